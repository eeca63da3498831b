"""Atomic writes, reads whose errors name the file, and a check for damaged files."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


MISSING = "is missing"
ARCHIVES = (".pt", ".pth", ".bin")  # files of torch.save, which are zip archives


def write_atomically(path: str | os.PathLike, write: Callable[[Path], Any]) -> None:
    """Write to a temporary file in the same folder and rename it to `path`; delete it if writing fails.

    Args:
        path: the file. Its folder is created if it does not exist.
        write: writes the file whose path it is given.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write text in UTF-8 atomically."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


@contextmanager
def reading(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Context manager: errors of a library that reads a file become a `ValueError` that names the file.

    numpy, safetensors, yaml and json raise a dozen kinds of errors on damaged content, for example `RecursionError`
    and `tokenize.TokenError`. Most of them do not name the file.

    Args:
        path: the file.
        what: the expected format, as in "... cannot be read as {what}".

    Raises:
        ValueError: the content is damaged; the message names the file, the expected format and the reason.
        OSError: the file does not exist or may not be read.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # the operating system has named the file
            raise
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        if isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        raise ValueError(f"{path} cannot be read as {what} ({reason}). Repair or replace the file.") from None


def read_json(path: str | os.PathLike) -> Any:
    """Return the content of a JSON file that a program has written.

    Raises:
        ValueError: it is damaged; the message names the file.
        OSError: it does not exist.
    """
    with reading(path, "JSON"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def damage_of(path: str | os.PathLike) -> str | None:
    """Return what is wrong with the format of a file, or None. Tensors are not read.

    JSON is parsed; the header of a safetensors file is compared with the file's size; an archive of torch must have
    its directory at the end.

    Returns:
        The end of a sentence that starts with the file's name: `"is missing"`, `"is empty or cut off"`, ...
    """
    path = Path(path)
    if not path.is_file():
        return MISSING
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
    except (ValueError, RecursionError) as error:
        return f"is not valid JSON ({error})"
    except SafetensorError as error:
        return f"is not a whole safetensors file ({error})"
    if path.suffix in ARCHIVES and not zipfile.is_zipfile(path):
        return "is empty or cut off"
    return None
