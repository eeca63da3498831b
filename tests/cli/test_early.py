"""Mistakes that `gflowtrl train` reports before torch is imported."""

import subprocess
import sys
from dataclasses import fields

import pytest
import yaml
from transformers import Seq2SeqTrainingArguments
from trl import SFTConfig

from gflowtrl import GFlowNetConfig
from gflowtrl.cli.early import CLASSES, check_early, declared_fields
from gflowtrl.configuration import known_files, recipe_folder
from gflowtrl.data import PromptFormat
from gflowtrl.pipeline import Recipe
from gflowtrl.pipeline.sections import DataSection, EvaluationSection, StoppingSection
from gflowtrl.semantic_ids import SemanticIdOptions


REAL = {
    "": [Recipe],
    "data": [DataSection],
    "data.semantic_ids": [SemanticIdOptions],
    "evaluation": [EvaluationSection],
    "prompt": [PromptFormat],
    "sft": [SFTConfig, Seq2SeqTrainingArguments, StoppingSection],
    "gflownet": [GFlowNetConfig, StoppingSection],
    "control": [GFlowNetConfig, StoppingSection],
}


@pytest.mark.parametrize("section", CLASSES)
def test_names_read_from_source_are_those_of_the_classes(section):
    real = {entry.name for kind in REAL[section] for entry in fields(kind) if entry.init}
    assert declared_fields(CLASSES[section]) == real


def test_a_class_that_has_moved_gives_no_names_and_checks_nothing(tmp_path, monkeypatch):
    assert declared_fields(("gflowtrl:pipeline/absent.py:Recipe",)) == set()
    assert declared_fields(("gflowtrl:pipeline/recipe.py:Absent",)) == set()
    assert declared_fields(("no_such_package:a.py:A",)) == set()
    monkeypatch.setitem(CLASSES, "sft", ("trl:absent.py:SFTConfig",))
    file = tmp_path / "r.yaml"
    file.write_text("sft: {learning_rat: 1}")
    check_early(file, [])


@pytest.mark.parametrize("name", known_files(recipe_folder()))
def test_recipes_of_the_library_pass(name):
    options = ["--learning_rate", "1", "--sft.learning_rate", "1", "--data.semantic_ids.quantizer", "kmeans"]
    check_early(known_files(recipe_folder())[name], options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sft.learning_rat", "1"], "There is no field 'sft.learning_rat'. Did you mean 'sft.learning_rate'?"),
        (["--learning_rat", "1"], "There is no field 'learning_rat'. Did you mean 'learning_rate'?"),
        (["--data.k_cor", "1"], "Did you mean 'data.k_core'?"),
        (["--data.semantic_ids.quantizr", "kmeans"], "Did you mean 'data.semantic_ids.quantizer'?"),
        (["--gflownet.num_generation", "1"], "Did you mean 'gflownet.num_generations'?"),
        (["--data_dir", "absent"], "There is no folder absent."),
        (["--config", "absent"], "There is no recipe absent"),
        (["--num_processes", "0"], "--num_processes is 0"),
        (["--accelerate_config", "zero9"], "There is no accelerate configuration zero9"),
    ],
)
def test_a_mistake_is_one_line_and_needs_no_torch(options, message):
    code = (
        "import sys; from gflowtrl.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(9 if {'torch', 'transformers', 'trl'} & sys.modules.keys() else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, "train", *options], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {message}"[:7]) and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_base_of_a_recipe_is_checked_too(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"sft": {"num_train_epoch": 1}}))
    (tmp_path / "r.yaml").write_text("base: base.yaml")
    with pytest.raises(ValueError, match="Did you mean 'sft.num_train_epochs'"):
        check_early(tmp_path / "r.yaml", [])


@pytest.mark.parametrize("name", [".", "Toys", "link"])
def test_a_data_folder_is_also_a_link_or_the_beginning_of_a_triple(name, tmp_path):
    (tmp_path / "Toys.inter.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path)
    check_early(known_files(recipe_folder())["quickstart"], ["--data_dir", str(tmp_path / name)])
