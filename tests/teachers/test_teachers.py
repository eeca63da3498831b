"""EASE, popularity, SASRec and mixtures, compared with closed forms, brute force and known patterns."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from gflowtrl.data.sequences import Sequences
from gflowtrl.teachers import EASE, MixtureTeacher, Popularity, SASRec, Teacher, fingerprint, top_items


ITEMS = ["tea", "cup", "pot", "ink", "pen", "pad", "bow", "oar"]


def random_sequences(number=60, seed=0):
    generator = np.random.default_rng(seed)
    return [[ITEMS[i] for i in generator.permutation(8)[: generator.integers(2, 7)]] for _ in range(number)]


def cycle_sequences(items, number, seed=0):
    """Make sequences that follow a cycle of items from a random start. The last item determines the next one."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        start, length = generator.integers(len(items)), generator.integers(2, 9)
        rows.append([items[(start + step) % len(items)] for step in range(length)])
    return rows


def test_ease_solves_its_ridge_regressions():
    """Each column of EASE is the ridge regression of an item on all others, computed here with numpy."""
    sequences = random_sequences()
    teacher = EASE.fit(sequences, ITEMS, regularization=3.0)
    seen = np.array([[float(item in sequence) for item in ITEMS] for sequence in sequences])
    expected = np.zeros((8, 8))
    for column in range(8):
        others = [index for index in range(8) if index != column]
        x, y = seen[:, others], seen[:, column]
        expected[others, column] = np.linalg.solve(x.T @ x + 3.0 * np.eye(7), x.T @ y)
    np.testing.assert_allclose(teacher.weights.numpy(), expected, atol=1e-5)
    history = ["pen", "tea", "pen"]
    np.testing.assert_allclose(teacher.score([history])[0].numpy(), expected[4] + expected[0], atol=1e-5)
    assert teacher.score([[], history]).shape == (2, 8) and not teacher.score([[], history])[0].any()


def test_ease_temperature_maximizes_the_likelihood():
    sequences = random_sequences(200)
    rows = [{"history": sequence[:-1], "target": sequence[-1]} for sequence in sequences]
    plain, calibrated = EASE.fit(sequences, ITEMS), EASE.fit(sequences, ITEMS, rows)
    targets = torch.tensor([ITEMS.index(row["target"]) for row in rows])
    scores = plain.score([row["history"] for row in rows])
    chosen = calibrated.config["temperature"]
    losses = {value: torch.nn.functional.cross_entropy(scores / value, targets) for value in EASE.temperature_grid}
    assert chosen == min(losses, key=losses.get)
    torch.testing.assert_close(calibrated.score([["tea"]]), plain.score([["tea"]]) / chosen)


def test_popularity_is_the_smoothed_training_distribution():
    teacher = Popularity.fit([["tea", "cup"], ["tea"], ["tea", "ink"]], ITEMS)
    counts = torch.tensor([3.0, 1, 0, 1, 0, 0, 0, 0])
    scores = teacher.score([["pad"], ["tea", "cup"]])
    torch.testing.assert_close(scores.softmax(-1), ((counts + 1) / 13).expand(2, -1))


def test_sasrec_learns_a_cycle():
    items = list(range(100, 112))
    train = cycle_sequences(items, 300)
    held_out = [{"history": row[:-1], "target": row[-1]} for row in cycle_sequences(items, 50, seed=1)]
    settings = {"epochs": 12, "learning_rate": 5e-3, "progress": False, "batch_size": 32, "dropout": 0.1, "width": 16}
    teacher = SASRec.fit(train, items, held_out, **settings)
    top = top_items(teacher, [row["history"] for row in held_out], 1).flatten()
    assert [items[index] for index in top] == [row["target"] for row in held_out]

    again = SASRec.fit(train, items, held_out, **settings)
    torch.testing.assert_close(teacher.score([[100]]), again.score([[100]]), rtol=0, atol=0)
    other = SASRec.fit(train, items, held_out, **(settings | {"epochs": 1, "seed": 1}))
    assert not torch.allclose(
        other.score([[100]]), SASRec.fit(train, items, **(settings | {"epochs": 1})).score([[100]])
    )


