"""A recommender with titles, counts and a teacher, and the folder of a run around it."""

import json
from pathlib import Path

import torch

from gflowtrl import Recommender
from gflowtrl.teachers import Transitions
from tests.tiny import tiny_model
from tests.trainer.world import ITEMS, TOKENIZER, make_catalog


HISTORY = ["i010", "i222", "twin"]
TITLES = {"i010": "A lamp", "i222": "Lamp <b>oil</b>", "twin": "Oil for a lamp", "short": "Chair"}
COUNTS = torch.arange(len(ITEMS))
OPTIONS = {"loss_type": ["exact_flow"], "reward_beta": 0.5, "reward_floor": "1e-2", "learning_rate": 1e-3}
REWARDS = [
    {"type": "ground_truth", "weight": 0.3},
    {"type": "collaborative", "weight": "learned", "temperature": 0.5, "popularity_correction": 0.25},
    {"type": "uniform", "weight": 0.1},
]
WEIGHTS = [0.3, 0.7, 0.1]


def make_teacher() -> Transitions:
    return Transitions.fit([ITEMS, ITEMS[::-2], ITEMS[::3]], ITEMS)


def make_recommender(**options) -> Recommender:
    options = {"titles": TITLES, "item_counts": COUNTS, "teacher": make_teacher(), **options}
    return Recommender(tiny_model(len(TOKENIZER)), TOKENIZER, make_catalog(), 5, **options)


def write_stage(folder: Path, rewards: list | None = None, weights: list | None = None, **options) -> Path:
    """Write the folder of a GFlowNet stage without its model, and return the place of the model."""
    inputs = {"sft": "0123", "gflownet": OPTIONS | options, "rewards": REWARDS if rewards is None else rewards}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "inputs.json").write_text(json.dumps(inputs))
    (folder / "done.json").write_text(json.dumps({"reward_weights": WEIGHTS if weights is None else weights}))
    return folder / "model"
