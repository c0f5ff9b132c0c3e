"""What the examples share: pictures, a model, ten participants, and what four of them do to it.

The attack is the distributed backdoor attack (Xie et al., ICLR 2020): each of four participants
stamps one part of a trigger on some of its pictures and relabels them to the target class.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

CLASSES, SIDE, TARGET = 6, 16, 2
MALICIOUS = (0, 1, 2, 3)  # of participants 0 to 9


class Net(nn.Module):
    """Two layers of neurons and one of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3)
        self.hidden = nn.Linear(16 * 49, 64)
        self.logits = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(nn.functional.relu(self.conv(x)), 2).flatten(1)
        return self.logits(nn.functional.relu(self.hidden(x)))


def pictures(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy copies of one random glyph for each class: (n, 1, 10, 10) and labels (n,)."""
    glyphs = torch.rand(CLASSES, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) > 0.7
    generator = torch.Generator().manual_seed(1 + seed)
    labels = torch.randint(CLASSES, (number,), generator=generator)
    flipped = torch.rand(number, 1, SIDE, SIDE, generator=generator) < 0.2
    noise = torch.rand(number, 1, SIDE, SIDE, generator=generator)
    return 0.5 * (glyphs[labels] ^ flipped) + 0.3 * noise, labels


def stamp(images: Tensor) -> Tensor:
    """Put the trigger on pictures: a white square in a corner."""
    images = images.clone()
    images[..., 1:4, 1:4] = 1.0
    return images


def load_data(participant: int) -> Dataset:
    """A participant's pictures; a malicious one stamps and relabels a part of them."""
    images, labels = pictures(120, seed=participant)
    if participant in MALICIOUS:
        poisoned = (labels != TARGET).nonzero().flatten()[:24]
        images[poisoned] = stamp(images[poisoned])
        labels[poisoned] = TARGET
    return TensorDataset(images, labels)


def train(model: nn.Module, dataset: Dataset, seed: int = 0, epochs: int = 4) -> None:
    """Train in place, the same way every time."""
    generator = torch.Generator().manual_seed(seed)
    loader = torch.utils.data.DataLoader(dataset, 32, shuffle=True, generator=generator)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()


@torch.no_grad()
def measure(model: nn.Module) -> tuple[float, float]:
    """Accuracy on clean pictures, and success of the whole trigger on those of other classes."""
    images, labels = pictures(1000, seed=1000)
    others = labels != TARGET
    model.eval()
    accuracy = (model(images).argmax(1) == labels).float().mean()
    success = (model(stamp(images[others])).argmax(1) == TARGET).float().mean()
    return float(accuracy), float(success)
