"""`Recommender` against brute force over all leaves, and its error messages."""

import json

import pytest
import scipy
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM

from gflowtrl import Recommender
from gflowtrl.policy import attach_flow_heads, load_backbone
from gflowtrl.policy.temperature import set_temperature
from gflowtrl.teachers import Popularity
from tests.tiny import tiny_model, tiny_seq2seq
from tests.trainer.world import ITEMS, TOKENIZER, make_catalog


HISTORIES = [["i010"], ["short", "twin"], ["i222", "i001", "i100"], ["i111"] * 30]


@pytest.fixture(scope="module", params=["causal", "seq2seq"])
def recommender(request) -> Recommender:
    model = tiny_model(len(TOKENIZER)) if request.param == "causal" else tiny_seq2seq(len(TOKENIZER))
    return Recommender(model, TOKENIZER, make_catalog(), max_history_items=5)


def brute_force(recommender: Recommender, history: list, exclude: bool = False) -> list[tuple[str, float]]:
    """Return all items by decreasing probability of their leaf, computed for this history alone."""
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
    assert greedy != found  # so the beam width matters here


def test_lists_are_full_and_items_with_the_same_id_are_adjacent(recommender):
    (found,) = recommender.recommend([["i001"]], k=10, exclude_seen=True)
    assert len(found) == 10 and "i001" not in {r.item for r in found}
    (found,) = recommender.recommend([["i010"]], k=len(ITEMS))
    items = [r.item for r in found]
    assert abs(items.index("twin") - items.index("i001")) == 1  # they share a semantic id
    assert found[items.index("twin")].log_prob == found[items.index("i001")].log_prob
    assert sum(torch.tensor([r.log_prob for r in found if r.item != "twin"]).exp()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"strategy": "sample", "seed": 3}, {"exclude_seen": True}])
def test_each_user_has_items_to_leave_out(recommender, options):
    exclude = [["i010"], [], {"i222", "gone"}, set(ITEMS) - {"twin"}]
    everything = recommender.recommend(HISTORIES, len(ITEMS), **options)
    found = recommender.recommend(HISTORIES, len(ITEMS), exclude=exclude, **options)
    for whole, rows, left_out in zip(everything, found, exclude, strict=True):
        assert [row.item for row in rows] == [row.item for row in whole if row.item not in left_out]
        values = [row.log_prob for row in whole if row.item not in left_out]
        assert [row.log_prob for row in rows] == pytest.approx(values, abs=1e-4)
    narrow = recommender.recommend(HISTORIES, 2, num_beams=2, exclude=[ITEMS[:-2]] * 4)
    assert all({row.item for row in rows} == set(ITEMS[-2:]) for rows in narrow)
    with pytest.raises(ValueError, match="exclude has 1 entries for 4 histories; give one per history"):
        recommender.recommend(HISTORIES, exclude=[[]])
    with pytest.raises(TypeError, match=r"exclude\[0\] is 'i010'; it must be a collection"):
        recommender.recommend(HISTORIES[:1], exclude=["i010"])


def test_users_with_many_excluded_items_are_sampled_alone(recommender, monkeypatch):
    options = {"k": 3, "strategy": "sample", "seed": 3, "exclude": [ITEMS[:5], [], ITEMS[5:], ITEMS]}
    together = recommender.recommend(HISTORIES, **options)
    monkeypatch.setattr("gflowtrl.request.MANY_EXCLUDED", 3)
    apart = recommender.recommend(HISTORIES, **options)
    assert [[row.item for row in rows] for rows in apart] == [[row.item for row in rows] for rows in together]
    monkeypatch.setattr("gflowtrl.recommender.MAX_ENUMERATED", 0)  # wider searches, until each list is complete
    allowed = recommender.recommend(HISTORIES, **options, allowed_items=ITEMS[4:7])
    assert [len(rows) for rows in allowed] == [2, 3, 1, 0]


def test_seen_items_are_masked_in_a_narrow_beam(recommender):
    """However long the histories of the batch are; also where a leaf's only allowed item is a seen one."""
    history = [item for item in ITEMS if item not in ("i222", "twin")]
    for histories in ([["i010"]], [["i010"], history], [["i010"], ["i001", "i111"] * 9]):
        lists = recommender.recommend(histories, k=3, num_beams=3, exclude_seen=True)
        (alone,) = recommender.recommend([["i010"]], k=3, num_beams=3, exclude_seen=True)
        assert [r.item for r in lists[0]] == [r.item for r in alone]
        assert all(
            len(found) == min(3, len(ITEMS) - len(set(seen))) for found, seen in zip(lists, histories, strict=True)
        )
        assert all(r.item not in seen for found, seen in zip(lists, histories, strict=True) for r in found)
    allowed = {"twin", "i001", "i222", "i100"}
    for seen in (["i001"], ["i001", "i222"], ["i001", "twin"]):
        (found,) = recommender.recommend([seen], k=2, num_beams=2, exclude_seen=True, allowed_items=allowed)
        expected = [pair for pair in brute_force(recommender, seen, exclude=True) if pair[0] in allowed]
        if len(expected) == 2:
            assert {r.item for r in found} == {item for item, _ in expected}
        assert len(found) == 2 and {r.item for r in found} <= allowed - set(seen)


