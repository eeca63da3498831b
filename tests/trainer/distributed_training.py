"""Three steps of training, run by test_distributed.py in one process and by `accelerate launch` in two."""

import json
import sys
from pathlib import Path

from accelerate import PartialState

from gflowtrl.rewards import CollaborativeReward, GroundTruthReward

from .world import losses, make_rows, make_trainer, teacher, weights


STEPS = 3


def run(folder: Path, batch_size: int) -> dict:
    """Train on `STEPS` global batches of 8 prompts and return the results."""

    def seen(items, log_metric, trainer_state, **_):
        if trainer_state.global_step == 1 and PartialState().is_main_process:
            log_metric("late", 1.0)  # a metric that some steps and some processes do not report
        return [0.1] * len(items)

    trainer = make_trainer(
        folder, [GroundTruthReward(), CollaborativeReward(teacher), seen], loss_type="sft,trajectory_balance",
        per_device_train_batch_size=batch_size, max_steps=STEPS, optim="sgd", max_grad_norm=0.1,
        eval_dataset=make_rows(7, 1, 500), per_device_eval_batch_size=2,
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(folder / "model"))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "losses": losses(trainer),
        "rewards": [log["reward"] for log in logs],
        "late": [log.get("rewards/late") for log in logs],
        "log_z": [log["log_z"] for log in logs],
        "weight": {name: value.double().sum().item() for name, value in weights(trainer).items()},
        "evaluation": {name: metrics[f"eval_{name}"] for name in ("ndcg@10", "recall@5", "coverage@10")},
        "processes": trainer.accelerator.num_processes,
        "distributed": str(trainer.accelerator.distributed_type),
        "wrapper": type(trainer.model_wrapped).__name__,
        "rank": trainer.accelerator.process_index,
    }


if __name__ == "__main__":
    target = Path(sys.argv[1])
    result = run(target, batch_size=4)
    (target / f"rank-{result['rank']}.json").write_text(json.dumps(result))
