"""Embeddings that a fitted classifier gives: features of its network, or log probabilities."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.utils.data import DataLoader, Dataset

from uq.errors import DataError, ParameterError
from uq.inference.abnn import ABNNPosterior
from uq.inference.implicit_vi import ImplicitPosterior
from uq.inference.pbnn import PartialPosterior
from uq.inference.posterior import (
    LastLayerPosterior,
    MixturePosterior,
    Posterior,
    WeightPosterior,
    Weights,
)
from uq.inference.ssvi_posterior import SparsePosterior
from uq.nn.network import Network
from uq.nn.sdm import FeatureNetwork

_SMALLEST_P = 1e-12
_ROWS = 1024


def embeddings(base: Any, X: Any, layer: str | None = None) -> np.ndarray:
    """Embed the rows of ``X`` by a fitted classifier.

    Parameters
    ----------
    base : classifier
        An estimator of uq, of which the network's features are taken, or any other, of which the
        log probabilities or decision values are.
    X : array-like
        What its ``predict`` takes.
    layer : str, optional
        Submodule of the network whose output is taken, or "penultimate". By default the features
        before a Bayesian last layer, and what enters the last linear layer of other networks.

    Returns
    -------
    ndarray of shape (n, D)

    Raises
    ------
    NotFittedError
        If ``base`` is not fitted.
    ParameterError
        If there is no such layer.
    """
    if isinstance(base, FrozenEstimator):
        base = base.estimator
    check_is_fitted(base)
    if isinstance(X, Dataset | DataLoader):
        raise DataError(
            "SDMClassifier: with a classifier as base, X must be what its predict takes, not a "
            f"{type(X).__name__}."
        )
    posterior = getattr(base, "posterior_", None)
    if isinstance(posterior, Posterior) and (network := _network_of(posterior)) is not None:
        x, _ = base._posterior_at(X)
        if layer is None and not isinstance(posterior, LastLayerPosterior):
            layer = "penultimate"
        features = FeatureNetwork(copy.deepcopy(network), layer).eval()
        with torch.no_grad():
            found: np.ndarray = torch.cat([features(rows) for rows in x.split(_ROWS)]).cpu().numpy()
        return found
    if layer is not None:
        raise ParameterError(
            f"SDMClassifier: layer needs a base with a network, got a {type(base).__name__}."
        )
    return _log_probabilities(base, X)


def _network_of(posterior: Posterior) -> nn.Module | None:
    """The network behind a posterior: at its mean, of its first member, or at one draw."""
    if isinstance(posterior, MixturePosterior):
        return posterior.members[0].network.body
    if isinstance(posterior, SparsePosterior):
        return posterior.to_dense().network.body
    if isinstance(posterior, ABNNPosterior):
        return _with_first(posterior.network, posterior.members).body
    if isinstance(posterior, ImplicitPosterior | PartialPosterior):
        draw = posterior.sampler(1, posterior.generator(posterior.seed.device))
        return _with_first(posterior.network, draw(1)).body
    if isinstance(posterior, WeightPosterior):
        return posterior.network.body
    if isinstance(posterior, LastLayerPosterior):
        return posterior.body
    return None


def _with_first(network: Network, weights: Weights) -> Network:
    """Copy of a network that does not itself hold its weights, with the first of those given."""
    network = copy.deepcopy(network)
    network.load_state_dict({name: w[0] for name, w in weights.items()}, strict=False)
    return network


def _log_probabilities(base: Any, X: Any) -> np.ndarray:
    """Centred log probabilities, or decision values of a classifier without probabilities."""
    if hasattr(base, "predict_proba"):
        p = np.clip(np.asarray(base.predict_proba(X), dtype=np.float64), _SMALLEST_P, 1)
        log_p: np.ndarray = np.log(p) - np.log(p).mean(1, keepdims=True)
        return log_p
    if hasattr(base, "decision_function"):
        values = np.asarray(base.decision_function(X), dtype=np.float64)
        return values.reshape(len(values), -1)
    raise ParameterError(
        f"SDMClassifier: base must have predict_proba or decision_function; a "
        f"{type(base).__name__} has neither."
    )
