"""Atomic writing of files, and errors that name a file that cannot be read."""

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
ARCHIVES = (".pt", ".pth", ".bin")  # torch.save writes zip archives


def check_data_path(path: Path) -> None:
    """Raise FileNotFoundError if a path is neither a folder nor the common beginning of a triple (`X.inter.json`)."""
    if not path.exists() and not path.with_name(f"{path.name}.inter.json").is_file():
        raise FileNotFoundError(f"There is no folder {path}. Check the path; `gflowtrl prepare` creates one.")


def write_atomically(path: str | os.PathLike, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file next to `path`, then rename it to `path`. An unfinished file is removed.

    The folder is created if it is missing.
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
    """Write text atomically, in UTF-8."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


@contextmanager
def reading(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Context manager around reading a file with another library: errors about its content name the file.

    numpy, safetensors, yaml and json raise a dozen kinds of errors on malformed content, `RecursionError` and
    `tokenize.TokenError` among them, and few of these errors name the file.

    Args:
        path: the file.
        what: the expected content, as in "... cannot be read as {what}".

    Raises:
        ValueError: names the file, the expected content and the reason.
        OSError: the file does not exist or cannot be opened (the operating system's own error, unchanged).
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # the operating system's own error
            raise
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        if isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        raise ValueError(f"{path} cannot be read as {what} ({reason}). Repair or replace the file.") from None


def read_json(path: str | os.PathLike) -> Any:
    """Return the content of a JSON file that a program wrote.

    Raises:
        ValueError: the file is not valid JSON; the message names the file.
        OSError: the file does not exist.
    """
    with reading(path, "JSON"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def damage_of(path: str | os.PathLike) -> str | None:
    """Describe visible damage of a file, or return None. Tensor values are not read.

    JSON is parsed. For safetensors, the header is compared with the file's size. For torch's archives, the directory
    at the end must be present.

    Returns:
        The end of a sentence that begins with the file's name: `"is missing"`, `"is empty or cut off"`, ...
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
