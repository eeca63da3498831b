"""Raw dumps in, the folder format out: one file a family of formats. docs/data.md has the table of formats."""

from .base import Columns
from .preparation import prepare
from .registry import RAW_FORMATS
from .report import Preparation


__all__ = ["RAW_FORMATS", "Columns", "Preparation", "prepare"]
