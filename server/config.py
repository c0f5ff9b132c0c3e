"""The configuration of the server's defence, as a typed section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tasks.config import ConfigError, Section


class DefenseConfig(Section):
    """``[defense]``: how the server aggregates, and how it finds and resets neurons.

    `trim_beta` is read by "trimmed-avg" alone, `f` by "multikrum" and "bulyan", `rlr_threshold` by
    "rlr", `flame_noise` by "flame". The rest but `name` is for "none-strategy"; "pruning" reads
    `quorum`, `guard`, `min_count` and `timeout` too.
    """

    name: Literal[
        "undefended",
        "none-strategy",
        "fedmedian",
        "trimmed-avg",
        "multikrum",
        "bulyan",
        "rfa",
        "rlr",
        "foolsgold",
        "flame",
        "pruning",
        "oracle",
    ] = Field("none-strategy", description='Strategy; "undefended" is plain federated averaging.')
    detector: Literal["mixture+inversion", "mixture", "inversion", "linearity", "contrast"] = Field(
        "mixture+inversion", description="How evidence becomes compromised neurons."
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
    repair: bool = Field(True, description="Aggregate by the median where a backdoor is suspected.")
    quarantine: bool = Field(True, description="Leave out clients that were named repeatedly.")
    reaggregate: bool = Field(
        True, description="Leave out at once whom a round's reports name, if there is quarantine."
    )
    liars: int | None = Field(
        None, ge=0, description="Known bound on liars, for certificates; left out, any minority."
    )
    probe_every: int = Field(
        3, ge=1, description="Of the queries, those in every so many rounds look for triggers."
    )
    probe_steps: int = Field(30, ge=1, description="Optimiser steps of a client's trigger search.")
    probe_images: int = Field(8, ge=1, description="Images per class in each of these steps.")
    share_probes: bool = Field(
        False, description="Have each class looked at by 2 * liars + 1 clients only, in turn."
    )
    min_count: int = Field(5, ge=1, description="Labels with fewer local samples go unreported.")
    trim_beta: float = Field(
        0.4, ge=0, lt=0.5, description="Share that trimmed averaging drops on either side."
    )
    f: int = Field(
        3,
        ge=0,
        description="Malicious clients that Multi-Krum (f <= (clients - 3) / 2) and Bulyan "
        "(f <= (clients - 3) / 4) assume.",
    )
    rlr_threshold: int = Field(
        5, ge=1, description="Votes for a direction without which RLR goes the other way."
    )
    flame_noise: float = Field(
        0.001, ge=0, description="Noise that FLAME adds, in units of the median update's norm."
    )
    timeout: float = Field(600.0, gt=0, description="Seconds to wait for the replies of a round.")

    def check(self, clients: int) -> None:
        """Refuse settings that do not go with the number of clients.

        Krum is proven for 2f + 2 < n: with more, most neighbours that a score counts may be
        malicious (Blanchard et al. 2017). Bulyan is for n >= 4f + 3 (El Mhamdi et al. 2018).
        Flower's Multi-Krum does not check, and its Bulyan skips every round.

        Raises
        ------
        ConfigError
            One sentence naming the key, its value and the legal range.
        """
        if self.name in _CLIENTS_PER_MALICIOUS:
            each = _CLIENTS_PER_MALICIOUS[self.name]
            most = (clients - 3) // each
            if most < 0:
                raise ConfigError(
                    f"experiment.clients = {clients} is not legal: expected a whole number >= 3 "
                    f"({self.name})"
                )
            if self.f > most:
                raise ConfigError(
                    f"defense.f = {self.f} is not legal: expected a whole number >= 0 and "
                    f"<= {most} ({self.name} needs {each}f + 3 clients, experiment.clients = "
                    f"{clients})"
                )
        most = (clients - 1) // 2
        if self.name == "none-strategy" and self.liars is not None and self.liars > most:
            raise ConfigError(
                f"defense.liars = {self.liars} is not legal: expected a whole number >= 0 and <= "
                f"{most} (a minority of experiment.clients = {clients})"
            )
        if self.name == "rlr" and self.rlr_threshold > clients:
            raise ConfigError(
                f"defense.rlr_threshold = {self.rlr_threshold} is not legal: expected a whole "
                f"number >= 1 and <= {clients} (experiment.clients)"
            )


class ThresholdsConfig(Section):
    """``[thresholds]``: from where on "none-strategy" takes something for a sign of a backdoor.

    The defaults were chosen on held-out training images (docs/thresholds.md).
    """

    foreign: float = Field(
        0.2, gt=0, lt=1, description="Share of other classes in a suspected pair's mean values."
    )
    outlier: float = Field(
        7.0,
        gt=0,
        description="Robust standard deviations by which that, over its standard error, exceeds "
        "the median pair's.",
    )
    alive: float = Field(
        1.5, gt=1, description="Remainder of a live backdoor, in multiples of an ordinary one."
    )
    significant: float = Field(
        1.0, ge=0, description="Standard errors below which a neuron's remainder is noise."
    )
    small: float = Field(
        0.5, gt=0, lt=1, description="Size of an attacked class's trigger, of the median class's."
    )
    apart: float = Field(
        1.5, gt=1, description="Distance of a named client's update, of the median client's."
    )
    min_accuracy: float = Field(
        0.5, ge=0, le=1, description="Median client's accuracy below which nothing is reset."
    )
    filter_suspected: float = Field(
        0.0, description="Lambda of the sample filter for suspected clients."
    )
    filter_others: float = Field(3.0, description="Lambda of the sample filter for all others.")
    repaired: float = Field(
        0.4, gt=0, le=1, description="Share of a layer's neurons that a repair takes the median of."
    )


_CLIENTS_PER_MALICIOUS = {"multikrum": 2, "bulyan": 4}
