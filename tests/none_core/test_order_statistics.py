"""Whatever f liars say, what is known of the honest values holds."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from none_core.order_statistics import (
    most_liars,
    some_honest_at_least,
    some_honest_at_most,
)

VALUES = st.sampled_from([-np.inf, -1.0, 0.0, 0.0, 0.5, 2.0, np.inf]) | st.floats(-10, 10)


@st.composite
def reports(draw: st.DrawFn) -> tuple[list[float], np.ndarray, int]:
    """Honest values, all reported ones in any order, and a bound that the liars keep to."""
    honest = draw(st.lists(VALUES, min_size=1, max_size=8))
    lies = draw(st.lists(VALUES, max_size=6))
    bound = draw(st.integers(len(lies), len(honest) + len(lies) - 1))
    return honest, np.array(draw(st.permutations(honest + lies))), bound


@given(reports())
def test_some_honest_value_is_at_most_and_some_at_least(
    case: tuple[list[float], np.ndarray, int],
) -> None:
    honest, values, liars = case
    assert min(honest) <= some_honest_at_most(values, liars)
    assert max(honest) >= some_honest_at_least(values, liars)


@given(st.lists(VALUES, min_size=1, max_size=9), st.integers(0, 8))
def test_the_bounds_are_reported_values_and_as_narrow_as_can_be(
    values: list[float], liars: int
) -> None:
    liars = min(liars, len(values) - 1)
    ordered = sorted(values)
    # The liars may be those with the smallest reports, or those with the largest.
    honest = len(values) - liars
    assert some_honest_at_most(np.array(values), liars) == min(ordered[liars:])
    assert some_honest_at_least(np.array(values), liars) == max(ordered[:honest])


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_every_column_is_looked_at_by_itself(rows: int, columns: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(rows, columns, 2))
    liars = (rows - 1) // 2
    found = [some_honest_at_most(values, liars), some_honest_at_least(values, liars)]
    for i, j in np.ndindex(columns, 2):
        one = values[:, i, j]
        wanted = [some_honest_at_most(one, liars), some_honest_at_least(one, liars)]
        assert [array[i, j] for array in found] == wanted


def test_the_reports_are_left_as_they_are() -> None:
    values = np.array([3.0, 1.0, 2.0])
    some_honest_at_most(values, 1)
    some_honest_at_least(values, 1)
    assert values.tolist() == [3.0, 1.0, 2.0]


@given(st.integers(1, 100), st.none() | st.integers(0, 100))
def test_liars_are_a_minority_and_no_more_than_the_bound(reports: int, bound: int | None) -> None:
    liars = most_liars(reports, bound)
    allowed = [f for f in range(reports) if 2 * f < reports and (bound is None or f <= bound)]
    assert liars == max(allowed)
