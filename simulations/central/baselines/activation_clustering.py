"""Activation Clustering: a class that falls apart into a large and a small group is poisoned.

Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", SafeAI
at AAAI 2019, https://arxiv.org/abs/1811.03728. A network is trained on all images. For each label,
the activations of the last hidden layer are reduced by independent component analysis and split by
2-means. The paper offers three ways to judge the split; here it is the relative size together with
the silhouette score, as in the authors' own library (the Adversarial Robustness Toolbox,
``clustering_analyzer.py``, whose thresholds these are). The small group is left out, and a fresh
network is trained on the rest.

What differs: the paper's third way, retraining without a group to see what it is then taken for, is
not used. Principal components are taken before the independent ones, as whitening does anyway, so
that directions without any spread can be left out. In a network that ends in a convolution, the
last hidden layer's values are averaged over positions.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simulations.central.baselines.base import (
    CLUSTERING,
    TRAINING,
    Baseline,
    fit,
    over_batches,
    require,
    undefended,
)
from simulations.central.setting import Outcome, Setting

FloatArray = NDArray[np.float64]


def last_hidden(model: nn.Module, images: Tensor) -> FloatArray:
    """Give what the layer of the logits takes, for all images, in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
    images : Tensor
        uint8 (N, C, H, W).

    Returns
    -------
    ndarray
        (N, d).
    """
    latest: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        latest[:] = inputs[:1]

    def features(batch: Tensor) -> Tensor:
        model(batch)
        values = latest.pop()
        return values.flatten(2).mean(2) if values.ndim > 2 else values

    weighted = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    hooks = [module.register_forward_pre_hook(keep) for module in weighted]
    try:
        return over_batches(model, images, features).double().numpy()
    finally:
        for hook in hooks:
            hook.remove()


def reduced(activations: FloatArray, dimensions: int, seed: int) -> FloatArray:
    """Reduce activations to their independent components.

    Parameters
    ----------
    activations : ndarray
        (n, d), n >= 2.
    dimensions : int
        Most components to keep, >= 1; fewer if the activations spread in fewer directions.
    seed : int
        In [0, 2**32).

    Returns
    -------
    ndarray
        (n, m), m <= dimensions, each component of variance 1; m is 0 if all activations are equal.
    """
    from sklearn.decomposition import PCA, FastICA  # slow to import
    from sklearn.exceptions import ConvergenceWarning

    principal = PCA(min(dimensions, *activations.shape), random_state=seed)
    scores = principal.fit_transform(activations)
    spread = principal.explained_variance_
    scores = scores[:, spread > 1e-9 * max(spread.max(), 1e-9)]
    if not scores.shape[1]:
        return scores
    with warnings.catch_warnings():
        # Components that are not quite independent still separate the groups.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return FastICA(whiten="unit-variance", random_state=seed).fit_transform(scores)


def suspicious(
    points: FloatArray, *, largest_share: float, least_silhouette: float, seed: int
) -> NDArray[np.bool_]:
    """Split points in two, and find the group that does not belong.

    Parameters
    ----------
    points : ndarray
        (n, m).
    largest_share : float
        The smaller group is suspicious below this share of the points, ...
    least_silhouette : float
        ... if the silhouette score of the split is above this.
    seed : int
        In [0, 2**32).

    Returns
    -------
    ndarray of bool
        (n,); all False if the split is unsuspicious, or the points are all the same.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    nobody = np.zeros(len(points), dtype=bool)
    if len(np.unique(points, axis=0)) < 3:
        return nobody
    labels = KMeans(2, n_init=10, random_state=seed).fit_predict(points)
    small = labels == np.argmin(np.bincount(labels, minlength=2))
    if small.mean() >= largest_share or silhouette_score(points, labels) <= least_silhouette:
        return nobody
    return small


@dataclass(frozen=True)
class ActivationClustering(Baseline):
    """Leave out each label's suspicious group, and train anew.

    Attributes
    ----------
    dimensions : int
        Independent components, >= 1. Labels with no more images than that are not judged.
    largest_share : float
        See `suspicious`; in [0, 0.5].
    least_silhouette : float
        See `suspicious`; in [-1, 1].
    """

    dimensions: int = 10
    largest_share: float = 0.35
    least_silhouette: float = 0.1

    def validate(self) -> None:
        """Check the fields."""
        require(self.dimensions >= 1, "dimensions", self.dimensions, ">= 1")
        require(0 <= self.largest_share <= 0.5, "largest_share", self.largest_share, "in [0, 0.5]")
        require(
            -1 <= self.least_silhouette <= 1,
            "least_silhouette",
            self.least_silhouette,
            "in [-1, 1]",
        )

    def train(self, setting: Setting) -> Outcome:
        """Train, find the poisoned images, and train anew without them."""
        dropped = self.poisoned(undefended(setting), setting)
        kept = torch.ones(len(setting.images), dtype=torch.bool)
        kept[torch.from_numpy(dropped)] = False
        images, labels = setting.images[kept], setting.labels[kept]
        order = setting.generator(TRAINING)
        return Outcome(fit(setting.model_fn(), images, labels, setting.schedule, order), dropped)

    def poisoned(self, model: nn.Module, setting: Setting) -> NDArray[np.int64]:
        """Find the training images, ascending, that a trained network shows to be poisoned."""
        seed = setting.generator(CLUSTERING).initial_seed() % 2**32
        activations, labels = last_hidden(model, setting.images), setting.labels.numpy()
        found: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            if len(members) > self.dimensions:
                small = suspicious(
                    reduced(activations[members], self.dimensions, seed),
                    largest_share=self.largest_share,
                    least_silhouette=self.least_silhouette,
                    seed=seed,
                )
                found.append(members[small])
        return np.sort(np.concatenate(found))
