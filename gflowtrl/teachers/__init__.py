"""Collaborative models that score all items for a history."""

from .cache import fingerprint, fit_cached
from .closed_form import EASE, Popularity
from .mixture import LEARNED, MixtureTeacher
from .neighbors import ItemKNN, Transitions
from .sasrec import SASRec
from .teacher import Teacher, TeacherModule, as_teacher, load_teacher, score_histories, teacher_scores, top_items
from .text import TFIDF, ItemText


__all__ = [
    "EASE",
    "LEARNED",
    "ItemKNN",
    "ItemText",
    "MixtureTeacher",
    "Popularity",
    "SASRec",
    "TFIDF",
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
