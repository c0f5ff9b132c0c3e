"""Building an activation report against running the model over the same data and no more."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import ConfigRecord
from torch import Tensor, nn

from benchmarks.outcome import Bar, Outcome, Row
from none_core.activations import LABEL_HISTOGRAMS, Report, ReportSpec, build_report
from none_core.flower.messages import report_content
from none_core.neurons import NeuronMap
from tasks import data, models
from tasks.training import train

METHOD = (
    "Seconds of processor time on one core. Alternately a bare forward pass (evaluation mode, "
    "inference mode) and a report with its encoding, over the same batches; the reader is kept "
    "between reports, as the client handler keeps it. The model was trained on the data for two "
    "epochs. The ratio is the median over pairs. Bytes are those of the arrays in the reply, with "
    "their headers, against those of the model's tensors."
)
RATIO, REPORT_BYTES, REPORT_SHARE = 1.3, 100_000, 0.05
BATCH = 256  # as the client handler's
TRAINED = 1000  # images at most to train on
LABELS = 10
LAYOUTS = {"default layout": torch.contiguous_format, "channels last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """A model by name, and what to run it on: uint8 images (N, C, H, W) and labels (N,)."""

    name: str
    model: str
    images: Tensor
    labels: Tensor

    def build(self, layout: str) -> nn.Module:
        """Build the model and train it a little: fresh weights make reports that are too small."""
        shape = tuple(self.images.shape[1:])
        model = models.build(self.model, shape, LABELS, seed=0).to(memory_format=LAYOUTS[layout])
        train(
            model,
            self.images[:TRAINED],
            self.labels[:TRAINED],
            epochs=2,
            batch_size=64,
            lr=0.05,
            momentum=0.9,
            weight_decay=0.0,
            generator=torch.Generator().manual_seed(0),
        )
        return model.eval()

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Return the data as the model takes it."""
        images = self.images.float().div_(255)
        return list(zip(images.split(BATCH), self.labels.split(BATCH), strict=True))


def run(data_root: Path | None, repeats: int = 7) -> Outcome:
    """Measure all cases in both memory layouts (client.app answers with the channels last)."""
    torch.set_num_threads(1)
    rows = [measure(case, layout, repeats) for case in cases(data_root) for layout in LAYOUTS]
    return Outcome("report", METHOD, rows)


def cases(data_root: Path | None) -> list[Case]:
    """Return one client's share of mnist5k, one of full MNIST, and random images for ResNet-18."""
    digits = data.load("mnist5k")
    small = digits.train_images[::10], digits.train_labels[::10]
    large, source = _full_mnist_share(data_root, digits)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (256, 3, 32, 32), generator=generator).byte()
    labels = torch.randint(LABELS, (256,), generator=generator)
    return [
        Case(f"mnist-cnn, {len(small[1])} digits", "mnist-cnn", *small),
        Case(f"mnist-cnn, {len(large[1]):,} digits ({source})", "mnist-cnn", *large),
        Case(f"resnet18, {len(labels)} random 32x32 images", "resnet18", images, labels),
    ]


def measure(case: Case, layout: str, repeats: int) -> Row:
    """Alternate between the two ways `repeats` times, after one pass to warm up."""
    model, batches = case.build(layout), case.batches()
    neurons = NeuronMap.trace(model, batches[0][0][:1])
    spec = ReportSpec(neurons.size, LABELS, frozenset({LABEL_HISTOGRAMS}))
    reader = neurons.reader(model)

    def report() -> Report:
        return build_report(model, neurons, batches, spec, reader=reader)

    forward: list[float] = []
    reports: list[float] = []
    for _ in range(repeats + 1):
        forward.append(_seconds(lambda: _forward(model, batches)))
        reports.append(_seconds(lambda: report().encode()))
    return _row(f"{case.name}, {layout}", model, report(), forward[1:], reports[1:])


def _row(
    case: str, model: nn.Module, report: Report, forward: list[float], reports: list[float]
) -> Row:
    ratios = [r / f for r, f in zip(reports, forward, strict=True)]
    ratio = statistics.median(ratios)
    content = report_content(report, ConfigRecord({"round": 1}))
    size = sum(len(a.data) for r in content.array_records.values() for a in r.values())
    model_size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    small = model_size < REPORT_BYTES / REPORT_SHARE
    size_bar = (
        Bar("bytes", size, REPORT_BYTES)
        if small
        else Bar("share of the model", size / model_size, REPORT_SHARE)
    )
    return Row(
        case,
        {
            "forward s": statistics.median(forward),
            "report s": statistics.median(reports),
            "ratio": ratio,
            "ratio of minima": min(reports) / min(forward),
            "bytes": size,
            "share of the model": size / model_size,
        },
        (Bar("ratio", ratio, RATIO), size_bar),
        {"forward s": forward, "report s": reports},
    )


def _forward(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    with torch.inference_mode():
        for images, _ in batches:
            model(images)


def _seconds(work: Callable[[], object]) -> float:
    """Processor time: other programs on the machine add less to it than to the clock's."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def _full_mnist_share(
    data_root: Path | None, digits: data.Data
) -> tuple[tuple[Tensor, Tensor], str]:
    """Return 6,000 digits: real ones if they are there."""
    if data_root is not None:
        try:
            mnist = data.load("mnist", data_root)
        except data.DataError:
            pass
        else:
            return (mnist.train_images[::10], mnist.train_labels[::10]), "MNIST"
    chosen = torch.arange(6000) % len(digits.train_labels)
    return (digits.train_images[chosen], digits.train_labels[chosen]), "mnist5k, repeated"