def test_sasrec_learns_a_cycle_from_sampled_items():
    items = list(range(100, 112))
    held_out = [{"history": row[:-1], "target": row[-1]} for row in cycle_sequences(items, 50, seed=1)]
    settings = {"epochs": 12, "learning_rate": 5e-3, "progress": False, "batch_size": 32, "dropout": 0.1, "width": 16}
    teacher = SASRec.fit(cycle_sequences(items, 300), items, held_out, negatives=6, **settings)
    top = top_items(teacher, [row["history"] for row in held_out], 1).flatten()
    assert [items[index] for index in top] == [row["target"] for row in held_out]


def test_the_sampled_softmax_estimates_the_full_one():
    """With many draws, the loss and its gradient are those of the cross entropy over all items."""
    torch.manual_seed(0)
    teacher, targets = SASRec(list(range(40)), width=8), torch.tensor([3, 3, 39, 0])
    torch.nn.init.normal_(teacher.item_embedding.weight)
    hidden = torch.randn(4, 8)

    def gradient(negatives):
        loss = teacher._loss(hidden, teacher.item_embedding.weight, targets, negatives)
        return loss, torch.autograd.grad(loss, teacher.item_embedding.weight)[0]

    (full, exact), (sampled, estimate) = gradient(None), gradient(400_000)
    torch.testing.assert_close(full, torch.nn.functional.cross_entropy(hidden @ teacher.item_vectors().T, targets))
    torch.testing.assert_close(sampled, full, atol=0.02, rtol=0)
    torch.testing.assert_close(estimate, exact, atol=0.02, rtol=0)
    # With one draw, a target is never its own negative.
    assert all(teacher._loss(hidden[2:3], teacher.item_vectors(), targets[2:3], 1) >= 0 for _ in range(200))


def test_sasrec_uses_the_order_of_a_history():
    """Item b follows (a, x) and item c follows (x, a), which a model of sets cannot distinguish."""
    train = [["tea", "cup", "pot"], ["cup", "tea", "ink"]] * 40
    teacher = SASRec.fit(train, ITEMS, epochs=15, learning_rate=1e-2, width=16, dropout=0.0, progress=False)
    assert [ITEMS[i] for i in top_items(teacher, [["tea", "cup"], ["cup", "tea"]], 1).flatten()] == ["pot", "ink"]


def test_sasrec_scores_do_not_depend_on_padding_or_on_items_beyond_the_limit():
    torch.manual_seed(0)
    teacher = SASRec(ITEMS, max_history_items=4)
    histories = [["tea"], ["ink", "pen", "pad"], ["bow", "oar", "tea", "cup", "pot", "ink"]]
    together = teacher.score(histories)
    for row, history in enumerate(histories):
        torch.testing.assert_close(together[row], teacher.score([history[-4:]])[0], rtol=1e-5, atol=1e-6)


def test_sasrec_windows_train_every_target_once():
    teacher = SASRec(list(range(50)), max_history_items=4)
    sequences = [list(range(length)) for length in (1, 2, 4, 5, 6, 9, 23)]
    windows = teacher._windows(sequences)
    targets = sorted(target for group in windows for target in group[:, 1:].flatten().tolist())
    assert targets == sorted(item for sequence in sequences for item in sequence[1:])
    assert all(2 <= group.shape[1] <= 5 and (group.diff(dim=1) == 1).all() for group in windows)


def test_sasrec_keeps_the_best_validation_epoch_and_stops_early():
    """Validation rows that contradict the training rows get worse with every epoch, so the first state is kept."""
    train = [["tea", "cup"]] * 64
    contradiction = [{"history": ["tea"], "target": item} for item in ITEMS if item != "cup"]
    settings = {"learning_rate": 1e-2, "width": 16, "dropout": 0.0, "progress": False}
    steps = []
    original = SASRec._train_epoch
    try:
        SASRec._train_epoch = lambda self, *args: (steps.append(1), original(self, *args))[1]
        stopped = SASRec.fit(train, ITEMS, contradiction, epochs=40, patience=3, **settings)
    finally:
        SASRec._train_epoch = original
    assert len(steps) < 40
    kept = SASRec.fit(train, ITEMS, epochs=len(steps) - 3, **settings)
    torch.testing.assert_close(stopped.score([["tea"]]), kept.score([["tea"]]), rtol=0, atol=0)


