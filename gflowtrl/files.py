"""Atomic writing of files, and errors that name a file that cannot be read."""

from __future__ import annotations

import codecs
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from gflowtrl.checks import one_line, short_repr, shortened


if TYPE_CHECKING:
    from torch import Tensor


MISSING = "is missing"
ARCHIVES = (".pt", ".pth", ".bin")  # torch.save writes zip archives
_SMALL_BYTES = 1 << 22  # states of generators and schedulers; an optimizer's would take too long


def check_data_path(path: Path) -> None:
    """Raise FileNotFoundError if a path is neither a folder nor the common beginning of a triple (`X.inter.json`)."""
    if not path.exists() and not path.with_name(f"{path.name}.inter.json").is_file():
        raise FileNotFoundError(f"There is no folder {path}. Check the path; `gflowtrl prepare` creates one.")


def is_entry(path: str | os.PathLike) -> bool:
    """Return whether a folder has an entry of this name.

    For optional files: a broken link or a folder counts, so that reading it is an error.
    """
    return os.path.lexists(path)


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


def check_new_folder(path: Path) -> None:
    """Raise FileExistsError if a path exists and is not an empty folder."""
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder. Choose a new folder.")


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Context manager: a temporary folder, which becomes `path` on success and is removed on an error.

    Its files get the mode of a file that `open` makes.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
    """
    check_new_folder(Path(path))
    place = Path(path).resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as scratch:
        folder = Path(scratch, "folder")
        folder.mkdir()
        yield folder
        _give_usual_modes(folder)
        if place.exists():
            place.rmdir()
        folder.rename(place)


def _give_usual_modes(folder: Path) -> None:
    """Give all files of a folder the mode of a file that `open` makes; safetensors lets only the owner read."""
    mask = os.umask(0)  # the only way to read it
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write text atomically, in UTF-8."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


@contextmanager
def reading(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Context manager around reading a file: errors about its content name the file.

    numpy, safetensors, yaml, json, torch and our own constructors raise a dozen kinds of errors on malformed content,
    `RecursionError`, `KeyError` and `tokenize.TokenError` among them, and few of these errors name the file. This is
    the place where they become one kind, so the block should hold nothing but the reading of this file.

    Args:
        path: the file, or its name in messages.
        what: the expected content, as in "... cannot be read as {what}".

    Raises:
        ValueError: names the file, the expected content and the reason. A ValueError that names the file already is
            unchanged.
        OSError: the file does not exist or cannot be opened (the operating system's own error, unchanged).
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # the operating system's own error
            raise
        if type(error) is ValueError and str(path) in str(error):  # of a reader inside
            raise
        raise ValueError(
            f"{path} cannot be read as {what} ({_reason(error, path)}). Repair or replace the file."
        ) from None


def _reason(error: Exception, path: str | os.PathLike) -> str:
    """Why a file cannot be read, in words."""
    if isinstance(error, UnicodeDecodeError):
        return f"{_first_line_in_another_encoding(path)} is not UTF-8; save it as UTF-8"
    reasons: dict[type[Exception], str] = {
        RecursionError: "it is nested too deeply",
        MemoryError: "it needs more memory than this machine has",
        EOFError: "it ends too early",
        KeyError: f"{short_repr(error.args[0] if error.args else '')} is missing",
    }
    if known := next((reason for kind, reason in reasons.items() if isinstance(error, kind)), None):
        return known
    if "int_max_str_digits" in str(error):
        return "it has a whole number of thousands of digits"
    text = re.sub(r" object at 0x[0-9a-f]+", "", one_line(str(error)))
    return shortened(text.rstrip("."), 300) or type(error).__name__


def _first_line_in_another_encoding(path: str | os.PathLike) -> str:
    """Name the first line that is not UTF-8, as "line 3"; "the content" of what is not a file."""
    if Path(path).is_file():
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode()
                except UnicodeDecodeError:
                    return f"line {number}"
    return "the content"


def is_utf16(head: bytes) -> bool:
    """Return whether text with this beginning is UTF-16: it has a byte order mark, or every other byte is 0."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return True
    counts = head[::2].count(0), head[1::2].count(0)
    return min(counts) == 0 and max(counts) > len(head) // 4


def text_lines(path: str | os.PathLike, what: str = "uncompressed UTF-8 text") -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their line ends. A byte order mark is left out.

    Args:
        path: the file; `-` is standard input.
        what: the expected content, for messages.

    Raises:
        ValueError: the file is not UTF-8; the message names the file, the line and the remedy.
        OSError: the file does not exist or cannot be opened.
    """
    is_input = str(path) == "-"
    with (
        reading("standard input" if is_input else path, what),
        open(os.dup(0) if is_input else path, encoding="utf-8-sig") as text,
    ):
        head = getattr(text.buffer, "peek", lambda: b"")()[:4096]
        if is_utf16(head):
            raise ValueError("it is in UTF-16; save it as UTF-8")
        yield from text


def read_text(path: str | os.PathLike, what: str = "uncompressed UTF-8 text") -> str:
    """Return the content of a UTF-8 file; arguments and errors as for `text_lines`."""
    return "".join(text_lines(path, what))


def read_json(path: str | os.PathLike) -> Any:
    """Return the content of a JSON file that a program wrote.

    Raises:
        ValueError: the file is not valid JSON; the message names the file.
        OSError: the file does not exist.
    """
    with reading(path, "JSON"):
        return json.loads(read_text(path, "JSON"))


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """Return the object in a JSON file that a program wrote; errors as in `read_json`, also for other JSON."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain a JSON object, not {short_repr(content)}. Repair or replace the file.")
    return content


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` file.

    Raises:
        ValueError: the file is damaged; the message names the file.
        OSError: the file does not exist.
    """
    from safetensors.torch import load_file  # imports torch

    with reading(path, "a .safetensors file"):
        return load_file(path)


def damage_of(path: str | os.PathLike) -> str | None:
    """Describe visible damage of a file, or return None. Tensor values are not read.

    JSON is parsed. For safetensors, the header is compared with the file's size. For torch's archives, the directory
    at the end must be present; small ones are compared with their checksums.

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
        return f"is not valid JSON ({_reason(error, path)})"
    except SafetensorError as error:
        return f"is not a whole safetensors file ({_reason(error, path)})"
    if path.suffix in ARCHIVES:
        if not zipfile.is_zipfile(path):
            return "is empty or cut off"
        if path.stat().st_size < _SMALL_BYTES and not _is_whole(path):
            return "does not have its checksum"
    return None


def _is_whole(path: Path) -> bool:
    """Whether every part of a zip archive has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError):
        return False
