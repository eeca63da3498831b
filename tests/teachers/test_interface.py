"""The common interface of teachers: saving, caching, alignment to a catalog, memoized scores, top items."""

import gc
import json
import os
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from gflowtrl.data import Step, Windows
from gflowtrl.teachers import (
    EASE,
    CrossFitTeacher,
    ItemKNN,
    MixtureTeacher,
    Popularity,
    SASRec,
    Transitions,
    as_teacher,
    fingerprint,
    fit_cached,
    load_teacher,
    teacher_scores,
    top_items,
    without_fold,
)


ITEMS = ["tea", "cup", "pot", "ink", 7, 8]
SEQUENCES = [["tea", "cup", 7], ["pot", "ink"], [8, "tea", "cup"], ["cup", 7, "pot", "ink"]]


def all_kinds():
    torch.manual_seed(0)
    rows = [{"history": sequence[:-1], "target": sequence[-1]} for sequence in SEQUENCES]
    ease, popularity = EASE.fit(SEQUENCES, ITEMS, rows), Popularity.fit(SEQUENCES, ITEMS)
    sasrec = SASRec(ITEMS, max_history_items=3, width=8)
    return [ease, popularity, sasrec, MixtureTeacher({ease: 1.0, MixtureTeacher({sasrec: 1.0, popularity: 2.0}): 0.5})]


def step_of(histories):
    return Step({}, torch.arange(len(histories)), torch.full((len(histories),), -1), {"history": histories})


class Counting:
    """A teacher that counts the calls of `score`."""

    def __init__(self, items=ITEMS):
        self.items, self.calls = items, 0

    def score(self, histories):
        self.calls += 1
        return torch.arange(len(self.items)).float().expand(len(histories), -1)


@pytest.mark.parametrize("kind", range(4))
def test_saving_and_loading_changes_nothing(kind, tmp_path):
    teacher = all_kinds()[kind]
    teacher.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"teacher.json", "teacher.safetensors"}
    for load in (load_teacher, type(teacher).from_pretrained):
        loaded = load(tmp_path / "saved")
        assert type(loaded) is type(teacher) and loaded.items == ITEMS
        torch.testing.assert_close(loaded.score(SEQUENCES), teacher.score(SEQUENCES), rtol=0, atol=0)


def test_loading_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no saved teacher"):
        load_teacher(tmp_path)
    Popularity.fit(SEQUENCES, ITEMS).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="contains a Popularity teacher, not a EASE"):
        EASE.from_pretrained(tmp_path)
    description = json.loads((tmp_path / "teacher.json").read_text())
    (tmp_path / "teacher.json").write_text(json.dumps(description | {"class": "Oracle"}))
    with pytest.raises(ValueError, match="'Oracle'; choose from .*EASE"):
        load_teacher(tmp_path)


def test_a_failed_write_keeps_the_saved_teacher(tmp_path, monkeypatch):
    Popularity.fit(SEQUENCES, ITEMS).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="disk full"):
        Popularity.fit(SEQUENCES[:1], ITEMS).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_mixture_with_a_callable_works_but_is_not_saved(tmp_path):
    popularity = Popularity.fit(SEQUENCES, ITEMS)
    mixture = MixtureTeacher({popularity: 1.0, as_teacher(lambda h: np.zeros((len(h), 6)), ITEMS): 1.0})
    expected = popularity.score(SEQUENCES).softmax(-1) / 2 + 1 / 12
    torch.testing.assert_close(mixture.score(SEQUENCES).softmax(-1), expected)
    with pytest.raises(TypeError, match="built-in teachers"):
        mixture.save_pretrained(tmp_path)


def test_fit_cached_fits_once_per_key(tmp_path):
    fits = []

    def fit():
        fits.append(1)
        return Popularity.fit(SEQUENCES, ITEMS)

    first = fit_cached(fit, tmp_path, {"teacher": "popularity", "seed": 1})
    again = fit_cached(fit, tmp_path, {"seed": 1, "teacher": "popularity"})
    assert len(fits) == 1 and torch.equal(first.counts, again.counts)
    fit_cached(fit, tmp_path, {"teacher": "popularity", "seed": 2})
    assert len(fits) == 2


