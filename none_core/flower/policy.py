"""What a client is willing to say about its data, whatever the server asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from flwr.app import ConfigRecord, Context

from none_core.accounting import epsilon

PREFIX = "privacy."

_ANSWERS = "none.answers"  # where the client's own state counts its private answers


@dataclass(frozen=True)
class ReportPolicy:
    """A client's own limits on its reports; of two policies each limit's stricter one holds.

    Attributes
    ----------
    reports : bool
        Whether it reports at all. If not, its replies say so, and the server counts it as missing.
    min_count : int
        Labels with fewer samples are left out, if the server does not ask for more; >= 1.
    noise : float
        Noise multiplier of every answer under differential privacy, >= 0; 0 is none.
    delta : float
        Probability for which epsilon is allowed not to hold, in (0, 1).
    max_epsilon : float
        What all answers of a run may cost together, > 0; then it declines. Needs noise.
    patterns : bool
        Whether it shows the pattern of an attacked class's trigger, which is made from its images.
    """

    reports: bool = True
    min_count: int = 1
    noise: float = 0.0
    delta: float = 1e-5
    max_epsilon: float = math.inf
    patterns: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.min_count < 1:
            raise ValueError(f"min_count must be >= 1, got {self.min_count}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be >= 0 and finite, got {self.noise}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be in (0, 1), got {self.delta}")
        if not self.max_epsilon > 0:
            raise ValueError(f"max_epsilon must be > 0, got {self.max_epsilon}")
        if self.max_epsilon < math.inf and not self.noise:
            raise ValueError("max_epsilon needs noise > 0: without noise epsilon is infinite")

    @classmethod
    def of(cls, context: Context) -> ReportPolicy:
        """Read ``privacy.*`` from the run configuration and from the node's own.

        The node's owner writes the latter (``flower-supernode --node-config``), and whoever starts
        the run the former: of each limit the stricter one holds, so a run cannot loosen a node's.
        A node that sets any limit has the defaults for the others, against which the run's are held
        likewise; one that sets none takes the run's as they are, but shows no patterns: that only
        the owner of the images can allow.

        Raises
        ------
        ValueError
            If a key is unknown, or its value not legal: a misspelt limit must not be none.
        """
        run, node = _limits(context.run_config), _limits(context.node_config)
        if not node:
            return cls(**run | {"patterns": False})
        own = {field.name: node.get(field.name, field.default) for field in fields(cls)}
        return cls(**own | {name: _STRICTER[name](own[name], run[name]) for name in run})

    def declines(self, context: Context) -> str | None:
        """Say why not to answer a query, or None."""
        if not self.reports:
            return "its policy is not to report"
        if self.noise and epsilon(self.noise, answers(context) + 1, self.delta) > self.max_epsilon:
            return f"another answer would cost more privacy than epsilon = {self.max_epsilon:g}"
        return None

    def spend(self, context: Context) -> dict[str, int | float]:
        """Count one more private answer; how many there were, and what they cost together."""
        given = answers(context) + 1
        context.state[_ANSWERS] = ConfigRecord({"answers": given})
        cost = epsilon(self.noise, given, self.delta)
        return {"answers": given, "noise": self.noise, "delta": self.delta, "epsilon": cost}


_STRICTER: dict[str, Callable[[Any, Any], Any]] = {
    "reports": lambda one, other: one and other,
    "min_count": max,
    "noise": max,
    "delta": min,
    "max_epsilon": min,
    "patterns": lambda one, other: one and other,
}


def answers(context: Context) -> int:
    """Count the private answers that a client has given in this run."""
    record: Any = context.state.config_records.get(_ANSWERS, {})
    return int(record.get("answers", 0))


def _limits(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the limits that a configuration sets; an empty text sets none."""
    types = {field.name: type(field.default) for field in fields(ReportPolicy)}
    limits: dict[str, Any] = {}
    for key, value in config.items():
        if not key.startswith(PREFIX) or value == "":
            continue
        name = key.removeprefix(PREFIX)
        if name not in types:
            raise ValueError(f"{key} is not a known key: there are {', '.join(types)}")
        if types[name] is float and type(value) is int:
            value = float(value)
        if type(value) is not types[name]:
            raise ValueError(f"{key} = {value!r:.40} is not legal: expected {types[name].__name__}")
        limits[name] = value
    return limits
