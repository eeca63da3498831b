"""A cache of fitted teachers."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .teacher import CONFIG_FILE, TeacherModule


logger = logging.getLogger(__name__)


def fingerprint(value: Any) -> str:
    """Return a hash of a JSON-serializable value (settings, sequences, items): sixteen hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_as_list).encode()).hexdigest()[:16]


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
