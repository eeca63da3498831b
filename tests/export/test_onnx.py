"""ONNX Runtime recommends what the recommender does."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gflowtrl import Recommender
from gflowtrl.cli import main
from gflowtrl.export import export, onnx_files
from tests.export.shop import HISTORIES, assert_same_lists, make_recommender, make_windowed
from tests.tiny import tiny_seq2seq
from tests.trainer.world import ITEMS, TOKENIZER, make_catalog


pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    make_recommender().save_pretrained(folder / "model")
    export(folder / "model", "onnx", folder / "export")
    return folder


@pytest.fixture(scope="module")
def exported(model):
    from gflowtrl.export.standalone.onnx_recommender import OnnxRecommender

    return OnnxRecommender(model / "export", threads=1)


@pytest.fixture(scope="module")
def recommender(model) -> Recommender:
    return Recommender.from_pretrained(model / "model")


@pytest.mark.parametrize(("k", "num_beams"), [(len(ITEMS), None), (3, 3), (1, 1), (10, 50)])
def test_lists_equal_those_of_the_recommender(recommender, exported, k, num_beams):
    expected = recommender.recommend(HISTORIES, k, num_beams)
    assert_same_lists(expected, exported.recommend(HISTORIES, k, num_beams))
    alone = [exported.recommend([history], k, num_beams)[0] for history in HISTORIES]
    assert_same_lists(expected, alone)


@pytest.mark.parametrize("kind", ["gemma2", pytest.param("mistral", marks=pytest.mark.slow)])
def test_layers_with_a_window_see_the_same_tokens(kind, tmp_path):
    from gflowtrl.export.standalone.onnx_recommender import OnnxRecommender

    recommender = make_windowed(kind)
    onnx_files.write(recommender, tmp_path)
    histories = [[1, 2, 3], [4], list(range(20))]
    found = OnnxRecommender(tmp_path, threads=1).recommend(histories, k=20)
    assert_same_lists(recommender.recommend(histories, k=20), found)


def test_the_folder_works_without_gflowtrl(model, recommender):
    program = (
        "import runpy, sys; sys.modules['gflowtrl'] = sys.modules['torch'] = None; sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = model / "export" / "onnx_recommender.py"
    answer = subprocess.run(
        [sys.executable, "-c", program, script, "--k", "4"], input="\n".join(map(json.dumps, HISTORIES)),
        capture_output=True, text=True, check=True, cwd="/",
    ).stdout  # fmt: skip
    lists = [json.loads(line) for line in answer.splitlines()]
    for ours, theirs in zip(recommender.recommend(HISTORIES, 4), lists, strict=True):
        assert [one.probability for one in ours] == pytest.approx([one["probability"] for one in theirs], abs=1e-5)
    assert str(Path.cwd()).encode() not in (model / "export" / "model.onnx").read_bytes()


def test_a_history_without_known_items_is_refused(exported, recommender):
    with pytest.raises(ValueError, match=r"The history \['nonsense'\] has no item of the catalog. Leave it out."):
        exported.recommend([["i010"], ["nonsense"]])
    with pytest.warns(UserWarning, match="not in the catalog"):
        expected = recommender.recommend([["nonsense", "i010"]])
    assert_same_lists(expected, exported.recommend([["nonsense", "i010"]]))


def test_a_graph_that_computes_something_else_is_refused(monkeypatch, model, tmp_path):
    def copy(_, file):
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copyfile(model / "export" / name, file.with_name(name))

    monkeypatch.setattr(onnx_files, "_write_graph", copy)
    with pytest.raises(ValueError, match="LlamaForCausalLM and the recommender differ by .*so it is not exported"):
        onnx_files.write(make_recommender(temperature=1.4), tmp_path)


def test_a_model_that_torch_cannot_export_is_refused(monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise torch.onnx.OnnxExporterError("no\nsuch operator")

    make_recommender().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch.onnx, "export", fail)
    words = ["--model", str(tmp_path / "model"), "--to", "onnx", "--output", str(tmp_path / "out")]
    assert main(["export", *words]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert "torch cannot export a LlamaForCausalLM to ONNX (no such operator). Use a newer version" in printed
    assert not (tmp_path / "out").exists()


def test_encoder_decoders_are_refused(tmp_path):
    recommender = Recommender(tiny_seq2seq(len(TOKENIZER), "bart"), TOKENIZER, make_catalog(), max_history_items=5)
    with pytest.raises(ValueError, match="is an encoder-decoder, and the export to ONNX supports causal models only"):
        onnx_files.write(recommender, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("histories", "k", "message"), [
    ([["i010"]], 0, "k is 0; it must be at least 1"),
    (["i010"], 5, "'i010' is not a history; give a list of items"),
    ([17], 5, "17 is not a history; give a list of items"),
    ([[["i010"]]], 5, r"\['i010'\] is not an item; items are whole numbers or strings"),
    ([["i010", True]], 5, "True is not an item"),
    ([[1.0, "i010"]], 5, "1.0 is not an item"),
])  # fmt: skip
def test_wrong_arguments_are_named(exported, histories, k, message):
    with pytest.raises(ValueError, match=message):
        exported.recommend(histories, k)
    assert exported.recommend([]) == []


@pytest.mark.parametrize("num_beams", [4, 0, -1])
def test_there_are_at_least_k_beams(exported, num_beams):
    with pytest.raises(ValueError, match=f"num_beams is {num_beams}, less than k; it must be at least 5"):
        exported.recommend([["i010"]], 5, num_beams)


def test_histories_may_be_an_array(exported):
    """Or a column of pandas: they have no truth value."""
    assert exported.recommend(np.fromiter(HISTORIES, dtype=object), 5) == exported.recommend(HISTORIES, 5)


def test_a_wrong_line_is_named_and_earlier_ones_are_answered(model):
    script = model / "export" / "onnx_recommender.py"
    for wrong, message in (
        ("[]", "The history [] has no item"),
        ("17 4", "Extra data"),
        ('{"a": 1}', "not a history"),
        ("null", "not a history"),
        ('[["i010"]]', "['i010'] is not an item"),
        ("[" * 100_000, "recursion"),
    ):
        text = f'\n["i010", "nonsense"]\n{wrong}\n["i010"]\n'
        ran = subprocess.run([sys.executable, script], input=text, capture_output=True, text=True)
        assert ran.returncode == 2 and len(ran.stdout.splitlines()) == 1
        left_out, error = ran.stderr.splitlines()
        assert left_out == "line 2: left out, because the catalog does not have them: ['nonsense']"
        assert error.startswith("error: line 3: ") and message in error


def test_bytes_that_other_programs_write_are_read(model):
    """A byte order mark, bytes that are not UTF-8, and a reader that exits."""
    command = [sys.executable, model / "export" / "onnx_recommender.py"]
    ran = subprocess.run(command, input=b'\xef\xbb\xbf["i010"]\r\n["i010", "\xff"]\r\n', capture_output=True)
    assert ran.returncode == 0 and len(ran.stdout.splitlines()) == 2
    assert ran.stderr.startswith(b"line 2: left out") and len(ran.stderr.splitlines()) == 1
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        process.stdin.write(b'["i010"]\n' * 5)
        process.stdin.close()
        assert process.stderr.read() == b"" and process.wait() == 1
