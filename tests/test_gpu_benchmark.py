"""A small run of benchmarks/gpu.py on the CPU: its measurements, its counts of FLOPs, and its time budget."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import gpu
from benchmarks.gpu_parts import synchronizations
from benchmarks.gpu_parts.flops import FlopFormula, Work
from benchmarks.gpu_parts.settings import RunSettings
from gflowtrl.policy import TreePolicy


SMALL = RunSettings(torch.device("cpu"), small=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpu.py", "--out", str(out), "--device", "cpu", "--small"])
        patch.setattr(gpu, "START", time.monotonic())
        assert gpu.main() == 0
    text = out.read_text()
    assert str(out.parent) not in text  # no path of this machine
    return json.loads(text)


def rows(report: dict, part: str, name: str) -> dict[str, dict]:
    return {row[name]: row for row in report["parts"][part]["rows"]}


def test_every_part_has_finite_and_positive_results(report):
    assert list(report["parts"]) == list(gpu.PARTS)
    for name, part in report["parts"].items():
        assert part["status"] == ("needs CUDA" if name == "synchronizations" else "complete")
        assert bool(part["rows"]) == (name != "synchronizations")
        for row in part["rows"]:
            numbers = {key: value for key, value in row.items() if not isinstance(value, str)}
            assert len(numbers) >= 5
            assert all(math.isfinite(value) and value > 0 for value in numbers.values()), row
    assert report["matmul_flops"] > 0 and report["versions"]["torch"] == torch.__version__


def test_bf16_changes_the_distribution_and_float64_does_not(report):
    for size in ("0.2M", "1.2M"):
        results = {row["precision"]: row for row in report["parts"]["exactness"]["rows"] if row["size"] == size}
        assert results["float64"]["largest_total_variation"] < 1e-5
        for precision in ("bf16 autocast", "bf16 weights"):
            assert 1e-4 < results[precision]["total_variation"] < 0.1
    for row in report["parts"]["total_variation"]["rows"]:
        assert row["trained"] < row["untrained"]


def test_tokens_per_step_are_those_of_its_rows(report):
    """Four prompts of 1 to 4 items of three tokens, either in one whole row per user or in separate rows."""
    sides = rows(report, "training_office", "side")
    # BOS and the tokens of five items except the last token: the targets' ids are part of the row.
    assert sides["sft, whole rows"]["tokens_per_step"] == 1 + 5 * 3 - 1
    longest = 1 + 4 * 3
    assert 4 * longest < sides["sft, separate rows"]["tokens_per_step"] <= 4 * (longest + 2)
    for loss in ("sft", "exact_flow", "vargrad"):
        whole, separate = sides[f"{loss}, whole rows"], sides[f"{loss}, separate rows"]
        assert whole["tokens_per_step"] < separate["tokens_per_step"]
        assert whole["flops_per_step"] < separate["flops_per_step"] < sides["GRPOTrainer"]["flops_per_step"]
    for side in sides.values():
        assert side["tokens_read_per_step"] >= side["tokens_per_step"]
        floor = side["flops_per_step"] / report["matmul_flops"]
        assert side["floor_seconds"] == pytest.approx(floor)
        assert side["model_flops_utilization"] == pytest.approx(floor / side["seconds_per_step"])
    for row in report["parts"]["lora"]["rows"]:
        prompt, branches = row["prompt_tokens"], 3 * row["num_generations"]
        assert row["prompts"] * prompt < row["tokens_per_step"] <= row["prompts"] * (prompt + branches)
        assert row["trained_parameters"] < row["parameters"]


# -------------------------------------------------------------------------------------------------------------- FLOPs
def dense_model(frozen: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.requires_grad_(not frozen)
    return model


@pytest.mark.parametrize(("frozen", "per_weight"), [(False, 6), (True, 4)])
def test_flops_agree_with_a_count_by_hand_and_with_torch(frozen, per_weight):
    model, ids = dense_model(frozen), torch.randint(11, (3, 5))
    work = Work(model)
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    weights = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)  # queries and output, keys and values, the MLP
    by_hand = per_weight * weights * 15 + 12 * (2 * 2 * 8) * (3 * 5 * 5) + 6 * 16 * (15 * 11)
    assert work.flops == by_hand
    assert work.flops == pytest.approx(counted.get_total_flops(), rel=1e-3)  # torch also counts the rotary angles
    assert work.tokens == 15 and work.tokens_without_gradient == 0

    work.reset()
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(input_ids=ids, use_cache=False)
    assert work.flops == pytest.approx(counted.get_total_flops(), rel=1e-3)
    assert work.tokens == 0 and work.tokens_without_gradient == 15


def test_attention_to_a_cache_is_counted():
    formula = FlopFormula.of(dense_model(False))
    assert formula.layers(2, 2 * 30, False) - formula.layers(2, 2 * 10, False) == 4 * 32 * 40
    model, ids = dense_model(False), torch.randint(11, (1, 5))
    work = Work(model)
    with torch.no_grad():
        past = model(input_ids=ids, use_cache=True).past_key_values
        work.reset()
        model(input_ids=ids[:, :1], past_key_values=past, attention_mask=torch.ones(1, 6, dtype=torch.long))
    assert work.flops == FlopFormula.of(model).layers(1, 6, False) + FlopFormula.of(model).head(11, False)


# --------------------------------------------------------------------------------------------------- synchronizations
def test_synchronizations_of_one_step_are_counted_by_their_source(monkeypatch):
    """The test issues torch's warning once per level of every draw."""

    def inverse_cdf(*args):
        warnings.warn(synchronizations.MESSAGE, stacklevel=1)
        return original(*args)

    module = sys.modules[TreePolicy.__module__]
    original = module.inverse_cdf
    monkeypatch.setattr(module, "inverse_cdf", inverse_cdf)
    results = {row["work"]: row for row in (measure() for measure in synchronizations.count_all(SMALL))}
    for work, count in {
        "policy.sample, K 16": 3, "policy.beam_search, width 20": 0, "training step, vargrad, whole rows": 3,
        "training step, exact_flow, whole rows": 0, "training step, sft, whole rows": 0,
    }.items():  # fmt: skip
        assert results[work]["synchronizations"] == count, work
        for site in results[work]["sites"]:
            assert site["line"].startswith(f"{__name__}:") and site["gflowtrl"].startswith(f"{module.__name__}:")
            assert site["count"] == 3


