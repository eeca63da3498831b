"""A small shop for training: 24 items on 23 leaves of two or three tokens, rows, and helpers to make a trainer."""

import random
from typing import Any

import torch
from datasets import Dataset

from gflowtrl import GFlowNetConfig, GFlowNetTrainer, ItemCatalog
from gflowtrl.data import build_tokenizer
from tests.tiny import tiny_model


SEMANTIC_IDS = {
    f"i{a}{b}{c}": (f"<a_{a}>", f"<b_{b}>", f"<c_{c}>") for a in range(3) for b in range(3) for c in range(3)
}
for gone in ("i000", "i011", "i120", "i122", "i201"):
    del SEMANTIC_IDS[gone]
SEMANTIC_IDS |= {"short": ("<a_3>", "<b_0>"), "twin": ("<a_0>", "<b_0>", "<c_1>")}
ITEMS = list(SEMANTIC_IDS)
TOKENIZER = build_tokenizer(SEMANTIC_IDS)
PRICES = {item: 1.0 + 9.0 * (index % 2) for index, item in enumerate(ITEMS)}


def make_catalog() -> ItemCatalog:
    return ItemCatalog.from_semantic_ids(SEMANTIC_IDS, TOKENIZER)


def make_rows(count: int = 24, seed: int = 0, first_row_id: int = 100, longest: int = 4) -> Dataset:
    """Rows whose target depends on the last item, so that it can be learned."""
    chance = random.Random(seed)
    histories = [chance.sample(ITEMS, chance.randint(1, longest)) for _ in range(count)]
    targets = [ITEMS[(ITEMS.index(history[-1]) * 5 + 1) % len(ITEMS)] for history in histories]
    row_ids = list(range(first_row_id, first_row_id + count))
    return Dataset.from_dict({"row_id": row_ids, "history": histories, "target": targets})


def make_user_rows(count: int = 24, first_row_id: int = 100, longest: int = 6) -> Dataset:
    """Rows of users with two to `longest` items: one row per item except the first, at most `count` rows."""
    rows, user = [], 0
    while len(rows) < count:
        items = [ITEMS[(7 * user) % len(ITEMS)]]
        while len(items) < 2 + user % (longest - 1):
            items.append(ITEMS[(ITEMS.index(items[-1]) * 5 + 1) % len(ITEMS)])
        rows += [{"user": user, "history": items[:end], "target": items[end]} for end in range(1, len(items))]
        user += 1
    return Dataset.from_list([{"row_id": first_row_id + i, **row} for i, row in enumerate(rows[:count])])


def teacher(histories: list[list[str]]) -> torch.Tensor:
    """Scores that depend on the last item of the history."""
    table = torch.randn(len(ITEMS), len(ITEMS), generator=torch.Generator().manual_seed(1))
    return 2 * table[[ITEMS.index(history[-1]) for history in histories]]


def make_trainer(tmp_path: Any, reward_funcs: Any = None, model: Any = None, **options: Any) -> GFlowNetTrainer:
    """Make a trainer. `options` are fields of `GFlowNetConfig`, or else arguments of the trainer. `model`: False for
    none."""
    settings = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "eval_num_beams": 10,
        "eval_ks": [5, 10],
    }  # fmt: skip
    own = {name: value for name, value in options.items() if name in GFlowNetConfig.__dataclass_fields__}
    arguments = {"train_dataset": make_rows(), "catalog": make_catalog(), "processing_class": TOKENIZER}
    arguments |= {name: value for name, value in options.items() if name not in own}
    model = tiny_model(len(TOKENIZER)) if model is None else (None if model is False else model)
    return GFlowNetTrainer(model, reward_funcs, GFlowNetConfig(str(tmp_path), **(settings | own)), **arguments)


def weights(trainer: GFlowNetTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def losses(trainer: GFlowNetTrainer) -> list[float]:
    """The logged losses of all steps."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
