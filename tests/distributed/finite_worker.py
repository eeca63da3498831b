"""What a NaN in one of two processes does to both: `finite_worker.py ENGINE FOLDER`, run by test_finite.py."""

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


def caught(work: Any) -> str:
    try:
        work()
    except NonFiniteError as error:
        return str(error)
    return ""


def run(engine: str, folder: Path) -> dict[str, Any]:
    second = os.environ["RANK"] == "1"
    options = {"use_cpu": False, "loss_type": "sft", "max_steps": 4, **ENGINES[engine][1]}
    found: dict[str, Any] = {"processes": 0}

    def make(name: str, **more: Any):
        options.update(per_device_train_batch_size=4, per_device_eval_batch_size=2, eval_dataset=make_rows(7, 1, 500))
        return make_trainer(folder / name, [GroundTruthReward()], **(options | more))

    trainer = make("loss", logging_strategy="no", save_strategy="steps", save_steps=2)
    loss_of = trainer.compute_loss

    def spoiled_loss(*args: Any, **kwargs: Any):
        loss = loss_of(*args, **kwargs)
        return loss * math.nan if second and trainer.state.global_step == 2 else loss

    trainer.compute_loss = spoiled_loss
    found["loss"] = caught(trainer.train)
    found["checkpoints"] = sorted(path.name for path in (folder / "loss").glob("checkpoint-*"))

    trainer = make("weights")
    trainer.train()
    beam = trainer.prediction_step

    def spoiled_step(*args: Any, **kwargs: Any):
        result = beam(*args, **kwargs)
        trainer._bad_rankings |= torch.tensor(second)
        return result

    trainer.prediction_step = spoiled_step
    found["evaluation"] = caught(trainer.evaluate)

    found |= {"processes": trainer.args.world_size, "split": is_split(trainer.model)}
    if second or not found["split"]:  # of a model in parts, in the part of one process
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                local_shard(parameter).view(-1)[:1] = math.nan
    found["save"] = caught(lambda: trainer.save_model(str(folder / "saved")))
    return found


if __name__ == "__main__":
    target = Path(sys.argv[2])
    record = run(sys.argv[1], target)
    (target / f"rank-{PartialState().process_index}.json").write_text(json.dumps(record))
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
