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
HOLDER_FILE = ".running.json"  # for the error of whoever comes second; the lock alone decides


@contextmanager
def sole_run(folder: str | os.PathLike) -> Iterator[None]:
    """Within, this run alone works in `folder`; the first process holds the lock, for all that belong to the run.

    The operating system gives the lock back when the process ends, however it ends.

    Raises:
        ValueError: another run is at work there; in all processes alike.
    """
    state, lock, told = PartialState(), FileLock(Path(folder, LOCK_FILE)), [None]
    if state.is_main_process:
        told = [_take(lock, Path(folder))]
    if state.num_processes > 1:
        broadcast_object_list(told)
    if told[0] is not None:
        raise ValueError(told[0])
    try:
        yield
    finally:
        if state.is_main_process:
            Path(folder, HOLDER_FILE).unlink(missing_ok=True)
            lock.release()


def _take(lock: FileLock, folder: Path) -> str | None:
    """None where the lock is taken now, else why not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except OSError as error:
        if not isinstance(error, Timeout):
            return (
                f"{folder} cannot be locked ({error}). Choose an output_dir on a disk that can be written and locked."
            )
        return (
            f"{folder} is in use by {_holder(folder)}: two runs in one folder would write over each other's stages. "
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
