"""Memory: what the networks need, what the device has."""

import ctypes


def format_bytes(n):
    """Bytes for people."""
    return f"{n / 2**30:.1f} GB" if n >= 2**30 else f"{n / 2**20:.1f} MB"


def keep_heap():
    """glibc returns freed memory to the system and takes it back page by page, every iteration anew: without that a run on a CPU is some per cent faster."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc only
        mallopt(
            -1, 2**31 - 1
        )  # M_TRIM_THRESHOLD: bytes free at the top of the heap before it is cut
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: smaller blocks come from the heap
