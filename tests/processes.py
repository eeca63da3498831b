"""Python scripts and modules in processes of their own that find the libraries imported.

A server that has imported them, and done nothing else, forks for each run. That saves the ten seconds in which a new
interpreter imports them.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["gflowtrl.pipeline"])


def run_python(
    command: Sequence[str | Path], cwd: Path, timeout: float = 300, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `python COMMAND`, which is `-m MODULE ARGUMENTS` or `FILE ARGUMENTS`, as `subprocess.run` does.

    Args:
        command: the words after `python`.
        cwd: folder to run in.
        timeout: seconds after which the process is killed.
        environment: variables beside those of this process.

    Returns:
        The exit status (negative: the signal that ended the process) and what was printed.

    Raises:
        subprocess.TimeoutExpired: if it took longer.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, name) for name in ("stdout", "stderr")]
        variables = {**os.environ, **(environment or {})}
        process = _context.Process(target=_run, args=(words, str(cwd), variables, [str(file) for file in printed]))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, process.exitcode, *(file.read_text() for file in printed))


def _run(words: list[str], cwd: str, variables: dict[str, str], printed: list[str]) -> None:
    for descriptor, file in enumerate(printed, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    if words[0] == "-m":
        sys.path[0:0] = [cwd]
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0:0] = [str(Path(words[0]).parent)]
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