def test_an_interrupted_fit_or_save_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_cached(interrupted, tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Popularity, "description", interrupted)
        fit_cached(lambda: Popularity(ITEMS), tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_another_process_fills_is_used(tmp_path):
    def slow_fit():
        fit_cached(lambda: Popularity.fit(SEQUENCES, ITEMS), tmp_path, 1)
        return Popularity(ITEMS)

    assert fit_cached(slow_fit, tmp_path, 1).counts.sum() == sum(map(len, SEQUENCES))
    assert len(list(tmp_path.iterdir())) == 1


def test_fingerprint():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint([[1, 2]]) != fingerprint([[2, 1]]) != fingerprint([["1", 2]])


def test_as_teacher_aligns_and_wraps():
    popularity = Popularity.fit(SEQUENCES, ITEMS)
    assert as_teacher(popularity, ITEMS) is popularity
    aligned = as_teacher(popularity, [8, "cup", "tea"]).score(SEQUENCES)
    assert torch.equal(aligned, popularity.score(SEQUENCES)[:, [5, 1, 0]])
    with pytest.raises(ValueError, match="does not know 1 items, for example 'gnu'"):
        as_teacher(popularity, ["tea", "gnu"])
    wrapped = as_teacher(lambda histories: [[1, 2]] * len(histories), ["tea", "cup"])
    assert wrapped.score([["tea"], ["cup"]]).tolist() == [[1, 2], [1, 2]]
    with pytest.raises(ValueError, match=r"returned shape \(2, 2\); it must return .*\(2, 3\)"):
        as_teacher(lambda histories: [[1, 2]] * len(histories), ["tea", "cup", "pot"]).score([["tea"], ["cup"]])
    with pytest.raises(TypeError, match="int is neither"):
        as_teacher(3, ITEMS)


def test_scores_are_computed_once_per_step():
    teacher, popularity = Counting(), Popularity.fit(SEQUENCES, ITEMS)
    mixture, reordered = MixtureTeacher({teacher: 1.0, popularity: 1.0}), as_teacher(teacher, ITEMS[::-1])
    step = step_of(SEQUENCES)
    for model in (teacher, mixture, reordered, mixture, teacher):
        torch.testing.assert_close(teacher_scores(model, step, "The test"), model.score(SEQUENCES))
    assert teacher.calls == 1 + 5  # one for the step, five for the direct calls in the comparison
    teacher_scores(teacher, step_of(SEQUENCES), "The test")
    teacher_scores(teacher, step.rows(slice(2)), "The test")
    assert teacher.calls == 1 + 5 + 2


@pytest.mark.parametrize("longest", [3, 9])
def test_windows_are_scored_as_their_histories(longest):
    """All teachers score windows and histories equally. SASRec reads the shared part of prompts once if it can."""
    sequence = ["tea", "cup", 7, "pot", "ink", 8]
    histories = [sequence[:end] for end in (4, 1, 3)] + [["pot", "ink"], ["pot"]]
    windows = Windows.pack(histories, ["ink", "cup", "pot", 8, "ink"])
    assert len(windows.items) == 2
    torch.manual_seed(0)
    batch_sizes, sasrec = [], SASRec(ITEMS, max_history_items=longest, width=8)
    sasrec.blocks.register_forward_pre_hook(lambda module, args: batch_sizes.append(len(args[0])))
    for teacher in (*all_kinds(), sasrec, as_teacher(sasrec, ITEMS[::-1])):
        step = replace(step_of([sequence] * 5), windows=windows)
        expected = teacher.score(histories)
        torch.testing.assert_close(teacher_scores(teacher, step, "The test"), expected, rtol=1e-5, atol=1e-5)
    assert batch_sizes[:2] == [5, 2 if longest == 9 else 5]


def test_an_overridden_score_is_used_for_windows():
    """`score` of a subclass, or of a wrapper that forwards other attributes, takes precedence."""

    class Other(SASRec):
        def score(self, histories):
            return -super().score(histories)

    class Wrapper:
        def __init__(self, teacher):
            self.teacher = teacher

        def __getattr__(self, name):
            return getattr(self.teacher, name)

        def score(self, histories):
            return -self.teacher.score(histories)

    torch.manual_seed(0)
    step = replace(step_of(SEQUENCES), windows=Windows.separate(SEQUENCES))
    for teacher in (Other(ITEMS, width=8), Wrapper(SASRec(ITEMS, width=8))):
        torch.testing.assert_close(teacher_scores(teacher, step, "The test"), teacher.score(SEQUENCES))


def test_top_items_cut_histories():
    class LastItem:
        items = ITEMS

        def score(self, histories):
            assert all(len(history) <= 2 for history in histories)
            return torch.stack([torch.tensor([float(item == history[-1]) for item in ITEMS]) for history in histories])

    histories = [["tea", "cup", 7], ["pot", "ink"], [8]]
    assert top_items(LastItem(), histories, 1, max_history_items=2, batch_size=2).flatten().tolist() == [4, 3, 5]
    assert top_items(Counting(), histories, 99).tolist() == [[5, 4, 3, 2, 1, 0]] * 3
    assert top_items(Counting(), [], 2).shape == (0, 2)


def test_a_step_is_freed_without_garbage_collection():
    """The tables of a step are large, so they must be freed with the last reference."""
    teacher = MixtureTeacher({as_teacher(lambda histories: torch.ones(len(histories), len(ITEMS)), ITEMS): 1.0})
    step = step_of(SEQUENCES)
    teacher_scores(teacher, step, "The test")
    reference = weakref.ref(step)
    gc.disable()
    try:
        del step
        assert reference() is None
    finally:
        gc.enable()


# ----------------------------------------------------------------------------------------------------- wrong arguments
ROW = {"history": ["tea"], "target": "cup"}


@pytest.mark.parametrize(
    ("fit", "error", "message"),
    [
        (lambda: EASE.fit(SEQUENCES, ITEMS, [{"history": ["tea"]}]), ValueError, "Row 0 of validation is .*needs a h"),
        (lambda: SASRec.fit(SEQUENCES, ITEMS, [ROW, 5], epochs=1), ValueError, "Row 1 of validation is 5; it needs"),
        (lambda: SASRec.fit(SEQUENCES, ITEMS, [{**ROW, "target": "gnu"}]), ValueError, "Item 'gnu' is not in"),
        (lambda: ItemKNN.fit(SEQUENCES, ITEMS, 5), TypeError, "validation is of type int; it must be rows"),
        (lambda: EASE.fit([["tea"], None], ITEMS), TypeError, "A history is not a list of items"),
        (lambda: ItemKNN.fit([["tea"], [["cup"]]], ITEMS), TypeError, "sequences must be a list with a list of items"),
        (lambda: Popularity.fit(SEQUENCES, [*ITEMS, 1.5]), TypeError, "1.5 of type float is not an item"),
        (lambda: Popularity.fit([], []), ValueError, "items is empty"),
        (lambda: Transitions.fit([], []), ValueError, "items is empty"),
        (lambda: ItemKNN.fit(SEQUENCES, None), TypeError, "items is of type NoneType; it must be a list"),
        (lambda: SASRec.fit(SEQUENCES, ITEMS, width=None), ValueError, "width is None; it must be a whole number"),
        (lambda: SASRec.fit(SEQUENCES, ITEMS, start="saved"), TypeError, "start is of type str; it must be a fitted"),
        (lambda: MixtureTeacher([1.0]), TypeError, "teachers is of type list; it must be a dictionary"),
        (lambda: CrossFitTeacher(5), TypeError, "teachers is of type int; it must be a list of teachers"),
        (lambda: without_fold(SEQUENCES, range(4), 3, 3), ValueError, "fold is 3; it must be below"),
        (lambda: without_fold(SEQUENCES, range(4), 0, 0), ValueError, "folds is 0"),
    ],
)
def test_wrong_arguments_of_teachers_are_refused_before_the_fit(monkeypatch, fit, error, message):
    monkeypatch.setattr(SASRec, "_train_epoch", lambda *_: pytest.fail("an epoch was trained"))
    with pytest.raises(error, match=message):
        fit()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": -1}, ValueError, "k is -1"),
        ({"batch_size": -1}, ValueError, "batch_size is -1"),  # it gave no lists
        ({"max_history_items": 0}, ValueError, "max_history_items is 0"),  # it gave whole histories
        ({"max_history_items": -1}, ValueError, "max_history_items is -1"),  # it dropped the first item
        ({"teacher": len}, TypeError, "teacher is of type builtin_function_or_method; wrap"),
        ({"histories": None}, TypeError, "histories is of type NoneType"),
    ],
)
def test_wrong_arguments_of_top_items_are_refused(options, error, message):
    good = {"teacher": Popularity.fit(SEQUENCES, ITEMS), "histories": SEQUENCES, "k": 2}
    assert top_items(**good).shape == (4, 2)
    with pytest.raises(error, match=message):
        top_items(**(good | options))


def test_items_of_numpy_can_be_saved(tmp_path):
    numbers = np.arange(3)
    Popularity.fit([numbers, numbers[:1]], numbers).save_pretrained(tmp_path)
    assert load_teacher(tmp_path).items == [0, 1, 2]
