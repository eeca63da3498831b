"""Conversion of raw dumps to the folder format, with one module per family of formats, as listed in docs/data.md."""

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
