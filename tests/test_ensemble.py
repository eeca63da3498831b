"""`Ensemble` against brute force over all leaves of all members, its views, the command, and its error messages."""

import json
import math
from collections import Counter

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl import Recommender
from gflowtrl.catalog import ItemCatalog
from gflowtrl.cli import main
from gflowtrl.data import InteractionData, build_tokenizer, leave_one_out, read_interactions, write_folder
from gflowtrl.ensemble import Ensemble, View
from gflowtrl.metrics import item_ranking_metrics
from tests.tiny import tiny_model, tiny_seq2seq
from tests.trainer.world import ITEMS, SEMANTIC_IDS, TOKENIZER, make_catalog


HISTORIES = [["i010"], ["short", "twin"], ["i222", "i001", "i100", "i010"], ["i111", "i222"] * 9]
VIEWS = [View(), View(last=2), View(last=1)]
# The same items in another order, with two tokens per id. Other items collide: three at each of eight leaves.
OTHER_IDS = {item: (f"<x_{i % 4}>", f"<y_{i % 2}>") for i, item in enumerate(reversed(ITEMS))}
OTHER_TOKENIZER = build_tokenizer(OTHER_IDS)


def make_members() -> list[Recommender]:
    """Two architectures with different ids, item orders and lengths of histories, and a second model of the first."""
    other = ItemCatalog.from_semantic_ids(OTHER_IDS, OTHER_TOKENIZER)
    counts = torch.arange(len(ITEMS))
    return [
        Recommender(tiny_model(len(TOKENIZER)), TOKENIZER, make_catalog(), 5, item_counts=counts),
        Recommender(tiny_seq2seq(len(OTHER_TOKENIZER), "bart"), OTHER_TOKENIZER, other, max_history_items=3),
        Recommender(tiny_model(len(TOKENIZER), "qwen3", seed=1), TOKENIZER, make_catalog(), max_history_items=5),
    ]


MEMBERS = make_members()


def probabilities_of(member: Recommender, history: list) -> dict[str, float]:
    """The probability of each item's leaf, shared among the items with the same id."""
    ids = OTHER_IDS if member.tokenizer is OTHER_TOKENIZER else SEMANTIC_IDS
    (log_probs,) = member.policy.leaf_log_probs(member.encoder([history]))
    probabilities = log_probs[member.catalog.leaf_of(ITEMS)].double().exp().tolist()
    sizes = Counter(ids.values())
    return {item: value / sizes[ids[item]] for item, value in zip(ITEMS, probabilities, strict=True)}


def brute_force(members: list, weights: list, views: list, history: list) -> dict[str, float]:
    """The average probability of every item, one model, view and history at a time."""
    total = dict.fromkeys(ITEMS, 0.0)
    for member, weight in zip(members, weights, strict=True):
        for view in views:
            seen = view(history[-member.max_history_items :])
            for item, probability in probabilities_of(member, seen).items():
                total[item] += weight / sum(weights) / len(views) * probability
    return total


def ranked(probabilities: dict) -> list[str]:
    return sorted(probabilities, key=lambda item: (-probabilities[item], ITEMS.index(item)))


def assert_ranking(found: list, expected: dict[str, float], k: int) -> None:
    """Compare a list with the best of all items; items whose probabilities differ by rounding may swap."""
    assert len(found) == len({one.item for one in found}) == min(k, len(expected))
    assert [one.probability for one in found] == pytest.approx([expected[one.item] for one in found], rel=1e-4)
    best = sorted(expected.values(), reverse=True)[:k]
    assert [one.probability for one in found] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("batch_size", [256, 3])
@pytest.mark.parametrize("chosen", [[0], [0, 2], [0, 1], [1, 0, 2]])
@pytest.mark.parametrize("views", [VIEWS[:1], VIEWS])
def test_an_item_has_the_average_of_its_probabilities(chosen, views, batch_size):
    members, weights = [MEMBERS[i] for i in chosen], [3.0, 1.0, 0.5][: len(chosen)]
    ensemble = Ensemble(members, weights, views)
    lists = ensemble.recommend(HISTORIES, k=len(ITEMS), batch_size=batch_size)
    for history, found in zip(HISTORIES, lists, strict=True):
        assert_ranking(found, brute_force(members, weights, views, history), len(ITEMS))
        assert math.fsum(one.probability for one in found) == pytest.approx(1, abs=1e-5)


