"""Raw dumps in, the folder format out: one file a family of formats. docs/data.md has the table of formats."""

from .base import Columns
from .downloads import PUBLIC_DATA, RawFiles, download, download_file, extract_zip
from .preparation import prepare
from .registry import RAW_FORMATS
from .report import Preparation


__all__ = [
    "PUBLIC_DATA",
    "RAW_FORMATS",
    "Columns",
    "Preparation",
    "RawFiles",
    "download",
    "download_file",
    "extract_zip",
    "prepare",
]
