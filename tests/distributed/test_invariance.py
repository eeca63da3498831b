"""The same global batch gives the same training run in one process and with DDP, ZeRO-1, -2, -3 and FSDP2.

With every engine, a resumed run repeats an uninterrupted one. One launch trains and resumes all cases of an engine in
one group of two processes. `cases.chosen` selects the cases; `pytest -m exhaustive` trains all combinations.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .cases import BACKBONES, LOSSES, RESUMED, RESUMED_TOO, STEPS, Case, chosen, dump, train
from .launch import ENGINES, PROCESSES, launch


EXPECTED_ENGINE = {
    "ddp": {"distributed_type": "MULTI_CPU", "wrapper": "DistributedDataParallel", "zero_stage": None},
    "zero1": {"distributed_type": "DEEPSPEED", "wrapper": "DeepSpeedEngine", "zero_stage": 1},
    "zero2": {"distributed_type": "DEEPSPEED", "wrapper": "DeepSpeedEngine", "zero_stage": 2},
    "zero3": {"distributed_type": "DEEPSPEED", "wrapper": "DeepSpeedEngine", "zero_stage": 3},
    "fsdp2": {"distributed_type": "FSDP", "zero_stage": None},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Function that returns the results of a plain case in one process, and the folder of its saved model."""

    @cache
    def run_plain(case: Case) -> tuple[dict, Path]:
        folder = tmp_path_factory.mktemp("alone")
        return train(case, folder), folder / "model"

    def run(case: Case) -> tuple[dict, Path]:
        return run_plain(case.plain)

    return run


def assert_same(case: Case, records: list[dict], model: Path, expected: dict, expected_model: Path) -> None:
    for record in records:
        assert len(record["losses"]) == STEPS
        assert record["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-5), case
        assert record["grad_norms"][0] == pytest.approx(expected["grad_norms"][0], rel=1e-5), case
        assert record["losses"] == pytest.approx(expected["losses"], rel=1e-4), case
        assert record["evaluation"] == pytest.approx(expected["evaluation"]), case
        assert record["prefix_weights"] == pytest.approx(expected["prefix_weights"], rel=1e-4), case
    drawn = [tuple(entry) for record in records for entry in record["drawn"]]
    assert sorted(drawn) == sorted(expected["drawn"]), case
    files = sorted(file.name for file in expected_model.glob("*.safetensors"))
    assert files == sorted(file.name for file in model.glob("*.safetensors")), case
    for name in files:
        saved, other = load_file(model / name), load_file(expected_model / name)
        assert saved.keys() == other.keys(), case
        for key, value in other.items():
            torch.testing.assert_close(saved[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, k=key: f"{k}: {text}")


VARIANTS = [{"accumulation": 2}, {"accumulation": 4}, {"checkpointing": True}]
#: One variant of every case, two cases of every variant; the others are slow tests.
CASES_AND_VARIANTS = [
    pytest.param(case, variant, id=f"{case}-{variant}", marks=[pytest.mark.slow] if (j - i) % len(VARIANTS) else [])
    for i, case in enumerate(chosen(5))
    for j, variant in enumerate(VARIANTS)
]


@pytest.mark.parametrize(("case", "variant"), CASES_AND_VARIANTS)
def test_in_one_process(case, variant, alone, tmp_path):
    record = train(replace(case.plain, **variant), tmp_path)
    assert record["engine"]["processes"] == 1
    assert_same(case, [record], tmp_path / "model", *alone(case))


def assert_same_as_alone(engine: str, folder: Path, cases: list[Case], alone) -> None:
    for case in cases:
        records = [json.loads((folder / f"train-{case}-{rank}.json").read_text()) for rank in range(PROCESSES)]
        for record in records:
            assert record["engine"].items() >= {"processes": PROCESSES, **EXPECTED_ENGINE[engine]}.items()
            assert engine != "fsdp2" or record["engine"]["wrapper"].startswith("FSDP")
        assert_same(case, records, folder / f"train-{case}" / "model", *alone(case))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Case]]]:
    """Function from an engine to the folder and the cases of its launch, which trains `chosen` and resumes `RESUMED`
    in one group of two processes."""

    @cache
    def run(engine: str) -> tuple[Path, list[Case]]:
        folder, cases = tmp_path_factory.mktemp(engine), cases_of(engine)[0]
        if engine == "ddp":
            # Its weights adapt to the prompts of the whole step, over all micro-batches and processes.
            cases.append(Case("sft,prefix_pairwise", accumulation=2))
        launch(engine, folder, ["-m", "tests.distributed.worker", engine, str(folder), dump(cases), dump(RESUMED)])
        return folder, cases

    return run


