"""The final folder is loaded and compared: a difference is an error, and the files are kept."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from gflowtrl import Recommender
from gflowtrl.rewards import GroundTruthReward
from gflowtrl.trainer import saved
from tests.tiny import tiny_model, tiny_seq2seq

from .test_adapters import lora
from .world import TOKENIZER, make_trainer


def trainer_of(folder, model=None, **options):
    return make_trainer(folder, [GroundTruthReward()], model, **{"max_steps": 2, **options})


def damage(trainer, monkeypatch, table: str, by: float = 1.0) -> None:
    """Make the next save write a tensor that differs from the model's."""
    write = trainer._save

    def write_and_change(output_dir=None, state_dict=None):
        write(output_dir, state_dict)
        for file in Path(output_dir or trainer.args.output_dir).glob("*model.safetensors"):
            content = load_file(file)
            changed = {
                name: value + by * torch.randn_like(value) if table in name else value
                for name, value in content.items()
            }
            save_file(changed, file, metadata={"format": "pt"})

    monkeypatch.setattr(trainer, "_save", write_and_change)


@pytest.fixture
def loads(monkeypatch) -> list[Path]:
    """The folders that were loaded for the comparison."""
    found, load = [], Recommender.from_pretrained.__func__
    monkeypatch.setattr(
        Recommender,
        "from_pretrained",
        classmethod(lambda cls, folder, **options: (found.append(Path(folder)), load(cls, folder, **options))[1]),
    )
    return found


@pytest.mark.parametrize("kind", ["llama", "t5", "bart"])
def test_the_final_folder_is_loaded_once_and_no_checkpoint_is(tmp_path, loads, kind):
    model = tiny_model(len(TOKENIZER)) if kind == "llama" else tiny_seq2seq(len(TOKENIZER), kind)
    trainer = trainer_of(tmp_path, model, save_strategy="steps", save_steps=1, save_only_model=True)
    trainer.train()
    assert (tmp_path / "checkpoint-2").is_dir() and not loads
    trainer.save_model()
    trainer.save_model(str(tmp_path / "final"))
    assert loads == [tmp_path, tmp_path / "final"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_a_difference(tmp_path, loads, dtype):
    trainer = trainer_of(tmp_path, tiny_model(len(TOKENIZER)).to(dtype))
    trainer.save_model()
    mixed = trainer_of(tmp_path, tiny_model(len(TOKENIZER)), bf16=True)
    mixed.train()
    mixed.save_model()
    assert len(loads) == 2


@pytest.mark.parametrize("largest", [saved.LARGEST, 0])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_difference_is_an_error_and_the_files_are_kept(tmp_path, monkeypatch, largest, adapters):
    monkeypatch.setattr(saved, "LARGEST", largest)
    tiny_model(len(TOKENIZER)).save_pretrained(tmp_path / "base")
    options = {"peft_config": lora()} if adapters else {}
    trainer = trainer_of(tmp_path / "out", str(tmp_path / "base"), **options)
    trainer.train()
    trainer.save_model()
    damage(trainer, monkeypatch, "q_proj", 5.0)
    with pytest.raises(ValueError, match=f"{tmp_path}/out.* does not contain the trained.*reason.*are kept"):
        trainer.save_model()
    name = "adapter_model.safetensors" if adapters else "model.safetensors"
    assert (tmp_path / "out" / name).is_file() and (tmp_path / "out" / "catalog.json").is_file()


def test_the_size_of_the_difference(tmp_path, monkeypatch):
    """Compared with the largest total variation over the states of all paths, which are all compared here."""
    trainer = trainer_of(tmp_path)
    expected = saved._scores(trainer, trainer.model, trainer._catalog, trainer._encoder)
    damage(trainer, monkeypatch, "embed_tokens")
    with pytest.raises(ValueError, match="after the longest prompts") as error:
        trainer.save_model()
    loaded = Recommender.from_pretrained(tmp_path)
    found = saved._scores(trainer, loaded.model, loaded.catalog, loaded.encoder)
    variation = max(
        0.5 * float((one - other).abs().sum())
        for one, other in zip(expected.flatten(0, 2), found.flatten(0, 2), strict=True)
    )
    assert f"total variation of {variation:.3f}, and rounding explains 0.002" in str(error.value)


def test_a_base_that_was_changed_in_memory_is_named(tmp_path):
    base = tiny_model(len(TOKENIZER))
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight)
    trainer = trainer_of(tmp_path / "out", model, peft_config=lora())
    trainer.train()
    with pytest.raises(ValueError, match="base model was changed in memory after it was loaded from '.*base'"):
        trainer.save_model()


def test_a_folder_that_cannot_be_loaded_is_an_error(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    write = trainer._save
    monkeypatch.setattr(trainer, "_save", lambda *args: (write(*args), (tmp_path / "catalog.json").unlink()))
    with pytest.raises(ValueError, match="was saved, but it cannot be loaded: .*catalog.json is missing"):
        trainer.save_model()


def test_folders_that_cannot_be_compared_give_a_warning(tmp_path, caplog, monkeypatch):
    made = trainer_of(tmp_path / "made", peft_config=lora())
    empty = trainer_of(tmp_path / "empty")
    monkeypatch.setattr(empty, "_save", lambda *args: None)  # as with an engine that writes shards
    with caplog.at_level(logging.WARNING, "gflowtrl"):
        made.save_model()
        empty.save_model()
    first, second = [r.getMessage() for r in caplog.records if "was not compared" in r.getMessage()]
    assert "adapters of a model that was created in memory" in first and "its folder to the trainer" in first
    assert "contains no full weights" in second


def test_adapters_on_a_quantized_base_are_compared_tensor_by_tensor(tmp_path, monkeypatch, loads):
    pytest.importorskip("bitsandbytes")
    tiny_model(len(TOKENIZER)).save_pretrained(tmp_path / "base")
    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    trainer = trainer_of(
        tmp_path / "out", str(tmp_path / "base"), peft_config=lora(), max_steps=1, model_init_kwargs=options,
        processing_class=TOKENIZER,
    )  # fmt: skip
    trainer.save_model()
    damage(trainer, monkeypatch, "lora_A")
    with pytest.raises(ValueError, match="adapter_model.safetensors does not contain the trained model: .*lora_A"):
        trainer.save_model()
    assert not loads