def candidates_of(history: list, beams: int, removed: set) -> set[str]:
    """The items that any member finds for any view by a search without the leaves whose items are all removed."""
    found = set()
    for member in MEMBERS:
        catalog = member.catalog
        closed = [leaf for leaf in range(catalog.tree.num_leaves) if removed.issuperset(catalog.items_of(leaf))]
        for view in VIEWS:
            prompts = member.encoder([view(history[-member.max_history_items :])])
            leaves = member.policy.beam_search(prompts, beams, excluded=torch.tensor([closed or [-1]]))[0][0].tolist()
            found |= {item for leaf in leaves if leaf >= 0 for item in catalog.items_of(leaf)}
    return found - removed


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.sampled_from(ITEMS), min_size=1, max_size=30),
    st.integers(1, 6),
    st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    st.booleans(),
)
def test_a_narrow_beam_only_limits_the_candidates(history, beams, weights, exclude_seen):
    """No list is shorter than the beam, unless the user has had almost everything."""
    removed = set(history) if exclude_seen else set()
    expected = brute_force(MEMBERS, weights, VIEWS, history)
    candidates = candidates_of(history, beams, removed)
    assert len(candidates) >= min(beams, len(ITEMS) - len(removed))
    ensemble = Ensemble(MEMBERS, weights, VIEWS)
    (found,) = ensemble.recommend([history], k=beams, num_beams=beams, exclude_seen=exclude_seen)
    assert_ranking(found, {item: expected[item] for item in candidates}, beams)


def test_a_user_who_has_had_all_items_gets_an_empty_list():
    histories = [ITEMS, ITEMS[:-1], ITEMS[:3]]
    lists = Ensemble(MEMBERS, views=VIEWS).recommend(histories, k=2, exclude_seen=True)
    assert [one.item for one in lists[1]] == ITEMS[-1:]
    assert lists[0] == [] and len(lists[2]) == 2
    assert Ensemble(MEMBERS).recommend([ITEMS], exclude_seen=True) == [[]]
    own = Ensemble(MEMBERS, views=VIEWS).recommend(histories, k=2, exclude=histories)
    assert [[row.item for row in rows] for rows in own] == [[row.item for row in rows] for rows in lists]


@pytest.mark.parametrize("batch_size", [256, 2])
def test_both_rankings_are_those_of_brute_force(batch_size):
    """Also where the history was cut, and where the target is a repetition, which stays a candidate."""
    earlier = [*HISTORIES, ITEMS[:20], ["i222", "i100", "i222"]]
    targets = ["i001", "i111", "i010", "i112", "twin", "i222"]
    rows = Dataset.from_dict({"history": [history[-5:] for history in earlier], "target": targets})
    lists = Ensemble(MEMBERS, [3, 1, 1], VIEWS).rank_both(rows, earlier, len(ITEMS), batch_size=batch_size)
    for row, (history, target) in enumerate(zip(earlier, targets, strict=True)):
        expected = brute_force(MEMBERS, [3, 1, 1], VIEWS, history)
        for ranked_items, removed in zip(lists, (set(), set(history) - {target}), strict=True):
            places = ranked_items[row].tolist()
            kept = [ITEMS[place] for place in places if place >= 0]
            assert set(kept) == set(ITEMS) - removed and places[len(kept) :] == [-1] * len(removed)
            values = [expected[item] for item in kept]
            assert values == pytest.approx(sorted(values, reverse=True), rel=1e-4)


def test_both_rankings_are_the_lists_of_recommend():
    rows = Dataset.from_dict({"history": HISTORIES, "target": ["i012", "i112", "i112", "i112"]})
    ensemble = Ensemble(MEMBERS, views=VIEWS)
    narrow = {"k": 3, "num_beams": 3}
    for ranked_items, exclude_seen in zip(ensemble.rank_both(rows, HISTORIES, **narrow), (False, True), strict=True):
        lists = ensemble.recommend(HISTORIES, exclude_seen=exclude_seen, **narrow)
        assert [[ITEMS[place] for place in places] for places in ranked_items.tolist()] == [
            [one.item for one in found] for found in lists
        ]


def test_a_narrow_beam_is_approximate():
    """Otherwise the previous test could not fail for a search of all items."""
    histories = [[item] for item in ITEMS]
    narrow = Ensemble(MEMBERS).recommend(histories, k=1, num_beams=1)
    wide = Ensemble(MEMBERS).recommend(histories, k=1)
    assert [found[0].item for found in wide] == [
        ranked(brute_force(MEMBERS, [1, 1, 1], [View()], history))[0] for history in histories
    ]
    assert narrow != wide


