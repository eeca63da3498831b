"""The main job in two processes of every engine has the results of one process.

These tests are slow, because test_invariance.py tests every engine and test_command.py the job in two processes.
"""

import json
from pathlib import Path

import pytest
import yaml

from tests.data.words import CHAT, byte_tokenizer
from tests.pipeline.micro import micro_settings
from tests.pipeline.test_encoder_decoder import T5
from tests.processes import run_python
from tests.tiny import tiny_model

from .launch import ENGINES, PROCESSES, ROOT, launch


pytestmark = pytest.mark.slow

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
COMPARED = ("recall@5", "ndcg@5", "coverage@5", "total_variation")


def recipe(folder, processes: int, options: dict, **changes) -> list[str]:
    """Write a recipe whose steps do not depend on the number of processes, and return the command that runs it."""
    settings = micro_settings(folder / "out", **changes)
    settings["rewards"] = [
        {"type": "ground_truth", "weight": 0.3}, {"type": "collaborative", "weight": 0.5},
        {"type": "likelihood", "weight": 0.2},
    ]  # fmt: skip
    settings["sampler"] = {"ground_truth": 1, "on_policy": 2}
    settings["gflownet"]["loss_type"] = ["sft", "trajectory_balance"]
    settings["gflownet"]["ref_weight"] = 0.5  # reference: the model before training, or the model without its adapters
    settings["gflownet"]["per_device_train_batch_size"] = 32 // processes
    settings["sft"]["per_device_train_batch_size"] = 8 // processes
    for stage in ("sft", "control", "gflownet"):
        # An incomplete last step would be filled with repeated rows, which one process does not do.
        settings[stage] |= {"optim": "sgd", "learning_rate": 0.5, "dataloader_drop_last": True, **options}
    folder.mkdir()
    (folder / "micro.yaml").write_text(yaml.safe_dump(settings))
    return ["-m", "tests.distributed.example", "--config", str(folder / "micro.yaml")]


def metrics(folder) -> dict[tuple[str, str], float]:
    results = json.loads((folder / "out" / "results.json").read_text())
    values = {(name, key): entry["metrics"][key] for name, entry in results["methods"].items() for key in COMPARED}
    calibration = results["calibration"]["methods"].items()
    return values | {(name, "to R / Z"): entry["test"]["total_variation"] for name, entry in calibration}


def in_one_process(folder, **changes) -> dict[tuple[str, str], float]:
    ran = run_python(recipe(folder, 1, {"use_cpu": True}, **changes), ROOT)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return metrics(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return in_one_process(tmp_path_factory.mktemp("example") / "one")


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_results_of_one_process(engine, alone, tmp_path):
    printed = launch(engine, tmp_path, recipe(tmp_path / engine, PROCESSES, ENGINES[engine][1]))
    assert metrics(tmp_path / engine) == pytest.approx(alone, rel=1e-4)
    assert printed.count("[gflownet] finished") == 1  # printed by the main process only
    assert alone["gflownet", "total_variation"] != pytest.approx(alone["sft", "total_variation"], rel=1e-3)


def test_a_sharded_encoder_decoder(tmp_path):
    """FSDP2 refuses embeddings that are shared between modules, so the trainer must handle them."""
    model = {**T5, "dropout_rate": 0.0}
    launch("fsdp2", tmp_path, recipe(tmp_path / "two", PROCESSES, ENGINES["fsdp2"][1], model=model))
    assert metrics(tmp_path / "two") == pytest.approx(in_one_process(tmp_path / "one", model=model), rel=1e-3)


@pytest.fixture(scope="module")
def adapted_alone(tmp_path_factory):
    return in_one_process(tmp_path_factory.mktemp("adapted") / "one", peft=LORA)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_sharded_adapters(engine, adapted_alone, tmp_path):
    """SFT, control and GFlowNet train adapters, which are merged before the next stage."""
    launch(engine, tmp_path, recipe(tmp_path / "two", PROCESSES, ENGINES[engine][1], peft=LORA))
    assert metrics(tmp_path / "two") == pytest.approx(adapted_alone, rel=1e-3)
    assert len(list((tmp_path / "two" / "out").glob("*/adapters/adapter_model.safetensors"))) == 3


def test_the_recipe_of_a_large_language_model(tmp_path):
    """gflowgr_office_qwen.yaml with ZeRO-3, on a small Qwen and the shop."""
    tokenizer = byte_tokenizer(CHAT)
    tokenizer.save_pretrained(tmp_path / "qwen")
    model = tiny_model(len(tokenizer), "qwen3")
    model.config.max_position_embeddings = 1024
    model.save_pretrained(tmp_path / "qwen")
    small = {
        "output_dir": tmp_path / "out", "model.model_name_or_path": tmp_path / "qwen", "teacher": {"type": "ease"},
        "data.shop": micro_settings(tmp_path)["data"]["shop"], "data.max_history_items": 3,
        "evaluation.num_beams": 10, "evaluation.ks": [5, 10], "prompt.max_title_words": 2,
    }  # fmt: skip
    small["control.ddp_backend"] = "gloo"
    for stage in ("sft", "gflownet"):
        small |= {f"{stage}.max_steps": 2, f"{stage}.ddp_backend": "gloo", f"{stage}.per_device_train_batch_size": 2}
    options = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    recipe = str(ROOT / "recipes" / "gflowgr_office_qwen.yaml")
    launch("zero3", tmp_path, ["-m", "tests.distributed.example", "--config", recipe, *options])
    results = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]
    assert {"sft", "control", "gflownet"} <= results.keys()
    assert all(Path(results[name]["model"], "chat_template.jinja").is_file() for name in ("sft", "gflownet"))
