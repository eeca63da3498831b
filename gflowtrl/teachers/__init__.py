"""Collaborative models that score all items for a history."""

from .cache import fingerprint, fit_cached
from .closed_form import EASE, Popularity
from .content import ContentSASRec
from .cross_fit import CrossFitTeacher, fold_of, without_fold
from .mixture import MixtureTeacher
from .neighbors import ItemKNN, Transitions
from .sasrec import SASRec
from .teacher import Teacher, TeacherModule, as_teacher, load_teacher, score_histories, teacher_scores, top_items
from .text import ItemText


__all__ = [
    "ContentSASRec",
    "CrossFitTeacher",
    "fold_of",
    "without_fold",
    "EASE",
    "ItemKNN",
    "ItemText",
    "MixtureTeacher",
    "Popularity",
    "SASRec",
    "Teacher",
    "TeacherModule",
    "Transitions",
    "as_teacher",
    "fingerprint",
    "fit_cached",
    "load_teacher",
    "score_histories",
    "teacher_scores",
    "top_items",
]