@pytest.mark.parametrize("allowed", [None, ["i001", "twin", "i222", "i010", "short"]])
def test_sampled_lists_without_seen_items_are_draws_among_the_others(recommender, allowed):
    """The first item of each list is a draw from the renormalized policy."""
    history, draws = ["i222", "i001", "i100"], 1500
    options = {"k": 2, "strategy": "sample", "seed": 5, "exclude_seen": True, "allowed_items": allowed}
    lists = recommender.recommend([history] * draws, **options)
    left = {i: p for i, p in brute_force(recommender, history, exclude=True) if allowed is None or i in allowed}
    assert all(len({r.item for r in found} & left.keys()) == 2 for found in lists)
    expected = torch.tensor(list(left.values()), dtype=torch.double).softmax(0) * draws
    counts = torch.tensor([sum(found[0].item == item for found in lists) for item in left]).double()
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert scipy.stats.chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-3


def test_no_histories_give_no_lists(recommender):
    assert recommender.recommend([]) == []


def test_histories_may_be_a_generator(recommender):
    assert recommender.recommend(history for history in HISTORIES) == recommender.recommend(HISTORIES)


def test_a_sampled_list_has_distinct_items_in_proportion_to_their_probability(recommender):
    """The first item of each list is a draw from the policy."""
    history, draws = HISTORIES[2], 1500
    lists = recommender.recommend([history] * draws, k=3, strategy="sample", seed=1)
    assert all(len({r.item for r in found}) == 3 for found in lists)
    probability = dict(brute_force(recommender, history))
    assert [r.log_prob for r in lists[0]] == pytest.approx([probability[r.item] for r in lists[0]], abs=1e-4)
    # "twin" has the id of "i001" and comes with it, so leaves are counted.
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
    assert scipy.stats.chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-3


def test_sampled_lists_follow_the_seed_and_not_the_batch(recommender):
    def items(**options):
        lists = recommender.recommend(HISTORIES * 3, k=5, strategy="sample", **options)
        return [[r.item for r in found] for found in lists]

    first = items(seed=4)
    assert items(seed=4, batch_size=5) == first == items(seed=4, num_beams=9)
    assert items(seed=5) != first
    assert first[:4] != first[4:8]  # equal histories have different draws
    cold = items(temperature=1e-4)  # nearly deterministic: the best token at each step is drawn
    greedy = recommender.recommend(HISTORIES * 3, k=1, num_beams=1)
    assert [found[0] for found in cold] == [found.item for (found,) in greedy]
    everything = recommender.recommend([["i001"]], k=10, exclude_seen=True, strategy="sample")[0]
    assert len(everything) == 10 and "i001" not in {r.item for r in everything}


ALLOWED = {"short", "twin", "i001", "i222", ITEMS[7]}


def test_only_allowed_items_are_recommended_with_unchanged_probabilities(recommender):
    expected = [pair for pair in brute_force(recommender, HISTORIES[0]) if pair[0] in ALLOWED]
    (found,) = recommender.recommend(HISTORIES[:1], k=10, allowed_items=ALLOWED)
    assert [r.item for r in found] == [item for item, _ in expected]
    assert [r.log_prob for r in found] == pytest.approx([value for _, value in expected], abs=1e-4)
    # A greedy search among all items would end at another item.
    ((one,),) = recommender.recommend(HISTORIES[:1], k=1, num_beams=1, allowed_items={expected[-1][0]})
    assert one.item == expected[-1][0]


