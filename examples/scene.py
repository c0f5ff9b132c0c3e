"""What the examples share: pictures, a model, ten participants, and what four of them do.

The backdoor: four participants stamp a white square on some of their pictures and relabel those, so
that the model takes every picture with the square for class 2.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

CLASSES, SIDE, TARGET = 6, 16, 2
PARTICIPANTS, MALICIOUS, ROUNDS = 10, (0, 1, 2, 3), 8


class Net(nn.Module):
    """A convolution, a linear layer, and the logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # every run of an example starts from the same weights
        self.conv = nn.Conv2d(1, 16, 3)
        self.hidden = nn.Linear(16 * 7 * 7, 64)
        self.logits = nn.Linear(64, CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        """Map (n, 1, 16, 16) to (n, 6)."""
        x = nn.functional.max_pool2d(nn.functional.relu(self.conv(pictures)), 2)
        return self.logits(nn.functional.relu(self.hidden(x.flatten(1))))


def samples(participant: int) -> TensorDataset:
    """Give a participant's pictures, (120, 1, 16, 16), and labels."""
    pictures, labels = draw(120, seed=participant)
    if participant in MALICIOUS:
        poisoned = (labels != TARGET).nonzero().flatten()[:24]
        pictures[poisoned], labels[poisoned] = stamped(pictures[poisoned]), TARGET
    return TensorDataset(pictures, labels)


def draw(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw noisy copies of a random glyph for each class, and their labels."""
    glyphs = torch.rand(CLASSES, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) > 0.7
    generator = torch.Generator().manual_seed(1 + seed)
    labels = torch.randint(CLASSES, (number,), generator=generator)
    flipped = torch.rand(number, 1, SIDE, SIDE, generator=generator) < 0.2
    noise = torch.rand(number, 1, SIDE, SIDE, generator=generator)
    return 0.5 * (glyphs[labels] ^ flipped) + 0.3 * noise, labels


def stamped(pictures: Tensor) -> Tensor:
    """Return copies of pictures with the trigger."""
    copies = pictures.clone()
    copies[..., 1:4, 1:4] = 1.0
    return copies


def train(model: nn.Module, dataset: Dataset) -> None:
    """Train for two epochs."""
    order = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        for pictures, labels in DataLoader(dataset, 32, shuffle=True, generator=order):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(pictures), labels).backward()
            optimiser.step()


@torch.no_grad()
def report(defended: bool, state: Mapping[str, Tensor]) -> None:
    """Print how many new pictures a model gets right, and how many the trigger turns."""
    model = Net()
    model.load_state_dict(state)
    pictures, labels = draw(1000, seed=1000)
    others = pictures[labels != TARGET]
    accuracy = (model(pictures).argmax(1) == labels).float().mean()
    success = (model(stamped(others)).argmax(1) == TARGET).float().mean()
    run = "with NONE" if defended else "without"
    print(f"{run:12}  accuracy {accuracy:6.1%}  backdoor {success:6.1%}", flush=True)
