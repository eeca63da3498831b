"""What the report says of a run, against the stages' own records."""

import json
from pathlib import Path

from gflowtrl.pipeline import run

from .micro import micro_recipe, micro_settings


def test_the_teachers_seconds_are_those_of_its_own_stages(tmp_path):
    """And stay those when the run is repeated: a reward's teacher is not fitted again then."""
    settings = micro_settings(tmp_path)
    parts = [{"type": "ease"}, {"type": "sasrec", "epochs": 4}]
    recipe = micro_recipe(
        tmp_path,
        stages=["gflownet"],
        teacher={"type": "mixture", "parts": parts},
        rewards=[{"type": "collaborative", "teacher": {"type": "sasrec", "epochs": 3}}, {"type": "collaborative"}],
        sft={"max_steps": 1},
        gflownet=settings["gflownet"] | {"max_steps": 1},
        evaluation=settings["evaluation"] | {"calibration_rows": 0, "users": 5},
    )
    results = run(recipe, quiet=True)
    inputs = {file.parent.name: json.loads(file.read_text()) for file in Path(tmp_path).glob("teacher-*/inputs.json")}
    own = [name for name, given in inputs.items() if given["teacher"].get("epochs") != 3]
    assert len(own) == 2 and len(inputs) == 3
    assert sum(results["seconds"][name] for name in inputs) > sum(results["seconds"][name] for name in own) > 0
    assert results["methods"]["teacher"]["seconds"] == sum(results["seconds"][name] for name in own)
    assert run(recipe, quiet=True)["methods"]["teacher"] == results["methods"]["teacher"]