@pytest.mark.parametrize("max_enumerated", [0, 4096])
def test_allowed_items_are_sampled_in_proportion_to_their_probability(recommender, monkeypatch, max_enumerated):
    """Both if all allowed items are enumerated, and if all items are sampled and the others left out."""
    monkeypatch.setattr("gflowtrl.recommender.MAX_ENUMERATED", max_enumerated)
    history, draws, warm = HISTORIES[2], 600, 1.7
    allowed = ALLOWED - {"twin"}  # it has the id of "i001"
    options = {"k": 2, "strategy": "sample", "seed": 3, "temperature": warm, "allowed_items": allowed}
    lists = recommender.recommend([history] * draws, **options)
    assert lists[:5] == recommender.recommend([history] * draws, batch_size=7, **options)[:5]
    everything = recommender.recommend([history], k=len(ITEMS), strategy="sample", temperature=warm)[0]
    tempered = {r.item: r.log_prob for r in everything}
    assert all(len({r.item for r in found} & allowed) == 2 for found in lists)
    assert [r.log_prob for r in lists[0]] == pytest.approx([tempered[r.item] for r in lists[0]], abs=1e-4)
    expected = torch.tensor([tempered[item] for item in sorted(allowed)]).softmax(0) * draws
    counts = [sum(found[0].item == item for found in lists) for item in sorted(allowed)]
    observed, wanted = torch.tensor(counts)[expected >= 5].double(), expected[expected >= 5].double()
    assert scipy.stats.chisquare(observed.numpy(), (wanted * observed.sum() / wanted.sum()).numpy()).pvalue > 1e-3


def test_unknown_items_are_left_out_with_a_warning(recommender):
    with pytest.warns(UserWarning, match="2 items of the histories are not in the catalog.*'nonsense' in row 1"):
        found = recommender.recommend([["i010"], ["nonsense", "i010", 7]])
    items = [[r.item for r in one] for one in found]
    assert items[0] == items[1] == [r.item for r in recommender.recommend([["i010"]])[0]]


