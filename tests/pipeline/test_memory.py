"""What is freed stays with the process, unless the user has told glibc otherwise."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from gflowtrl.pipeline import memory


# Page faults of a process that takes and frees 64 MB twenty times; the module alone, as its package imports much more.
PROGRAM = """
import resource, runpy, sys
kept = runpy.run_path(sys.argv[1])["keep_freed_memory"]()
def work():
    for _ in range(20):
        bytearray(2**26)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> tuple[bool, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, memory.__file__], capture_output=True, text=True, check=True, env=environment
    )
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again():
    kept, few = faults()
    left, many = faults(MALLOC_MMAP_THRESHOLD_="131072")
    assert kept and not left
    assert few < 100 < 1000 < many
