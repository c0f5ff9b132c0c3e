"""The map of a torch model's neurons: where each one's value is read, and how it is reset.

A neuron is an output channel of a convolution or a unit of a linear layer whose value enters an
activation function. This is the unit that NONE finds compromised and resets: Wang et al.,
"Training with More Confidence: Mitigating Injected and Natural Backdoors During Training",
NeurIPS 2022, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from none_core._tracing import (
    NORMS,
    WEIGHTED,
    GraphReader,
    Layer,
    Reader,
    Source,
    TraceError,
    find_read_points,
    rehearsal,
    trace_graph,
)

__all__ = ["Layer", "NeuronMap", "Reader", "Source", "TraceError"]

IntArray = npt.NDArray[np.int64]

HOWS = ("zero", "init")
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


class NeuronMap:
    """The neurons of a model under one flat index, 0 to J - 1, over all layers in forward order.

    Made by `trace` or, for a model that torch.fx cannot trace, by `from_modules`. It holds names
    and sizes only, so that it serves every model of the same architecture.

    Parameters
    ----------
    layers : sequence of Layer
        In forward order.
    example : Tensor, optional
        A batch of at least one sample, with which `reader` finds the layers in a model's graph;
        None has them read by hooks.

    Attributes
    ----------
    layers : tuple of Layer
        In forward order.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> neurons = NeuronMap.trace(model, torch.zeros(1, 4))
    >>> neurons.size, neurons.label(2)
    (3, ('0', 2))
    >>> output, (hidden,) = neurons.reader(model)(torch.zeros(5, 4))
    >>> hidden.shape
    torch.Size([5, 3])
    >>> neurons.reset(model, np.array([2]), how="zero")
    """

    def __init__(self, layers: Sequence[Layer], example: Tensor | None = None) -> None:
        self.layers = tuple(layers)
        self._example = example

    @classmethod
    def trace(
        cls, model: nn.Module, example_input: Tensor, layers: Sequence[str] | None = None
    ) -> NeuronMap:
        """Find every convolution and linear layer that feeds an activation function.

        The graph of `model` is traced in the mode (training or evaluation) it is in, and run once
        on the first sample of the example; the model and the random state are left as they were.
        A layer's values are those that enter its activation function. A module belongs to the
        first activation that it reaches, through normalisation, arithmetic such as a residual
        addition, pooling, resampling, padding, dropout, concatenation and reshaping. Layers that
        reach none, the one of the logits above all, are not listed.

        Parameters
        ----------
        model : torch.nn.Module
            Takes one tensor; further arguments of ``forward`` are fixed to their defaults.
        example_input : Tensor, shape (n, ...), n >= 1
            A batch that the model accepts, on the model's device.
        layers : sequence of str, optional
            Restrict the map to the layers of these names.

        Returns
        -------
        NeuronMap

        Raises
        ------
        TraceError
            If torch.fx cannot trace the model, as with control flow that depends on the data.
        ValueError
            If no layer feeds an activation function, if a name in `layers` is not a layer's, or if
            `example_input` is not a batch on which the model runs.

        Notes
        -----
        Not listed: transposed convolutions, layers called as functions (``F.conv2d``), layers
        inside attention and recurrent modules, and values whose first dimension is not the batch.
        A module that is called several times is read where its first activation is.
        """
        found = [point.layer for point in find_read_points(trace_graph(model), example_input)]
        if not found:
            raise ValueError(
                f"No convolution or linear layer of {type(model).__name__} feeds an activation "
                f"function."
            )
        if layers is not None:
            names = [layer.name for layer in found]
            if unknown := [name for name in layers if name not in names]:
                raise ValueError(
                    f"layers names {_listed(unknown)}, but the layers of {type(model).__name__} "
                    f"are {_listed(names)}."
                )
            found = [layer for layer in found if layer.name in layers]
        return cls(found, example_input[:1].detach().clone())

    @classmethod
    def from_modules(
        cls,
        model: nn.Module,
        example_input: Tensor,
        modules: Sequence[str | tuple[str, str]] | None = None,
    ) -> NeuronMap:
        """Read the outputs of named modules by hooks, for a model that cannot be traced.

        Slower than `trace`, since each value is copied in case an in-place activation follows, and
        it knows neither activations, nor consumers, nor residual additions.

        Parameters
        ----------
        model : torch.nn.Module
            Takes one tensor.
        example_input : Tensor, shape (n, ...), n >= 1
            A batch that the model accepts, on the model's device.
        modules : sequence of str or (str, str), optional
            Convolution or linear modules, each read at its own output or, given as a pair (module,
            norm), at the output of the normalisation after it. All but the last one called if
            not given.

        Returns
        -------
        NeuronMap
            Its layers are in the order in which the example calls them. A module that is called
            several times is read at its first call.

        Raises
        ------
        ValueError
            If a name is not that of a convolution, a linear module or, second in a pair, of a
            normalisation, or if the example does not call it.
        """
        weighted = [name for name, m in model.named_modules() if isinstance(m, WEIGHTED)]
        pairs = [
            (m, None) if isinstance(m, str) else m
            for m in (weighted if modules is None else modules)
        ]
        for module, norm in pairs:
            _submodule(model, module, WEIGHTED, "convolution or linear module")
            if norm is not None:
                _submodule(model, norm, NORMS, "normalisation")
        sources = {norm or module: Source(module, norm) for module, norm in pairs}
        with rehearsal(model, example_input) as pair:
            _, values = _record(model, list(sources), pair)
        if modules is None and values:
            values.popitem()
        elif uncalled := [name for name in sources if name not in values]:
            raise ValueError(f"The example does not pass through {_listed(uncalled)}.")
        return cls([_hooked_layer(model, sources[name], value) for name, value in values.items()])

    @property
    def offsets(self) -> IntArray:
        """Where each layer starts in the flat index and, last, the number of neurons: (L + 1,)."""
        return np.cumsum([0] + [layer.size for layer in self.layers], dtype=np.int64)

    @property
    def size(self) -> int:
        """The number of neurons, J."""
        return sum(layer.size for layer in self.layers)

    def layer_of(self, neurons: npt.ArrayLike) -> IntArray:
        """Give the position in `layers` of each neuron's layer.

        Parameters
        ----------
        neurons : array_like of int
            Flat indices, 0 to J - 1, of any shape.

        Returns
        -------
        ndarray of int64, the same shape

        Raises
        ------
        ValueError
            If an index is out of range or not an integer.
        """
        return np.searchsorted(self.offsets, self._checked(neurons), side="right") - 1

    def label(self, neuron: int) -> tuple[str, int]:
        """Give a neuron's layer name and its channel in that layer.

        Raises
        ------
        ValueError
            If the index is out of range or not an integer.
        """
        position = int(self.layer_of(neuron))
        return self.layers[position].name, int(neuron - self.offsets[position])

    def by_layer(self, neurons: npt.ArrayLike) -> dict[str, IntArray]:
        """Sort neurons into the layers that hold them.

        Parameters
        ----------
        neurons : array_like of int
            Flat indices, 0 to J - 1; repetitions count once.

        Returns
        -------
        dict of str to ndarray of int64
            The channels, ascending, for each layer that has any, in forward order.

        Raises
        ------
        ValueError
            If an index is out of range or not an integer.
        """
        flat = np.unique(self._checked(neurons))
        bounds = np.searchsorted(flat, self.offsets)
        return {
            layer.name: flat[low:high] - offset
            for layer, offset, low, high in zip(
                self.layers, self.offsets, bounds, bounds[1:], strict=False
            )
            if high > low
        }

    def reader(self, model: nn.Module) -> Reader:
        """Make a function that runs `model` and returns the neurons' values beside its output.

        Parameters
        ----------
        model : torch.nn.Module
            The traced model or another of the same architecture. Its modules are shared, so that
            later changes of its weights and of its mode are seen.

        Returns
        -------
        callable
            ``x -> (output, reads)``: the model's own output and a tuple with one tensor for each
            layer, shape (n, channels, *positions), the values *before* the activation function.
            Gradients are the caller's business (`torch.no_grad`).

        Raises
        ------
        ValueError
            If `model` does not have the layers of this map.
        TraceError
            If torch.fx cannot trace it, here or on the first call in a mode not met before.
        """
        if self._example is None:
            return _HookReader(model, self.layers)
        return GraphReader(model, self.layers, self._example)

    def reset(
        self,
        model: nn.Module,
        neurons: npt.ArrayLike,
        how: Literal["zero", "init"] = "zero",
        generator: torch.Generator | None = None,
    ) -> None:
        """Reset neurons in place: incoming weights, bias and normalisation, and nothing else.

        The reset step of Wang et al., NeurIPS 2022, Algorithm 1, for any architecture.

        Every source of a neuron's layer is reset in the neuron's channel. The normalisation gets
        its initial values: weight 1, bias 0, running mean 0 and running variance 1.
        ``num_batches_tracked``, which belongs to no neuron, stays.

        With ``"zero"`` the value that enters the activation function is then 0 for every input,
        but for what is added to it that is not this layer's own: in a residual block whatever the
        skip connection carries. Group and layer normalisation mix channels, so that the weight
        of theirs must be 0 for that too, and is; where they have none, the value is not 0.

        With ``"init"`` weights and bias are drawn anew as ``reset_parameters`` does, uniformly
        within 1/sqrt(fan_in) (Kaiming with a = sqrt(5)). What a neuron gets depends on the
        generator's state alone, not on the neurons that are reset with it, nor on the device.
        The generator advances by the same amount at every call.

        Parameters
        ----------
        model : torch.nn.Module
            The traced model or another of the same architecture.
        neurons : array_like of int
            Flat indices, 0 to J - 1.
        how : {"zero", "init"}
            What the incoming weights become.
        generator : torch.Generator, optional
            Required by ``"init"``.

        Raises
        ------
        ValueError
            If an index is out of range, `how` is unknown, the generator is missing, `model` does
            not have the layers of this map, or a weight is computed from other parameters
            (weight normalisation, parametrisations). Nothing has been changed then.
        """
        if how not in HOWS:
            raise ValueError(f"how must be one of {_listed(HOWS)}, but it is {how!r}.")
        if how != "zero" and generator is None:
            raise ValueError(f"how={how!r} draws new weights, so it needs a generator.")
        channels_of = self.by_layer(neurons)
        touched = [layer for layer in self.layers if layer.name in channels_of]
        for layer in touched:
            _require_resettable(model, layer)
        seeds = self._seeds(None if how == "zero" else generator)
        with torch.no_grad():
            for layer in touched:
                channels = torch.from_numpy(channels_of[layer.name])
                for source in layer.sources:
                    seed = seeds[source.module]
                    _reset_weights(model.get_submodule(source.module), channels, seed)
                    if source.norm is not None:
                        norm = model.get_submodule(source.norm)
                        _reset_norm(norm, channels, layer, silent=how == "zero")

    def rows(self, model: nn.Module, neuron: int) -> dict[str, int]:
        """Name all that a reset of one neuron changes: tensors of the state dict, a row of each.

        Raises
        ------
        ValueError
            If the index is out of range or not an integer, or `model` does not have the layers of
            this map.
        """
        position = int(self.layer_of(neuron))
        layer, channel = self.layers[position], int(neuron - self.offsets[position])
        _require_layer(model, layer)
        found: dict[str, int] = {}
        for source in layer.sources:
            tensors = model.get_submodule(source.module)._parameters
            found |= {
                _joined(source.module, name): channel
                for name in ("weight", "bias")
                if tensors.get(name) is not None
            }
            if source.norm is not None:
                norm = model.get_submodule(source.norm)
                found |= {
                    _joined(source.norm, name): channel + _first_channel(tensor, layer)
                    for name in _NORM_TENSORS
                    if (tensor := getattr(norm, name, None)) is not None
                }
        return found

    def _seeds(self, generator: torch.Generator | None) -> dict[str, int | None]:
        """Draw one seed for every source module, whether it is reset or not."""
        names = list(dict.fromkeys(s.module for layer in self.layers for s in layer.sources))
        if generator is None:
            return dict.fromkeys(names)
        device = generator.device
        seeds = torch.randint(2**62, (len(names),), generator=generator, device=device)
        return dict(zip(names, seeds.tolist(), strict=True))

    def _checked(self, neurons: npt.ArrayLike) -> IntArray:
        array = np.asarray(neurons)
        if array.size == 0:
            return array.astype(np.int64)
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"neurons must be integers, but they are {array.dtype}.")
        if array.min() < 0 or array.max() >= self.size:
            raise ValueError(
                f"neurons must lie in 0 to {self.size - 1}, but they reach from {array.min()} to "
                f"{array.max()}."
            )
        return array.astype(np.int64)


class _HookReader:
    """Runs a model with hooks on the modules that a map from `NeuronMap.from_modules` reads."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        for layer in layers:
            _require_layer(model, layer)
        self._model = model
        self._dims = {s.norm or s.module: la.channel_dim for la in layers for s in la.sources}

    def __call__(self, x: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        output, values = _record(self._model, list(self._dims), x)
        if missing := [name for name in self._dims if name not in values]:
            raise ValueError(f"This input does not pass through {_listed(missing)}.")
        return output, tuple(values[name].movedim(dim, 1) for name, dim in self._dims.items())


def _record(model: nn.Module, names: Sequence[str], x: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """Run a model and keep what the named modules return when first called, in that order."""
    values: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if name not in values:
                values[name] = output.clone()  # an in-place activation may follow

        return hook

    with ExitStack() as hooks:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(hook_for(name))
            hooks.callback(handle.remove)
        return model(x), values


def _hooked_layer(model: nn.Module, source: Source, value: Tensor) -> Layer:
    module = model.get_submodule(source.module)
    channel_dim = value.ndim - 1 if isinstance(module, nn.Linear) else 1
    size = value.shape[channel_dim]
    return Layer(source.module, size, (source,), "unknown", (), channel_dim)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _submodule(
    model: nn.Module, name: str, types: tuple[type[nn.Module], ...], what: str
) -> nn.Module:
    found = dict(model.named_modules(remove_duplicate=False))
    module = found.get(name)
    if module is None or not isinstance(module, types):
        legal = [known for known, other in found.items() if isinstance(other, types)]
        raise ValueError(
            f"{type(model).__name__} has no {what} '{name}'; it has {_listed(legal) or 'none'}."
        )
    return module


def _require_layer(model: nn.Module, layer: Layer) -> None:
    for source in layer.sources:
        module = _submodule(model, source.module, WEIGHTED, "convolution or linear module")
        outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        if outputs != layer.size:
            raise ValueError(
                f"'{source.module}' has {outputs} outputs in {type(model).__name__}, but "
                f"{layer.size} in the model that was traced."
            )
        if source.norm is not None:
            _submodule(model, source.norm, NORMS, "normalisation")


def _require_resettable(model: nn.Module, layer: Layer) -> None:
    _require_layer(model, layer)
    for source in layer.sources:
        if "weight" not in model.get_submodule(source.module)._parameters:
            raise ValueError(
                f"The weight of '{source.module}' is computed from other parameters (weight "
                f"normalisation, a parametrisation), so it cannot be reset; remove that first."
            )


def _reset_weights(module: nn.Module, channels: Tensor, seed: int | None) -> None:
    """Clear the channels' incoming weights and bias or, with a seed, draw them anew."""
    weight, bias = module.get_parameter("weight"), module._parameters["bias"]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    bound = weight[0].numel() ** -0.5
    for parameter in (weight, bias):
        if parameter is None:
            continue
        rows = channels.to(parameter.device)
        if generator is None:
            parameter.index_fill_(0, rows, 0.0)
        else:
            # All channels are drawn, so that a channel's values do not depend on the others'.
            drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            drawn.uniform_(-bound, bound, generator=generator)
            parameter.index_copy_(0, rows, drawn[channels].to(parameter.device))


def _reset_norm(norm: nn.Module, channels: Tensor, layer: Layer, *, silent: bool) -> None:
    """Give the channels' normalisation its initial values; a silent one must return 0 for 0."""
    # These centre on the mean of several channels, which turns a channel of zeros into others.
    mixes_channels = isinstance(norm, nn.GroupNorm | nn.LayerNorm)
    initial = (0.0 if silent and mixes_channels else 1.0, 0.0, 0.0, 1.0)
    for name, value in zip(_NORM_TENSORS, initial, strict=True):
        tensor = getattr(norm, name, None)
        if tensor is not None:
            first = _first_channel(tensor, layer)
            tensor.index_fill_(0, (channels + first).to(tensor.device), value)


def _first_channel(tensor: Tensor, layer: Layer) -> int:
    """Where a layer begins in its normalisation, which after a concatenation has others' too."""
    return layer.first_channel if len(tensor) != layer.size else 0


def _joined(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
