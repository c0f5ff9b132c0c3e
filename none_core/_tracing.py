"""Finds in a model's torch.fx graph where its neurons are read, with no per-architecture code.

From every convolution and linear layer the graph is walked forward through whatever keeps channels
apart (normalisation, residual addition, pooling, dropout, reshaping) until an activation function
is met. The tensor that enters it is the read point.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

Reader = Callable[[Tensor], tuple[Any, tuple[Tensor, ...]]]

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_BATCHLIKE = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)
_SHAPED = (nn.LayerNorm, nn.RMSNorm)
NORMS = (*_BATCHLIKE, *_SHAPED)

# Operations are recognised by name without case and underscores, so that nn.LeakyReLU,
# F.leaky_relu, F.leaky_relu_ and Tensor.leaky_relu_ are one kind.
_ACTIVATIONS = {
    name.replace("_", ""): name
    for name in (
        *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu"),
        *("mish", "softplus", "softsign", "tanh", "tanhshrink", "hardtanh", "sigmoid", "threshold"),
        *("log_sigmoid", "hardsigmoid", "hardswish", "hardshrink", "softshrink"),
    )
}
_ARITHMETIC = {"add", "iadd", "sub", "isub", "mul", "imul", "div", "truediv", "itruediv", "neg"}
_INPLACE_OPERATORS = {"iadd", "isub", "imul", "itruediv", "setitem"}
_CONCATENATIONS = {"cat", "concat", "concatenate"}
_VIEWS = {"flatten", "unflatten", "view", "reshape", "squeeze", "unsqueeze"}
_MOVES = {"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims"}
_REDUCTIONS = {"mean", "amax", "amin"}

# While torch.fx traces, nn.Module.__call__ is the tracer's for the whole process: one at a time.
_one_trace = threading.Lock()


class TraceError(RuntimeError):
    """The model's graph cannot be read; the message names the module and the way out."""


@dataclass(frozen=True)
class Source:
    """A convolution or linear module and the normalisation between it and the read point.

    Attributes
    ----------
    module : str
        Qualified name of the convolution or linear module.
    norm : str or None
        Qualified name of the normalisation after it. A module with two normalisations on its way
        makes two sources, one for each.
    """

    module: str
    norm: str | None


@dataclass(frozen=True)
class Layer:
    """The neurons that are read together: the input of one activation call.

    Attributes
    ----------
    name : str
        Name of the first source's module; unique within a map.
    size : int
        Number of neurons, which is the number of channels (units) of each source.
    sources : tuple of Source
        Whose outputs are summed at the read point: several in a residual block with a projection.
    activation : str
        The activation function by its ``torch.nn.functional`` name, ``"leaky_relu"`` say;
        ``"unknown"`` in a map made by `NeuronMap.from_modules`.
    consumers : tuple of str
        Convolution and linear modules that take the activation's output; empty if there are none,
        as after the last convolution of a network in network.
    channel_dim : int
        The channels' dimension in the tensor that enters the activation function.
    first_channel : int
        The layer's first channel in that tensor; not 0 only where layers are concatenated.
    """

    name: str
    size: int
    sources: tuple[Source, ...]
    activation: str
    consumers: tuple[str, ...]
    channel_dim: int
    first_channel: int = 0


@dataclass(frozen=True)
class ReadPoint:
    """A layer and the node of one traced graph that holds its neurons' values."""

    layer: Layer
    node: fx.Node


@dataclass(frozen=True)
class _Path:
    """How far a module's output has been followed, and where its channels are by then."""

    node: fx.Node
    channel_dim: int
    first_channel: int
    norms: tuple[str, ...] = ()
    # Set once a reshape has merged the channels with other dimensions: read before the reshape.
    read: fx.Node | None = None


@dataclass(frozen=True)
class _Arrival:
    """A module's output meeting an activation function."""

    module: str
    size: int
    path: _Path
    activation: fx.Node

    @property
    def read(self) -> fx.Node:
        return self.path.read or self.path.node


