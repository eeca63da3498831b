"""A recommender whose catalog changes: compared with one that is built from scratch with the same weights."""

import copy

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from gflowtrl import ItemCatalog, Recommender
from gflowtrl.catalog_change import CatalogConflict
from gflowtrl.data import PromptFormat, TextPromptEncoder, build_tokenizer
from gflowtrl.data.item_file import read_items
from gflowtrl.ensemble import Ensemble
from gflowtrl.rewards import GroundTruthReward
from gflowtrl.semantic_ids import ItemTokenizer, ResidualKMeans
from gflowtrl.teachers import ItemKNN
from tests.tiny import tiny_model, tiny_seq2seq
from tests.trainer.world import TOKENIZER, make_catalog, make_rows, make_trainer


COLORS = ("red", "blue", "green", "black", "white")
KINDS = ("lamp", "desk", "chair", "pen", "ink", "paper", "folder", "stapler")
SIZES = ("small", "large", "tiny", "broad", "long", "short", "thin")  # with them, no residuals are equal
FEATURES = {
    number: {"title": f"{COLORS[number % 5]} {KINDS[number // 5]} {SIZES[number**2 % 7]}"} for number in range(40)
}
TITLES = {item: row["title"] for item, row in FEATURES.items()}
NEW = {100: {"title": "red ink"}, 101: {"text": "white stapler"}, 102: {"title": "A green lamp", "brand": "Lux"}}
HISTORIES = [[3, 7, 11], [39], [20, 21, 22, 23, 24, 25]]
ALL = 50  # beams, so that every leaf is found


def make_item_tokenizer(collisions: str = "reassign", codes: int = 8) -> ItemTokenizer:
    return ItemTokenizer(ResidualKMeans(2, codes), collisions=collisions).fit(list(TITLES.values()), list(FEATURES))


def make_recommender(item_tokenizer=None, kind=tiny_model, ids=None, **options) -> Recommender:
    """A recommender of 40 items. The default item tokenizer uses all its codes, so new items have no new token."""
    if item_tokenizer is None:
        item_tokenizer = make_item_tokenizer()
        assert [len(level.unique()) for level in item_tokenizer.codes.T] == [8, 8]
    ids = item_tokenizer.semantic_ids if ids is None else ids
    tokenizer = build_tokenizer(ids)
    catalog = ItemCatalog.from_semantic_ids(ids, tokenizer)
    options = {"item_counts": torch.arange(len(ids)), "titles": TITLES, "item_tokenizer": item_tokenizer} | options
    return Recommender(kind(len(tokenizer)), tokenizer, catalog, 5, **options)


def probabilities(recommender: Recommender, histories=HISTORIES) -> list[dict]:
    """The log-probability of every item that can be recommended, for each history."""
    found = recommender.recommend(histories, k=200, num_beams=200)
    return [{one.item: one.log_prob for one in row} for row in found]


