"""NoneStrategy, and the robust strategies that come with Flower, held against the public suite."""

from __future__ import annotations

from typing import ClassVar

from flwr.serverapp.strategy import (
    Bulyan,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    MultiKrum,
    Strategy,
)

from none_core.conformance import DefenceConformance
from none_core.flower import NoneStrategy

NEVER = 10**9
UNVALIDATED = "Flower's strategies hardly look at a reply before they use it"


class TestNoneStrategy(DefenceConformance):
    def make(self, clients: int, malicious: int, on: bool = True) -> Strategy:
        return NoneStrategy(
            FedAvg(**self.everybody(clients)),
            self.model_fn,
            self.example_input,
            start_round=1 if on else NEVER,
            budget=0.2,
            liars=malicious,
        )


class TestFedMedian(DefenceConformance):
    independent_of_counts = True
    takes_no_f = "FedMedian takes no number of malicious clients"
    expected_failures: ClassVar = {
        "equals_fedavg_when_off": "it has no switch",
        "survives_hostile_replies": UNVALIDATED,
    }

    def make(self, clients: int, malicious: int, on: bool = True) -> Strategy:
        return FedMedian(**self.everybody(clients))


class TestFedTrimmedAvg(DefenceConformance):
    independent_of_counts = True
    expected_failures: ClassVar = {
        "equals_fedavg_when_off": "with beta=0 it is a mean that ignores counts",
        "survives_hostile_replies": UNVALIDATED,
    }

    def make(self, clients: int, malicious: int, on: bool = True) -> Strategy:
        beta = malicious / clients if on else 0.0
        return FedTrimmedAvg(**self.everybody(clients), beta=beta)


class TestMultiKrum(DefenceConformance):
    tolerates = 3  # n >= 2f + 3
    off_tolerance = 1e-5  # it sums in the order of its scores
    expected_failures: ClassVar = {
        "survives_hostile_replies": UNVALIDATED,
        "refuses_impossible_n_and_f": "it never compares them; too many f count as one neighbour",
    }

    def make(self, clients: int, malicious: int, on: bool = True) -> Strategy:
        return MultiKrum(
            **self.everybody(clients),
            num_malicious_nodes=malicious if on else 0,
            num_nodes_to_select=clients - malicious if on else clients,
        )


class TestBulyan(DefenceConformance):
    clients = 19  # n >= 4f + 3
    independent_of_counts = True
    expected_failures: ClassVar = {
        "equals_fedavg_when_off": "with f=0 it is a mean that ignores counts",
        "survives_hostile_replies": f"{UNVALIDATED}; at n = 4f + 3 no reply may miss",
        "refuses_impossible_n_and_f": "with too few replies it logs a warning and skips the round",
    }

    def make(self, clients: int, malicious: int, on: bool = True) -> Strategy:
        return Bulyan(**self.everybody(clients), num_malicious_nodes=malicious if on else 0)
