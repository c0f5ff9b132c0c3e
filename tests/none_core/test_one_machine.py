"""What docs/one-machine.md tells people to write, run as it stands there."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset

from none_core.cleansing import Cleanser
from tests.none_core import poisoned

PAGE = Path(__file__).resolve().parents[2] / "docs" / "one-machine.md"
IN_THREE_LINES, OWN_LOOP, LIGHTNING = re.findall(
    r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
)
EXAMPLE = torch.zeros(2, poisoned.FEATURES)


@pytest.fixture(scope="module")
def task() -> poisoned.Task:
    torch.set_num_threads(1)
    return poisoned.make(0.08)


def names(task: poisoned.Task, model: nn.Module) -> dict[str, Any]:
    """What the page takes for granted."""
    return {
        "model": model,
        "dataset": task.train,
        "example_input": EXAMPLE,
        "torch": torch,
        "np": np,
        "Subset": Subset,
        "Cleanser": Cleanser,
    }


def is_clean(task: poisoned.Task, model: nn.Module) -> bool:
    right, turned = task.scores(model)
    return right > 0.95 and turned < 0.05


def test_in_three_lines(task: poisoned.Task) -> None:
    model = poisoned.net(norm=True)
    known = names(task, model)
    exec(IN_THREE_LINES, known)
    assert is_clean(task, model)
    assert known["trained"].dropped.tolist() == task.poisoned.tolist()


def test_in_a_loop_of_ones_own(task: poisoned.Task) -> None:
    def train(
        model: nn.Module,
        dataset: Dataset[Any],
        *,
        lr: float,
        epochs: int,
        frozen_normalisation: bool = False,
    ) -> None:
        model.train()
        for module in model.modules():
            if frozen_normalisation and isinstance(module, nn.BatchNorm1d):
                module.eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        for _ in range(epochs):
            for inputs, labels in DataLoader(dataset, 64, shuffle=True, generator=generator):
                optimizer.zero_grad()
                functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()

    model = poisoned.net(norm=True)
    known = names(task, model) | {"train": train}
    exec(OWN_LOOP, known)
    assert is_clean(task, model)
    assert len(known["kept"]) == len(task.train) - len(task.poisoned)


def test_in_lightning(task: poisoned.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where Lightning writes its logs and checkpoints
    import_module("tasks.torchvision_import")  # which Lightning's metrics import
    lightning = import_module("pytorch_lightning")

    class Classifier(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = poisoned.net(norm=True)

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    module = Classifier()
    known = names(task, module.model) | {"L": lightning, "module": module}
    lightning.seed_everything(0)
    exec(LIGHTNING, known)
    assert is_clean(task, module.model)
    assert len(known["cleansing"].kept) == len(task.train) - len(task.poisoned)