def test_other_warnings_are_shown():
    with warnings.catch_warnings(record=True) as others, synchronizations.synchronizations() as counted:
        warnings.warn("something else", stacklevel=1)
    assert not counted and [str(warning.message) for warning in others] == ["something else"]


# ------------------------------------------------------------------------------------------------------------- budget
def run(out, part: gpu.Part, seconds: float) -> dict:
    gpu.Run(RunSettings(SMALL.device), out, time.monotonic() + seconds, {"parts": {}}).part("part", part)
    return json.loads(out.read_text())["parts"]["part"]


def test_a_part_that_no_longer_fits_is_left_out(tmp_path):
    part = run(tmp_path / "gpu.json", gpu.Part(60, lambda _: pytest.fail("it was started")), seconds=30)
    assert part["status"] in ("left out: 30 seconds left", "left out: 29 seconds left") and part["rows"] == []


def test_a_part_that_takes_too_long_is_stopped_and_keeps_its_rows(tmp_path):
    out = tmp_path / "gpu.json"

    def too_long() -> dict:
        assert json.loads(out.read_text())["parts"]["part"]["rows"] == [{"figure": 1}]  # already saved
        time.sleep(20)
        return {"figure": 2}

    part = run(out, gpu.Part(0.2, lambda _: iter([lambda: {"figure": 1}, too_long])), seconds=60)
    assert part["status"].startswith("stopped") and part["rows"] == [{"figure": 1}] and part["seconds"] < 5


def test_a_failing_row_does_not_affect_other_rows(tmp_path):
    part = run(tmp_path / "gpu.json", gpu.Part(5, lambda _: iter([lambda: 1 / 0, lambda: {"figure": 2}])), seconds=60)
    assert part["status"] == "failed: 1 of 2 rows"
    assert part["rows"] == [{"failed": "failed: ZeroDivisionError: division by zero"}, {"figure": 2}]
