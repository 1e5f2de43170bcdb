"""Bayesian last layers on frozen features: any trained network, one pass, no gradient step.

The rows enter sums of products (:mod:`uq.nn.vbll_statistics`) in memory O(D²), whatever their
number and order, and the head is set to the exact posterior given these sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from uq.inference.posterior import LastLayerPosterior
from uq.nn.vbll import BayesianLastLayer


def sum_features(
    posterior: LastLayerPosterior, batches: Iterable[Sequence[Tensor]], statistics: Any
) -> None:
    """Add the features of all batches (x, y) or (x, y, weight) to ``statistics``."""
    device = posterior.head.prior_variance.device
    for x, y, *weight in batches:
        features = posterior.features(x.to(device))
        statistics.add(features, y.to(device), *(w.to(device) for w in weight))


def post_train(
    body: nn.Module,
    head: BayesianLastLayer,
    batches: Iterable[Sequence[Tensor]],
    *,
    seed: int = 0,
) -> LastLayerPosterior:
    """Find the last layer of a trained network in closed form, in one pass over the data.

    Parameters
    ----------
    body : Module
        Maps a batch to features (n, D). Used in eval mode; its weights are not changed.
    head : BayesianLastLayer
        :class:`uq.nn.VBLLRegression`, :class:`uq.nn.VBLLStudentTRegression` or
        :class:`uq.nn.VBLLGenerativeClassification` on D features; changed in place. Its
        ``prior_variance`` should fit the size of the features: the prior variance of the mean is
        E‖φ‖² times it.
    batches : iterable of (x, y) or (x, y, weight)
        A DataLoader, say. Targets (n, K) in units in which they are about 1 in size, or class
        positions (n,); weights count rows.
    seed : int, default=0
        Seed of the draws that predictions use.

    Returns
    -------
    LastLayerPosterior
        Callable on inputs; ``posterior.head.update(posterior.features(x), y)`` adds rows.

    Raises
    ------
    ParameterError
        If the head has no closed form.
    DataError
        If there are no rows, or they hold NaN or infinity.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import post_train
    >>> from uq.nn import VBLLRegression
    >>> x = torch.randn(100, 3)
    >>> y = x[:, :1].sin()
    >>> body = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.Tanh())
    >>> posterior = post_train(body, VBLLRegression(32), zip(x.split(25), y.split(25)))
    >>> posterior(x[:2]).batch_shape
    torch.Size([2, 1])
    """
    posterior = LastLayerPosterior(body, head, seed)
    statistics = head.statistics()
    sum_features(posterior, batches, statistics)
    head.fit_statistics(statistics)
    return posterior.eval()
