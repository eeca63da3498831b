"""One run per output folder at a time."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from gflowtrl.files import write_text


LOCK_FILE = ".lock"
HOLDER_FILE = ".running.json"  # names the owner in the error of a second run; only the lock decides


@contextmanager
def sole_run(folder: str | os.PathLike) -> Iterator[None]:
    """Context manager: no other run works in `folder`. The first process holds the lock for all processes of the run.

    The operating system releases the lock when the process ends, whatever ends it.

    Raises:
        ValueError: another run works in the folder; raised in all processes.
    """
    state, lock, reason = PartialState(), FileLock(Path(folder, LOCK_FILE)), [None]
    if state.is_main_process:
        reason = [_take(lock, Path(folder))]
    if state.num_processes > 1:
        broadcast_object_list(reason)
    if reason[0] is not None:
        raise ValueError(reason[0])
    try:
        yield
    finally:
        if state.is_main_process:
            Path(folder, HOLDER_FILE).unlink(missing_ok=True)
            lock.release()


def _take(lock: FileLock, folder: Path) -> str | None:
    """Take the lock. Returns None, or why it cannot be taken."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except OSError as error:
        if not isinstance(error, Timeout):
            return (
                f"{folder} cannot be locked ({error}). Choose an output_dir on a disk that allows writing and locking."
            )
        return (
            f"{folder} is in use by {_holder(folder)}: two runs in one folder would overwrite each other's stages. "
            f"Wait until that run has ended, or choose another output_dir."
        )
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_text(folder / HOLDER_FILE, json.dumps(holder))
    return None


def _holder(folder: Path) -> str:
    try:
        found = json.loads((folder / HOLDER_FILE).read_text(encoding="utf-8"))
        return f"process {found['process']} on {found['host']} (since {found['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
