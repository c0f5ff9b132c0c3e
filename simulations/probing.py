"""What the figures show of a model: its neurons on test images, without and with the trigger.

Only figures use it. No test image reaches a decision of the defence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from none_core.activations import spatial_maximum
from none_core.neurons import NeuronMap
from simulations.config import Experiment
from tasks import data, models
from tasks.models import as_input
from tasks.poisoning import stamp

FloatArray = npt.NDArray[np.float32]

EVIDENCE, EVIDENCE_MODEL, FINAL_MODEL = "evidence.npz", "evidence_model.pt", "model.pt"
PATTERNS = "patterns.npz"


@dataclass(frozen=True, eq=False)
class Neuron:
    """One neuron's values.

    Attributes
    ----------
    name : str
        Layer and channel.
    clean, stamped : ndarray, shape (n,)
        Its value (spatial maximum) for each image, without and with the whole trigger.
    reset : bool
        Whether the server reset it.
    """

    name: str
    clean: FloatArray
    stamped: FloatArray
    reset: bool


@dataclass(frozen=True, eq=False)
class Probe:
    """The neurons worth showing, the worst first; of which model, and how they were chosen."""

    neurons: tuple[Neuron, ...]
    model: str
    chosen: str


def load_data(experiment: Experiment) -> data.Data:
    """Load the experiment's data set."""
    root, task = experiment.run.data_root, experiment.task
    return data.load(task.dataset, None if root is None else Path(root), held_out=task.held_out)


def probe(
    output: Path, experiment: Experiment, loaded: data.Data, *, neurons: int, images: int = 1000
) -> Probe | None:
    """Read the worst neurons of a run's model on test images.

    The worst are those with the highest scores among the reset ones, of the model as it was before
    that reset; a run without evidence is shown by its final model, and the neurons that the trigger
    shifts most.

    Returns
    -------
    Probe or None
        None when the run left no model.
    """
    has_evidence = all((output / name).exists() for name in (EVIDENCE, EVIDENCE_MODEL))
    file = output / (EVIDENCE_MODEL if has_evidence else FINAL_MODEL)
    if not file.exists():
        return None
    task = experiment.task
    model = models.build(task.model_name, loaded.shape, len(loaded.classes), 0, task.activation)
    model.load_state_dict(torch.load(file, weights_only=True))
    model.eval()
    shown = loaded.test_images[loaded.test_labels != experiment.attack.target][:images]
    neuron_map = NeuronMap.trace(model, as_input(model, shown[:2]))
    clean = _values(neuron_map, model, shown)
    stamped = _values(neuron_map, model, stamp(shown, experiment.trigger.whole()))
    reset = np.zeros(neuron_map.size, dtype=bool)
    if has_evidence:
        with np.load(output / EVIDENCE, allow_pickle=False) as evidence:
            scores, reset = evidence["scores"], evidence["reset"].astype(bool)
            where = f"global model of round {int(evidence['round'])}, before its reset"
        if reset.any():
            scores = np.where(reset, scores, -np.inf)
        chosen = (
            "reset with the highest evidence score" if reset.any() else "with the highest score"
        )
    else:
        scores = (stamped.mean(0) - clean.mean(0)) / (clean.std(0) + 1e-6)
        where, chosen = "final global model", "that the trigger shifts most on test images"
    worst = np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")[:neurons]
    return Probe(
        tuple(
            Neuron(_name(neuron_map, j), clean[:, j], stamped[:, j], bool(reset[j])) for j in worst
        ),
        where,
        chosen,
    )


def _values(neuron_map: NeuronMap, model: torch.nn.Module, images: Tensor) -> FloatArray:
    """Read all neurons for all images, (n, J)."""
    read = neuron_map.reader(model)
    with torch.no_grad():
        batches = [spatial_maximum(read(as_input(model, part))[1]) for part in images.split(250)]
    return torch.cat(batches).numpy()


def _name(neuron_map: NeuronMap, neuron: int) -> str:
    layer, channel = neuron_map.label(int(neuron))
    return f"{layer} · {channel}"