@contextmanager
def rehearsal(model: nn.Module, example: Tensor) -> Iterator[Tensor]:
    """Yield a batch of two on which `model` can run and keep its buffers and the random state.

    Two samples, since a batch normalisation in training mode may refuse a single one.
    """
    if example.ndim < 2 or len(example) == 0:
        raise ValueError(
            f"example_input must be a batch of at least one sample, shape (n, ...), "
            f"but its shape is {tuple(example.shape)}."
        )
    device = example.device
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    random_devices = [] if device.type in ("cpu", "meta") else [device]
    with (
        torch.no_grad(),
        torch.random.fork_rng(
            random_devices, device_type=device.type if random_devices else "cuda"
        ),
    ):
        try:
            yield torch.cat([example[:1].detach()] * 2)
        finally:
            for buffer, value in kept:
                buffer.copy_(value)


class _LayerTracer(fx.Tracer):
    """Keeps subclasses of the layers whole and remembers in which module a failure arose."""

    def __init__(self) -> None:
        super().__init__()
        self.failed_in: str | None = None
        self._thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*WEIGHTED, *NORMS)) or super().is_leaf_module(
            m, module_qualified_name
        )

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)  # another thread runs a model of its own meanwhile
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or self.path_of_module(m)
            raise


def trace_graph(model: nn.Module) -> fx.GraphModule:
    """Trace `model` in its present mode into a graph module that uses the model's own modules.

    Arguments of ``forward`` with a plain default (a flag, None) are fixed to that default.
    """
    tracer = _LayerTracer()
    fixed = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if isinstance(parameter.default, bool | int | float | str | None)
    }
    attributes = set(vars(model))
    try:
        with _one_trace:
            graph_module = fx.GraphModule(model, tracer.trace(model, fixed))
    except Exception as error:
        place = f"module '{tracer.failed_in}' of " if tracer.failed_in else ""
        raise TraceError(
            f"torch.fx cannot trace {place}{type(model).__name__} ({error}). "
            f"Use NeuronMap.from_modules, which reads the modules that you name by hooks."
        ) from error
    finally:
        # Tensors made inside forward are left on the model, which is not ours to change.
        made = {name: vars(model).pop(name) for name in set(vars(model)) - attributes}
    # Share the registries too, so that a buffer put in later (by .to(device), say) is seen.
    plain = {name: value for name, value in vars(model).items() if isinstance(value, Tensor)}
    graph_module.__dict__.update(plain | made)
    graph_module._modules = dict(model._modules)
    graph_module._parameters, graph_module._buffers = model._parameters, model._buffers
    return graph_module


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph and keeps the shape of every node that is a tensor."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        return value


def find_read_points(graph_module: fx.GraphModule, example: Tensor) -> list[ReadPoint]:
    """List the layers of a traced model in forward order, each with its node.

    Parameters
    ----------
    graph_module : torch.fx.GraphModule
        From `trace_graph`.
    example : Tensor, shape (n, ...)
        A batch that the model accepts.

    Raises
    ------
    ValueError
        If the model does not run on the example.
    """
    recorder = _ShapeRecorder(graph_module)
    with rehearsal(graph_module, example) as pair:
        try:
            recorder.run(pair)
        except Exception as error:
            raise ValueError(
                f"The model does not run on two samples of example_input, whose shape is "
                f"{tuple(example.shape)}: {error}"
            ) from error
    return _Search(graph_module, recorder.shapes, samples=len(pair)).read_points()


