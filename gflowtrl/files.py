"""Files that a reader sees whole or not at all, and errors that name a file which cannot be read."""

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
ARCHIVES = (".pt", ".pth", ".bin")  # what torch.save writes: zip archives


def write_atomically(path: str | os.PathLike, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file next to `path`, which then takes its name; an unfinished one is removed.

    The folder is made where it is missing.
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
    """Within, a file is read by another library, and whatever that library makes of broken content names the file.

    numpy, safetensors, yaml and json raise a dozen kinds of errors on bytes that are not theirs, `RecursionError` and
    `tokenize.TokenError` among them, and hardly one says which file it was.

    Args:
        path: the file.
        what: what it should be, as in "... cannot be read as {what}".

    Raises:
        ValueError: names the file, what it should be and the reason.
        OSError: the file is not there or may not be read, as ever.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:  # the operating system's own, which names the file
            raise
        raise _unreadable(path, what, error) from None
    except Exception as error:
        raise _unreadable(path, what, error) from None


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file that a program has written.

    Raises:
        ValueError: it is broken; the message names the file.
        OSError: it is not there.
    """
    with reading(path, "JSON"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def _unreadable(path: str | os.PathLike, what: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    return ValueError(f"{os.fspath(path)} cannot be read as {what} ({reason.rstrip('.')}). Mend or replace the file.")


def damage_of(path: str | os.PathLike) -> str | None:
    """What is wrong with a file, as far as its form tells; None where nothing is. Tensors are not read.

    JSON is parsed, the header of safetensors is compared with the file's size, and of torch's archives the directory
    at the end is looked for.

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
