"""Run Python scripts and modules in new processes that have already imported the libraries.

A server process that has only imported the libraries forks for each run. That saves the ten seconds that a new
interpreter needs for the imports.
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
    """Run `python COMMAND` like `subprocess.run`. COMMAND is `-m MODULE ARGUMENTS` or `FILE ARGUMENTS`.

    Args:
        command: the words after `python`.
        cwd: working directory.
        timeout: seconds after which the process is killed.
        environment: variables in addition to those of this process.

    Returns:
        The exit status (negative: the signal that ended the process), stdout and stderr.

    Raises:
        subprocess.TimeoutExpired: the process took longer than `timeout`.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        variables = {**os.environ, **(environment or {})}
        process = _context.Process(target=_run, args=(words, str(cwd), variables, [str(file) for file in streams]))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, process.exitcode, *(file.read_text() for file in streams))


def _run(words: list[str], cwd: str, variables: dict[str, str], streams: list[str]) -> None:
    for descriptor, file in enumerate(streams, start=1):
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
