"""Main memory of this process; apart from ``resources``, which imports PyTorch."""

import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Bytes of main memory that this process has held at most so far.

    On Linux from /proc: ``getrusage`` would tell a child no less than what its parent held when it was started.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text(encoding="ascii").split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