def assert_equal_probabilities(actual: list[dict], expected: list[dict]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        assert list(one.values()) == pytest.approx([other[item] for item in one], abs=2e-5)


def from_scratch(changed: Recommender) -> Recommender:
    """A recommender of the same items, with a copy of the same weights, that never had another catalog."""
    catalog = changed.catalog
    ids = dict(zip(catalog.history_items, catalog.history_semantic_ids, strict=True))
    fresh = ItemCatalog.from_semantic_ids(ids, changed.tokenizer, catalog.retired)
    encoder, form = None, changed.encoder.format
    if form is not None:
        encoder = TextPromptEncoder(fresh, changed.tokenizer, changed.titles, form, 5)
    counts = changed.item_counts
    return Recommender(copy.deepcopy(changed.model), changed.tokenizer, fresh, 5, encoder, item_counts=counts)


def uncut(recommender: Recommender, history) -> dict[tuple, dict[str, float]]:
    """The distribution over the next tokens after every prefix: prefix of tokens -> token -> probability."""
    nodes: dict[tuple, dict[str, float]] = {}
    for item in recommender.catalog.items:
        explanation = recommender.explain(history, item)
        prefix = ()
        for step in explanation.steps:
            nodes.setdefault(prefix, {})[step.token] = step.probability
            prefix = (*prefix, step.token)
    return nodes


@pytest.mark.parametrize("kind", [tiny_model, tiny_seq2seq])
@pytest.mark.parametrize("collisions", ["reassign", "level", "keep"])
def test_after_adding_it_is_the_recommender_built_from_scratch(kind, collisions):
    before = make_recommender(make_item_tokenizer(collisions), kind)
    old = probabilities(before)
    after = before.add_items(NEW)
    assert after.catalog.items == [*FEATURES, *NEW] and after.catalog.version == 2
    assert_equal_probabilities(probabilities(after), probabilities(from_scratch(after)))
    assert_equal_probabilities(
        probabilities(after, [[100, 3], [102]]), probabilities(from_scratch(after), [[100, 3], [102]])
    )
    assert after.titles[100] == "red ink" and 101 not in after.titles
    ids = after.item_tokenizer.semantic_ids
    assert after.catalog.semantic_ids == [ids[item] for item in after.catalog.items]
    assert before.item_tokenizer.items == list(FEATURES)
    assert_equal_probabilities(probabilities(before), old)  # also if the tables of the shared model have grown


def test_after_retiring_each_node_is_renormalized_over_the_remaining_children():
    before, gone = make_recommender(make_item_tokenizer("keep")), [0, 7, 12, 13, 14, 39]
    after = before.retire_items(gone)
    assert after.catalog.items == [item for item in FEATURES if item not in gone] and after.catalog.retired == gone
    for history in ([3, 7, 11], [39]):  # histories with retired items
        old, new = uncut(before, history), uncut(after, history)
        assert new.keys() <= old.keys() and len(new) < len(old) or any(len(new[n]) < len(old[n]) for n in new)
        for prefix, children in new.items():
            total = sum(old[prefix][token] for token in children)
            assert sum(children.values()) == pytest.approx(1, abs=1e-5)
            for token, probability in children.items():
                assert probability == pytest.approx(old[prefix][token] / total, rel=1e-3)
    assert not {one.item for one in after.recommend([[3]], k=200, num_beams=200)[0]} & set(gone)


def test_a_retired_item_that_shares_its_leaf_leaves_it_to_the_others():
    ids = {0: ("<a_0>", "<b_0>"), 1: ("<a_0>", "<b_0>"), 2: ("<a_0>", "<b_1>"), 3: ("<a_1>", "<b_0>")}
    before = make_recommender(ids=ids, item_tokenizer=False, titles={}, item_counts=torch.tensor([9, 1, 1, 1]))
    before._item_tokenizer = None
    after = before.retire_items([0])
    expected = [{item: value for item, value in row.items() if item != 0} for row in probabilities(before, [[0, 3]])]
    assert_equal_probabilities(probabilities(after, [[0, 3]]), expected)
    assert [one.item for one in after.recommend([[]], k=9)[0]] == [1, 2, 3]  # by popularity
    assert after.explain([0], 1).shares_id_with == []


def test_opposite_changes_restore_the_answers():
    before = make_recommender()
    old, cold = probabilities(before), before.recommend([[]], k=50)
    assert_equal_probabilities(probabilities(before.add_items(NEW).retire_items(NEW)), old)
    gone = [0, 7, 12, 39]
    again = before.retire_items(gone).add_items({item: FEATURES[item] for item in gone})
    assert_equal_probabilities(probabilities(again), old)
    assert {one.item: one.log_prob for one in again.recommend([[]], k=50)[0]} == {
        one.item: pytest.approx(one.log_prob) for one in cold[0]
    }
    assert again.catalog.version == 3 and not again.catalog.retired
    both = before.with_change(before.plan_change(NEW, gone))
    one_by_one = before.retire_items(gone).add_items(NEW)
    assert_equal_probabilities(probabilities(both), probabilities(one_by_one))


def test_reports_count_what_changes():
    before = make_recommender(make_item_tokenizer("keep")).retire_items([5])
    report = before.plan_change({5: {}, 100: {"title": "red ink"}, 101: {"title": "red ink"}}, [7, 8]).report
    assert (report.added, report.restored, report.retired, report.items, report.version) == (2, 1, 2, 40, 3)
    assert report.sharing >= 2 and report.new_tokens == 0
    assert "2 items added, 1 restored, 2 retired: 40 items can be recommended (version 3" in str(report)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_get_the_rows_of_the_nearest_code(tied):
    ids = {item: path for item, path in make_item_tokenizer().semantic_ids.items()}
    item_tokenizer = make_item_tokenizer()
    code = int(item_tokenizer.codes[0, 0])
    kept = [row for row in range(40) if int(item_tokenizer.codes[row, 0]) != code]
    ids = {row: ids[row] for row in kept}
    before = make_recommender(item_tokenizer, lambda size: tiny_model(size, tie_word_embeddings=tied), ids=ids,
                              item_counts=torch.arange(len(ids)))  # fmt: skip
    size, weights = len(before.tokenizer), copy.deepcopy(before.model.state_dict())
    plan = before.plan_change({0: {}})  # an item that was tokenized, but not in the catalog
    token = item_tokenizer.semantic_ids[0][0]
    assert plan.report.new_tokens == 1 and list(plan.similar_tokens) == [token] and len(before.tokenizer) == size
    books = item_tokenizer.quantizer.codebooks[0]
    nearest = min(
        (int(item_tokenizer.codes[row, 0]) for row in kept), key=lambda c: float((books[c] - books[code]).norm())
    )
    assert plan.similar_tokens[token] == [f"<a_{nearest}>"]
    after = before.with_change(plan)
    new, old = after.tokenizer.convert_tokens_to_ids([token, f"<a_{nearest}>"])
    for table in (after.model.get_input_embeddings().weight, after.model.get_output_embeddings().weight):
        assert len(table) == size + 1 == new + 1 and torch.equal(table[new], table[old])
    for name, value in weights.items():
        assert torch.equal(after.model.state_dict()[name][: len(value)], value)
    assert_equal_probabilities(probabilities(after), probabilities(from_scratch(after)))
    with pytest.raises(ValueError, match="rows for the new tokens of another change"):
        before.with_change(plan)


def test_counts_are_those_of_the_items_with_or_without_the_retired_ones():
    changed = make_recommender().retire_items([7, 21])
    parts = changed.model, changed.tokenizer, changed.catalog
    counts = changed.item_counts
    popular = [[one.item for one in changed.recommend([[]], k=5)[0]]]
    for given in (counts, counts[:38]):
        again = Recommender(*parts, 5, item_counts=given)
        assert [[one.item for one in again.recommend([[]], k=5)[0]]] == popular
    for wrong in (counts[:37], counts[:39], torch.cat([counts, counts[:1]])):
        with pytest.raises(ValueError, match="item_counts has shape"):
            Recommender(*parts, 5, item_counts=wrong)
    counts = counts.clone()
    counts[39] = -1
    with pytest.raises(ValueError, match="-1 for item 21;"):
        Recommender(*parts, 5, item_counts=counts)


@pytest.mark.parametrize("prompt", ["plain", "text"])
def test_a_changed_recommender_is_saved_and_loaded(tmp_path, prompt):
    recommender = make_recommender()
    if prompt == "text":  # a word-level tokenizer without a word for "red" cannot encode titles
        form = PromptFormat("{history}", "{semantic_id} ")
        recommender.encoder = TextPromptEncoder(recommender.catalog, recommender.tokenizer, TITLES, form, 5)
    changed = recommender.retire_items([7, 21]).add_items(NEW)
    changed.save_pretrained(tmp_path)
    loaded = Recommender.from_pretrained(tmp_path)
    assert loaded.catalog.retired == [7, 21] and loaded.titles == changed.titles
    assert loaded.item_counts.tolist() == changed.item_counts.tolist()
    histories = [*HISTORIES, [7, 100], [21]]
    assert_equal_probabilities(probabilities(loaded, histories), probabilities(changed, histories))
    assert_equal_probabilities(probabilities(changed, histories), probabilities(from_scratch(changed), histories))
    assert loaded.item_tokenizer.semantic_ids == changed.item_tokenizer.semantic_ids
    again = loaded.add_items({7: {}, 103: {"title": "blue pen"}})
    again.save_pretrained(tmp_path)
    assert_equal_probabilities(probabilities(Recommender.from_pretrained(tmp_path)), probabilities(again))


def test_titles_are_in_the_prompts_of_new_items():
    tokens = {number: (f"<a_{number % 8}>", f"<b_{number // 8}>") for number in range(40)}
    words = {200 + row: (word,) for row, word in enumerate(["A", *COLORS, *KINDS, *SIZES])}
    tokenizer = build_tokenizer(tokens | words)
    catalog, form = (
        ItemCatalog.from_semantic_ids(tokens, tokenizer),
        PromptFormat("{history}", "{title} {semantic_id} "),
    )
    encoder = TextPromptEncoder(catalog, tokenizer, TITLES, form, 5)
    before = Recommender(tiny_model(len(tokenizer)), tokenizer, catalog, 5, encoder, TITLES)
    new = {100: {"title": "A red ink folder", "semantic_id": ["<a_0>", "<b_0>"]}}
    after = before.retire_items([3]).add_items(new)
    prompt = after.encoder([[3, 100, 39]])["input_ids"][0]
    shown = " ".join(tokenizer.convert_ids_to_tokens(prompt))
    assert shown == f"{TITLES[3]} <a_3> <b_0> A red ink folder <a_0> <b_0> {TITLES[39]} <a_7> <b_4>"
    with pytest.raises(ValueError, match="items have none, for example 101"):
        before.add_items({101: {"semantic_id": ["<a_0>", "<b_0>"]}})
    old, table = probabilities(before), before.model.get_input_embeddings().weight.clone()
    word = before.plan_change({100: {"title": "A red ink", "semantic_id": ["lamp", "<b_0>"]}})
    assert word.report.new_tokens == 0
    with_word = before.with_change(word)  # titles contain it, so that its row must stay
    assert torch.equal(before.model.get_input_embeddings().weight, table)
    assert_equal_probabilities(probabilities(before), old)
    assert 100 in probabilities(with_word)[0]


def test_explanations_know_which_items_have_a_teacher():
    teacher = ItemKNN.fit([[item, (item + 1) % 40, (item + 2) % 40] for item in range(40)], list(FEATURES))
    before = make_recommender(teacher=teacher)
    after = before.retire_items([4, 5]).add_items(NEW)
    assert after.explain([3], 100).teacher_rank is None and after.explain([100], 3).teacher_rank is None
    old, new = before.explain([3], 6), after.explain([100, 3, 4], 6)
    scores = teacher.score([[3, 4]])[0]
    scores[[4, 5]] = -torch.inf
    assert new.teacher_probability == pytest.approx(float(scores.softmax(-1)[6]))
    assert new.teacher_rank == 1 + int((scores > scores[6]).sum())
    assert old.teacher_probability == pytest.approx(float(teacher.score([[3]])[0].softmax(-1)[6]))


def test_seen_and_excluded_items_may_be_retired():
    after = make_recommender().retire_items([7, 3])
    (found,) = after.recommend([[3, 7, 11]], k=50, num_beams=ALL, exclude_seen=True, exclude=[[7, 12]])
    assert sorted(one.item for one in found) == [item for item in FEATURES if item not in (3, 7, 11, 12)]
    (drawn,) = after.recommend([[3, 7, 11]], k=50, strategy="sample", exclude_seen=True)
    assert sorted(one.item for one in drawn) == [item for item in FEATURES if item not in (3, 7, 11)]
    with pytest.raises(ValueError, match="allowed_items holds 7"):
        after.recommend([[3]], allowed_items=[7, 8])
    with pytest.warns(UserWarning, match="1 items of the histories are not in the catalog .* the first is 99"):
        after.recommend([[7, 99]])


@pytest.mark.parametrize(
    ("add", "retire", "error", "message"),
    [
        ({}, [], ValueError, "The change is empty"),
        ({3: {"title": "x"}}, [], CatalogConflict, "Item 3 is in the catalog already"),
        ({}, [99], CatalogConflict, "Item 99 cannot be retired, because it is not in the catalog"),
        ({}, [39, 0, 1], CatalogConflict, "Item 39 cannot be retired, because it is retired already"),
        ({100: {"title": "x"}}, [100], ValueError, "Item 100 is to be added and to be retired"),
        ({}, range(39), CatalogConflict, "Every item would be retired"),
        ({"100": {"title": "x"}}, [], ValueError, "Item '100' is of type str, but the items .* of type int"),
        ({2**63: {"title": "x"}}, [], ValueError, "whole number of at most 64 bits"),
        ({True: {"title": "x"}}, [], ValueError, "Item True is neither text nor"),
        ({100: {"price": 3}}, [], ValueError, "Item 100 has no text. Give text, or one of the features title, brand"),
        ({100: "red lamp"}, [], ValueError, "Item 100 has 'red lamp'; it must have features by name"),
        ({100: {"title": 3}}, [], ValueError, "The title of item 100 must be text"),
        ({100: {"title": "\ud800"}}, [], ValueError, "half a character"),
        ({100: {"text": ["red"]}}, [], ValueError, "The text of item 100 must be text"),
        ({100: {"title": "x", "semantic_id": ["<a_0>"]}}, [], ValueError, "this recommender makes its ids"),
    ],
)  # fmt: skip
def test_wrong_changes_are_refused(add, retire, error, message):
    recommender = REFUSING
    with pytest.raises(error, match=message):
        recommender.plan_change(add, retire)
    assert recommender.catalog.version == 2 and recommender.item_tokenizer.items == list(FEATURES)


def test_new_tokens_need_merged_adapters():
    ids = {number: (f"<a_{number % 8}>", f"<b_{number // 8}>") for number in range(40)}
    before = make_recommender(item_tokenizer=False, ids=ids)
    before._item_tokenizer = None
    model = get_peft_model(before.model, LoraConfig(target_modules=["q_proj"]))
    adapted = Recommender(model, before.tokenizer, before.catalog, 5)
    with pytest.raises(ValueError, match="which a model with adapters cannot get. Merge the adapters first"):
        adapted.add_items({100: {"semantic_id": ["<a_0>", "<z_0>"]}})
    larger = adapted.add_items({100: {"semantic_id": ["<a_0>", "<b_0>"]}})  # no new token
    assert 100 in probabilities(larger)[0]


@pytest.mark.parametrize(
    ("add", "retire", "message"),
    [
        ([100], [], "add is of type list; it must be a dictionary"),
        ({}, "39", "The items to retire are '39'; they must be a list"),
        ({}, 39, "The items to retire are 39; they must be a list"),
        ({}, [[39]], "The items to retire hold a list or a dictionary"),
    ],
)
def test_changes_of_a_wrong_type_are_refused(add, retire, message):
    with pytest.raises(TypeError, match=message):
        REFUSING.plan_change(add, retire)


REFUSING = make_recommender().retire_items([39])


def test_ids_are_needed_without_an_item_tokenizer(tmp_path):
    with_one = make_recommender()
    with_one.save_pretrained(tmp_path)
    without = Recommender(with_one.model, with_one.tokenizer, with_one.catalog)
    with pytest.raises(ValueError, match="Item 100 has no semantic_id, and the recommender has no item tokenizer"):
        without.add_items({100: {"title": "red ink"}})
    with pytest.raises(ValueError, match="must be a list of tokens"):
        without.add_items({100: {"semantic_id": "<a_0>"}})
    with pytest.raises(ValueError, match=r"id <a_0> of item 100 is a prefix of <a_0> <b_\d> of item \d"):
        without.add_items({100: {"semantic_id": ["<a_0>"]}})
    after = without.add_items({100: {"semantic_id": ["<a_0>", "<z_9>"]}})  # a new token, like the others of its level
    table = after.model.get_input_embeddings().weight
    others = with_one.catalog.item_token_ids[:, 1].unique()
    assert torch.allclose(table[-1], table[others].mean(0), atol=1e-6)
    other = make_item_tokenizer(codes=7)
    other.save_pretrained(tmp_path / "item_tokenizer")
    with pytest.raises(ValueError, match="item_tokenizer has not made the ids of this recommender: .* items"):
        Recommender.from_pretrained(tmp_path).add_items({100: {"title": "red ink"}})
    vectors = ItemTokenizer(ResidualKMeans(2, 8)).fit(torch.randn(40, 4), list(FEATURES))
    with pytest.raises(ValueError, match="made from vectors"):
        make_recommender(vectors).add_items({100: {"title": "red ink"}})


def test_ensembles_need_members_with_the_same_retired_items():
    before = make_recommender()
    after = before.retire_items([3])
    (found,), (expected,) = (one.recommend([[3, 7]], k=40, num_beams=ALL) for one in (Ensemble([after, after]), after))
    assert {one.item: one.log_prob for one in found} == pytest.approx(
        {one.item: one.log_prob for one in expected}, abs=1e-4
    )
    with pytest.raises(ValueError, match="does not have 1 items of member"):
        Ensemble([before, after])
    unknown = ItemCatalog(after.catalog.items, after.catalog.semantic_ids, after.catalog.item_token_ids)
    with pytest.raises(ValueError, match="does not have 1 items of member .*, for example 3"):
        Ensemble([after, Recommender(before.model, before.tokenizer, unknown)])


def test_a_changed_recommender_is_trained_further(tmp_path):
    recommender = Recommender(tiny_model(len(TOKENIZER)), TOKENIZER, make_catalog(), 5, item_counts=torch.arange(24))
    new = {"i000": {"semantic_id": ["<a_0>", "<b_0>", "<c_0>"], "title": "A lamp"}}
    changed = recommender.retire_items(["i010"]).add_items(new)
    changed.save_pretrained(tmp_path / "model")
    rows = [row for row in make_rows() if "i010" not in [*row["history"], row["target"]]]
    rows[0]["history"], rows[1]["target"] = ["i000"], "i000"
    trainer = make_trainer(
        tmp_path / "out", GroundTruthReward(), str(tmp_path / "model"), catalog=None, processing_class=None,
        max_steps=1, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:4]),
    )  # fmt: skip
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_coverage@10"] <= 1
    trainer.save_model()
    saved = Recommender.from_pretrained(tmp_path / "out")
    assert saved.catalog.retired == ["i010"] and saved.catalog.version == 3 and saved.titles == {"i000": "A lamp"}
    assert saved.item_counts.tolist()[:24] == changed.item_counts.tolist()[:24]
    assert {one.item for one in saved.recommend([["i010", "i000"]], k=24, num_beams=24)[0]} == set(
        changed.catalog.items
    )


def test_items_are_read_from_parquet(tmp_path):
    rows = [{"item": "B1", "title": "red ink", "price": 3}, {"item": "B2", "title": None, "price": 4}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "new.parquet")
    assert read_items(tmp_path / "new.parquet") == {"B1": {"title": "red ink", "price": 3}, "B2": {"price": 4}}
    pq.write_table(pa.Table.from_pylist([*rows, rows[0]]), tmp_path / "new.parquet")
    with pytest.raises(ValueError, match="'B1' is on an earlier row already"):
        read_items(tmp_path / "new.parquet")
    (tmp_path / "mixed.jsonl").write_text('{"item": 1}\n{"item": "B1"}\n')
    with pytest.raises(ValueError, match="all whole numbers or all strings"):
        read_items(tmp_path / "mixed.jsonl")
