"""Detectors: ways to turn activation reports into compromised neurons, chosen by name."""

from __future__ import annotations

from none_core.detection.base import Detection, Detector, Suspicion
from none_core.detection.contrast import Contrast
from none_core.detection.linearity import Linearity
from none_core.detection.mixture import Mixture

DETECTORS: dict[str, type[Detector]] = {
    detector.name: detector for detector in (Linearity, Contrast, Mixture)
}

__all__ = ["DETECTORS", "Contrast", "Detection", "Detector", "Linearity", "Mixture", "Suspicion"]
