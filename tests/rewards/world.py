"""A small shop for tests of rewards and samplers: 9 items at 8 leaves of two or three tokens, with one collision."""

import re

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from gflowtrl.catalog import ItemCatalog
from gflowtrl.data import Step, build_tokenizer
from gflowtrl.policy import CausalTreePolicy
from gflowtrl.rewards import TitleLikelihoodReward
from gflowtrl.rewards.title_likelihood import TEMPLATE
from tests.tiny import tiny_model


SEMANTIC_IDS = {
    "pear": ("<a_2>", "<b_2>", "<c_1>"),
    "apple": ("<a_1>", "<b_1>", "<c_1>"),
    "quince": ("<a_1>", "<b_1>", "<c_1>"),  # the same id as "apple"
    "fig": ("<a_1>", "<b_1>", "<c_2>"),
    "plum": ("<a_1>", "<b_2>", "<c_1>"),
    "lime": ("<a_2>", "<b_1>", "<c_1>"),
    "kiwi": ("<a_2>", "<b_1>", "<c_2>"),
    "date": ("<a_3>", "<b_1>"),
    "nut": ("<a_3>", "<b_2>", "<c_2>"),
}
PRICES = {item: float(i + 1) for i, item in enumerate(SEMANTIC_IDS)}
TOKENIZER = build_tokenizer(SEMANTIC_IDS)
SESSIONS = {  # sessions of the four rows, with the levels 0 shown, 1 clicked, 2 purchased
    "session_items": [["fig", "quince", "fig", "apple"], ["lime", "date"], ["nut", "lime", "pear"], ["kiwi"]],
    "session_levels": [[0, 1, 1, 2], [0, 1], [2, 0, 1], [1]],
}
TITLES = {
    "pear": "green pear", "apple": "red apple", "quince": "quince", "fig": "dried fig from Izmir", "plum": "plum",
    "lime": "green lime", "kiwi": "kiwi", "date": "dried date", "nut": "nut, shelled and salted",
}  # fmt: skip


class TableTeacher:
    """Scores that depend on the last item of the history. The order of its items differs from the catalog."""

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


def make_seq2seq() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(TOKENIZER), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0,
        pad_token_id=0, decoder_start_token_id=0, eos_token_id=2, initializer_factor=3.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def text_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer for the words and punctuation marks of titles and template. Every text starts with `<s>`."""
    words = sorted({word for text in [*TITLES.values(), TEMPLATE] for word in re.findall(r"\w+|[^\w\s]", text)})
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<s>", "?", *words])}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


def make_title_reward(**options) -> TitleLikelihoodReward:
    tokenizer = text_tokenizer()
    return TitleLikelihoodReward(tiny_model(len(tokenizer), seed=3), tokenizer, TITLES, **options)


def make_step(rows=(0, 1, 2, 3), without=(), progress=0.0, **columns) -> Step:
    """Make a step as the trainer passes it to rewards and samplers.

    Args:
        rows: indices into the four rows, with repetitions allowed.
        without: names of columns to omit. Without "target", the target leaves are hidden too.
        progress: progress of the training.
        columns: columns to add or replace.
    """
    histories = [["fig"], ["pear", "date"], ["nut", "plum", "lime"], ["kiwi", "quince"]]
    targets = ["apple", "date", "pear", "quince"]
    texts = [
        " ".join(["<bos>", *(token for item in history for token in SEMANTIC_IDS[item])]) for history in histories
    ]
    prompts = TOKENIZER([texts[i] for i in rows], add_special_tokens=False, padding=True, return_tensors="pt")
    known = {
        "row_id": [10 + i for i in rows],
        "history": [histories[i] for i in rows],
        "target": [targets[i] for i in rows],
        "budget": [float(i) for i in rows],
        **{name: [column[i] for i in rows] for name, column in SESSIONS.items()},
    }
    kept = {name: values for name, values in (known | columns).items() if name not in without}
    row_ids = torch.tensor(known["row_id"])
    hidden = torch.full_like(row_ids, -1)
    return Step(
        prompts={name: prompts[name] for name in ("input_ids", "attention_mask")},
        row_ids=row_ids,
        target_leaves=make_catalog().leaf_of(kept["target"]) if "target" in kept else hidden,
        columns=kept,
        progress=progress,
    )


def all_leaves(catalog: ItemCatalog, step: Step) -> torch.Tensor:
    return torch.arange(catalog.tree.num_leaves).expand(len(step), -1).contiguous()
