"""What repeated answers cost in privacy: epsilon for a noise multiplier and a number of answers.

The accountant is Opacus' (Renyi differential privacy, Mironov, CSF 2017), installed by the extra
``privacy``. It is read only by clients that add noise.
"""

from __future__ import annotations

from functools import lru_cache

# Orders at which the Renyi divergence is turned into epsilon; the best of them counts.
_ORDERS = [
    *(1 + x / 100 for x in range(1, 20)),
    *(1 + x / 10 for x in range(2, 100)),
    *range(11, 64),
    *range(64, 1025, 16),
]


class AccountantMissing(ImportError):  # noqa: N818 (a missing part, not a failure of ours)
    """Noise was asked for, but nothing that could account for it is installed."""


@lru_cache(maxsize=4096)
def epsilon(noise: float, answers: int, delta: float) -> float:
    """Give the epsilon of so many answers about the same samples, each a Gaussian mechanism.

    Every answer sees every sample, so nothing is gained by subsampling.

    Parameters
    ----------
    noise : float
        Noise multiplier of one answer, > 0.
    answers : int
        >= 0.
    delta : float
        In (0, 1).

    Raises
    ------
    AccountantMissing
        If Opacus is not installed.
    ValueError
        If an argument is out of range.
    """
    if not noise > 0:
        raise ValueError(f"noise must be > 0, got {noise}")
    if answers < 0:
        raise ValueError(f"answers must be >= 0, got {answers}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    if answers == 0:
        return 0.0
    try:
        from opacus.accountants.analysis import rdp
    except ImportError as error:
        raise AccountantMissing(
            "differential privacy needs an accountant: pip install none-defense[privacy]"
        ) from error
    spent = rdp.compute_rdp(q=1.0, noise_multiplier=noise, steps=answers, orders=_ORDERS)
    return float(rdp.get_privacy_spent(orders=_ORDERS, rdp=spent, delta=delta)[0])
