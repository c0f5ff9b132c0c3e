"""Reading the reports of many clients and detecting compromised neurons in them, on one core."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch.nn import functional

from benchmarks.outcome import Bar, Outcome, Row
from benchmarks.processes import alone, memory
from none_core.activations import ReportBuilder, ReportSpec
from none_core.detection import DETECTORS
from none_core.flower.messages import QUERY, REPORT, read_report
from none_core.neurons import NeuronMap
from tasks import models

LABELS = 10
DISTINCT = 16  # reports that are really different; more clients send one of these again
SAMPLES = 400  # of each report
SECONDS, MEGABYTES = 10.0, 2000.0
BARRED = ("mixture", "resnet18", 1000)
SHAPES = {"mnist-cnn": (1, 28, 28), "resnet18": (3, 32, 32)}

METHOD = (
    "Each case in a process of its own, one thread, seconds of processor time. "
    f"{DISTINCT} distinct reports of {SAMPLES} samples (random means for each class and neuron, "
    "samples spread over about twice as many bins as in the trained networks of the benchmark "
    "'report') are sent under as many client ids as there are clients. read: decode, check and "
    "summarise each, as the server does; detect: all summaries at once. MB: growth of the process "
    "from before the first report to its peak, and at its peak the whole process, torch and Flower "
    "included."
)


def run(clients: Sequence[int], samples: int = SAMPLES) -> Outcome:
    """Measure mixture for all numbers of clients, and the other detectors up to 100."""
    rows = [
        measure(detector, model, clients, samples)
        for model in SHAPES
        for detector in ("mixture", "linearity", "contrast")
    ]
    return Outcome("detect", METHOD, [row for several in rows for row in several])


def measure(detector: str, model: str, clients: Sequence[int], samples: int) -> list[Row]:
    """Make reports, and measure reading and detection for each number of clients."""
    chosen = [n for n in clients if detector == "mixture" or n <= 100]
    if not chosen:
        return []
    network = models.build(model, SHAPES[model], LABELS, seed=0)
    neurons = NeuronMap.trace(network, torch.zeros(1, *SHAPES[model]))
    spec = ReportSpec(neurons.size, LABELS, DETECTORS[detector].statistics)
    layer_of = neurons.layer_of(np.arange(neurons.size))
    with tempfile.TemporaryDirectory() as folder:
        for number, fields in enumerate(
            _reports(spec, layer_of, min(DISTINCT, max(chosen)), samples)
        ):
            np.savez(Path(folder) / f"report-{number}.npz", **fields)
        return [
            _row(detector, model, n, alone(_cell, detector, spec, layer_of, Path(folder), n))
            for n in chosen
        ]


def _row(detector: str, model: str, clients: int, figures: dict[str, float]) -> Row:
    bars = (
        Bar("read s + detect s", figures["read s"] + figures["detect s"], SECONDS),
        Bar("peak MB", figures["peak MB"], MEGABYTES),
    )
    barred = (detector, model, clients) == BARRED
    case = f"{detector}, {model}, {clients:,} clients"
    return Row(case, dict(figures), bars if barred else ())


def _reports(
    spec: ReportSpec, layer_of: np.ndarray, number: int, samples: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield encoded reports of random values: a mean for each class and neuron, and noise."""
    generator = torch.Generator().manual_seed(0)
    means = 1 + torch.randn(LABELS, spec.neurons, generator=generator)
    sizes = np.bincount(layer_of).tolist()
    for _ in range(number):
        labels = torch.randint(LABELS, (samples,), generator=generator)
        values = means[labels] + torch.randn(samples, spec.neurons, generator=generator) / 2
        builder = ReportBuilder(spec)
        # Logits so sure of the label that prediction-extremes are filled as well.
        builder.add(values.split(sizes, dim=1), 10.0 * functional.one_hot(labels, LABELS), labels)
        yield builder.report().encode()


def _cell(
    detector_name: str, spec: ReportSpec, layer_of: np.ndarray, folder: Path, clients: int
) -> dict[str, float]:
    """Read and detect once; runs in a fresh process, whose peak memory is then this cell's."""
    torch.set_num_threads(1)
    detector = DETECTORS[detector_name]()
    contents = [_content(file) for file in sorted(folder.glob("*.npz"))]
    before, begin = memory("VmRSS"), time.process_time()
    summaries = {
        client: detector.summarise(
            read_report(
                contents[client % len(contents)],
                spec,
                sender=f"node {client}",
                server_round=1,
                max_samples=10_000_000,
            )
        )
        for client in range(clients)
    }
    read = time.process_time()
    detector.detect(summaries, layer_of)
    end, peak = time.process_time(), memory("VmHWM")
    return {
        "read s": read - begin,
        "detect s": end - read,
        "ms / report": 1000 * (read - begin) / clients,
        "KB / report": sum(len(a.data) for a in contents[0].array_records[REPORT].values()) / 1000,
        "growth MB": max(0.0, peak - before),
        "peak MB": peak,
    }


def _content(file: Path) -> RecordDict:
    """Return a client's reply as it arrives."""
    with np.load(file, allow_pickle=False) as fields:
        record = ArrayRecord({name: Array(array) for name, array in fields.items()})
    return RecordDict({REPORT: record, QUERY: ConfigRecord({"round": 1})})
