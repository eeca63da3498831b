"""A small recommender to serve, and an assertion about error answers."""

import re

import torch

from gflowtrl import Recommender
from tests.tiny import tiny_model
from tests.trainer.world import ITEMS, TOKENIZER, make_catalog


HISTORY = ["i010", "i222"]
COUNTS = torch.arange(len(ITEMS))


def make_recommender(counts: torch.Tensor | None = COUNTS) -> Recommender:
    model = tiny_model(len(TOKENIZER))
    return Recommender(model, TOKENIZER, make_catalog(), 5, titles={"i010": "A lamp"}, item_counts=counts)


def assert_refused(answer, status: int, message: str) -> None:
    """Assert that the answer is an error whose body is one sentence."""
    detail = answer.json()["detail"]
    assert answer.status_code == status, detail
    assert "\n" not in detail and detail.endswith("."), detail
    assert re.search(message, detail), detail
