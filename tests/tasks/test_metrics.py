"""BA, ASR and recovered accuracy, against numbers worked out by hand with a fake model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tasks.metrics import Scores, Success, attack_success, benign_accuracy, evaluate
from tasks.poisoning import Trigger
from tasks.triggers import DynamicPatch, Pixels, Solid

# Two parts in the top row; the answer of the fake model is written in the bottom right pixel.
TRIGGER = Trigger((((0, 0),), ((0, 1),)))
TARGET = 2


class FakeModel(nn.Module):
    """Answers the class written in the image, and the target when it sees the whole trigger.

    An image with a mark at (1, 0) resists the trigger. An image that carries the trigger and a
    mark at (1, 1) is given class 0, which is neither target nor what is written.
    """

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.float32
        assert images.max() <= 1.0
        levels = (images[:, 0] * 255).round().long()
        answer = levels[:, -1, -1].clone()
        triggered = (levels[:, 0, 0] == 255) & (levels[:, 0, 1] == 255)
        resists, confused = levels[:, 1, 0] == 255, levels[:, 1, 1] == 255
        answer[triggered & ~resists] = TARGET
        answer[triggered & confused] = 0
        return nn.functional.one_hot(answer, 4).float()


def image(written: int, *marks: tuple[int, int]) -> Tensor:
    pixels = torch.zeros(1, 3, 3, dtype=torch.uint8)
    pixels[0, -1, -1] = written
    for row, column in marks:
        pixels[0, row, column] = 255
    return pixels


def test_scores_are_those_worked_out_by_hand():
    resists, confused = (1, 0), (1, 1)
    samples = [  # image, true label             clean     stamped
        (image(0), 0),  #                        right     target
        (image(1), 1),  #                        right     target
        (image(2), 1),  #                        wrong     target
        (image(2, resists), 1),  #               wrong     target, as without the stamp
        (image(3, resists), 3),  #               right     its true class
        (image(1, resists), 3),  #               wrong     another wrong class
        (image(1, confused), 1),  #              right     another wrong class
        (image(2), 2),  #                        right     of the target class: not counted
        (image(2, confused), 2),  #              right     of the target class: not counted
        (image(1), 2),  #                        wrong     of the target class: not counted
    ]
    images = torch.stack([sample for sample, _ in samples])
    labels = torch.tensor([label for _, label in samples])

    for batch_size in (1, 3, 500):
        scores = evaluate(FakeModel(), images, labels, TRIGGER, TARGET, batch_size)

        assert scores == Scores(ba=6 / 10, asr=4 / 7, recovered=1 / 7)


def test_images_and_modes_are_left_as_they_were():
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Dropout(), nn.Linear(9, 4)))
    model.train()
    model[1][0].eval()
    images = torch.stack([image(0), image(1)])
    before = images.clone()

    evaluate(model, images, torch.tensor([0, 1]), TRIGGER, TARGET)

    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    assert torch.equal(images, before)


def test_model_is_in_evaluation_mode_without_gradients():
    seen = []

    class Spy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            return torch.zeros(len(images), 4)

    evaluate(Spy().train(), image(0)[None], torch.tensor([0]), TRIGGER, TARGET)

    assert seen == [(False, False)] * 2


def test_nothing_to_attack_is_an_error():
    images = torch.stack([image(2), image(2)])

    with pytest.raises(ValueError, match="other than target 2"):
        evaluate(FakeModel(), images, torch.tensor([2, 2]), TRIGGER, TARGET)


# --- any attack ----------------------------------------------------------------------------------


class Shift(nn.Module):
    """Answers the next class where it sees the trigger at (0, 0), else what is written."""

    def forward(self, images: Tensor) -> Tensor:
        levels = (images[:, 0] * 255).round().long()
        answer = (levels[:, -1, -1] + (levels[:, 0, 0] == 255)) % 4
        return nn.functional.one_hot(answer, 4).float()


def test_attack_on_every_label_counts_the_wanted_answer_of_each():
    images = torch.stack([image(0), image(1), image(2), image(3), image(3)])
    labels = torch.tensor([0, 1, 2, 3, 2])  # the last is answered 0 when stamped
    stamp, generator = Pixels(TRIGGER), torch.Generator()

    def next_class(true: Tensor) -> Tensor:
        return (true + 1) % 4

    for batch_size in (1, 2, 500):
        result = attack_success(Shift(), images, labels, stamp, next_class, generator, batch_size)
        assert result == Success(asr=4 / 5, recovered=0.0)
    assert benign_accuracy(Shift(), images, labels) == 4 / 5


def test_images_of_which_nothing_is_wanted_do_not_count():
    images = torch.stack([image(0), image(1), image(1), image(2)])
    labels = torch.tensor([0, 1, 1, 2])

    result = attack_success(
        Shift(),
        images,
        labels,
        Pixels(TRIGGER),
        lambda true: torch.where(true == 1, 2, true),
        torch.Generator(),
    )

    assert result == Success(asr=1.0, recovered=0.0)


def test_drawn_stamps_follow_the_generator():
    images = image(1).repeat(40, 1, 1, 1)
    stamp = DynamicPatch(1, pattern=Solid())
    seen = []

    class Spy(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            seen.append(batch)
            return torch.zeros(len(batch), 4)

    def attack(seed: int) -> None:
        attack_success(
            Spy(),
            images,
            torch.ones(40, dtype=torch.int64),
            stamp,
            torch.zeros_like,
            torch.Generator().manual_seed(seed),
        )

    for seed in (0, 0, 1):
        attack(seed)

    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_attack_that_wants_nothing_and_accuracy_of_nothing_are_errors():
    images, labels = torch.stack([image(0), image(1)]), torch.tensor([0, 1])

    with pytest.raises(ValueError, match="ASR is undefined"):
        attack_success(
            FakeModel(), images, labels, Pixels(TRIGGER), lambda true: true, torch.Generator()
        )
    with pytest.raises(ValueError, match="BA is undefined"):
        benign_accuracy(FakeModel(), images[:0], labels[:0])
