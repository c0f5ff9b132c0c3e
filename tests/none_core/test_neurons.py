"""The neuron map against forward hooks, on nets written in many ways, and the reset, exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (as torch users write it)
from hypothesis import given, settings
from torch import Tensor, nn

from none_core.neurons import Layer, NeuronMap, Source, TraceError
from tasks.torchvision_import import torchvision

# --- models -----------------------------------------------------------------------------------


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a model and give its normalisations statistics and weights unlike the initial ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        for module in model.modules():
            for name in ("weight", "bias", "running_mean", "running_var"):
                tensor = getattr(module, name, None)
                if tensor is not None and "Norm" in type(module).__name__:
                    tensor.data.uniform_(0.5, 1.5)
    return model.eval()


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class Normalised(nn.Module):
    """A first layer that normalises the input with buffers, around any model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(0.4))

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.mean) / torch.tensor(0.3))


def mnist_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.ReLU(inplace=True)),
        *(nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
    )


def features_of(name: str) -> nn.Module:
    """Take a large model's features without ever allocating its classifier."""
    with torch.device("meta"):
        features = getattr(torchvision.models, name)().features
    features.to_empty(device="cpu")
    for module in features.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return features


def network_in_network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(True), nn.Conv2d(8, 6, 1), nn.ReLU(True), nn.Dropout(0.5)),
        *(nn.Conv2d(6, 4, 1), nn.ReLU(True), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def separable_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6), nn.ReLU6(True)),
        *(nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5), nn.Hardswish(True)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)),
    )


class ActivationHooks:
    """The slow, obvious oracle: what enters the activation modules, in the order of the calls."""

    def __init__(self, model: nn.Module, *types: type[nn.Module]) -> None:
        self.inputs: list[Tensor] = []
        self.handles = [
            module.register_forward_pre_hook(
                lambda _, args: self.inputs.append(args[0].detach().clone())
            )
            for module in model.modules()
            if isinstance(module, types)
        ]

    def run(self, model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            output = model(x)
        for handle in self.handles:
            handle.remove()
        return output, self.inputs


def read(neurons: NeuronMap, model: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.no_grad():
        return neurons.reader(model)(x)


def names_of(neurons: NeuronMap) -> list[str]:
    return [layer.name for layer in neurons.layers]


# --- what is found ------------------------------------------------------------------------------


def test_the_mnist_net_is_read_after_pooling_and_without_its_logits():
    neurons = NeuronMap.trace(seeded(mnist_net), images(1, 1, 28, 28))

    assert neurons.layers == (
        Layer("0", 20, (Source("0", None),), "relu", ("3",), 1),
        Layer("3", 50, (Source("3", None),), "relu", ("7",), 1),
        Layer("7", 500, (Source("7", None),), "relu", ("9",), 1),
    )


REAL_MODELS = {
    "mnist-net": (mnist_net, (1, 28, 28)),
    "nin": (network_in_network, (3, 9, 9)),
    "separable": (separable_net, (3, 9, 9)),
    "normalised": (lambda: Normalised(separable_net()), (3, 9, 9)),
    "vgg11-features": (lambda: features_of("vgg11"), (3, 32, 32)),
    "vgg16_bn-features": (lambda: features_of("vgg16_bn"), (3, 32, 32)),
    "alexnet-features": (lambda: features_of("alexnet"), (3, 64, 64)),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), (3, 32, 32)),
    "mobilenet_v2": (
        lambda: torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=3),
        (3, 32, 32),
    ),
}


@pytest.fixture(scope="module", params=REAL_MODELS)
def real_model(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[int, ...]]:
    build, shape = REAL_MODELS[request.param]
    return seeded(build), shape


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_values_and_output_are_those_that_hooks_see(real_model, training):
    model, shape = real_model
    model.train(training)
    x = images(2, *shape)
    neurons = NeuronMap.trace(model, x)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    output, inputs = ActivationHooks(model, nn.ReLU, nn.ReLU6, nn.Hardswish).run(model, x)
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(before)

    torch.manual_seed(3)
    seen_output, reads = read(neurons, model, x)

    assert torch.equal(seen_output, output)
    assert [value.shape for value in reads] == [value.shape for value in inputs]
    assert all(torch.equal(a, b) for a, b in zip(reads, inputs, strict=True))
    assert any((value < 0).any() for value in reads)
    for key, value in model.state_dict().items():
        assert torch.equal(value, after[key]), key
    model.eval()