class _Search:
    """The walk over one graph."""

    def __init__(
        self, graph_module: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]], samples: int
    ) -> None:
        self.shapes = shapes
        self.samples = samples
        self.order = {node: position for position, node in enumerate(graph_module.graph.nodes)}

    def read_points(self) -> list[ReadPoint]:
        arrivals = [
            arrival
            for node in self.order
            if _is_weighted(node) and node in self.shapes
            for arrival in self._arrivals(node)
        ]
        # A module belongs to the first read point that it reaches. What a skip connection carries
        # on from there is part of later values, but it is not theirs.
        first = {
            arrival.module: arrival.read
            for arrival in sorted(arrivals, key=lambda a: self.order[a.read], reverse=True)
        }
        groups: dict[tuple[fx.Node, int, int], list[_Arrival]] = {}
        for arrival in arrivals:
            if arrival.read is first[arrival.module]:
                key = (arrival.read, arrival.path.first_channel, arrival.size)
                groups.setdefault(key, []).append(arrival)
        ordered = sorted(groups.items(), key=lambda item: (self.order[item[0][0]], *item[0][1:]))
        return [self._read_point(group, arrivals) for _, group in ordered]

    def _read_point(self, group: list[_Arrival], arrivals: list[_Arrival]) -> ReadPoint:
        lead = group[0]
        activations = [arrival.activation for arrival in arrivals if arrival.read is lead.read]
        sources = [Source(a.module, norm) for a in group for norm in a.path.norms or (None,)]
        layer = Layer(
            name=lead.module,
            size=lead.size,
            sources=tuple(dict.fromkeys(sources)),
            activation=_ACTIVATIONS[_kind(min(activations, key=self.order.__getitem__))],
            consumers=self._consumers(activations),
            channel_dim=lead.path.channel_dim,
            first_channel=lead.path.first_channel,
        )
        return ReadPoint(layer, lead.read)

    def _consumers(self, activations: list[fx.Node]) -> tuple[str, ...]:
        """Name the weighted modules that the activations reach without another activation."""
        found: dict[fx.Node, None] = {}
        waiting, seen = list(activations), set(activations)
        while waiting:
            for user in waiting.pop().users:
                if _is_weighted(user):
                    found[user] = None
                elif user in self.shapes and user not in seen and not _is_activation(user):
                    seen.add(user)
                    waiting.append(user)
        in_order = sorted(found, key=self.order.__getitem__)
        return tuple(dict.fromkeys(str(node.target) for node in in_order))

    def _arrivals(self, start: fx.Node) -> Iterator[_Arrival]:
        """Follow one call of a weighted module to every activation that its output enters."""
        module = _module(start)
        rank = len(self.shapes[start])
        size = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        origin = _Path(start, rank - 1 if isinstance(module, nn.Linear) else 1, 0)
        waiting, seen = [origin], {origin}
        while waiting:
            path = waiting.pop()
            for user in path.node.users:
                if _is_activation(user) and user.all_input_nodes[0] is path.node:
                    arrival = _Arrival(str(start.target), size, path, user)
                    # Where other dimensions are folded into the batch, values have no sample.
                    if self.shapes[arrival.read][0] == self.samples:
                        yield arrival
                    continue
                for further in self._advance(path, user):
                    if further not in seen:
                        seen.add(further)
                        waiting.append(further)

    def _advance(self, path: _Path, user: fx.Node) -> Iterator[_Path]:
        """Follow a path through one operation; nothing where channels mix or meaning changes."""
        kind = _kind(user)
        if user not in self.shapes:
            return
        if path.read is not None:
            if _is_layout(kind):
                yield replace(path, node=user)
        elif kind in _CONCATENATIONS:
            yield from self._concatenated(path, user)
        else:
            dim = self._channel_dim_after(path, user, kind)
            width = self.shapes[path.node][path.channel_dim]
            if dim is not None and self.shapes[user][dim] == width:
                norms = (str(user.target),) if isinstance(_module(user), NORMS) else ()
                yield replace(path, node=user, channel_dim=dim, norms=path.norms + norms)
            elif _is_layout(kind):
                yield replace(path, node=user, read=path.node)

    def _concatenated(self, path: _Path, user: fx.Node) -> Iterator[_Path]:
        parts: Any = user.args[0] if user.args else user.kwargs["tensors"]
        given: Any = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim", 0)
        dim = given % len(self.shapes[user])
        for position, part in enumerate(parts):
            if part is path.node:
                before = sum(self.shapes[other][dim] for other in parts[:position])
                shift = before if dim == path.channel_dim else 0
                yield replace(path, node=user, first_channel=path.first_channel + shift)

    def _channel_dim_after(self, path: _Path, user: fx.Node, kind: str) -> int | None:
        """Find the channels' dimension in the operation's result; None where they are not kept."""
        before, after = self.shapes[path.node], self.shapes[user]
        dim, module = path.channel_dim, _module(user)
        if kind in _ARITHMETIC:
            divisor = kind.endswith("div") and user.args[0] is not path.node
            return dim if len(after) == len(before) and not divisor else None
        if user.all_input_nodes[0] is not path.node:
            return None
        if isinstance(module, _SHAPED):
            return dim if dim == len(before) - len(module.normalized_shape) else None
        if isinstance(module, _BATCHLIKE) or _is_spatial(kind):
            return dim if dim == 1 and (len(before) > 2 or isinstance(module, NORMS)) else None
        if kind in _VIEWS:
            return _dim_after_view(before, after, dim)
        if kind in _MOVES | _REDUCTIONS:
            return _dim_after_move(user, len(before), dim)
        return dim if _is_identity(kind) else None