def cases_of(engine: str) -> tuple[list[Case], list[Case]]:
    """Return every other case of an engine, and the remaining ones for the slow tests. Each loss is in the first part
    of some engine."""
    number = list(ENGINES).index(engine)
    cases = chosen(number)
    return cases[number % 2 :: 2], cases[(number + 1) % 2 :: 2]


@pytest.mark.parametrize("engine", ENGINES)
def test_in_two_processes(engine, ran, alone):
    folder, cases = ran(engine)
    assert_same_as_alone(engine, folder, cases, alone)
    for case in cases:  # unchanged weights would be equal in every engine
        if "prefix" in case.loss:
            assert alone(case)[0]["prefix_weights"] != pytest.approx([1 / 3] * 3, rel=1e-2)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_repeats_an_uninterrupted_one(engine, ran):
    assert_resumed(ran(engine)[0], RESUMED)


def assert_resumed(started: Path, cases: list[Case]) -> None:
    """Assert bitwise equal losses, draws, weights and sampler states."""
    for case in cases:
        for rank in range(PROCESSES):
            record = json.loads((started / f"resume-{case}-{rank}.json").read_text())
            assert len(record["whole"]) == 8
            assert record["resumed"] == record["whole"], case
            late = [entry for entry in record["drawn"] if entry[0] >= 4]
            assert len(late) == 4 * 4 * 4 and record["drawn_again"] == late, case
            assert len(set(record["shares"])) > 1  # the sampler's state matters
        folders = [started / f"resume-{case}" / name / "model" for name in ("whole", "resumed")]
        files = [file.name for file in folders[0].glob("*.safetensors")]
        assert len(files) == 1 + ("balance" in case.loss)
        for name in files:
            whole, resumed = (load_file(folder / name) for folder in folders)
            assert whole.keys() == resumed.keys()
            assert all(torch.equal(value, resumed[key]) for key, value in whole.items()), case


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_other_cases_in_two_processes(engine, alone, tmp_path):
    cases = cases_of(engine)[1]
    command = ["-m", "tests.distributed.worker", engine, str(tmp_path), dump(cases), dump(RESUMED_TOO)]
    launch(engine, tmp_path, command)
    assert_same_as_alone(engine, tmp_path, cases, alone)
    assert_resumed(tmp_path, RESUMED_TOO)


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ENGINES)
def test_every_combination_in_two_processes(engine, alone, tmp_path):
    cases = chosen(0, every=True)
    assert len(cases) == len(LOSSES) * len(BACKBONES) * 2
    command = ["-m", "tests.distributed.worker", engine, str(tmp_path), dump(cases), dump([])]
    launch(engine, tmp_path, command, timeout=3600)
    assert_same_as_alone(engine, tmp_path, cases, alone)


def test_the_cases_cover_all_pairs():
    """All pairs of values of engine, loss, backbone, and full or adapters. The sixth engine is one process."""
    covered = {(engine, c.loss, c.backbone, c.adapters) for engine in range(6) for c in chosen(engine)}
    options = [range(6), LOSSES, BACKBONES, (False, True)]
    for one, other in itertools.combinations(range(4), 2):
        pairs = {(entry[one], entry[other]) for entry in covered}
        assert pairs == set(itertools.product(options[one], options[other]))
    assert len(set(chosen(0, every=True))) == len(LOSSES) * len(BACKBONES) * 2
