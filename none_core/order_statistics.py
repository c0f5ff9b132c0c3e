"""What can be known about honest clients when some of the reports are lies.

With at most f liars among n reports, the k-th smallest honest value lies between the k-th and the
(k + f)-th smallest reported one, whatever the liars say. A decision that also holds for the less
favourable end of that range could not have been forced by f liars.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]


def most_liars(reports: int, bound: int | None = None) -> int:
    """Liars to reckon with among so many reports.

    Parameters
    ----------
    reports : int
        Number of reports, >= 1.
    bound : int, optional
        Known bound on the number of liars; without one, any minority.
    """
    minority = (reports - 1) // 2
    return minority if bound is None else min(bound, minority)


def some_honest_at_most(values: FloatArray, liars: int) -> FloatArray:
    """Value that at least one honest client's does not exceed: the (f + 1)-th smallest, (...)."""
    value: FloatArray = np.sort(values, axis=0)[min(liars, len(values) - 1)]
    return value


def some_honest_at_least(values: FloatArray, liars: int) -> FloatArray:
    """Value that at least one honest client's reaches: the (f + 1)-th largest, (...)."""
    highest: FloatArray = -some_honest_at_most(-values, liars)
    return highest
