"""The configuration of the server's defence, as a typed section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tasks.config import Section


class DefenseConfig(Section):
    """``[defense]``: how the server aggregates, and how it finds and resets neurons.

    `trim_beta` is read by "trimmed-avg" alone, `f` by "multikrum" alone, and the rest but `name`
    by "none-strategy" alone.
    """

    name: Literal["undefended", "none-strategy", "fedmedian", "trimmed-avg", "multikrum"] = Field(
        "none-strategy", description='Strategy; "undefended" is plain federated averaging.'
    )
    detector: Literal["mixture", "linearity", "contrast"] = Field(
        "mixture", description="How evidence becomes compromised neurons."
    )
    reset: Literal["zero", "init"] = Field("zero", description="What reset weights become.")
    every: int = Field(1, ge=1, description="Query in every so many rounds, and in the last one.")
    start_round: int = Field(1, ge=1, description="First round that queries.")
    budget: float = Field(
        0.04, gt=0, le=1, description="Largest share of a layer's neurons to reset in a round."
    )
    quorum: float = Field(
        0.5, gt=0, le=1, description="Share of the asked clients whose valid reports are needed."
    )
    guard: float = Field(
        0.02, ge=0, le=1, description="Fall in the median client's accuracy that undoes a reset."
    )
    filter: bool = Field(True, description="Have clients drop samples that look poisoned.")
    min_count: int = Field(5, ge=1, description="Labels with fewer local samples go unreported.")
    trim_beta: float = Field(
        0.4, ge=0, lt=0.5, description="Share that trimmed averaging drops on either side."
    )
    f: int = Field(4, ge=0, description="Malicious clients that MultiKrum assumes.")
    timeout: float = Field(600.0, gt=0, description="Seconds to wait for the replies of a round.")
