"""Fit once, then load."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .teacher import CONFIG_FILE, TeacherModule


logger = logging.getLogger(__name__)


def fingerprint(value: Any) -> str:
    """Sixteen hex digits that change with any change of a JSON-able value (settings, sequences, items)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def fit_cached(fit: Callable[[], TeacherModule], directory: str | Path, key: Any) -> TeacherModule:
    """Loads the teacher of `key` from `directory`, or fits and saves it there first.

    Args:
        fit: trains and returns the teacher.
        directory: the cache; each key has its own sub-folder, which appears only when it is complete, so that an
            interrupted fit leaves nothing behind and several processes may use the cache at once.
        key: JSON-able value that holds all that the teacher depends on: class, settings, seed, training sequences,
            items.
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
                if not (folder / CONFIG_FILE).is_file():  # else another process was faster, with the same teacher
                    raise
    else:
        logger.info("Loading the cached teacher of %s.", folder)
    return TeacherModule.from_pretrained(folder)
