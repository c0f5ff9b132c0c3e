"""Measuring in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def alone(work: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """Call a function in a process of its own that has nothing of this one's memory."""
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawned) as pool:
        return pool.submit(work, *arguments).result()


def memory(field: str) -> float:
    """Return the present (VmRSS) or peak (VmHWM) memory of this process in MB.

    Linux counts the parent's memory at the time of the fork into a child's ``ru_maxrss``, so it is
    read from /proc there; elsewhere both fields are the peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines[field].split()[0]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
