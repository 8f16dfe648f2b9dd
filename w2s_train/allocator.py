"""What the C library does with freed memory.

glibc gives large blocks back to the system when they are freed, and faults them in again, page by
page, when the same step allocates them anew: on a CPU, thousands of page faults per step.
"""

import ctypes

# Parameters of mallopt(3), of which glibc alone has these.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Keep what is freed for the next step; whether the C library can."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = {TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**28, MMAP_THRESHOLD: 2**30}
    return all([mallopt(name, value) for name, value in wanted.items()])