def test_equal_members_or_views_change_nothing():
    alone = Ensemble(MEMBERS[:1]).recommend(HISTORIES, k=9)
    for same in (Ensemble([MEMBERS[0]] * 2, [1, 4]), Ensemble(MEMBERS[:1], views=[View(), View(last=5)])):
        for one, other in zip(alone, same.recommend(HISTORIES, k=9), strict=True):
            assert [r.item for r in one] == [r.item for r in other]
            assert [r.log_prob for r in one] == pytest.approx([r.log_prob for r in other], abs=1e-5)


def test_one_member_ranks_as_its_recommender_does():
    """Except items that share an id: "twin" and "i001" have half of their leaf's probability each."""
    for one, other in zip(
        Ensemble(MEMBERS[2:]).recommend(HISTORIES, k=len(ITEMS)),
        MEMBERS[2].recommend(HISTORIES, k=len(ITEMS)),
        strict=True,
    ):
        shared = ("twin", "i001")
        assert [r.item for r in one if r.item not in shared] == [r.item for r in other if r.item not in shared]
        expected = {r.item: r.log_prob - math.log(2) * (r.item in shared) for r in other}
        assert {r.item: r.log_prob for r in one} == pytest.approx(expected, abs=1e-4)


def test_seen_items_are_left_out_and_only_allowed_ones_are_recommended():
    ensemble = Ensemble(MEMBERS[:2], views=VIEWS)
    allowed = ["twin", "i222", "i100", "short"]
    for history, unseen, chosen, both in zip(
        HISTORIES,
        ensemble.recommend(HISTORIES, k=5, num_beams=24, exclude_seen=True),
        ensemble.recommend(HISTORIES, k=3, allowed_items=allowed),
        ensemble.recommend(HISTORIES, k=5, allowed_items=allowed, exclude_seen=True),
        strict=True,
    ):
        expected = brute_force(MEMBERS[:2], [1, 1], VIEWS, history)
        assert_ranking(unseen, {item: value for item, value in expected.items() if item not in history}, 5)
        assert_ranking(chosen, {item: expected[item] for item in allowed}, 3)
        assert_ranking(both, {item: expected[item] for item in allowed if item not in history}, 5)


def test_a_user_without_known_items_gets_the_most_popular_ones():
    with pytest.warns(UserWarning, match="2 items of the histories are not in the catalog.*'new' in line 7"):
        lists = Ensemble(MEMBERS[:2]).recommend([["new", "new"], ["i010"]], k=2, names=["line 7", "line 8"])
    assert [r.item for r in lists[0]] == ITEMS[:-3:-1]
    assert lists[1] == Ensemble(MEMBERS[:2]).recommend([["i010"]], k=2)[0]
    assert Ensemble(MEMBERS).recommend([]) == []


# --------------------------------------------------------------------------------------------------------------- views
@given(st.lists(st.integers(), max_size=12), st.none() | st.integers(1, 15))
def test_a_view_is_the_end_of_a_history(history, last):
    view = View(last)
    assert view(history) == (history if last is None else list(reversed(history))[:last][::-1])
    assert View.parse(str(view)) == view


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("last=0", "last is 0; it must be a whole number of at least 1"),
        ("last=ten", "The view 'last=ten' is unknown. Write full, or last=10"),
        ("last=-1", "'last=-1' is unknown"),
        ("last", "'last' is unknown"),
        ("first=3", "'first=3' is unknown"),
        ("", "'' is unknown"),
    ],
)
def test_a_wrong_view_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        View.parse(text)


# ----------------------------------------------------------------------------------------------------- wrong ensembles
def test_wrong_ensembles_are_refused():
    fewer = {item: tokens for item, tokens in SEMANTIC_IDS.items() if item != "i222"}
    smaller = Recommender(
        tiny_model(len(TOKENIZER)), TOKENIZER, ItemCatalog.from_semantic_ids(fewer, TOKENIZER), max_history_items=5
    )
    with pytest.raises(ValueError, match="Member 3 of the ensemble does not have 1 items of member 1, .*'i222'"):
        Ensemble([*MEMBERS[:2], smaller])
    with pytest.raises(ValueError, match="Member 1 of the ensemble does not have 1 items of member 2, .*'i222'"):
        Ensemble([smaller, MEMBERS[1]])
    with pytest.raises(TypeError, match=r"members\[1\] is of type str; it must be a Recommender"):
        Ensemble([MEMBERS[0], "outputs/model"])
    with pytest.raises(TypeError, match=r"views\[0\] is of type int; it must be a View"):
        Ensemble(MEMBERS, views=[5])
    with pytest.raises(TypeError, match="weights is of type int; it must be a list"):
        Ensemble(MEMBERS, 1)
    with pytest.raises(TypeError, match="exclude_seen is of type str"):
        Ensemble(MEMBERS).recommend(HISTORIES, exclude_seen="no")
    with pytest.raises(ValueError, match="has no members"):
        Ensemble([])
    with pytest.raises(ValueError, match="has no views"):
        Ensemble(MEMBERS, views=[])
    with pytest.raises(ValueError, match="2 weights were given for 3 members"):
        Ensemble(MEMBERS, [1, 2])
    with pytest.raises(ValueError, match="A weight is 0; it must be a finite number above 0"):
        Ensemble(MEMBERS[:2], [1, 0])
    with pytest.raises(ValueError, match="1 weights were given for 2 members"):
        Ensemble.from_pretrained(["not/read", "nor/this"], [1])
    with pytest.raises(TypeError, match="must be a list of folders"):
        Ensemble.from_pretrained("outputs/model")
    with pytest.raises(ValueError, match="num_beams is 3, less than k"):
        Ensemble(MEMBERS).recommend(HISTORIES, k=4, num_beams=3)
    with pytest.raises(ValueError, match="batch_size is 0"):
        Ensemble(MEMBERS).recommend(HISTORIES, batch_size=0)