def _module(node: fx.Node) -> Any:
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner and node.op == "call_module" else None


def _kind(node: fx.Node) -> str:
    """Name an operation, the same whether it is a module, a function or a method."""
    if node.op == "call_module":
        name = type(_module(node)).__name__
    else:
        name = getattr(node.target, "__name__", str(node.target))
    return name.lower().replace("_", "") if node.op.startswith("call_") else ""


def _is_weighted(node: fx.Node) -> bool:
    return isinstance(_module(node), WEIGHTED)


def _is_activation(node: fx.Node) -> bool:
    return _kind(node) in _ACTIVATIONS


def _is_identity(kind: str) -> bool:
    return "dropout" in kind or kind in {"identity", "contiguous", "clone", "stochasticdepth"}


def _is_layout(kind: str) -> bool:
    return _is_identity(kind) or kind in _VIEWS | _MOVES


def _is_spatial(kind: str) -> bool:
    parts = ("pool", "pad", "upsample", "interpolate", "localresponsenorm")
    return any(part in kind for part in parts)


def _dim_after_view(before: tuple[int, ...], after: tuple[int, ...], dim: int) -> int | None:
    """Find a dimension again after a reshape, which keeps the order of the elements."""
    places = [
        place
        for place, size in enumerate(after)
        if size == before[dim] and prod(after[:place]) == prod(before[:dim])
    ]
    return dim if dim in places else next(iter(places), None)


def _dim_after_move(node: fx.Node, rank: int, dim: int) -> int | None:
    """Find a dimension again after a permutation or a reduction, by trying it on unequal sizes."""
    probe = torch.empty(tuple(range(2, rank + 2)))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: probe)
    method = node.op == "call_method"
    function: Any = getattr(Tensor, str(node.target)) if method else node.target
    sizes = tuple(function(*args, **kwargs).shape)
    return sizes.index(dim + 2) if dim + 2 in sizes else None


class GraphReader:
    """Runs a model and returns the layers' values too, as extra outputs of its graph.

    The graph is traced once for every combination of training and evaluation modes of the model's
    modules that is met, because tracing writes the modes down as constants.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], example: Tensor) -> None:
        self._model = model
        self._layers = layers
        self._example = example
        self._modules = list(model.modules())
        self._graphs: dict[tuple[bool, ...], fx.GraphModule] = {}
        self._graph_of_mode()  # a model of another architecture is refused here

    def __call__(self, x: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        output, reads = self._graph_of_mode()(x)
        return output, reads

    def _graph_of_mode(self) -> fx.GraphModule:
        mode = tuple(module.training for module in self._modules)
        if mode not in self._graphs:
            graph_module = trace_graph(self._model)
            device = next((p.device for p in self._model.parameters()), self._example.device)
            points = find_read_points(graph_module, self._example.to(device))
            known = {point.layer.name: point for point in points}
            for layer in self._layers:
                if layer.name not in known or not _same_neurons(known[layer.name].layer, layer):
                    raise ValueError(
                        f"{type(self._model).__name__} does not have the layer '{layer.name}' as "
                        f"it was traced ({layer.size} neurons before {layer.activation}); "
                        f"trace this model, in the mode in which it is to be read."
                    )
            _output_reads(graph_module, [known[layer.name] for layer in self._layers])
            self._graphs[mode] = graph_module
        return self._graphs[mode]


def _same_neurons(one: Layer, other: Layer) -> bool:
    """Compare all but the consumers, which auxiliary classifiers change with the mode."""
    return replace(one, consumers=other.consumers) == other


def _output_reads(graph_module: fx.GraphModule, points: Sequence[ReadPoint]) -> None:
    """Add the read points' tensors, channels in dimension 1, to what a graph returns."""
    graph = graph_module.graph
    kept = {
        node: _keep_from_overwriting(graph_module, node)
        for node in dict.fromkeys(point.node for point in points)
    }
    result = graph.output_node()
    with graph.inserting_before(result):
        reads = []
        for point in points:
            layer, read = point.layer, kept[point.node]
            slice_ = (layer.channel_dim, layer.first_channel, layer.size)
            read = graph.call_function(torch.narrow, (read, *slice_))
            if layer.channel_dim != 1:
                read = graph.call_function(torch.movedim, (read, layer.channel_dim, 1))
            reads.append(read)
    result.args = ((result.args[0], tuple(reads)),)
    graph.lint()
    graph_module.recompile()


