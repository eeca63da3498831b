"""`Recommender` against brute force over all leaves, and its answers to mistakes."""

import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from gflowtrl import Recommender
from gflowtrl.policy import attach_flow_heads
from tests.tiny import tiny_model, tiny_seq2seq
from tests.trainer.world import ITEMS, TOKENIZER, make_catalog


HISTORIES = [["i010"], ["short", "twin"], ["i222", "i001", "i100"], ["i111"] * 30]


@pytest.fixture(scope="module", params=["causal", "seq2seq"])
def recommender(request) -> Recommender:
    model = tiny_model(len(TOKENIZER)) if request.param == "causal" else tiny_seq2seq(len(TOKENIZER))
    return Recommender(model, TOKENIZER, make_catalog(), max_history_items=5)


def brute_force(recommender: Recommender, history: list, exclude: bool = False) -> list[tuple[str, float]]:
    """All items by falling probability of their leaf, computed for this history alone."""
    (log_probs,) = recommender.policy.leaf_log_probs(recommender.encoder([history]))
    pairs = [(item, log_probs[recommender.catalog.leaf_of([item])].item()) for item in ITEMS]
    pairs = [pair for pair in pairs if not exclude or pair[0] not in history]
    return sorted(pairs, key=lambda pair: (-pair[1], ITEMS.index(pair[0])))


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("batch_size", [256, 3])
def test_recommendations_are_the_most_probable_items(recommender, exclude, batch_size):
    k = len(ITEMS)
    lists = recommender.recommend(HISTORIES, k, exclude_seen=exclude, batch_size=batch_size)
    assert len(lists) == len(HISTORIES)
    for history, found in zip(HISTORIES, lists, strict=True):
        expected = brute_force(recommender, history, exclude)
        assert [r.item for r in found] == [item for item, _ in expected]
        assert [r.log_prob for r in found] == pytest.approx([value for _, value in expected], abs=1e-4)


def test_short_lists_are_searched_with_a_wide_beam(recommender):
    histories = [[item] for item in ITEMS]
    found = [r.item for (r,) in recommender.recommend(histories, k=1)]
    assert found == [brute_force(recommender, history)[0][0] for history in histories]
    greedy = [r.item for (r,) in recommender.recommend(histories, k=1, num_beams=1)]
    assert greedy != found  # so the width matters here


def test_lists_are_full_and_items_of_one_id_stand_together(recommender):
    (found,) = recommender.recommend([["i001"]], k=10, exclude_seen=True)
    assert len(found) == 10 and "i001" not in {r.item for r in found}
    (found,) = recommender.recommend([["i010"]], k=len(ITEMS))
    items = [r.item for r in found]
    assert abs(items.index("twin") - items.index("i001")) == 1  # they share a semantic id
    assert found[items.index("twin")].log_prob == found[items.index("i001")].log_prob
    assert sum(torch.tensor([r.log_prob for r in found if r.item != "twin"]).exp()) == pytest.approx(1.0, abs=1e-5)


def test_nothing_asked_nothing_answered(recommender):
    assert recommender.recommend([]) == []


def test_a_sampled_list_holds_distinct_items_in_proportion(recommender):
    """The first item of a list is an ordinary draw of the policy."""
    history, draws = HISTORIES[2], 1500
    lists = recommender.recommend([history] * draws, k=3, strategy="sample", seed=1)
    assert all(len({r.item for r in found}) == 3 for found in lists)
    probability = dict(brute_force(recommender, history))
    assert [r.log_prob for r in lists[0]] == pytest.approx([probability[r.item] for r in lists[0]], abs=1e-4)
    # "twin" shares the id of "i001" and stands beside it, so leaves are counted.
    leaves = [int(recommender.catalog.leaf_of([found[0].item])) for found in lists]
    size = recommender.catalog.tree.num_leaves
    expected = torch.zeros(size, dtype=torch.double)
    for item, value in probability.items():
        expected[recommender.catalog.leaf_of([item])] = draws * torch.tensor(value, dtype=torch.double).exp()
    counts = torch.bincount(torch.tensor(leaves), minlength=size).double()
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0] * draws / wanted.sum()
    assert stats.chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-3


def test_sampled_lists_follow_the_seed_and_not_the_batch(recommender):
    def items(**options):
        lists = recommender.recommend(HISTORIES * 3, k=5, strategy="sample", **options)
        return [[r.item for r in found] for found in lists]

    first = items(seed=4)
    assert items(seed=4, batch_size=5) == first == items(seed=4, num_beams=9)
    assert items(seed=5) != first
    assert first[:4] != first[4:8]  # the same history twice draws twice
    cold = items(temperature=1e-4)  # no chance is left: the best token at each step comes first
    greedy = recommender.recommend(HISTORIES * 3, k=1, num_beams=1)
    assert [found[0] for found in cold] == [found.item for (found,) in greedy]
    everything = recommender.recommend([["i001"]], k=10, exclude_seen=True, strategy="sample")[0]
    assert len(everything) == 10 and "i001" not in {r.item for r in everything}


@pytest.mark.parametrize("kind", ["qwen3", "t5", "bart"])
@pytest.mark.parametrize("heads", [False, True])
def test_saved_and_loaded_it_says_the_same(tmp_path, kind, heads):
    model = (tiny_model if kind == "qwen3" else tiny_seq2seq)(len(TOKENIZER), kind)
    if heads:
        attach_flow_heads(model)
    first = Recommender(model, TOKENIZER, make_catalog(), max_history_items=2)
    first.save_pretrained(tmp_path)
    second = Recommender.from_pretrained(str(tmp_path))
    assert second.recommend(HISTORIES) == first.recommend(HISTORIES)
    assert second.encoder.max_history_items == 2
    assert second.recommend([["i111", "i010", "short"]]) == second.recommend([["i010", "short"]])
    assert Recommender.from_pretrained(tmp_path, dtype=torch.float64).model.dtype == torch.float64
    loader = AutoModelForCausalLM if kind == "qwen3" else AutoModelForSeq2SeqLM
    _, report = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report


@pytest.mark.parametrize(
    ("histories", "options", "error", "message"),
    [
        ([["i010"], ["i010", "nonsense"]], {}, ValueError, "row 1 holds item 'nonsense'.*not in the catalogue"),
        ([["i010"], ["i010"], []], {"batch_size": 1}, ValueError, "row 2 is empty"),
        (["i010"], {}, TypeError, "row 0 is 'i010'; give a list of items"),
        ([3], {}, TypeError, "row 0 is 3; give a list of items"),
        ([["i010"]], {"k": 0}, ValueError, "k is 0"),
        ([["i010"]], {"k": 10, "num_beams": 9}, ValueError, "num_beams is 9, but 10 items"),
        ([["i010"]], {"strategy": "greedy"}, ValueError, "strategy is 'greedy'; use one of 'beam', 'sample'"),
        ([["i010"]], {"strategy": "sample", "temperature": 0.0}, ValueError, "temperature is 0.0.*must be positive"),
        ([["i010"]], {"temperature": 2.0}, ValueError, "strategy 'beam' draws nothing; use strategy='sample'"),
    ],
)
def test_mistakes_are_explained(recommender, histories, options, error, message):
    with pytest.raises(error, match=message):
        recommender.recommend(histories, **options)


def test_a_missing_folder_and_a_plain_language_model_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Recommender.from_pretrained(tmp_path / "nowhere")
    tiny_model(len(TOKENIZER)).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"catalog\.json is missing"):
        Recommender.from_pretrained(tmp_path)
