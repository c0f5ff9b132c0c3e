"""What two detectors agree on: each branch with detections made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from none_core.activations import LABEL_HISTOGRAMS, STATISTICS, TRIGGER_SHIFT, Report, ReportSpec
from none_core.detection import (
    Agreement,
    Attack,
    Detection,
    Inversion,
    Mixture,
    Standing,
    Suspicion,
)
from none_core.detection.base import NOTHING_RECENT, IntArray, Recent
from tests.none_core.detection.toys import LABELS, LAYER_OF, NEURONS, draw_values

CONTESTED, SUPPORTED, CERTIFIED = (int(s) for s in sorted(Standing))
ATTACK = Attack(label=2, size=0.01, usual=0.1, strength=9.0, certified=True)


def suspicion(label: int, *, alive: bool) -> Suspicion:
    return Suspicion(7, label, 0.5, 3.0, alive, np.zeros(NEURONS))


def ints(*values: int) -> IntArray:
    return np.array(values, dtype=np.int64)


class FixedMixture(Mixture):
    """Finds what it was told to find, and notes whom it was asked about."""

    def __init__(self, detection: Detection) -> None:
        super().__init__()
        self.detection = detection
        self.asked: list[int] = []
        self.bound: int | None = -1

    def detect(
        self,
        summaries: Mapping[int, Any],
        layer_of: IntArray,
        bound: int | None = None,
        recent: Recent = NOTHING_RECENT,
    ) -> Detection:
        self.asked, self.bound = sorted(summaries), bound
        return self.detection


class FixedInversion(Inversion):
    """The same for the other detector."""

    def __init__(self, detection: Detection) -> None:
        super().__init__()
        self.detection = detection
        self.asked: list[int] = []
        self.bound: int | None = -1

    def detect(
        self,
        summaries: Mapping[int, Any],
        layer_of: IntArray,
        bound: int | None = None,
        recent: Recent = NOTHING_RECENT,
    ) -> Detection:
        self.asked, self.bound = sorted(summaries), bound
        return self.detection


def blended(compromised: IntArray, *suspicions: Suspicion) -> Detection:
    """What mixture says: the worst first, and zero for all others."""
    scores = np.zeros(NEURONS)
    scores[compromised] = np.arange(len(compromised), 0, -1)
    return Detection(
        scores,
        compromised,
        alive=any(s.alive for s in suspicions),
        suspicions=suspicions,
        client_evidence={7: np.ones(NEURONS)},
        class_mean=np.zeros((LABELS, NEURONS)),
        class_deviation=np.ones((LABELS, NEURONS)),
    )


def probed(shifts: dict[int, Any], **found: Any) -> Detection:
    """What inversion says."""
    moved = {k: np.asarray(v, dtype=np.float64) for k, v in shifts.items()}
    return Detection(
        **{
            "scores": np.zeros(NEURONS),
            "compromised": ints(),
            "alive": False,
            "shifts": moved,
            **found,
        }
    )


def reports(statistics: frozenset[str], clients: int = 5) -> dict[int, Report]:
    spec = ReportSpec(NEURONS, LABELS, statistics)
    full = {client: draw_values(client, 30).report() for client in range(clients)}
    return {c: Report(spec, {name: r[name] for name in spec.fields()}) for c, r in full.items()}


def agree(
    mixture: Detection, inversion: Detection, statistics: frozenset[str] = Agreement.statistics
) -> Detection:
    detector = Agreement(FixedMixture(mixture), FixedInversion(inversion))
    summaries = {c: detector.summarise(r) for c, r in reports(statistics).items()}
    return detector.detect(summaries, LAYER_OF, 3)


def assert_keeps_what_mixture_knows(found: Detection, mixture: Detection) -> None:
    assert found.suspicions == mixture.suspicions
    assert found.client_evidence is mixture.client_evidence
    assert found.class_mean is mixture.class_mean
    assert found.class_deviation is mixture.class_deviation


# --- an attacked class ----------------------------------------------------------------------------


def attacked() -> Detection:
    """Neuron 4 is certified; 0, 1 and 6 are not, and worse than it or better."""
    standing = np.full(NEURONS, CONTESTED, dtype=np.int8)
    standing[4] = CERTIFIED
    return probed(
        {2: np.zeros(NEURONS)},
        scores=np.array([9.0, 8.0, 0.0, 0.0, 7.0, 0.0, 6.0]),
        compromised=ints(4),
        held_back=ints(0, 1, 6),
        alive=True,
        attacks=(ATTACK,),
        standing=standing,
    )


def test_what_inversion_certifies_needs_nobodys_support() -> None:
    mixture, inversion = blended(ints()), attacked()
    found = agree(mixture, inversion)
    assert found.compromised.tolist() == [4]
    assert found.held_back.tolist() == [0, 1, 6]
    assert found.alive
    assert found.attacks == (ATTACK,)
    assert found.standing is not None
    assert found.standing.tolist() == [CONTESTED] * 4 + [CERTIFIED] + [CONTESTED] * 2
    assert_keeps_what_mixture_knows(found, mixture)


def test_what_is_contested_is_reset_with_the_support_of_mixture() -> None:
    mixture, inversion = blended(ints(5, 6, 0), suspicion(2, alive=True)), attacked()
    before = inversion.standing.copy()  # type: ignore[union-attr]
    found = agree(mixture, inversion)
    # The worst first by inversion's scores; 5 is mixture's alone.
    assert found.compromised.tolist() == [0, 4, 6]
    assert found.held_back.tolist() == [1]
    assert found.scores is inversion.scores
    assert found.standing is not None
    expected = [SUPPORTED, CONTESTED, CONTESTED, CONTESTED, CERTIFIED, CONTESTED, SUPPORTED]
    assert found.standing.tolist() == expected
    assert inversion.standing is not None
    assert (inversion.standing == before).all()


# --- no attacked class, but live suspicions -------------------------------------------------------


@pytest.mark.parametrize("label", [0, 2])
def test_live_suspicions_are_followed_as_far_as_the_trigger_to_their_label_agrees(
    label: int,
) -> None:
    mixture = blended(ints(4, 0, 1), suspicion(label, alive=True))
    shifts = {
        0: [9.0, 0.1, 0.0, 0.1, 0.0, 0.0, 8.0],  # moves 0 and 6
        2: [-9.0, 7.0, 0.0, 0.1, 9.0, 0.0, 0.1],  # moves 1 and 4; a fall is no support
    }
    found = agree(mixture, probed(shifts, hints={0: 2, 2: 3}))
    assert found.compromised.tolist() == {0: [0], 2: [4, 1]}[label]
    assert found.held_back.tolist() == {0: [4, 1], 2: [0]}[label]
    assert found.alive
    assert found.attacks == ()
    assert found.standing is not None
    assert np.flatnonzero(found.standing == SUPPORTED).tolist() == sorted(found.compromised)
    assert not (found.standing == CERTIFIED).any()
    assert found.scores is mixture.scores
    assert_keeps_what_mixture_knows(found, mixture)


def test_two_suspected_labels_have_the_support_of_either_trigger() -> None:
    mixture = blended(ints(4, 0, 1), suspicion(0, alive=True), suspicion(2, alive=True))
    shifts = {0: [9.0, 0, 0, 0, 0, 0, 0], 2: [0, 0, 0, 0, 9.0, 0, 0]}
    both = probed(shifts, hints={0: 2, 2: 2})
    assert agree(mixture, both).compromised.tolist() == [4, 0]
    assert agree(mixture, probed(shifts, hints={0: 2, 2: 1})).compromised.tolist() == [0]


@pytest.mark.parametrize("hints", [{}, {2: 1}, {1: 4}])
def test_a_suspicion_that_no_two_clients_second_resets_nothing(hints: dict[int, int]) -> None:
    """A trigger to any class moves some neurons: that alone is no second opinion."""
    mixture = blended(ints(4, 0), suspicion(2, alive=True))

    found = agree(mixture, probed({2: [9.0, 0, 0, 0, 9.0, 0, 0]}, hints=hints))

    assert found.compromised.size == 0
    assert found.held_back.tolist() == [4, 0]


@pytest.mark.parametrize(
    "mixture",
    [
        blended(ints(4, 0), suspicion(2, alive=False)),  # dead
        blended(ints(4, 0), suspicion(1, alive=True)),  # nobody probed that label
        blended(ints(4, 0)),
    ],
)
def test_without_a_live_suspicion_of_a_probed_label_all_is_held_back(mixture: Detection) -> None:
    shifts = {2: [9.0, 0, 0, 0, 9.0, 0, 0]}
    found = agree(mixture, probed(shifts, hints={2: 3}))
    assert found.compromised.size == 0
    assert found.held_back.tolist() == [4, 0]
    assert found.alive == mixture.alive
    assert_keeps_what_mixture_knows(found, mixture)


# --- no probes ------------------------------------------------------------------------------------


def test_without_probes_nothing_is_reset_and_everybody_is_suspected_as_before() -> None:
    mixture = blended(ints(4, 0, 1), suspicion(2, alive=True))
    found = agree(mixture, attacked(), frozenset({LABEL_HISTOGRAMS}))
    assert found.compromised.size == 0
    assert found.compromised.dtype == np.int64
    assert found.held_back.tolist() == [4, 0, 1]
    assert found.alive
    assert (found.attacks, found.shifts) == ((), {})
    assert_keeps_what_mixture_knows(found, mixture)


# --- what each is asked ---------------------------------------------------------------------------


def test_it_asks_for_what_either_needs() -> None:
    assert Agreement.statistics == {LABEL_HISTOGRAMS, TRIGGER_SHIFT}


def test_each_detector_sees_the_clients_that_reported_what_it_needs() -> None:
    mixture, inversion = FixedMixture(blended(ints())), FixedInversion(probed({}))
    detector = Agreement(mixture, inversion)
    everybody = reports(Agreement.statistics)
    without = reports(frozenset({LABEL_HISTOGRAMS}))
    given = {c: (everybody if c in (1, 3) else without)[c] for c in everybody}
    detector.detect({c: detector.summarise(r) for c, r in given.items()}, LAYER_OF, 2)
    assert (mixture.asked, mixture.bound) == ([0, 1, 2, 3, 4], 2)
    assert (inversion.asked, inversion.bound) == ([1, 3], 2)


def test_its_summaries_are_those_of_both() -> None:
    report = reports(frozenset(STATISTICS))[0].with_trigger_shift(
        np.ones(LABELS, dtype=bool),
        np.full(LABELS, 0.5),
        np.ones(LABELS),
        np.ones((LABELS, NEURONS)),
    )
    summary = Agreement().summarise(report)
    assert summary.inversion is not None
    pairs = [
        *zip(summary.mixture, Mixture().summarise(report), strict=True),
        *zip(summary.inversion, Inversion().summarise(report), strict=True),
    ]
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)
