"""Nearest neighbors, transitions, texts and learned mixture weights, compared with loops over their definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from gflowtrl.data import Step, Windows
from gflowtrl.teachers import (
    EASE,
    ItemKNN,
    ItemText,
    MixtureTeacher,
    Popularity,
    SASRec,
    TeacherModule,
    Transitions,
    load_teacher,
    score_histories,
    teacher_scores,
    top_items,
)
from gflowtrl.teachers.mixture import _most_likely_shares


ITEMS = ["tea", "cup", "pot", "ink", "pen", "pad", "bow", "oar"]
HISTORIES = [["tea"], ["pen", "cup", "tea"], ["oar", "ink", "ink"], []]
SEQUENCES = st.lists(st.lists(st.sampled_from(ITEMS), min_size=0, max_size=6), min_size=1, max_size=8)


def random_sequences(number: int = 40, seed: int = 0) -> list[list[str]]:
    generator = np.random.default_rng(seed)
    return [[ITEMS[i] for i in generator.permutation(8)[: generator.integers(2, 7)]] for _ in range(number)]


def rows_of(sequences: list[list[str]]) -> list[dict]:
    return [{"history": sequence[:-1], "target": sequence[-1]} for sequence in sequences]


def by_recency(history: list[str], decay: float, table: np.ndarray) -> np.ndarray:
    """Average the rows of a table over a history, each item `decay` times as heavy as the one after it."""
    weights = [decay ** (len(history) - 1 - place) for place in range(len(history))]
    total = sum((w * table[ITEMS.index(item)] for w, item in zip(weights, history, strict=True)), np.zeros(8))
    return total / max(sum(weights), 1e-300)


def strongest(table: np.ndarray, k: int) -> np.ndarray:
    kept = np.zeros_like(table)
    for row, values in enumerate(table):
        for column in sorted(range(len(values)), key=lambda c, v=values: (-v[c], c))[:k]:
            kept[row, column] = values[column]
    return kept


@settings(max_examples=30, deadline=None)
@given(SEQUENCES, st.integers(1, 9), st.sampled_from([1.0, 0.5]), st.sampled_from(["cosine", "bm25"]))
def test_item_knn_averages_the_largest_cosines(sequences, k, decay, weighting):
    users = [set(sequence) for sequence in sequences]
    mean = sum(map(len, users)) / len(users)
    weights = [1.0] * len(users)
    if weighting == "bm25":
        weights = [2.2 / (1 + 1.2 * (1 - 0.75 + 0.75 * len(user) / max(mean, 1))) for user in users]
    vectors = np.array([[w * (item in user) for user, w in zip(users, weights, strict=True)] for item in ITEMS])
    table = np.zeros((8, 8))
    for i in range(8):
        for j in range(8):
            norms = np.linalg.norm(vectors[i]) * np.linalg.norm(vectors[j])
            table[i, j] = vectors[i] @ vectors[j] / norms if i != j and norms else 0
    table = strongest(table.round(12), k)
    teacher = ItemKNN.fit(sequences, ITEMS, neighbors=k, decay=decay, weighting=weighting)
    if k >= 7:  # fewer neighbors depend on how equal cosines are rounded
        expected = np.stack([by_recency(history, decay, table) for history in HISTORIES])
        np.testing.assert_allclose(teacher.score(HISTORIES).numpy(), expected, atol=1e-6)
    ours = teacher.table.strengths.sort(1, descending=True).values.numpy()
    np.testing.assert_allclose(ours, -np.sort(-table, 1)[:, : min(k, 8)], atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(SEQUENCES, st.integers(1, 9), st.sampled_from([1.0, 0.5]), st.integers(1, 7), st.sampled_from([0.1, 30.0]))
def test_transitions_are_the_smoothed_probabilities_of_later_items(sequences, k, decay, window, smoothing):
    counts, popularity = np.zeros((8, 8)), np.ones(8)
    for sequence in sequences:
        for place, item in enumerate(sequence):
            popularity[ITEMS.index(item)] += 1
            for distance in range(1, min(window, len(sequence) - 1 - place) + 1):
                counts[ITEMS.index(item), ITEMS.index(sequence[place + distance])] += 1 / distance
    popularity /= popularity.sum()
    counts = strongest(counts, k)
    options = {"neighbors": k, "decay": decay, "window": window, "smoothing": smoothing}
    probs = Transitions.fit(sequences, ITEMS, **options).score(HISTORIES).exp()
    torch.testing.assert_close(probs.sum(1), torch.ones(4))
    if k >= 8:  # fewer successors depend on how equal sums are rounded
        table = (counts + smoothing * popularity) / (counts.sum(1, keepdims=True) + smoothing)
        expected = [by_recency(history, decay, table) if history else popularity for history in HISTORIES]
        np.testing.assert_allclose(probs.numpy(), np.stack(expected), rtol=1e-4, atol=1e-7)


def test_the_most_frequent_successors_are_kept():
    sequences = [["tea", "cup"]] * 3 + [["tea", "pot"]] * 2 + [["tea", "ink"]]
    teacher = Transitions.fit(sequences, ITEMS, neighbors=2, smoothing=1.0)
    popularity = torch.tensor([7.0, 4, 3, 2, 1, 1, 1, 1]) / 20
    expected = (torch.tensor([0.0, 3, 2, 0, 0, 0, 0, 0]) + popularity) / 6  # the count of ink is dropped
    torch.testing.assert_close(teacher.score([["tea"]])[0].exp(), expected)


def test_item_text_is_the_cosine_to_the_mean_vector_of_the_history():
    vectors = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    vectors[3] = 0  # an item without a text
    teacher = ItemText.fit([], ITEMS, vectors=vectors, decay=0.5)
    table = vectors.double().numpy() / np.maximum(
        np.linalg.norm(vectors.double().numpy(), axis=1, keepdims=True), 1e-12
    )
    for history, scores in zip(HISTORIES, teacher.score(HISTORIES).numpy(), strict=True):
        profile = np.zeros(5)
        for place, item in enumerate(history):
            profile += 0.5 ** (len(history) - 1 - place) * table[ITEMS.index(item)]
        norm = np.linalg.norm(profile)
        np.testing.assert_allclose(scores, table @ profile / (norm if norm else 1), atol=1e-6)


def new_teachers() -> list[TeacherModule]:
    sequences, vectors = random_sequences(), torch.eye(8)[:, :6] + 0.1
    rows = rows_of(sequences)
    return [
        ItemKNN.fit(sequences, ITEMS, rows, neighbors=3),
        Transitions.fit(sequences, ITEMS, neighbors=3),
        ItemText.fit(sequences, ITEMS, rows, vectors=vectors),
    ]


@pytest.mark.parametrize("kind", [0, 2])
def test_temperatures_maximize_the_likelihood(kind):
    teacher, rows = new_teachers()[kind], rows_of(random_sequences())
    targets = torch.tensor([ITEMS.index(row["target"]) for row in rows])
    raw = teacher.raw_scores([row["history"] for row in rows])
    losses = {t: torch.nn.functional.cross_entropy(raw / t, targets) for t in teacher.temperature_grid}
    assert teacher.config["temperature"] == min(losses, key=losses.get)
    torch.testing.assert_close(teacher.score(HISTORIES), teacher.raw_scores(HISTORIES) / teacher.config["temperature"])


@pytest.mark.parametrize("kind", range(3))
def test_saving_and_loading_changes_nothing(kind, tmp_path):
    teacher = new_teachers()[kind]
    teacher.save_pretrained(tmp_path)
    loaded = load_teacher(tmp_path)
    assert type(loaded) is type(teacher)
    torch.testing.assert_close(loaded.score(HISTORIES), teacher.score(HISTORIES), rtol=0, atol=0)


def test_bad_options_are_named():
    for fit, message in (
        (lambda: ItemKNN.fit([["tea"]], ITEMS, neighbors=0), "neighbors is 0"),
        (lambda: ItemKNN.fit([["tea"]], ITEMS, decay=0.0), r"decay is 0.0; it must be a number in \(0, 1\]"),
        (lambda: ItemKNN.fit([["tea"]], ITEMS, weighting="bm26"), "weighting is 'bm26'; choose 'cosine' or 'bm25'"),
        (lambda: Transitions.fit([["tea"]], ITEMS, window=0), "window is 0"),
        (lambda: Transitions.fit([["tea"]], ITEMS, smoothing=0), "smoothing is 0"),
        (
            lambda: ItemText.fit([], ITEMS, vectors=torch.ones(7, 2)),
            r"vectors has shape \(7, 2\), but there are 8 items",
        ),
        (lambda: ItemText.fit([], ITEMS, vectors=torch.full((8, 2), math.nan)), "The input of ItemText"),
        (lambda: ItemKNN.fit([["gnu"]], ITEMS), "Item 'gnu' is not in the catalog"),
        (lambda: SASRec.fit([["tea", "cup"]], ITEMS, average=0), "average is 0"),
        (lambda: SASRec.fit([["tea", "cup"]], ITEMS, weight_decay=-1), "weight_decay is -1"),
        (lambda: SASRec.fit([["tea", "cup"]], ITEMS, negatives=0), "negatives is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            fit()


# ---------------------------------------------------------------------------------------------------- learned weights
def test_learned_shares_are_those_of_a_general_optimizer():
    probs = torch.rand(200, 3, dtype=torch.double, generator=torch.Generator().manual_seed(1)) ** 4
    shares, value = _most_likely_shares(probs)

    def loss(free: np.ndarray) -> float:
        weights = np.exp(free - free.max())
        return -np.log(probs.numpy() @ (weights / weights.sum())).mean()

    best = minimize(loss, np.zeros(3), method="BFGS")
    assert value == pytest.approx(-best.fun, abs=1e-8)
    np.testing.assert_allclose(shares.numpy(), np.exp(best.x) / np.exp(best.x).sum(), atol=1e-3)


def test_learned_weights_maximize_the_likelihood_of_the_mixture(caplog):
    sequences = random_sequences()
    rows = rows_of(random_sequences(seed=1))
    parts = [Transitions.fit(sequences, ITEMS, smoothing=1.0), Popularity.fit(sequences, ITEMS)]
    targets = torch.tensor([ITEMS.index(row["target"]) for row in rows])

    def log_likelihood(mixture: TeacherModule) -> float:
        scores = mixture.score([row["history"][-2:] for row in rows])
        return -float(torch.nn.functional.cross_entropy(scores, targets))

    mixture = MixtureTeacher(dict.fromkeys(parts, 1.0))
    with caplog.at_level("INFO"):
        found = mixture.learn_weights(rows, max_history_items=2)
    assert found == pytest.approx(log_likelihood(mixture), abs=1e-5)
    grid = [
        log_likelihood(MixtureTeacher({parts[0]: share, parts[1]: 1 - share})) for share in np.arange(1, 100) / 100
    ]
    assert max(grid) - 1e-6 <= found <= max(grid) + 1e-3
    assert f"Transitions {mixture.weights[0]:.3f}, Popularity {mixture.weights[1]:.3f}" in caplog.text


def test_a_useless_part_gets_a_weight_that_can_be_saved(tmp_path):
    rows = [{"history": ["tea"], "target": "cup"}]
    good, bad = Transitions.fit([["tea", "cup"]] * 50, ITEMS), Popularity.fit([["tea"]] * 99, ITEMS)
    mixture = MixtureTeacher({good: 1.0, bad: 1.0})
    mixture.learn_weights(rows)
    assert 0 < mixture.weights[1] < 1e-5 and sum(mixture.weights) == pytest.approx(1)
    mixture.save_pretrained(tmp_path)
    torch.testing.assert_close(load_teacher(tmp_path).score([["tea"]]), mixture.score([["tea"]]))


def test_weights_that_cannot_be_learned_are_refused():
    parts = [{"type": "ease", "weight": "learned"}, {"type": "popularity", "weight": "learned"}]
    with pytest.raises(ValueError, match="set normalization to 'softmax'"):
        MixtureTeacher.check_options(parts=parts, normalization="zscore")
    with pytest.raises(ValueError, match="either all of them are 'learned', or none is"):
        MixtureTeacher.check_options(parts=[parts[0], {"type": "popularity"}])
    with pytest.raises(ValueError, match="validation has no rows"):
        MixtureTeacher({Popularity(ITEMS): 1.0}).learn_weights([])
    MixtureTeacher.check_options(parts=parts)


# ----------------------------------------------------------------------------------------------------------- histories
def test_a_teacher_with_its_own_length_reads_the_whole_history():
    torch.manual_seed(0)
    own, of_prompt = SASRec(ITEMS, 4, width=8, full_history=True), SASRec(ITEMS, 4, width=8)
    ease = EASE.fit(random_sequences(), ITEMS)
    mixture = MixtureTeacher({own: 1.0, of_prompt: 1.0, ease: 1.0})
    history, targets = ["pen", "oar", "tea", "ink", "cup"], ["pot"]
    windows = Windows.pack([history[-2:]], targets)
    step = Step({}, torch.arange(1), torch.full((1,), -1), {"history": [history]}, windows=windows)
    expected: dict[TeacherModule, Tensor] = {
        own: own.score([history[-4:]]),
        of_prompt: of_prompt.score([history[-2:]]),
        ease: ease.score([history[-2:]]),
    }
    for teacher, scores in expected.items():
        torch.testing.assert_close(teacher_scores(teacher, step, "test"), scores)
        torch.testing.assert_close(score_histories(teacher, [history], 2), scores)
        assert top_items(teacher, [history], 1, max_history_items=2).item() == int(scores.argmax())
    total = torch.stack([scores.softmax(-1) for scores in expected.values()]).mean(0)
    torch.testing.assert_close(teacher_scores(mixture, step, "test").softmax(-1), total)
    torch.testing.assert_close(score_histories(mixture, [history], 2).softmax(-1), total)


# -------------------------------------------------------------------------------------------------------------- SASRec
def test_sasrec_averages_the_weights_of_its_best_epochs():
    """Without validation rows the best epochs are the last ones, each of which a shorter training ends with."""
    train = random_sequences()
    options = {"width": 8, "learning_rate": 1e-2, "progress": False, "batch_size": 32, "weight_decay": 0.1}
    states = [SASRec.fit(train, ITEMS, epochs=epochs, **options).state_dict() for epochs in (3, 4)]
    averaged = SASRec.fit(train, ITEMS, epochs=4, average=2, **options).state_dict()
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)


def test_weight_decay_shrinks_the_weights():
    options = {"width": 8, "learning_rate": 1e-2, "progress": False, "epochs": 5}
    norms = [
        sum(p.norm() for p in SASRec.fit(random_sequences(), ITEMS, weight_decay=decay, **options).parameters())
        for decay in (0.0, 5.0)
    ]
    assert norms[1] < 0.9 * norms[0]


def test_a_recipe_that_sets_the_length_of_histories_reads_them_whole():
    context = {"train_sequences": random_sequences(), "items": ITEMS, "max_history_items": 3, "progress": False}
    spec = {"epochs": 1, "width": 8}
    default = SASRec.from_spec(spec, context)
    own = SASRec.from_spec({**spec, "max_history_items": 5}, context)
    assert (default.max_history_items, default.full_history) == (3, False)
    assert (own.max_history_items, own.full_history) == (5, True)
    assert "max_history_items" in SASRec.option_names() and "full_history" not in SASRec.option_names()
