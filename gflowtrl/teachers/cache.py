"""A cache of fitted teachers."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .teacher import CONFIG_FILE, TeacherModule


_ELEMENTS_AT_ONCE = 1 << 14

logger = logging.getLogger(__name__)


def fingerprint(value: Any) -> str:
    """Return a hash of a JSON-serializable value (settings, sequences, items): sixteen hex digits."""
    digest = hashlib.sha256()
    for part in _json_parts(value):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _json_parts(value: Any) -> Iterator[str]:
    """Yield `json.dumps(value, sort_keys=True)` in parts, so that the text of a large log is never whole in memory."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        yield "{"
        for number, key in enumerate(sorted(value)):
            yield f"{', ' * (number > 0)}{json.dumps(key)}: "
            yield from _json_parts(value[key])
        yield "}"
    elif _is_large(value):
        yield "["
        for start in range(0, len(value), _ELEMENTS_AT_ONCE):
            part = json.dumps(list(value[start : start + _ELEMENTS_AT_ONCE]), sort_keys=True)
            yield f"{', ' * (start > 0)}{part[1:-1]}"
        yield "]"
    elif isinstance(value, list) and any(map(_is_large, value)):
        yield "["
        for number, part in enumerate(value):
            yield ", " * (number > 0)
            yield from _json_parts(part)
        yield "]"
    else:
        yield json.dumps(value, sort_keys=True, default=_as_list)


def _is_large(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) > _ELEMENTS_AT_ONCE


def _as_list(value: Any) -> list:
    if not isinstance(value, Sequence):
        raise TypeError(f"{type(value).__name__} cannot be a part of a fingerprint")
    return list(value)


def fit_cached(fit: Callable[[], TeacherModule], directory: str | Path, key: Any) -> TeacherModule:
    """Load the teacher of `key` from `directory`. If it does not exist, fit and save it first.

    Args:
        fit: function that trains and returns the teacher.
        directory: folder of the cache. Each key has its own subfolder, which appears only when it is complete. An
            interrupted fit therefore leaves no files, and several processes can use the cache at the same time.
        key: JSON-serializable value with everything that the teacher depends on: class, settings, seed, training
            sequences, items.
    """
    folder = Path(directory) / fingerprint(key)
    if not (folder / CONFIG_FILE).is_file():
        teacher = fit()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=directory) as partial:
            teacher.save_pretrained(Path(partial, "teacher"))
            try:
                Path(partial, "teacher").rename(folder)
            except OSError:
                if not (folder / CONFIG_FILE).is_file():  # otherwise another process has saved the same teacher
                    raise
    else:
        logger.info("Loading the cached teacher from %s.", folder)
    return TeacherModule.from_pretrained(folder)
