"""The functions that a network's neurons may go through, each chosen by name.

Networks are built with rectifiers, and `exchange` puts another function in their place. So no
network has to know of it, and a seed gives the same weights whatever the function. A module keeps
the name that it has: `relu1` may be an ELU.

The six are those of Wang et al., "Training with More Confidence: Mitigating Injected and Natural
Backdoors During Training", NeurIPS 2022, with torch's own constants. All of them rise with their
input (PReLU while its learned slopes are positive), so that maximum pooling may come before or
after them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

_MAKERS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "tanhshrink": nn.Tanhshrink,
}
ACTIVATIONS = tuple(_MAKERS)


def check(activation: str) -> None:
    """Raise ValueError unless it is one of `ACTIVATIONS`."""
    if activation not in _MAKERS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def exchange(model: nn.Module, activation: str) -> None:
    """Put an activation function in the place of every rectifier of a model.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place; with "relu" it stays as it is.
    activation : str
        One of `ACTIVATIONS`.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    check(activation)
    if activation == "relu":
        return
    rectifiers = [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    for name in rectifiers:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, _MAKERS[activation]())
