"""Record how two processes react to a NaN in one of them: `finite_worker.py ENGINE FOLDER`, run by test_finite.py."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch


if os.environ.get("GFLOWTRL_FSDP_ON_CPU"):
    import tests.distributed.fsdp_on_cpu  # noqa: F401

from accelerate import PartialState

from gflowtrl.finite import NonFiniteError, local_shard
from gflowtrl.rewards import GroundTruthReward
from gflowtrl.trainer.finite_steps import is_split
from tests.trainer.world import make_rows, make_trainer

from .launch import ENGINES


def error_of(work: Any) -> str:
    try:
        work()
    except NonFiniteError as error:
        return str(error)
    return ""


def run(engine: str, folder: Path) -> dict[str, Any]:
    second = os.environ["RANK"] == "1"
    options = {"use_cpu": False, "loss_type": "sft", "max_steps": 4, **ENGINES[engine][1]}
    record: dict[str, Any] = {"processes": 0}

    def make(name: str, **more: Any):
        options.update(per_device_train_batch_size=4, per_device_eval_batch_size=2, eval_dataset=make_rows(7, 1, 500))
        return make_trainer(folder / name, [GroundTruthReward()], **(options | more))

    trainer = make("loss", logging_strategy="no", save_strategy="steps", save_steps=2)
    loss_of = trainer.compute_loss

    def loss_with_nan(*args: Any, **kwargs: Any):
        loss = loss_of(*args, **kwargs)
        return loss * math.nan if second and trainer.state.global_step == 2 else loss

    trainer.compute_loss = loss_with_nan
    record["loss"] = error_of(trainer.train)
    record["checkpoints"] = sorted(path.name for path in (folder / "loss").glob("checkpoint-*"))

    trainer = make("weights")
    trainer.train()
    beam = trainer.prediction_step

    def step_with_bad_ranking(*args: Any, **kwargs: Any):
        result = beam(*args, **kwargs)
        trainer._bad_rankings |= torch.tensor(second)
        return result

    trainer.prediction_step = step_with_bad_ranking
    record["evaluation"] = error_of(trainer.evaluate)

    record |= {"processes": trainer.args.world_size, "split": is_split(trainer.model)}
    if second or not record["split"]:  # in a sharded model only in the shard of one process
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                local_shard(parameter).view(-1)[:1] = math.nan
    record["save"] = error_of(lambda: trainer.save_model(str(folder / "saved")))
    return record


if __name__ == "__main__":
    target = Path(sys.argv[2])
    record = run(sys.argv[1], target)
    (target / f"rank-{PartialState().process_index}.json").write_text(json.dumps(record))
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
