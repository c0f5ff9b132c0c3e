"""The network that participants train, read and report on: one copy for each thread."""

from __future__ import annotations

import threading
from functools import lru_cache

import torch
from torch import nn

from none_core.neurons import NeuronMap, Reader
from tasks import data, models
from tasks.config import TaskConfig

_models = threading.local()  # participants that share a process run on threads of their own


def build(task: TaskConfig) -> nn.Module:
    """Build the task's network, with weights that are to be replaced."""
    shape, classes = data.SHAPES[task.dataset], data.CLASSES[task.dataset]
    return models.build(task.model_name, shape, classes, 0, task.activation)


def model_of_thread(task: TaskConfig) -> nn.Module:
    """Return this thread's model; it is given new weights for every message."""
    if getattr(_models, "task", None) != task:
        _models.task, _models.model, _models.reader = task, build(task), None
    model: nn.Module = _models.model
    return model


def reader_of_thread(task: TaskConfig) -> Reader:
    """Return the reader of this thread's model: making one traces it, which takes a while."""
    model = model_of_thread(task)
    if _models.reader is None:
        _models.reader = neurons(task).reader(model)
    reader: Reader = _models.reader
    return reader


@lru_cache(maxsize=4)
def neurons(task: TaskConfig) -> NeuronMap:
    """Return the map of the network's neurons, the same that the server has."""
    return NeuronMap.trace(build(task).eval(), torch.zeros(1, *data.SHAPES[task.dataset]))