# --------------------------------------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """The folders of the first two members, and of data of the same items."""
    root = tmp_path_factory.mktemp("ensemble")
    for number, member in enumerate(MEMBERS[:2]):
        member.save_pretrained(root / f"model{number}")
    sequences = [[ITEMS[(7 * user + 5 * place) % len(ITEMS)] for place in range(3 + user % 4)] for user in range(12)]
    data = InteractionData(
        name="tiny", users=list(range(12)), items=ITEMS, sequences=sequences, semantic_ids=SEMANTIC_IDS
    )
    write_folder(data, root / "data")
    return [str(root / name) for name in ("model0", "model1", "data")]


def test_recommend_averages_models_and_views(folders, capsys, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, HISTORIES)))
    words = ["recommend", "--input", str(tmp_path / "in.jsonl"), "-k", "4", "--model"]
    views = ["--views", "full", "last=2", "last=1"]
    for more, ensemble in (
        ([*folders[:2], "--weights", "3", "1"], Ensemble(MEMBERS[:2], [3, 1])),
        ([folders[0], *views], Ensemble(MEMBERS[:1], views=VIEWS)),
    ):
        assert main([*words, *more]) == 0
        answers = [json.loads(line)["recommendations"] for line in capsys.readouterr().out.splitlines()]
        for answer, expected in zip(answers, ensemble.recommend(HISTORIES, k=4), strict=True):
            assert [one["item"] for one in answer] == [one.item for one in expected]
            assert [one["probability"] for one in answer] == pytest.approx([r.probability for r in expected], rel=1e-4)
    assert main([*words, *folders[:2], "--strategy", "sample"]) == 2
    assert "cannot be sampled. Leave out --strategy" in capsys.readouterr().err
    assert main([*words, folders[0], "--views", "lst=3"]) == 2
    assert "The view 'lst=3' is unknown" in capsys.readouterr().err


def test_evaluate_averages_models(folders, capsys):
    *models, data_dir = folders
    words = ["evaluate", "--data_dir", data_dir, "--ks", "3", "5", "--json", "--split", "validation", "--model"]
    assert main([*words, *models]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["model"] == models and printed["weights"] == [0.5, 0.5] and printed["views"] == ["full"]
    rows = leave_one_out(read_interactions(data_dir), 5).validation
    sequences = read_interactions(data_dir).sequences
    assert [sequence[-2] for sequence in sequences] == rows["target"]
    orders = {"": [], "unseen_": []}
    for history, target, sequence in zip(rows["history"], rows["target"], sequences, strict=True):
        order = ranked(brute_force(MEMBERS[:2], [1, 1], [View()], history))
        orders[""].append(order)
        removed = set(sequence[:-2]) - {target}
        orders["unseen_"].append([item for item in order if item not in removed])
    targets = torch.tensor([ITEMS.index(item) for item in rows["target"]])
    for prefix, order in orders.items():
        items = torch.tensor([[ITEMS.index(item) for item in ranking[:5]] for ranking in order])
        for name, values in item_ranking_metrics(items, targets, [3, 5]).items():
            assert printed["metrics"][f"{prefix}{name}"] == pytest.approx(values.mean().item()), name
        assert printed["metrics"][f"{prefix}item_ndcg@5"] == printed["metrics"][f"{prefix}ndcg@5"] > 0
    assert main([*words, *models, "--num_beams", "3"]) == 2
    assert "num_beams is 3, less than k" in capsys.readouterr().err
