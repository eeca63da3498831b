"""Mistakes in input: one line that names the file, whatever is wrong with it; silence on a closed pipe."""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gflowtrl import Recommender
from gflowtrl.checks import MOST_CHARACTERS, one_line, short_repr
from gflowtrl.cli import main, print_any_character
from gflowtrl.cli.common import guarded
from gflowtrl.configuration import check_names, read_yaml
from gflowtrl.files import damage_of, read_json, read_object, read_tensors, reading, text_lines
from gflowtrl.pipeline.comparison import find_results
from gflowtrl.semantic_ids import ItemTokenizer, load_vectors
from gflowtrl.teachers import Popularity, load_teacher
from tests.tiny import tiny_model
from tests.trainer.world import ITEMS, TOKENIZER, make_catalog


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    titles = dict.fromkeys(ITEMS, "商品 ±")
    counts = torch.arange(len(ITEMS))
    Recommender(
        tiny_model(len(TOKENIZER)), TOKENIZER, make_catalog(), item_counts=counts, titles=titles
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RecursionError("x"), "it is nested too deeply"),
        (MemoryError(), "it needs more memory than this machine has"),
        (EOFError(), "it ends too early"),
        (KeyError("class"), "'class' is missing"),
        (OverflowError("int too large"), "int too large"),
        (pickle.UnpicklingError("bad\nmagic"), "bad magic"),
        (Exception("while processing"), "while processing"),
        (TypeError("unhashable type: 'list'"), "unhashable type: 'list'"),
    ],
)
def test_every_error_of_reading_names_the_file(error, reason):
    with pytest.raises(ValueError) as caught, reading("some.json", "a list"):
        raise error
    assert str(caught.value) == f"some.json cannot be read as a list ({reason}). Repair or replace the file."


def test_an_error_that_names_the_file_is_not_told_twice():
    with pytest.raises(ValueError) as caught, reading("outer.json", "a list"), reading("outer.json", "JSON"):
        raise EOFError
    assert str(caught.value).count("outer.json") == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_named_with_the_remedy(encoding, tmp_path, capsys):
    file = tmp_path / "in.jsonl"
    file.write_text('{"history": [1]}\n', encoding=encoding)
    for read in (read_json, read_yaml, lambda path: list(text_lines(path))):
        with pytest.raises(ValueError, match=r"in\.jsonl .*\(it is in UTF-16; save it as UTF-8\)"):
            read(file)
    assert main(["recommend", "--model", "x", "--input", str(file)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "it is in UTF-16; save it as UTF-8" in printed
    words = ["--format", "csv", "--interactions", str(file), "--out", str(tmp_path / "out")]
    assert main(["prepare", *words]) == 2
    assert "--encoding utf-16" in capsys.readouterr().err


def test_the_line_in_another_encoding_is_named(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'["a"]\n["b"]\n["\xe9"]\n')
    with pytest.raises(ValueError, match=r"line 3 is not UTF-8; save it as UTF-8"):
        list(text_lines(file))
    (tmp_path / "x.json").write_bytes(b'"\xe9"')
    assert damage_of(tmp_path / "x.json") == "is not valid JSON (line 1 is not UTF-8; save it as UTF-8)"


def test_a_byte_order_mark_is_left_out(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_object(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"b\.json must contain a JSON object, not \[1\]"):
        read_object(tmp_path / "b.json")


@pytest.mark.parametrize("text", ["a\r\nb\tc", "a\x00\x1b[31mb\x85", "x" * 100_000, "word " * 100_000, "\u2028"])
def test_a_printed_error_is_one_short_line(text, capsys):
    def work():
        raise ValueError(f"The start {text} the end")

    assert guarded(work) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: The start ") and printed.endswith(" the end\n")
    assert len(printed) < MOST_CHARACTERS + 10 and printed[:-1].isprintable()


def test_long_values_keep_their_beginning_and_end():
    assert one_line("x" * 500 + "y") == "x" * 157 + " ... " + "x" * 77 + "y"
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    assert short_repr(deep) == "a list that cannot be shown"
    assert short_repr(10**5000) == "a int that cannot be shown" and short_repr("a\nb") == r"'a\nb'"


def test_mistakes_of_the_program_keep_their_traceback():
    with pytest.raises(AttributeError):
        guarded(lambda: None.missing)
    with pytest.raises(KeyError):
        guarded(lambda: {}["missing"])


def break_file(file: Path, edit) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("teacher.json", lambda c: c.pop("class")),
        ("teacher.json", lambda c: c.update({"class": ["a"]})),
        ("teacher.json", lambda c: c.update(config={"strange": 1})),
        ("teacher.json", lambda c: c.pop("items")),
        ("teacher.safetensors", None),
    ],
)
def test_a_damaged_teacher_is_named(name, edit, tmp_path):
    Popularity.fit([["a", "b"], ["b"]], ["a", "b"]).save_pretrained(tmp_path)
    if edit is None:
        save_file({"strange": torch.ones(2)}, tmp_path / name)
    else:
        break_file(tmp_path / name, edit)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as the (description|tensors) of "):
        load_teacher(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c.pop("quantizer"),
        lambda c: c["quantizer"].update({"class": {}}),
        lambda c: c.update(items=c["items"][1:]),
        lambda c: c.update(items=[[1], *c["items"][1:]]),
        lambda c: c.update(collisions=3),
    ],
)
def test_a_damaged_item_tokenizer_is_named(edit, tmp_path):
    tokenizer = ItemTokenizer().fit(torch.randn(300, 4, generator=torch.Generator().manual_seed(0)), list(range(300)))
    tokenizer.save_pretrained(tmp_path)
    assert ItemTokenizer.from_pretrained(tmp_path).semantic_ids == tokenizer.semantic_ids
    break_file(tmp_path / "item_tokenizer.json", edit)
    with pytest.raises(ValueError, match=r"item_tokenizer\.json cannot be read as the description"):
        ItemTokenizer.from_pretrained(tmp_path)