def test_users_without_known_items_get_popular_items(recommender):
    counts = torch.arange(len(ITEMS))
    known = Recommender(recommender.model, TOKENIZER, recommender.catalog, 5, item_counts=counts)
    with pytest.warns(UserWarning, match="not in the catalog"):
        cold, warm, strange = known.recommend([[], ["i010"], ["nonsense"]], k=4)
    by_count = [recommender.catalog.items[index] for index in counts.argsort(descending=True)]
    assert [r.item for r in cold] == [r.item for r in strange] == by_count[:4]
    assert warm == recommender.recommend([["i010"]], k=4)[0]
    shares = (counts.double() + 1) / (counts + 1).sum()
    assert [r.log_prob for r in cold] == pytest.approx(shares.flip(0)[:4].log().tolist())
    (few,) = known.recommend([[]], k=4, allowed_items=by_count[-2:])
    assert [r.item for r in few] == by_count[-2:]
    lists = known.recommend([[]] * 400, k=1, strategy="sample", seed=2)
    drawn = [recommender.catalog.items.index(found[0].item) for found in lists]
    top = sum(index >= len(ITEMS) // 2 for index in drawn) / 400
    assert top == pytest.approx(float(shares[len(ITEMS) // 2 :].sum()), abs=0.08)
    assert lists == known.recommend([[]] * 400, k=1, strategy="sample", seed=2)


def test_an_explanation_has_the_path_with_its_probabilities(recommender):
    history = HISTORIES[2]
    ranked = recommender.recommend([history], k=len(ITEMS))[0]
    for index in (0, 5, len(ITEMS) - 1):
        explanation = recommender.explain(history, ranked[index].item)
        assert explanation.log_prob == pytest.approx(ranked[index].log_prob, abs=1e-4)
        product = torch.tensor([step.probability for step in explanation.steps]).log().sum().item()
        assert product == pytest.approx(explanation.log_prob, abs=1e-4)
        tokens = recommender.catalog.semantic_ids[recommender.catalog.items.index(explanation.item)]
        assert [step.token for step in explanation.steps] == list(tokens)
    first = {ids[0] for ids in recommender.catalog.semantic_ids}
    assert all(recommender.explain(history, item).steps[0].choices == len(first) for item in ITEMS)
    ranks = {recommender.explain(history, item).steps[0].rank for item in ITEMS}
    assert ranks == set(range(1, len(first) + 1))
    assert recommender.explain(history, "twin").shares_id_with == ["i001"]
    with pytest.raises(ValueError, match="no known item"):
        recommender.explain([], "twin")


def test_titles_counts_and_teacher_are_saved_and_used_in_explanations(recommender, tmp_path):
    teacher = Popularity.fit([["i010", "twin", "i010"], ["i010"]], recommender.catalog.items)
    titles, counts = {"i010": "A lamp", "twin": "Ein Stuhl für zwei"}, torch.arange(len(ITEMS))
    Recommender(
        recommender.model, TOKENIZER, recommender.catalog, 5, titles=titles, item_counts=counts, teacher=teacher
    ).save_pretrained(tmp_path)
    loaded = Recommender.from_pretrained(tmp_path)
    assert loaded.titles == titles and loaded.item_counts.tolist() == counts.tolist()
    found = {r.item: r.title for r in loaded.recommend([["short"]], k=len(ITEMS))[0]}
    assert found == {item: titles.get(item) for item in ITEMS}
    explanation = loaded.explain(["short"], "twin")
    assert explanation.title == "Ein Stuhl für zwei" and explanation.teacher_rank == 2
    assert explanation.teacher_probability == pytest.approx(2 / (4 + 2 + len(ITEMS) - 2))
    assert recommender.explain(["short"], "twin").teacher_rank is None


@pytest.mark.parametrize("title", [float("nan"), ["a"], "pen \ud83d"])
def test_invalid_titles_are_refused(recommender, tmp_path, title):
    with pytest.raises(ValueError, match="The title of item 'i010' (must be text|holds half a character)"):
        Recommender(recommender.model, TOKENIZER, recommender.catalog, 5, titles={"i010": title})
    recommender.save_pretrained(tmp_path)
    titles = [title if item == "i010" else None for item in recommender.catalog.items]
    (tmp_path / "item_details.json").write_text(json.dumps({"titles": titles}))
    with pytest.raises(ValueError, match="item 'i010'"):
        Recommender.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["qwen3", "t5", "bart"])
@pytest.mark.parametrize("heads", [False, True])
def test_a_loaded_recommender_equals_the_saved_one(tmp_path, kind, heads):
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
        ([["i010"], ["i010"], []], {"batch_size": 1}, ValueError, "row 2 is empty.*has no counts"),
        ([["i010"]], {"allowed_items": []}, ValueError, "allowed_items is empty"),
        ([["i010"]], {"allowed_items": ["nonsense"]}, ValueError, "allowed_items holds 'nonsense'"),
        (["i010"], {}, TypeError, "row 0 is 'i010'; it must be a list of items"),
        ([3], {}, TypeError, "row 0 is 3; it must be a list of items"),
        (None, {}, TypeError, "histories is None; it must be a list of lists"),
        ("i010", {}, TypeError, "histories is 'i010'; it must be a list of lists"),
        ([["i010"], [["i010"]]], {}, TypeError, r"\['i010'\] is not an item; each history is a list of items"),
        ([["i010"]], {"names": ["a", "b"]}, ValueError, "names has 2 entries for 1 histories"),
        ([["i010"]], {"names": 5}, TypeError, "names is of type int"),
        ([["i010"]], {"num_beams": "20"}, ValueError, "num_beams is '20'; it must be a whole number"),
        ([["i010"]], {"num_beams": 20.5}, ValueError, "num_beams is 20.5; it must be a whole number"),
        ([["i010"]], {"exclude_seen": "false"}, TypeError, "exclude_seen is of type str; it must be True or False"),
        ([["i010"]], {"seed": None, "strategy": "sample"}, TypeError, "seed is of type NoneType; it must be a whole"),
        ([["i010"]], {"seed": 0.5}, TypeError, "seed is of type float; it must be a whole number"),
        ([["i010"]], {"allowed_items": 5}, TypeError, "allowed_items is 5; it must be a list of items"),
        ([["i010"]], {"allowed_items": "i010"}, TypeError, "allowed_items is 'i010'; it must be a list of items"),
        ([["i010"]], {"allowed_items": [["i010"]]}, TypeError, "allowed_items holds a list"),
        ([["i010"]], {"exclude": 5}, TypeError, "exclude is 5; it must be a list"),
        ([["i010"]], {"exclude": [None]}, TypeError, r"exclude\[0\] is None; it must be a collection"),
        ([["i010"]], {"k": 0}, ValueError, "k is 0"),
        ([["i010"]], {"batch_size": 0}, ValueError, "batch_size is 0; it must be a whole number of at least 1"),
        ([["i010"]], {"batch_size": -1}, ValueError, "batch_size is -1; it must be a whole number of at least 1"),
        ([["i010"]], {"k": 10, "num_beams": 9}, ValueError, "num_beams is 9, less than k; it must be at least 10"),
        ([["i010"]], {"strategy": "greedy"}, ValueError, "strategy is 'greedy'; choose 'beam' or 'sample'"),
        (
            [["i010"]],
            {"strategy": "sample", "temperature": 0.0},
            ValueError,
            "temperature is 0.0; it must be a finite number above 0",
        ),
        ([["i010"]], {"strategy": "sample", "temperature": float("nan")}, ValueError, "temperature is nan"),
        ([["i010"]], {"temperature": 2.0}, ValueError, "strategy 'beam' does not sample. Use strategy='sample'"),
    ],
)
def test_invalid_arguments_are_errors_with_a_remedy(recommender, histories, options, error, message):
    with pytest.raises(error, match=message):
        recommender.recommend(histories, **options)


def test_more_beams_than_leaves_find_the_same_lists(recommender):
    expected = recommender.recommend(HISTORIES, k=24, num_beams=24)
    assert recommender.recommend(HISTORIES, k=24, num_beams=10**12) == expected  # not a table of 10**12 columns
    assert [found[:24] for found in recommender.recommend(HISTORIES, k=10**12)] == expected
    drawn = recommender.recommend(HISTORIES, k=10**12, strategy="sample")
    assert all(sorted(one.item for one in found) == sorted(ITEMS) for found in drawn)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "outputs/model"}, TypeError, "model is of type str; it must be a language model"),
        ({"tokenizer": None}, TypeError, "tokenizer is of type NoneType; it must be a tokenizer"),
        ({"catalog": {"i010": ("<a_0>",)}}, TypeError, "catalog is of type dict; it must be an ItemCatalog"),
        ({"encoder": 5}, TypeError, "encoder is of type int; it must be a PromptEncoder"),
        ({"titles": ["a lamp"]}, TypeError, "titles is of type list; it must be a dictionary"),
        ({"teacher": lambda histories: 1}, TypeError, "teacher is of type function; it must be a teacher"),
        ({"item_counts": list(range(24))}, TypeError, "item_counts is of type list; it must be a tensor"),
        ({"item_counts": torch.ones(3)}, ValueError, r"item_counts has shape \(3,\), but the catalog has 24 items"),
        ({"item_counts": torch.full((24,), float("nan"))}, ValueError, "item_counts has nan for item 'i001'"),
        ({"max_history_items": 2.5}, ValueError, "max_history_items is 2.5"),
    ],
)
def test_wrong_parts_of_a_recommender_are_refused(changes, error, message):
    parts = {"model": tiny_model(len(TOKENIZER)), "tokenizer": TOKENIZER, "catalog": make_catalog()}
    with pytest.raises(error, match=message):
        Recommender(**(parts | changes))
    with pytest.raises(TypeError, match="directory is of type NoneType; it must be the path"):
        Recommender.from_pretrained(None)


