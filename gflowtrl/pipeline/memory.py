"""Memory allocation while training on a CPU."""

from __future__ import annotations

import ctypes
import os


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep the memory of freed tensors for the next ones.

    Otherwise the system maps each large activation again, page by page, and takes it back: up to a third of the time
    of a step with many branches (`benchmarks/speed/prefix_losses.py`). Peak memory does not change. Nothing is done if
    one of glibc's own variables (`MALLOC_MMAP_MAX_`, ...) is set, or with another C library.

    Returns:
        Whether memory is kept from now on.
    """
    chosen = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    if chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
