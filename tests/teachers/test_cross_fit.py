"""Cross-fitted teachers: training rows are scored by the copy that was fitted without their user."""

import pytest
import torch

from gflowtrl.data import Step
from gflowtrl.teachers import (
    EASE,
    CrossFitTeacher,
    MixtureTeacher,
    Popularity,
    SASRec,
    as_teacher,
    fold_of,
    load_teacher,
    teacher_scores,
    without_fold,
)


ITEMS = ["tea", "cup", "pot", "ink", 7, 8]
SEQUENCES = [["tea", "cup", 7], ["pot", "ink"], [8, "tea", "cup"], ["cup", 7, "pot", "ink"], [8, 7], ["ink", "tea"]]
USERS = ["ann", "ben", "cy", 4, 5, 6]
HISTORIES = [["tea"], ["pot", "ink"], [8], ["cup", 7]]


def copies(kind=EASE, folds=3, **options):
    return [kind.fit(without_fold(SEQUENCES, USERS, fold, folds), ITEMS, **options) for fold in range(folds)]


def step_of(histories, users, **columns):
    columns = {"history": histories, "user": users, **columns}
    return Step({}, torch.arange(len(histories)), torch.full((len(histories),), -1), columns)


def test_every_user_is_missing_in_exactly_one_copy():
    for folds in (2, 3, 5):
        parts = [without_fold(SEQUENCES, USERS, fold, folds) for fold in range(folds)]
        for sequence, user in zip(SEQUENCES, USERS, strict=True):
            assert [sequence not in part for part in parts] == [fold == fold_of(user, folds) for fold in range(folds)]


def test_folds_are_the_same_in_every_process_and_about_equal():
    assert [fold_of(user, 5) for user in ("ann", "ben", 4, 12345)] == [3, 0, 3, 4]
    sizes = torch.bincount(torch.tensor([fold_of(user, 5) for user in range(5000)]))
    assert sizes.min() > 900


@pytest.mark.parametrize("kind", [EASE, Popularity, SASRec])
def test_rows_of_a_step_get_the_copy_without_their_user(kind):
    options = {"epochs": 1, "width": 8, "progress": False} if kind is SASRec else {}
    parts = copies(kind, **options)
    teacher = CrossFitTeacher(parts)
    users = ["cy", "ann", 4, "somebody new"]
    scores = teacher_scores(teacher, step_of(HISTORIES, users), "a reward")
    for row, user in enumerate(users):
        torch.testing.assert_close(scores[row], parts[fold_of(user, 3)].score(HISTORIES)[row])


def test_other_histories_get_the_mean_of_all_copies():
    parts = copies()
    expected = torch.stack([part.score(HISTORIES).softmax(1) for part in parts]).mean(0)
    torch.testing.assert_close(CrossFitTeacher(parts).score(HISTORIES).softmax(1), expected)


def test_inside_a_mixture_and_with_other_columns():
    """The mixture of the scores of each row, in the order of another list of items."""
    parts, popularity = copies(), Popularity.fit(SEQUENCES, ITEMS)
    order = [8, "cup", "tea", "pot", "ink", 7]
    mixture = as_teacher(MixtureTeacher({CrossFitTeacher(parts): 3.0, popularity: 1.0}), order)
    users = ["ann", 6, "ben", 5]
    scores = teacher_scores(mixture, step_of(HISTORIES, users), "a reward")
    for row, user in enumerate(users):
        own = parts[fold_of(user, 3)].score(HISTORIES)[row].softmax(0)
        mixed = 0.75 * own + 0.25 * popularity.score(HISTORIES)[row].softmax(0)
        torch.testing.assert_close(scores[row].exp(), mixed[[ITEMS.index(item) for item in order]])


def test_saving_and_loading(tmp_path):
    teacher = MixtureTeacher({CrossFitTeacher(copies()): 1.0, Popularity.fit(SEQUENCES, ITEMS): 2.0})
    teacher.save_pretrained(tmp_path)
    loaded = load_teacher(tmp_path)
    step = step_of(HISTORIES, ["ann", "ben", "cy", 4])
    assert torch.equal(teacher_scores(loaded, step, "a reward"), teacher_scores(teacher, step, "a reward"))
    assert isinstance(loaded.parts[0], CrossFitTeacher)


def test_errors():
    with pytest.raises(ValueError, match="number of teachers of CrossFitTeacher is 1.*at least 2"):
        CrossFitTeacher(copies(folds=3)[:1])
    step = Step({}, torch.arange(1), torch.full((1,), -1), {"history": [["tea"]]})
    with pytest.raises(ValueError, match="CrossFitTeacher needs the dataset column 'user'"):
        teacher_scores(CrossFitTeacher(copies()), step, "a reward")
