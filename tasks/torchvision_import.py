"""The one place that imports torchvision, which a CPU-only torch may otherwise refuse to load.

torchvision's published wheel is linked against CUDA libraries. Beside a CPU-only torch its C++
operators therefore fail to load, and ``import torchvision`` then stops at the first function that
describes one of them: "operator torchvision::nms does not exist". Data sets and models need none
of these operators, so declaring the two schemas is enough. That is done only after the plain
import has failed with that error, so a matching torchvision keeps its real operators.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

_BOXES_TO_KEPT = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

# A declaration lasts as long as the Library object that made it.
_declared: list[torch.library.Library] = []


def _import_torchvision() -> ModuleType:
    """Import torchvision, declaring the missing operator schemas only where that is the problem."""
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        # The failed attempt leaves half-initialised submodules behind; start afresh.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(operator + _BOXES_TO_KEPT)
        _declared.append(library)
        import torchvision
    return torchvision


torchvision = _import_torchvision()
