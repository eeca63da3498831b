"""Train, save the model, and save a model with other weights, in one process group: `saved.py ENGINE FOLDER`."""

import json
import os
import sys
from pathlib import Path
from typing import Any


if os.environ.get("GFLOWTRL_FSDP_ON_CPU"):
    import tests.distributed.fsdp_on_cpu  # noqa: F401

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from gflowtrl.recommender import Recommender
from gflowtrl.trainer import saved

from .cases import Case, build, model_of
from .launch import ENGINES, PROCESSES


#: Case, and the largest number of parameters for which a saved model is loaded again and compared.
CASES = [
    (Case("vargrad"), saved.LARGEST), (Case("vargrad"), 0), (Case("vargrad", adapters=True), saved.LARGEST),
    (Case("vargrad", "qwen3", adapters=True), 0), (Case("sft", "t5"), saved.LARGEST),
]  # fmt: skip


def damage(folder: Path) -> None:
    for file in folder.glob("*model.safetensors"):
        content = load_file(file)
        save_file(
            {name: value + 3 * torch.randn_like(value) for name, value in content.items()}, file, {"format": "pt"}
        )


def save_both(case: Case, largest: int, folder: Path, **options: Any) -> dict[str, Any]:
    """Return the error of the two saves in this process, and how often it has loaded a folder."""
    if case.adapters and PartialState().is_main_process:
        model_of(case).save_pretrained(folder / "base")
    PartialState().wait_for_everyone()
    trainer, _ = build(case, folder, PROCESSES, **{"max_steps": 2, **options})
    if case.adapters:
        trainer.model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    trainer.train()
    saved.LARGEST, loads = largest, []
    load = Recommender.from_pretrained.__func__
    Recommender.from_pretrained = classmethod(lambda *args, **kwargs: (loads.append(1), load(*args, **kwargs))[1])
    try:
        trainer.save_model(str(folder / "model"))
        write = trainer._save

        def write_another(output_dir=None, state_dict=None):
            write(output_dir, state_dict)
            if trainer.is_world_process_zero():
                damage(Path(output_dir))

        trainer._save = write_another
        trainer.save_model(str(folder / "model"))
        error = None
    except ValueError as exception:
        error = str(exception)
    finally:
        Recommender.from_pretrained = classmethod(load)
    return {"error": error, "loads": len(loads)}


if __name__ == "__main__":
    engine, folder = sys.argv[1], Path(sys.argv[2])
    for number, (case, largest) in enumerate(CASES):
        record = save_both(case, largest, folder / str(number), **{"use_cpu": False, **ENGINES[engine][1]})
        Path(folder, f"{number}-{PartialState().process_index}.json").write_text(json.dumps(record))
    # A thread of gloo that still holds tensors of the last gather would abort the interpreter at exit.
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
