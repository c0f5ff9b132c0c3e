"""The networks: shapes, sizes, and weights that depend on the seed and on nothing else."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor, nn

from none_core.neurons import NeuronMap
from tasks import data, models

BUILDS = [
    ("mnist-cnn", (1, 28, 28), 10),
    ("mnist-cnn", (3, 32, 40), 7),
    ("cifar-cnn", (3, 32, 32), 10),
    ("cifar-cnn", (3, 64, 48), 43),
    ("cifar-cnn-bn", (3, 32, 32), 43),
    ("resnet18", (3, 32, 32), 10),
    ("resnet18", (1, 28, 28), 10),
    ("resnet18-small", (1, 28, 28), 10),
    ("resnet18-small", (3, 96, 96), 10),
    ("nin-bn", (3, 32, 32), 43),
    ("nin-small", (1, 28, 28), 10),
    ("nin-small-bn", (3, 32, 32), 43),
    ("nin-small", (3, 96, 96), 10),
    ("alexnet", (1, 28, 28), 10),
    ("vgg11", (3, 32, 32), 10),
    ("vgg11-bn", (1, 28, 28), 10),
    ("vgg11-small", (1, 28, 28), 10),
    ("vgg11-small", (3, 8, 8), 5),
    ("vgg16", (1, 28, 28), 10),
    ("vgg16-bn", (3, 32, 32), 10),
]
# Of the weights that seed 7 gives: results of other days stay comparable while these do not change.
DIGESTS = [
    ("mnist-cnn", (1, 28, 28), 10, "bc9fb2e2ac927c85"),
    ("cifar-cnn", (3, 32, 32), 10, "24080c3ff3aac5bb"),
    ("cifar-cnn-bn", (3, 32, 32), 43, "bf8833308ce48c5e"),
    ("resnet18", (3, 32, 32), 10, "ae25e661997cc8ca"),
    ("resnet18", (1, 96, 96), 10, "ff4bd10f81026ef8"),
]


@pytest.mark.parametrize(("name", "shape", "classes"), BUILDS)
def test_takes_images_and_returns_logits(name, shape, classes):
    model = models.build(name, shape, classes, seed=0)

    logits = model(torch.rand(2, *shape))

    assert logits.shape == (2, classes)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(("name", "shape", "classes"), BUILDS)
def test_seed_alone_fixes_the_weights(name, shape, classes):
    torch.manual_seed(1)
    first = models.build(name, shape, classes, seed=7).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = models.build(name, shape, classes, seed=7).state_dict()
    other = models.build(name, shape, classes, seed=8).state_dict()

    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("name", "shape", "classes", "digest"), DIGESTS)
def test_seeds_give_the_weights_that_they_always_gave(name, shape, classes, digest):
    state = models.build(name, shape, classes, seed=7).state_dict()

    found = hashlib.sha256()
    for key, tensor in state.items():
        found.update(key.encode() + tensor.contiguous().numpy().tobytes())

    assert found.hexdigest().startswith(digest)


@pytest.mark.parametrize(
    ("name", "shape"), [("alexnet", (3, 224, 224)), ("resnet18", (1, 224, 224))]
)
def test_large_images_go_through_torchvisions_own_stem_and_head(name, shape):
    from tasks.torchvision_import import torchvision

    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(num_classes=10)
    model = models.build(name, shape, 10, seed=0).eval()

    with torch.no_grad():
        logits = model(torch.rand(1, *shape))

    assert logits.shape == (1, 10)
    ours = {key: tensor.shape for key, tensor in model.state_dict().items()}
    different = {key for key, tensor in theirs.state_dict().items() if ours[key] != tensor.shape}
    assert len(ours) == len(theirs.state_dict())
    assert different == (set() if shape[0] == 3 else {"conv1.weight"})


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("number", [11, 16])
def test_vgg_is_torchvisions_up_to_its_head(number, batch_norm):
    from tasks.torchvision_import import torchvision

    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"vgg{number}{'_bn' * batch_norm}")().features
    model = models.build(f"vgg{number}{'-bn' * batch_norm}", (3, 32, 32), 10, seed=0)

    ours = {key: tensor.shape for key, tensor in model.features.state_dict().items()}
    assert ours == {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert model.classifier.weight.shape == (10, 512)


def test_nin_has_the_published_widths():
    model = models.build("nin", (3, 32, 32), 10, seed=0)

    widths = [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]

    assert widths == [192, 160, 96, 192, 192, 192, 192, 192, 10]
    assert sum(p.numel() for p in model.parameters()) == 966_986


@pytest.mark.parametrize("name", ["resnet18-small", "nin-small", "vgg11-small"])
def test_a_small_network_has_a_quarter_of_the_channels_everywhere(name):
    shape = (1, 28, 28)
    small, whole = (
        [
            (layer.in_channels, layer.out_channels)
            for layer in models.build(which, shape, 10, seed=0).modules()
            if isinstance(layer, nn.Conv2d)
        ]
        for which in (name, name.removesuffix("-small"))
    )

    assert small[0] == (1, whole[0][1] // 4)
    inner = slice(1, -1 if name == "nin-small" else None)  # whose last one is of the classes
    assert small[inner] == [(inputs // 4, outputs // 4) for inputs, outputs in whole[inner]]


def named(activation: str) -> str:
    return "leaky_relu" if activation == "leaky-relu" else activation


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
@pytest.mark.parametrize("name", ["mnist-cnn", "nin-small-bn", "vgg11-small", "resnet18-small"])
def test_an_activation_takes_the_place_of_every_rectifier_and_of_nothing_else(name, activation):
    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = models.build(name, (1, 16, 16), 3, seed=5)
    model = models.build(name, (1, 16, 16), 3, seed=5, activation=activation)

    traced = NeuronMap.trace(model.eval(), images[:1])
    model.train()
    logits = model(images)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()

    usual = NeuronMap.trace(plain.eval(), images[:1])
    assert [(la.name, la.size) for la in traced.layers] == [
        (la.name, la.size) for la in usual.layers
    ]
    assert {layer.activation for layer in traced.layers} == {named(activation)}
    state = model.state_dict()
    slopes = set(state) - set(plain.state_dict())
    assert bool(slopes) == (activation == "prelu")
    before = models.build(name, (1, 16, 16), 3, seed=5).state_dict()
    assert all(torch.equal(state[k], v) for k, v in before.items() if not is_statistic(k))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def is_statistic(key: str) -> bool:
    return "running_" in key or "num_batches" in key


@pytest.mark.parametrize(
    ("name", "neurons"),
    [("alexnet", 1152), ("nin-small", 352), ("vgg11-small", 688), ("resnet18-small", 976)],
)
def test_all_neurons_but_the_logits_are_found_and_can_be_reset(name, neurons):
    model = models.build(name, (3, 32, 32), 10, seed=0).eval()
    images = torch.rand(2, 3, 32, 32)

    found = NeuronMap.trace(model, images)
    before: Tensor = model(images)
    found.reset(model, range(neurons // 2), how="zero")

    assert found.size == neurons
    assert not torch.equal(model(images), before)


def test_dropout_draws_nothing_from_the_global_random_state():
    model = models.build("nin-small", (1, 16, 16), 10, seed=0).train()
    state = torch.get_rng_state()

    model(torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)))

    assert any(isinstance(layer, nn.Dropout) for layer in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["nin-small", "vgg11-small"])
def test_without_batch_normalisation_values_do_not_shrink_from_layer_to_layer(name):
    """Weights scaled by the number of outputs let them shrink to 0.1, and little is learned."""
    images = torch.rand(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    model = models.build(name, (1, 28, 28), 10, seed=0)
    sizes = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(
                lambda _, __, values: sizes.append(float(values.square().mean().sqrt()))
            )

    with torch.no_grad():
        model(images)

    assert len(sizes) > 7
    assert all(0.8 < size < 8 for size in sizes)


def test_unknown_activation_lists_the_legal_ones():
    with pytest.raises(ValueError, match="relu, leaky-relu, prelu, elu, softplus, tanhshrink"):
        models.build("mnist-cnn", (1, 28, 28), 10, seed=0, activation="swish")


def test_mnist_cnn_is_the_published_network():
    model = models.build("mnist-cnn", (1, 28, 28), 10, seed=0)

    parameters = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}

    assert parameters == {
        "conv1.weight": (20, 1, 5, 5),
        "conv1.bias": (20,),
        "conv2.weight": (50, 20, 5, 5),
        "conv2.bias": (50,),
        "fc1.weight": (500, 800),
        "fc1.bias": (500,),
        "fc2.weight": (10, 500),
        "fc2.bias": (10,),
    }


def test_pooling_before_the_rectifier_is_the_same_function():
    values = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pool, relu = nn.MaxPool2d(2), nn.ReLU()

    assert torch.equal(relu(pool(values)), pool(relu(values)))


def test_cifar_cnn_normalises_with_constants_that_are_not_sent():
    model = models.build("cifar-cnn", (3, 32, 32), 10, seed=0)
    mean = torch.tensor(models.CIFAR10_MEAN).view(1, 3, 1, 1).expand(2, 3, 32, 32)

    normalised = model.normalise(mean + 0.1)

    expected = (0.1 / torch.tensor(models.CIFAR10_STD)).view(1, 3, 1, 1)
    assert torch.allclose(normalised, expected.expand_as(normalised), atol=1e-6)
    assert not any(key.startswith("normalise") for key in model.state_dict())


@pytest.mark.parametrize(("side", "stride"), [(64, (1, 1)), (96, (2, 2))])
def test_resnet18_stem_follows_the_image_size(side, stride):
    model = models.build("resnet18", (3, side, side), 10, seed=0)

    assert model.conv1.stride == stride
    assert isinstance(model.maxpool, nn.Identity) == (stride == (1, 1))


def test_unknown_name_lists_the_legal_ones():
    with pytest.raises(ValueError, match="mnist-cnn, cifar-cnn, cifar-cnn-bn, resnet18"):
        models.build("vgg", (3, 32, 32), 10, seed=0)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mnist-cnn", (1, 15, 28)),
        ("cifar-cnn", (3, 32, 7)),
        ("cifar-cnn-bn", (1, 28, 28)),
        ("nin", (2, 32, 32)),
        ("vgg11-bn", (3, 7, 32)),
        ("alexnet", (4, 32, 32)),
    ],
)
def test_shape_that_does_not_fit_is_an_error(name, shape):
    with pytest.raises(ValueError, match="takes"):
        models.build(name, shape, 10, seed=0)


def test_every_data_set_has_a_default_model():
    assert set(models.DEFAULT_MODEL) == set(data.NAMES)
    assert set(models.DEFAULT_MODEL.values()) <= set(models.NAMES)


def test_as_input_scales_to_one_and_leaves_the_images_alone():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)

    got = models.as_input(nn.Linear(1, 1), images)

    assert torch.equal(got, torch.tensor([0.0, 0.2, 1.0]))
    assert images.tolist() == [0, 51, 255]
