"""A resumed training repeats an undisturbed one bit for bit in every engine: losses, draws, weights, sampler."""

import json

import torch
from safetensors.torch import load_file

from .cases import RESUMED
from .launch import PROCESSES, each_engine


@each_engine
def test_it_goes_on_as_if_undisturbed(engine, ran):
    started, _ = ran(engine)
    for case in RESUMED:
        for rank in range(PROCESSES):
            record = json.loads((started / f"resume-{case}-{rank}.json").read_text())
            assert len(record["whole"]) == 8
            assert record["resumed"] == record["whole"], case
            late = [entry for entry in record["drawn"] if entry[0] >= 4]
            assert len(late) == 4 * 4 * 4 and record["drawn_again"] == late, case
            assert len(set(record["shares"])) > 1  # the memory has a say
        folders = [started / f"resume-{case}" / name / "model" for name in ("whole", "resumed")]
        files = [file.name for file in folders[0].glob("*.safetensors")]
        assert len(files) == 1 + ("balance" in case.loss)
        for name in files:
            whole, resumed = (load_file(folder / name) for folder in folders)
            assert whole.keys() == resumed.keys()
            assert all(torch.equal(value, resumed[key]) for key, value in whole.items()), case