def test_each_convolution_of_a_densenet_is_read_where_it_is_first_used():
    model = seeded(lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3))
    x = images(2, 3, 32, 32)
    neurons = NeuronMap.trace(model, x)
    entering: dict[str, Tensor] = {}
    for layer in neurons.layers:
        name = layer.sources[0].norm
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: entering.update({name: output.clone()})
        )

    output, reads = read(neurons, model, x)

    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert sorted(names_of(neurons)) == sorted(convolutions)
    assert neurons.layers[-1].first_channel > 0
    for layer, values in zip(neurons.layers, reads, strict=True):
        whole = entering[layer.sources[0].norm]
        assert torch.equal(values, whole.narrow(1, layer.first_channel, layer.size))
    assert torch.equal(output, model(x))


@pytest.mark.parametrize("name", ["vgg11", "vgg16_bn", "alexnet"])
def test_large_models_are_traced_without_memory_on_the_meta_device(name):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()

        neurons = NeuronMap.trace(model, torch.empty(1, 3, 64, 64))

    weighted = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert names_of(neurons) == weighted[:-1]
    assert all(
        layer.consumers == (after,)
        for layer, after in zip(neurons.layers, weighted[1:], strict=True)
    )
    for layer in neurons.layers:
        norm = f"features.{int(layer.name.split('.')[1]) + 1}"
        batch_norm = name == "vgg16_bn" and layer.name.startswith("features")
        assert layer.sources == (Source(layer.name, norm if batch_norm else None),)


def test_resnet18_sums_the_projection_and_the_block_in_one_layer():
    model = seeded(lambda: torchvision.models.resnet18(num_classes=10))

    neurons = NeuronMap.trace(model, images(1, 3, 32, 32))

    layers = {layer.name: layer for layer in neurons.layers}
    assert len(layers) == 17
    assert neurons.size == 64 * 5 + 4 * (128 + 256 + 512)
    assert layers["conv1"].sources == (Source("conv1", "bn1"),)
    assert layers["conv1"].consumers == ("layer1.0.conv1",)
    assert layers["layer2.0.conv2"].sources == (
        Source("layer2.0.conv2", "layer2.0.bn2"),
        Source("layer2.0.downsample.0", "layer2.0.downsample.1"),
    )
    assert layers["layer1.1.conv2"].consumers == ("layer2.0.conv1", "layer2.0.downsample.0")
    assert layers["layer4.1.conv2"].consumers == ("fc",)


SPELLINGS: dict[str, nn.Module | Callable[[Tensor], Tensor]] = {
    **{
        f"nn.{kind.__name__}": kind()
        for kind in (
            *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU),
            *(nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign, nn.Tanh, nn.Tanhshrink),
            *(nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
            *(nn.Hardshrink, nn.Softshrink),
        )
    },
    "nn.Threshold": nn.Threshold(0.1, 0.0),
    **{
        f"nn.{kind.__name__}(inplace)": kind(inplace=True)
        for kind in (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Mish, nn.Hardtanh)
    },
    **{
        f"F.{name}": getattr(F, name)
        for name in (
            *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish"),
            *("softplus", "softsign", "tanhshrink", "logsigmoid", "hardtanh", "hardswish"),
            *("hardsigmoid", "hardshrink", "softshrink", "relu_", "elu_", "leaky_relu_"),
        )
    },
    "F.prelu": lambda x: F.prelu(x, torch.tensor([0.25])),
    "F.relu(inplace=True)": lambda x: F.relu(x, inplace=True),
    "F.leaky_relu(x, 0.1, True)": lambda x: F.leaky_relu(x, 0.1, True),
    "F.relu(input=x)": lambda x: F.relu(input=x),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "torch.tanh_": torch.tanh_,
    "torch.sigmoid": torch.sigmoid,
    "x.relu()": lambda x: x.relu(),
    "x.relu_()": lambda x: x.relu_(),
    "x.tanh()": lambda x: x.tanh(),
    "x.sigmoid_()": lambda x: x.sigmoid_(),
}