def test_an_explanation_of_what_is_not_an_item_is_refused(recommender):
    with pytest.raises(TypeError, match=r"\['i010'\] is not an item; give a list|\['i010'\] is not an item; items"):
        recommender.explain(["i010"], ["i010"])
    with pytest.raises(TypeError, match="row 0 is 'i010'; it must be a list of items"):
        recommender.explain("i010", "i010")


def test_a_missing_folder_and_a_plain_language_model_have_different_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Recommender.from_pretrained(tmp_path / "nowhere")
    tiny_model(len(TOKENIZER)).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"catalog\.json is missing"):
        Recommender.from_pretrained(tmp_path)


def test_saved_adapters_keep_their_temperature_and_a_full_model_replaces_them(tmp_path):
    tiny_model(len(TOKENIZER)).save_pretrained(tmp_path / "base")
    model = load_backbone(tmp_path / "base")
    set_temperature(model, 0.25)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    first = Recommender(adapted, TOKENIZER, make_catalog())
    first.save_pretrained(tmp_path / "out")
    loaded = Recommender.from_pretrained(tmp_path / "out")
    assert loaded.policy.temperature == 0.25
    assert loaded.recommend([["i010"]], k=2)[0][0].log_prob == pytest.approx(
        first.recommend([["i010"]], k=2)[0][0].log_prob, abs=1e-4
    )
    (tmp_path / "out" / "policy_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"policy_config.json holds \[1\]; it must hold a JSON object"):
        Recommender.from_pretrained(tmp_path / "out")
    full = Recommender(tiny_model(len(TOKENIZER), seed=3), TOKENIZER, make_catalog())
    full.save_pretrained(tmp_path / "out")
    again = Recommender.from_pretrained(tmp_path / "out")
    assert [r.item for r in again.recommend([["i010"]], k=5)[0]] == [
        r.item for r in full.recommend([["i010"]], k=5)[0]
    ]


def test_a_custom_subclass_is_loaded_as_its_base_class(tmp_path):
    class CustomLlama(LlamaForCausalLM):
        pass

    model = CustomLlama(tiny_model(len(TOKENIZER)).config).eval()
    Recommender(model, TOKENIZER, make_catalog()).save_pretrained(tmp_path)
    assert type(Recommender.from_pretrained(tmp_path).model) is LlamaForCausalLM
