"""The process made ready for training: threads, and an allocator that keeps its memory between steps."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys

import torch

# glibc's mallopt parameters (malloc.h). Big temporaries are otherwise mapped and given back on every use, and their
# page faults cost a good part of a CPU step (docs/speed.md).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEEP_BYTES = 1 << 30  # free memory at the top of the heap that is kept
HEAP_BYTES = 32 << 20  # larger blocks are mapped and given back: on the heap, blocks of changing size fragment it


KERNELS = (
    "128"  # that oneDNN keeps: packs have many lengths, each gets a kernel of its own of 0.6 MB, and 1,024 are kept
)


def set_up_machine(threads: int | None) -> None:
    """Use `threads` CPU threads (None = every core this process may use) and let the allocator keep up to 1 GiB blocks."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read at the first matrix product
        os.environ.setdefault(name, KERNELS)
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc than glibc has no mallopt
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_THRESHOLD, HEAP_BYTES)
            mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
            mallopt(M_TOP_PAD, 64 << 20)


def release_free_memory() -> None:
    """Give the heap's free pages back (glibc's malloc_trim). Blocks of changing size leave holes that nothing fits into;
    without this the resident memory of a run grows with its steps."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def peak_memory_bytes() -> int:
    """The most memory the training has used so far: of the GPU if there is one, else resident memory of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