def test_damaged_files_of_a_model_are_named(model, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        for file in model.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / name).write_bytes(b"\xff{")
        with pytest.raises(ValueError, match=rf"/{name} is not valid JSON"):
            Recommender.from_pretrained(folder)


def test_damaged_tensors_and_results_are_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match=r"x\.safetensors cannot be read as a \.safetensors file"):
        read_tensors(tmp_path / "x.safetensors")
    np.save(tmp_path / "complex.npy", np.ones((2, 2), np.complex64))
    with pytest.raises(ValueError, match=r"complex\.npy: The item vectors are complex"):
        load_vectors(tmp_path / "complex.npy", [1, 2])
    for content in ({"methods": 1}, {"methods": {"sft": {}}}, {"methods": {"sft": {"folder": 3}}}):
        (tmp_path / "results.json").write_text(json.dumps({"recipe": {}, "data": {}, **content}))
        with pytest.raises(ValueError, match=r"results\.json cannot be read as the results\.json of a run"):
            find_results([tmp_path])


def test_a_recipe_is_given_by_config(capsys):
    for words in (["recipes/x.yaml"], ["quickstart"], ["--recipe", "x"]):
        assert main(["train", *words]) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1 and f"A recipe is given by --config: write --config {words[-1]}." in printed


def test_an_unknown_field_lists_the_closest_of_many_names():
    known = [f"number_{number}" for number in range(200)] + ["learning_rate"]
    with pytest.raises(ValueError, match=r"Did you mean 's\.learning_rate'\?$"):
        check_names(["learning_rat"], known, "s")
    with pytest.raises(ValueError, match=r"The closest of 201 names: learning_rate") as caught:
        check_names(["rate"], known, "s")
    assert len(str(caught.value)) < 300
    with pytest.raises(ValueError, match="There are 201 names, among them learning_rate"):
        check_names(["@"], known)
    with pytest.raises(ValueError, match=r"Choose from abc, def\."):
        check_names(["@" * 100_000], ["abc", "def"])


def test_a_stream_prints_any_character():
    stream = io.TextIOWrapper(io.BytesIO(), "cp1252", errors="strict")
    print_any_character(stream)
    stream.write("± 商品")
    stream.flush()
    assert stream.buffer.getvalue() == b"\xb1 ??"


def run_command(words: list[str], **variables: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "gflowtrl", *words]
    return subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_console_without_chinese_gets_json_in_ascii(model, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps([ITEMS[0]]))
    words = ["recommend", "--model", str(model), "--input", str(tmp_path / "in.jsonl"), "-k", "2"]
    out, err = run_command(words, PYTHONIOENCODING="cp1252", PYTHONUTF8="0").communicate()
    assert b"\\u5546" in out and json.loads(out)["recommendations"][0]["title"] == "商品 ±", err


def test_a_pipe_that_is_closed_is_silence(model, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n".join([json.dumps([ITEMS[0]])] * 1500))
    words = ["recommend", "--model", str(model), "--input", str(tmp_path / "in.jsonl"), "-k", "2"]
    job = run_command(words)
    job.stdout.close()
    printed = job.stderr.read().decode()
    assert job.wait() == 1 and "rror" not in printed and "Traceback" not in printed, printed
