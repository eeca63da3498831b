"""Every engine compares the saved folder with the trained model, and all processes that save raise the error."""

import json

import pytest

from .launch import PROCESSES, launch
from .saved import CASES


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_a_difference_is_an_error(engine, tmp_path):
    launch(engine, tmp_path, ["-m", "tests.distributed.saved", engine, str(tmp_path)])
    for number, (case, largest) in enumerate(CASES):
        records = [json.loads((tmp_path / f"{number}-{rank}.json").read_text()) for rank in range(PROCESSES)]
        # With DDP, a script may save in the main process alone, which then cannot wait for others.
        assert records[1]["error"] == (None if engine == "ddp" else records[0]["error"]), case
        assert "does not contain the trained model" in (records[0]["error"] or ""), (case, records)
        assert [record["loads"] for record in records] == [2 if largest else 0, 0], case
