"""Raw dumps in, the folder format out: one file a family of formats. docs/data.md has the table of formats."""

from .downloads import PUBLIC_DATA, RawFiles, download, download_file, extract_zip
from .format import Columns
from .preparation import prepare
from .preparation_report import Preparation
from .registry import RAW_FORMATS


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
