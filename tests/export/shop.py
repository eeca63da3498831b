"""A recommender with ids of two lengths, a twin and a temperature, and the comparison of lists."""

from collections.abc import Iterable, Sequence

from gflowtrl import ItemCatalog, Recommender
from gflowtrl.policy.temperature import set_temperature
from gflowtrl.recommendation import Recommendation
from tests.policy.test_architectures import IDS as EQUAL_IDS
from tests.policy.test_architectures import TOKENIZER as EQUAL_TOKENIZER
from tests.policy.test_architectures import WINDOWED, build
from tests.tiny import tiny_model
from tests.trainer.world import SEMANTIC_IDS, TOKENIZER


HISTORIES = [["i010"], ["short", "twin"], ["i222", "i001", "i100"], ["i111", "short"] * 9]
TIE = 1e-4  # items whose log-probabilities differ by less may swap


def make_recommender(temperature: float = 0.7, **options) -> Recommender:
    """Return a recommender of 23 items on 22 leaves and a retired one, with random weights.

    `options` are those of `tiny_model`.
    """
    model = tiny_model(len(TOKENIZER), **options)
    set_temperature(model, temperature)
    catalog = ItemCatalog.from_semantic_ids(SEMANTIC_IDS, TOKENIZER, retired=["i111"])
    return Recommender(model, TOKENIZER, catalog, max_history_items=5)


def make_windowed(kind: str) -> Recommender:
    """Return a recommender of 27 items whose prompts are longer than the window of some layers."""
    catalog = ItemCatalog.from_semantic_ids(EQUAL_IDS, EQUAL_TOKENIZER)
    return Recommender(build(kind, WINDOWED[kind]), EQUAL_TOKENIZER, catalog, max_history_items=8)


def assert_same_lists(
    expected: Sequence[Sequence[Recommendation]], found: Iterable[Sequence[tuple[int | str, float]]]
) -> None:
    """Compare items, their order and their log-probabilities; nearly equally probable items may swap."""
    for ours, theirs in zip(expected, found, strict=True):
        for one, (item, log_prob) in zip(ours, theirs, strict=True):
            assert abs(one.log_prob - log_prob) < TIE
            if one.item != item:
                value = {other.item: other.log_prob for other in ours}.get(item, ours[-1].log_prob)
                assert abs(value - log_prob) < TIE