class Spelled(nn.Module):
    """One convolution, its normalisation and one activation, spelled as given."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_activation_is_recognised_and_read_before_it(spelling):
    model = seeded(lambda: Spelled(SPELLINGS[spelling]))
    x = images(3, 1, 6, 6)
    neurons = NeuronMap.trace(model, x)

    output, reads = read(neurons, model, x)

    expected = Layer("conv", 4, (Source("conv", "norm"),), "", ("head",), 1)
    (layer,) = neurons.layers
    assert layer == Layer(**{**vars(expected), "activation": layer.activation})
    assert layer.activation.replace("_", "") in spelling.lower().replace("_", "")
    with torch.no_grad():
        assert torch.equal(output, model(x))
        assert torch.equal(reads[0], model.norm(model.conv(x)))


# --- unusual graphs ------------------------------------------------------------------------------


class Assembled(nn.Module):
    """Three convolutions and a forward function given from outside."""

    def __init__(self, forward: Callable[[Assembled, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(2, 2, 3, padding=1),
            nn.Conv2d(2, 2, 1),
            nn.Conv2d(2, 3, 1),
        )
        self.norm, self.wide = nn.BatchNorm2d(2), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(2 * 16, 2)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def _overwritten_stream(m: Assembled, x: Tensor) -> Tensor:
    x = m.a(x)
    x += m.b(torch.relu(x))  # what was read changes later
    return x


def _activation_as_statement(m: Assembled, x: Tensor) -> Tensor:
    x = m.a(x)
    F.relu_(x)  # its result is not used, the overwritten tensor is
    return m.b(x)


def _overwritten_alias(m: Assembled, x: Tensor) -> Tensor:
    x = m.a(x)
    m.drop(x).relu_()  # overwrites x in evaluation mode
    return m.b(x)


def _written_before(m: Assembled, x: Tensor) -> Tensor:
    y = m.norm(m.a(x))
    y += x
    return m.b(y.relu_())


def _shared_activation_input(m: Assembled, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.b(torch.sigmoid(x)) + m.b(F.relu_(x))


@pytest.mark.parametrize(
    ("forward", "value"),
    [
        (_overwritten_stream, lambda m, x: m.a(x)),
        (_activation_as_statement, lambda m, x: m.a(x)),
        (_overwritten_alias, lambda m, x: m.a(x)),
        (_written_before, lambda m, x: m.norm(m.a(x)) + x),
        (_shared_activation_input, lambda m, x: m.a(x)),
    ],
)
def test_in_place_operations_spoil_neither_reads_nor_output(forward, value):
    model = seeded(lambda: Assembled(forward))
    x = images(3, 2, 4, 4) - 0.5
    neurons = NeuronMap.trace(model, x)

    output, reads = read(neurons, model, x)

    with torch.no_grad():
        assert names_of(neurons) == ["a"]
        assert torch.equal(output, model(x))
        assert torch.equal(reads[0], value(model, x))


def test_replacing_in_place_activations_costs_no_copy_and_leaves_the_model_alone():
    model = seeded(lambda: torchvision.models.resnet18(num_classes=3))
    reader = NeuronMap.trace(model, images(1, 3, 32, 32)).reader(model)

    (graph_module,) = reader._graphs.values()

    assert not any(node.target is torch.clone for node in graph_module.graph.nodes)
    assert model.relu.inplace
    assert "_out_of_place" not in str(list(dict(model.named_modules())))


def test_concatenated_convolutions_are_layers_with_their_part_of_the_normalisation():
    model = seeded(
        lambda: Assembled(lambda m, x: m.c(m.wide(torch.cat([m.a(x), m.b(x)], 1)).relu()[:, :2]))
    )
    x = images(3, 2, 4, 4)
    neurons = NeuronMap.trace(model, x)

    neurons.reset(model, [3], how="zero")
    _, reads = read(neurons, model, x)

    assert neurons.layers == (
        Layer("a", 2, (Source("a", "wide"),), "relu", ("c",), 1, 0),
        Layer("b", 2, (Source("b", "wide"),), "relu", ("c",), 1, 2),
    )
    assert [tuple(value.shape) for value in reads] == [(3, 2, 4, 4), (3, 2, 4, 4)]
    assert (model.wide.weight == 1).tolist() == [False, False, False, True]
    assert (reads[1][:, 1] == 0).all()
    assert (reads[1][:, 0] != 0).any()


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.flatten(1),
        lambda x: torch.flatten(x, 1),
        lambda x: x.view(-1, 32),
        lambda x: x.reshape(x.size(0), -1),
        lambda x: x.permute(0, 2, 3, 1).flatten(1),
    ],
)
def test_an_activation_after_flattening_is_read_by_channel(flatten):
    model = seeded(lambda: Assembled(lambda m, x: m.fc(flatten(m.a(x)).relu())))
    x = images(3, 2, 4, 4)
    neurons = NeuronMap.trace(model, x)

    _, reads = read(neurons, model, x)

    (layer,) = neurons.layers
    assert (layer.name, layer.size, layer.consumers) == ("a", 2, ("fc",))
    with torch.no_grad():
        assert torch.equal(reads[0], model.a(x))


def test_channels_are_followed_through_permutations_and_tokens():
    model = seeded(
        lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2))
    )
    moved = seeded(lambda: Assembled(lambda m, x: m.c(m.a(x).permute(0, 2, 3, 1).relu().mT)))
    tokens, x = images(3, 7, 5), images(3, 2, 2, 2)

    _, (units,) = read(NeuronMap.trace(model, tokens), model, tokens)
    neurons = NeuronMap.trace(moved, x)
    _, (channels,) = read(neurons, moved, x)

    with torch.no_grad():
        assert torch.equal(units, model[:2](tokens).movedim(2, 1))
        assert torch.equal(channels, moved.a(x))
    assert neurons.layers[0].channel_dim == 3


def test_a_module_belongs_to_the_first_activation_that_it_reaches():
    def pre_activation(m: Assembled, x: Tensor) -> Tensor:
        x = m.a(x)
        x = x + m.b(m.norm(x).relu())
        return m.c(x.relu())

    model = seeded(lambda: Assembled(pre_activation))

    neurons = NeuronMap.trace(model, images(1, 2, 4, 4))

    assert [layer.sources for layer in neurons.layers] == [
        (Source("a", "norm"),),
        (Source("b", None),),
    ]


def test_a_module_that_is_called_twice_is_one_layer_read_at_its_first_activation():
    model = seeded(lambda: Assembled(lambda m, x: m.c(m.a(m.a(x).relu()).relu())))
    x = images(3, 2, 4, 4)
    neurons = NeuronMap.trace(model, x)

    output, reads = read(neurons, model, x)

    assert names_of(neurons) == ["a"]
    assert neurons.layers[0].consumers == ("a",)
    with torch.no_grad():
        assert torch.equal(output, model(x))
        assert torch.equal(reads[0], model.a(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.c(F.glu(m.a(x), 2).relu()),
        lambda m, x: m.c(m.a(x).cumsum(1).relu()),
        lambda m, x: (1 / m.a(x)).relu(),
        lambda m, x: m.fc(x.flatten(1).repeat(3, 1)).relu(),  # three values for one sample
        lambda m, x: m.a(x).mean(1).relu(),
        lambda m, x: m.a(x).softmax(1),
    ],
)
def test_channels_that_are_lost_before_the_activation_are_not_neurons(forward):
    model = seeded(lambda: Assembled(forward))

    with pytest.raises(ValueError, match=r"No convolution or linear layer of Assembled feeds"):
        NeuronMap.trace(model, images(1, 2, 4, 4))


def test_subclasses_of_layers_and_flags_with_defaults_are_traced():
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias)

    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = Standardised(1, 3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor, features: bool = False, mask: Tensor | None = None) -> Tensor:
            x = self.conv(x).relu().mean((2, 3))
            if features:
                return x
            return self.fc(x if mask is None else x * mask)

    model = seeded(Flagged)
    x = images(3, 1, 5, 5)
    neurons = NeuronMap.trace(model, x)

    output, _ = read(neurons, model, x)

    assert names_of(neurons) == ["conv"]
    assert torch.equal(output, model(x))


# --- the map and its reader ------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_tracing_and_making_a_reader_change_nothing(training):
    model = seeded(lambda: Normalised(separable_net())).train(training)
    before, attributes = copy.deepcopy(model.state_dict()), set(vars(model))
    random_state = torch.get_rng_state()

    NeuronMap.trace(model, images(1, 3, 9, 9)).reader(model)

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert set(vars(model)) == attributes
    assert all(module.training is training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_one_reader_follows_the_mode_the_weights_and_the_buffers_of_the_model():
    class Functional(Normalised):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5, self.training))

    nested = seeded(lambda: Functional(separable_net()))
    model = seeded(lambda: Normalised(nn.Sequential(nested)))
    x = images(4, 3, 9, 9)
    reader = NeuronMap.trace(model, x).reader(model)

    for step, training in enumerate([False, True, False]):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
            for normalised in (model, nested):
                normalised.mean = normalised.mean + 0.1  # a new tensor, as after .to(device)
            before = copy.deepcopy(model.train(training).state_dict())
            torch.manual_seed(step)
            expected = model(x)
            model.load_state_dict(before)
            torch.manual_seed(step)
            output, _ = reader(x)
        assert torch.equal(output, expected), step


def test_a_partly_frozen_model_is_run_as_it_is():
    model = seeded(separable_net).train()
    model[1].eval()
    x = images(4, 3, 9, 9)
    before = model[1].running_mean.clone()

    _, reads = read(NeuronMap.trace(model, x), model, x)

    with torch.no_grad():
        assert torch.equal(reads[0], model[1](model[0](x)))
    assert torch.equal(model[1].running_mean, before)
    assert model[4].num_batches_tracked == 1


def test_gradients_flow_through_reads_when_they_are_wanted():
    model = seeded(separable_net)
    x = images(2, 3, 9, 9).requires_grad_()

    _, reads = NeuronMap.trace(model, x).reader(model)(x)
    reads[-1].sum().backward()

    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_one_map_reads_and_resets_another_instance_and_refuses_another_architecture():
    neurons = NeuronMap.trace(seeded(separable_net), images(2, 3, 9, 9))
    other = seeded(separable_net, seed=5)
    x = images(2, 3, 9, 9)

    output, _ = read(neurons, other, x)

    assert torch.equal(output, other(x))
    wider = seeded(lambda: nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Flatten()))
    with pytest.raises(ValueError, match=r"Sequential does not have the layer '0'"):
        neurons.reader(wider)
    with pytest.raises(ValueError, match=r"'0' has 9 outputs in Sequential, but 6 in the model"):
        neurons.reset(wider, [0])


def test_layers_restricts_the_map_and_names_the_legal_ones():
    model, x = seeded(mnist_net), images(2, 1, 28, 28)

    neurons = NeuronMap.trace(model, x, layers=["7", "3"])

    assert names_of(neurons) == ["3", "7"]
    assert [value.shape[1] for value in read(neurons, model, x)[1]] == [50, 500]
    with pytest.raises(ValueError, match=r"layers names '9', but the layers .* '0', '3', '7'"):
        NeuronMap.trace(model, x, layers=["0", "9"])


def test_indices_labels_and_layers_agree():
    neurons = NeuronMap.trace(seeded(mnist_net), images(1, 1, 28, 28))

    assert neurons.size == 570
    assert neurons.offsets.tolist() == [0, 20, 70, 570]
    assert neurons.layer_of([0, 19, 20, 69, 70, 569]).tolist() == [0, 0, 1, 1, 2, 2]
    assert neurons.label(20) == ("3", 0)
    grouped = neurons.by_layer(np.array([569, 19, 70, 569]))
    assert {name: channels.tolist() for name, channels in grouped.items()} == {
        "0": [19],
        "7": [0, 499],
    }
    for j in range(neurons.size):
        name, channel = neurons.label(j)
        assert neurons.by_layer([j])[name].tolist() == [channel]
    assert neurons.by_layer([]) == {}


@pytest.mark.parametrize(
    ("indices", "complaint"),
    [([570], "0 to 569"), ([-1], "0 to 569"), ([0.5], "integers"), ([True], "integers")],
)
def test_indices_that_are_no_neurons_are_refused(indices, complaint):
    neurons = NeuronMap.trace(seeded(mnist_net), images(1, 1, 28, 28))

    with pytest.raises(ValueError, match=complaint):
        neurons.by_layer(indices)


@pytest.mark.parametrize("example", [torch.zeros(5), torch.zeros(0, 1, 28, 28)])
def test_an_example_that_is_no_batch_is_refused(example):
    with pytest.raises(ValueError, match=r"example_input must be a batch"):
        NeuronMap.trace(seeded(mnist_net), example)


def test_an_example_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"does not run on .* shape is \(1, 3, 28, 28\): "):
        NeuronMap.trace(seeded(mnist_net), images(1, 3, 28, 28))


# --- models that cannot be traced ----------------------------------------------------------------


class Branching(nn.Module):
    """Control flow that depends on the data, inside a submodule."""

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.gate, self.relu = self.Gate(), nn.ReLU(inplace=True)
        self.hidden, self.fc = nn.Linear(3, 4), nn.Linear(4, 2)
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.gate(self.norm(self.conv(x))))
        return self.fc(self.relu(self.hidden(x.mean((2, 3)))))


def test_an_untraceable_model_is_named_with_the_way_out():
    with pytest.raises(TraceError, match=r"module 'gate' of Branching .*from_modules"):
        NeuronMap.trace(Branching(), images(1, 1, 6, 6))


def test_hooks_read_named_modules_and_pairs_in_the_order_of_the_calls():
    model, x = seeded(Branching), images(4, 1, 6, 6)
    neurons = NeuronMap.from_modules(model, x, ["hidden", ("conv", "norm")])

    output, reads = read(neurons, model, x)

    assert [layer.sources for layer in neurons.layers] == [
        (Source("conv", "norm"),),
        (Source("hidden", None),),
    ]
    with torch.no_grad():
        value = model.norm(model.conv(x))
        hidden = model.hidden(model.gate(value).relu().mean((2, 3)))
        assert torch.equal(output, model(x))
        assert torch.equal(reads[0], value)  # although an in-place activation follows
        assert torch.equal(reads[1], hidden)
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_without_names_read_all_but_the_last_called():
    model = seeded(Branching)

    neurons = NeuronMap.from_modules(model, images(2, 1, 6, 6))

    assert [(layer.name, layer.size) for layer in neurons.layers] == [("conv", 3), ("hidden", 4)]


def test_hooks_read_the_first_call_of_a_module_that_is_called_twice():
    model = seeded(lambda: Assembled(lambda m, x: m.c(m.a(m.a(x).relu()).relu())))
    x = images(3, 2, 4, 4)
    neurons = NeuronMap.from_modules(model, x)

    _, reads = read(neurons, model, x)

    assert names_of(neurons) == ["a"]
    assert torch.equal(reads[0], model.a(x))


def test_hooks_leave_the_model_as_it_was_and_reset_like_a_traced_map():
    model, x = seeded(Branching).train(), images(2, 1, 6, 6)
    before = copy.deepcopy(model.state_dict())

    neurons = NeuronMap.from_modules(model, x, [("conv", "norm"), "hidden"])
    unchanged = copy.deepcopy(model.state_dict())
    neurons.reset(model, [1, 4])
    _, reads = read(neurons, model.eval(), x)

    assert all(torch.equal(value, before[key]) for key, value in unchanged.items())
    assert (reads[0][:, 1] == 0).all()
    assert (reads[1][:, 1] == 0).all()
    assert (reads[0][:, 0] != 0).any()


@pytest.mark.parametrize(
    ("modules", "complaint"),
    [
        (["con"], r"no convolution or linear module 'con'; it has 'conv', 'hidden'"),
        (["relu"], r"no convolution or linear module 'relu'"),
        ([("conv", "relu")], r"no normalisation 'relu'; it has 'norm'"),
        (["unused"], r"does not pass through 'unused'"),
    ],
)
def test_modules_that_cannot_be_read_are_refused(modules, complaint):
    with pytest.raises(ValueError, match=complaint):
        NeuronMap.from_modules(seeded(Branching), images(2, 1, 6, 6), modules)


# --- reset ----------------------------------------------------------------------------------


NORMALISATIONS: dict[str, Callable[[int], nn.Module] | None] = {
    "none": None,
    "batch": nn.BatchNorm2d,
    "batch, no weight": lambda width: nn.BatchNorm2d(width, affine=False),
    "batch, no statistics": lambda width: nn.BatchNorm2d(width, track_running_stats=False),
    "instance": lambda width: nn.InstanceNorm2d(width, affine=True, track_running_stats=True),
    "group": lambda width: nn.GroupNorm(2, width),
}


class Block(nn.Module):
    """A convolution, perhaps a residual sum, and an activation; knows its own sources."""

    def __init__(self, inputs: int, width: int, norm: str, residual: str, bias: bool) -> None:
        super().__init__()
        build = NORMALISATIONS[norm]
        self.conv = nn.Conv2d(inputs, width, 3, padding=1, bias=bias)
        self.norm = build(width) if build else nn.Identity()
        self.project = nn.Conv2d(inputs, width, 1, bias=bias) if residual == "projection" else None
        self.identity = residual == "identity" and inputs == width

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.project is not None:
            y = y + self.project(x)
        elif self.identity:
            y = y + x
        return F.relu(y, inplace=True)


blocks = st.tuples(
    st.sampled_from([2, 4]),
    st.sampled_from(list(NORMALISATIONS)),
    st.sampled_from(["no", "projection", "identity"]),
    st.booleans(),
)


@st.composite
def nets_and_neurons(draw: st.DrawFn) -> tuple[nn.Module, list[int]]:
    parts = draw(st.lists(blocks, min_size=1, max_size=3))
    widths = [2, *(width for width, *_ in parts)]
    hidden = draw(st.integers(1, 4))

    def build() -> nn.Module:
        stem = [
            Block(inputs, width, norm, residual, bias)
            for inputs, (width, norm, residual, bias) in zip(widths, parts, strict=False)
        ]
        head = (nn.Linear(widths[-1], hidden), nn.Tanh(), nn.Linear(hidden, 2))
        return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)

    model = seeded(build, draw(st.integers(0, 99)))
    count = sum(widths[1:]) + hidden
    return model, draw(st.lists(st.integers(0, count - 1), unique=True, max_size=count))


def expected_rows(model: nn.Sequential, neurons: list[int]) -> dict[str, set[int]]:
    """Which rows of which tensors a reset may touch, said one neuron at a time."""
    places: list[tuple[list[str], int]] = []
    for position, module in enumerate(model[:-1]):
        if isinstance(module, Block):
            parts = ["conv", "norm"] + (["project"] if module.project is not None else [])
            names = [f"{position}.{part}" for part in parts]
            places += [(names, channel) for channel in range(module.conv.out_channels)]
        elif isinstance(module, nn.Linear):
            places += [([str(position)], unit) for unit in range(module.out_features)]
    rows: dict[str, set[int]] = {}
    for neuron in neurons:
        modules, channel = places[neuron]
        for name in modules:
            for key in ("weight", "bias", "running_mean", "running_var"):
                rows.setdefault(f"{name}.{key}", set()).add(channel)
    return rows


@settings(max_examples=60, deadline=None)
@given(nets_and_neurons())
def test_the_rows_that_a_reset_touches_are_named(case):
    model, neurons = case
    mapped = NeuronMap.trace(model, images(2, 2, 4, 4))
    named: dict[str, set[int]] = {}
    for neuron in neurons:
        for key, row in mapped.rows(model, neuron).items():
            named.setdefault(key, set()).add(row)
    state = model.state_dict()
    assert named == {k: rows for k, rows in expected_rows(model, neurons).items() if k in state}


def test_the_row_of_a_normalisation_after_a_concatenation_is_named():
    model = seeded(
        lambda: Assembled(lambda m, x: m.c(m.wide(torch.cat([m.a(x), m.b(x)], 1)).relu()[:, :2]))
    )
    rows = NeuronMap.trace(model, images(3, 2, 4, 4)).rows(model, 3)
    assert rows["b.weight"] == 1
    assert rows["wide.weight"] == rows["wide.running_var"] == 3


@settings(max_examples=60, deadline=None)
@given(nets_and_neurons(), st.sampled_from(["zero", "init"]))
def test_reset_touches_exactly_the_neurons_and_makes_zero_neurons_silent(case, how):
    model, neurons = case
    x = images(2, 2, 4, 4)
    mapped = NeuronMap.trace(model, x)
    before = copy.deepcopy(model.state_dict())

    mapped.reset(model, neurons, how, torch.Generator().manual_seed(0) if how == "init" else None)

    rows = expected_rows(model, neurons)
    assert mapped.size == sum(layer.size for layer in mapped.layers)
    for key, value in model.state_dict().items():
        name, _, kind = key.rpartition(".")
        module = model.get_submodule(name)
        for channel in range(len(value) if value.ndim else 0):
            if channel not in rows.get(key, ()):
                assert torch.equal(value[channel], before[key][channel]), (key, channel)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                bound = module.weight[0].numel() ** -0.5
                assert not torch.equal(value[channel], before[key][channel])
                assert value[channel].abs().max() <= (0 if how == "zero" else bound)
            else:
                silent = how == "zero" and isinstance(module, nn.GroupNorm)
                initial = {"weight": float(not silent), "running_var": 1.0}.get(kind, 0.0)
                assert (value[channel] == initial).all(), (key, channel)
        if not value.ndim:
            assert torch.equal(value, before[key]), key  # num_batches_tracked

    if how == "zero":
        _, reads = read(mapped, model, x)
        for neuron in neurons:
            name, channel = mapped.label(neuron)
            block = model[int(name.split(".")[0])]
            if not (isinstance(block, Block) and block.identity and block.project is None):
                values = reads[names_of(mapped).index(name)][:, channel]
                assert (values == 0).all(), (neuron, name)


def test_what_is_left_of_a_reset_neuron_in_a_residual_sum_is_the_skip_connection():
    model = seeded(lambda: nn.Sequential(*(Block(2, 2, "batch", "identity", True) for _ in "ab")))
    x = images(2, 2, 4, 4)
    neurons = NeuronMap.trace(model, x)

    neurons.reset(model, [3], how="zero")
    _, reads = read(neurons, model, x)

    assert torch.equal(reads[1][:, 1], reads[0][:, 1].relu())
    assert not torch.equal(reads[1][:, 0], reads[0][:, 0].relu())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_reset_neuron_of_a_linear_layer_with_layer_norm_is_silent(training):
    model = seeded(
        lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
    ).train(training)
    x = images(3, 5)
    neurons = NeuronMap.trace(model, x)

    neurons.reset(model, [2])

    _, (values,) = read(neurons, model, x)
    assert (values == 0).all(0).tolist() == [False, False, True, False]


def test_redrawn_weights_depend_on_the_seed_alone():
    def redrawn(indices: list[int], seed: int) -> dict[str, Tensor]:
        model = seeded(mnist_net)
        neurons = NeuronMap.trace(model, images(1, 1, 28, 28))
        neurons.reset(model, indices, "init", torch.Generator().manual_seed(seed))
        return model.state_dict()

    alone, together = redrawn([80], seed=4), redrawn([3, 75, 80, 81], seed=4)
    other = redrawn([80], seed=5)

    assert torch.equal(alone["7.weight"][10], together["7.weight"][10])
    assert torch.equal(alone["7.bias"][10], together["7.bias"][10])
    assert not torch.equal(alone["7.weight"][10], other["7.weight"][10])


def test_redrawn_weights_have_the_distribution_of_a_new_layer():
    model = seeded(mnist_net)
    neurons = NeuronMap.trace(model, images(1, 1, 28, 28))

    neurons.reset(model, np.arange(70, 570), "init", torch.Generator().manual_seed(0))

    fresh = nn.Linear(800, 500)
    for mine, theirs in zip(model[7].parameters(), fresh.parameters(), strict=True):
        mine, theirs = mine.detach(), theirs.detach()
        assert mine.abs().max() <= 800**-0.5
        assert mine.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.05)
        assert mine.std().item() == pytest.approx(theirs.std().item(), rel=0.15)


def test_the_generator_advances_by_the_same_amount_whatever_is_reset():
    model = seeded(mnist_net)
    neurons = NeuronMap.trace(model, images(1, 1, 28, 28))
    one, many = (torch.Generator().manual_seed(0) for _ in range(2))

    neurons.reset(model, [], "init", one)
    neurons.reset(model, np.arange(100), "init", many)

    assert torch.equal(one.get_state(), many.get_state())


def test_resetting_nothing_changes_nothing():
    model = seeded(mnist_net)
    before = copy.deepcopy(model.state_dict())

    NeuronMap.trace(model, images(1, 1, 28, 28)).reset(model, [])

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_reset_that_cannot_be_done_says_why_and_changes_nothing():
    model = seeded(mnist_net)
    neurons = NeuronMap.trace(model, images(1, 1, 28, 28))
    nn.utils.parametrizations.weight_norm(model[3])
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(ValueError, match=r"weight of '3' is computed from other parameters"):
        neurons.reset(model, [0, 20])
    with pytest.raises(ValueError, match=r"needs a generator"):
        neurons.reset(model, [0], "init")
    with pytest.raises(ValueError, match=r"how must be one of 'zero', 'init', but it is 'one'"):
        neurons.reset(model, [0], "one")

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