def test_sasrec_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    SASRec.fit([["tea", "cup"]], ITEMS, epochs=1, progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_mixture_is_the_mixture_of_distributions():
    sequences = random_sequences()
    parts = [EASE.fit(sequences, ITEMS), Popularity.fit(sequences, ITEMS)]
    histories = sequences[:5]
    mixture = MixtureTeacher({parts[0]: 3.0, parts[1]: 1.0})
    expected = 0.75 * parts[0].score(histories).softmax(-1) + 0.25 * parts[1].score(histories).softmax(-1)
    torch.testing.assert_close(mixture.score(histories).softmax(-1), expected)

    first, second = (part.score(histories).double().numpy() for part in parts)
    standard = [(x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in (first, second)]
    zscore = MixtureTeacher({parts[0]: 3.0, parts[1]: 1.0}, normalization="zscore").score(histories)
    np.testing.assert_allclose(zscore.numpy(), 0.75 * standard[0] + 0.25 * standard[1], atol=1e-4)


def test_mixture_aligns_the_items_of_its_parts():
    sequences = random_sequences()
    shuffled = ITEMS[::-1]
    same = MixtureTeacher({EASE.fit(sequences, ITEMS): 1.0, Popularity.fit(sequences, shuffled): 1.0})
    expected = MixtureTeacher({EASE.fit(sequences, ITEMS): 1.0, Popularity.fit(sequences, ITEMS): 1.0})
    torch.testing.assert_close(same.score([["tea"]]), expected.score([["tea"]]))


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_mixture_weights_must_be_positive(weights):
    with pytest.raises(ValueError, match="it must be a finite number above 0"):
        MixtureTeacher(dict(zip([Popularity(ITEMS), EASE(ITEMS)], weights, strict=True)))


def test_invalid_input_is_named():
    teachers = [SASRec(ITEMS, width=8), EASE(ITEMS), MixtureTeacher({EASE(ITEMS): 1.0})]
    for teacher in teachers:
        assert isinstance(teacher, Teacher)
        with pytest.raises(ValueError, match="Item 'gnu' is not in the catalog"):
            teacher.score([["tea"], ["cup", "gnu"]])
    with pytest.raises(ValueError, match="History 1 is empty"):
        teachers[0].score([["tea"], []])
    with pytest.raises(ValueError, match="given twice"):
        Popularity(["tea", "tea"])
    with pytest.raises(ValueError, match="two or more items"):
        SASRec.fit([["tea"]], ITEMS)


@pytest.mark.skipif("GFLOWTRL_TEST_DATA" not in os.environ, reason="GFLOWTRL_TEST_DATA is not set")
def test_ease_reproduces_published_metrics_on_office():
    """Recall@10 / NDCG@10 are .0408 / .0232 (with unknown regularization) in the benchmark protocol."""
    lines = (Path(os.environ["GFLOWTRL_TEST_DATA"]) / "office" / "sequences.jsonl").read_text().splitlines()
    sequences = [json.loads(line)["items"] for line in lines]
    items = sorted({item for sequence in sequences for item in sequence})
    teacher = EASE.fit([sequence[:-2] for sequence in sequences], items)
    top = top_items(teacher, [sequence[:-1] for sequence in sequences], 10)
    index = {item: column for column, item in enumerate(items)}
    hits = (top == torch.tensor([[index[sequence[-1]]] for sequence in sequences])).double()
    assert hits.sum(1).mean().item() == pytest.approx(0.0408, rel=0.05)
    assert (hits / torch.log2(torch.arange(10) + 2.0)).sum(1).mean().item() == pytest.approx(0.0232, rel=0.05)


def test_the_fingerprint_of_a_large_log_is_that_of_its_json(monkeypatch):
    monkeypatch.setattr("gflowtrl.teachers.cache._ELEMENTS_AT_ONCE", 2)
    lists = [[0, 2], [1], [2, 2, 1, 0, 1], [0]]
    flat, offsets = np.array([value for part in lists for value in part]), np.cumsum([0, *map(len, lists)])
    for names in (None, ["a", "b", "é"], [7, 8, 9]):
        sequences = Sequences(flat, offsets, names)
        value = {"b": sequences, "a": [1, "x", None], "c": {"e": list(sequences), "d": 2.5}, "f": ("y", "z", "y")}
        for content in (value, [[1, 2, 3], sequences], sequences):
            text = json.dumps(content, sort_keys=True, default=list)
            assert fingerprint(content) == hashlib.sha256(text.encode()).hexdigest()[:16]
    with pytest.raises(TypeError, match="object cannot be a part of a fingerprint"):
        fingerprint({"a": object()})
