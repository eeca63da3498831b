"""Collaborative models that score all items for a history."""

from .cache import fingerprint, fit_cached
from .closed_form import EASE, Popularity
from .mixture import MixtureTeacher
from .sasrec import SASRec
from .teacher import Teacher, TeacherModule, as_teacher, load_teacher, teacher_scores, top_items


__all__ = [
    "EASE",
    "MixtureTeacher",
    "Popularity",
    "SASRec",
    "Teacher",
    "TeacherModule",
    "as_teacher",
    "fingerprint",
    "fit_cached",
    "load_teacher",
    "teacher_scores",
    "top_items",
]
