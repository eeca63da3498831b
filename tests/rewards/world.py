"""A small shop for tests of rewards and samplers: 9 items on 8 leaves of two or three tokens, one collision."""

import torch

from gflowtrl.catalog import ItemCatalog
from gflowtrl.data import build_tokenizer
from gflowtrl.policy import CausalTreePolicy
from tests.tiny import tiny_model


SEMANTIC_IDS = {
    "pear": ("<a_2>", "<b_2>", "<c_1>"),
    "apple": ("<a_1>", "<b_1>", "<c_1>"),
    "quince": ("<a_1>", "<b_1>", "<c_1>"),  # the same id as the apple's
    "fig": ("<a_1>", "<b_1>", "<c_2>"),
    "plum": ("<a_1>", "<b_2>", "<c_1>"),
    "lime": ("<a_2>", "<b_1>", "<c_1>"),
    "kiwi": ("<a_2>", "<b_1>", "<c_2>"),
    "date": ("<a_3>", "<b_1>"),
    "nut": ("<a_3>", "<b_2>", "<c_2>"),
}
PRICES = {item: float(i + 1) for i, item in enumerate(SEMANTIC_IDS)}
TOKENIZER = build_tokenizer(SEMANTIC_IDS)


class TableTeacher:
    """Scores that depend on the last item of the history; its items stand in another order than the catalogue's."""

    def __init__(self):
        self.items = sorted(SEMANTIC_IDS)
        self.table = torch.randn(len(self.items), len(self.items), generator=torch.Generator().manual_seed(1))
        self.calls = 0

    def score(self, histories):
        self.calls += 1
        return self.table[[self.items.index(history[-1]) for history in histories]]


def make_catalog() -> ItemCatalog:
    return ItemCatalog.from_semantic_ids(SEMANTIC_IDS, TOKENIZER)


def make_policy(catalog: ItemCatalog) -> CausalTreePolicy:
    return CausalTreePolicy(tiny_model(len(TOKENIZER)), catalog)


def make_batch(rows=(0, 1, 2, 3)) -> dict:
    """What the trainer hands to rewards and samplers."""
    histories = [["fig"], ["pear", "date"], ["nut", "plum", "lime"], ["kiwi", "quince"]]
    targets = ["apple", "date", "pear", "quince"]
    texts = [
        " ".join(["<bos>", *(token for item in history for token in SEMANTIC_IDS[item])]) for history in histories
    ]
    prompts = TOKENIZER([texts[i] for i in rows], add_special_tokens=False, padding=True, return_tensors="pt")
    return {
        "prompts": {name: prompts[name] for name in ("input_ids", "attention_mask")},
        "row_id": torch.tensor([10 + i for i in rows]),
        "history": [histories[i] for i in rows],
        "target": [targets[i] for i in rows],
        "budget": [float(i) for i in rows],
        "cache": {},
    }


def all_leaves(catalog: ItemCatalog, batch: dict) -> torch.Tensor:
    return torch.arange(catalog.tree.num_leaves).expand(len(batch["row_id"]), -1).contiguous()
