"""NONE for a federated loop of one's own, without Flower.

Source: Wang et al., "Training with More Confidence: Mitigating Injected and Natural Backdoors
During Training", NeurIPS 2022, section 5.4 (the federated defence).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from none_core.activations import TRIGGER_SHIFT, Report, ReportSpec, build_report
from none_core.decision import Decision, Policy, Reputation, decide, weigh
from none_core.detection import Detector, Mixture
from none_core.neurons import NeuronMap


class LoopDefence:
    """Clients report, the server resets neurons and says whom to leave out of the next average.

    It is the paper's setting: reports are believed, as they are where all clients run in one
    process. What :class:`none_core.flower.NoneStrategy` does besides is not in here: validating
    replies, looking for triggers, trying a reset out before it is kept, filtering samples.

    Parameters
    ----------
    model : nn.Module
        Of the architecture that is trained; its weights do not matter, and it is not kept.
    example_input : Tensor
        One batch as the model takes it.
    detector : Detector, optional
        Any that asks for no trigger; :class:`~none_core.detection.Mixture` if not given.
    policy : Policy, optional
        Of which ``min_accuracy`` and ``budget`` are used.
    reputation : Reputation, optional
    neuron_map : NeuronMap, optional
        For models that cannot be traced.

    Raises
    ------
    ValueError
        If the detector needs triggers.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> defence = LoopDefence(model, torch.zeros(1, 4))
    >>> data = torch.eye(4).repeat(5, 1), torch.arange(20) % 3
    >>> reports = {client: defence.report(model, [data]) for client in range(4)}
    >>> defence.defend(model, reports).neurons.size
    0
    >>> defence.quarantined
    frozenset()
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor,
        *,
        detector: Detector | None = None,
        policy: Policy | None = None,
        reputation: Reputation | None = None,
        neuron_map: NeuronMap | None = None,
    ) -> None:
        self.detector = detector or Mixture()
        if TRIGGER_SHIFT in self.detector.statistics:
            raise ValueError(f"detector {self.detector.name!r} needs triggers, which no loop sends")
        self.policy, self.reputation = policy or Policy(), reputation or Reputation()
        self.neurons = neuron_map or NeuronMap.trace(model, example_input)
        with torch.inference_mode():
            labels = int(model(example_input).shape[1])
        self.spec = ReportSpec(self.neurons.size, labels, self.detector.statistics)

    @property
    def quarantined(self) -> frozenset[int]:
        """Clients whose updates are to be left out."""
        return self.reputation.quarantined

    def report(
        self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], min_count: int = 5
    ) -> Report:
        """Report a client's samples; see :func:`~none_core.activations.build_report`."""
        return build_report(model, self.neurons, batches, self.spec, min_count)

    def defend(self, model: nn.Module, reports: Mapping[int, Report]) -> Decision:
        """Reset neurons of the averaged model in place, and hold the reports against the clients.

        Parameters
        ----------
        model : nn.Module
        reports : mapping of client to Report
            Those of this very model, at least one.

        Returns
        -------
        Decision
            What was reset, and why.
        """
        layer_of = self.neurons.layer_of(np.arange(self.neurons.size))
        summaries = {c: self.detector.summarise(report) for c, report in reports.items()}
        suspicions = self.detector.detect(summaries, layer_of).suspicions
        trusted = [c for c in reports if c not in self.quarantined] or list(reports)
        detection = self.detector.detect({c: summaries[c] for c in trusted}, layer_of)
        accuracy = float(np.median([reports[c].accuracy for c in trusted]))
        decision = decide(detection, layer_of, self.policy, accuracy=accuracy)
        self.neurons.reset(model, decision.neurons)
        suspected = {s.client: True for s in suspicions}
        self.reputation.update(weigh(reports, suspected, [], certified=False))
        return decision
