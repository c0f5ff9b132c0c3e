"""Epsilon: against formulas that are known to hold, and clear errors."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from none_core.accounting import AccountantMissing, epsilon

opacus = pytest.mark.skipif(
    importlib.util.find_spec("opacus") is None, reason="needs the extra privacy"
)


def exact(noise: float, answers: int, delta: float) -> float:
    """Balle and Wang, ICML 2018, theorem 8, for the one Gaussian that the answers amount to."""
    mu = math.sqrt(answers) / noise

    def excess(eps: float) -> float:
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) - delta

    return float(brentq(excess, 0, 500))


@opacus
@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("answers", [1, 7, 60])
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_it_is_an_upper_bound_and_a_near_one(noise: float, answers: int, delta: float) -> None:
    true = exact(noise, answers, delta)
    assert true <= epsilon(noise, answers, delta) <= 1.25 * true + 0.05


@opacus
def test_it_grows_with_every_answer_and_falls_with_noise() -> None:
    costs = [epsilon(2.0, n, 1e-5) for n in range(6)]
    assert costs[0] == 0
    assert costs == sorted(costs)
    assert len(set(costs)) == 6
    assert epsilon(3.0, 5, 1e-5) < epsilon(2.0, 5, 1e-5) < epsilon(2.0, 5, 1e-9)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0.0, 1, 1e-5), "noise"), ((1.0, -1, 1e-5), "answers"), ((1.0, 1, 1.0), "delta")],
)
def test_values_out_of_range_are_refused(arguments: tuple[float, int, float], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} must be"):
        epsilon(*arguments)


def test_without_an_accountant_there_is_no_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants.analysis", None)
    with pytest.raises(AccountantMissing, match=r"none-defense\[privacy\]"):
        epsilon(1.2345, 3, 1e-5)