def _keep_from_overwriting(graph_module: fx.GraphModule, read: fx.Node) -> fx.Node:
    """Return a node that still holds `read`'s value when the graph returns.

    An in-place activation that nothing but its own result depends on is replaced by the same
    activation out of place, at no cost; a copy is taken before any other in-place operation.
    """
    order = {node: position for position, node in enumerate(graph_module.graph.nodes)}
    aliases = _aliases(read)
    later = [user for alias in aliases for user in alias.users if order[user] > order[read]]
    writers = {user for user in later if _is_inplace(user) and user.all_input_nodes[0] in aliases}
    if not writers:
        return read
    writer = max(writers, key=order.__getitem__)
    last_use = max(order[user] for user in later)
    if len(writers) == 1 and _is_activation(writer) and order[writer] == last_use:
        _make_out_of_place(graph_module, writer)
        return read
    with graph_module.graph.inserting_after(read):
        return graph_module.graph.call_function(torch.clone, (read,))


def _aliases(read: fx.Node) -> set[fx.Node]:
    """List the nodes that may share `read`'s memory before an activation is computed from it."""
    family = {read}
    while _may_alias(read):
        read = read.all_input_nodes[0]
        family.add(read)
    waiting = list(family)
    while waiting:
        for user in waiting.pop().users:
            if user not in family and _may_alias(user) and not _is_activation(user):
                family.add(user)
                waiting.append(user)
    return family


def _may_alias(node: fx.Node) -> bool:
    return bool(node.all_input_nodes) and (_is_layout(_kind(node)) or _is_inplace(node))


def _is_inplace(node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(_module(node), "inplace", False))
    name = getattr(node.target, "__name__", str(node.target))
    if name in _INPLACE_OPERATORS or (name.endswith("_") and not name.endswith("__")):
        return node.op.startswith("call_")
    return node.op == "call_function" and bool(_arguments(node).arguments.get("inplace", False))


def _arguments(node: fx.Node) -> inspect.BoundArguments:
    try:
        signature = inspect.signature(node.target)  # type: ignore[arg-type]
        return signature.bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # builtins have no signature, and no argument `inplace` either
        return inspect.BoundArguments(inspect.Signature(), {})


def _make_out_of_place(graph_module: fx.GraphModule, node: fx.Node) -> None:
    name = getattr(node.target, "__name__", str(node.target))
    if node.op == "call_module":
        twin = copy.copy(_module(node))
        twin.inplace = False
        node.target = f"_out_of_place_{node.name}"
        graph_module.add_module(node.target, twin)
    elif node.op == "call_method":
        node.target = name.rstrip("_")
    elif name.endswith("_"):
        node.target = getattr(functional, name.rstrip("_"))
    else:
        arguments = _arguments(node)
        arguments.arguments["inplace"] = False
        node.args, node.kwargs = arguments.args, arguments.kwargs
