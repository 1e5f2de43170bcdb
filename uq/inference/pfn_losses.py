"""Losses of prior-data fitted networks, and those of the exact posterior they aim at."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from uq.distributions.bar import BarDistribution, bar_loss
from uq.inference.pfn_priors import GPPrior, rbf_covariance
from uq.nn.pfn import PFN, preprocess


def query_loss(
    model: PFN,
    X: Tensor,
    y: Tensor,
    n: int,
    *,
    autocast: AbstractContextManager[None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of the rows after the first ``n``, given these, in nats.

    Parameters
    ----------
    model : PFN
        Network.
    X : Tensor of shape (B, n + m, d)
        Raw features of B data sets, NaN where missing.
    y : Tensor of shape (B, n + m)
        Targets, or class positions. For a scaled network classes are recoded by those of the
        context, and queries of others, which no method could name, do not count.
    n : int
        Rows of the context.
    autocast : context manager, optional
        Precision of the network's forward.

    Returns
    -------
    loss : Tensor of shape (B, m)
        −log q(y | x, D); 0 where the query does not count. For a network with scaled targets, in
        the units of the standardised target.
    counts : Tensor of shape (B, m)
        Whether a query counts.
    """
    config = model.config
    present = None
    if config.task == "classification":
        # A prior with a scale of its own has classes of its own, too: nothing is recoded.
        y, present = dense_labels(y, n if config.scaled else 0, config.n_outputs)
    Xc, yc, Xq, scaling = preprocess(X[:, :n], y[:, :n], X[:, n:], config)
    with autocast or nullcontext():
        logits = model(Xc, yc, Xq)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    target = scaling.targets(y[:, n:])
    if present is None:
        assert model.borders is not None
        borders = model.borders.to(logits.dtype)
        loss = bar_loss(logits, borders, target.to(logits.dtype))
        return loss, torch.ones_like(loss, dtype=torch.bool)
    logits = logits.masked_fill(~present[:, None, :], -math.inf)
    loss = F.cross_entropy(logits.transpose(1, 2), target, reduction="none", ignore_index=-100)
    return loss, target >= 0


def dense_labels(y: Tensor, n: int, n_classes: int) -> tuple[Tensor, Tensor]:
    """Recode labels as 0, 1, … by the classes of the context, as an estimator does.

    Returns
    -------
    codes : Tensor of shape (B, n + m)
        −100 for queries of a class that the context does not have.
    present : Tensor of shape (B, n_classes)
        Which codes are in use; all of them without a context.
    """
    seen = torch.zeros(len(y), n_classes, dtype=torch.bool, device=y.device)
    seen.scatter_(1, y[:, :n], True)
    if n == 0:
        seen[:] = True
    codes = torch.where(seen, seen.cumsum(1) - 1, -100)
    count = seen.sum(1, keepdim=True)
    return codes.gather(1, y), torch.arange(n_classes, device=y.device) < count


def exact_gp_loss(prior: GPPrior, X: Tensor, y: Tensor, n: int) -> Tensor:
    """−log p(y | x, D) of the rows after the first ``n`` under the exact posterior of a GP prior.

    Parameters
    ----------
    prior : GPPrior
        Gaussian process with known hyper-parameters.
    X : Tensor of shape (B, n + m, d)
        Inputs.
    y : Tensor of shape (B, n + m)
        Noisy values.
    n : int
        Rows of the context.

    Returns
    -------
    Tensor of shape (B, m)
        float64, in nats.
    """
    mean, variance = exact_gp(prior, X, y, n)
    z = (y[:, n:].double() - mean).square() / variance
    return 0.5 * (z + variance.log() + math.log(2 * math.pi))


def exact_gp(prior: GPPrior, X: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, m) of new noisy values; arguments as for :func:`exact_gp_loss`."""
    X, y = X.double(), y.double()
    K = rbf_covariance(X, prior.lengthscale)
    noisy = K[:, :n, :n] + prior.noise_variance * torch.eye(n, dtype=K.dtype, device=K.device)
    factor = torch.linalg.cholesky(noisy)
    cross = torch.linalg.solve_triangular(factor, K[:, :n, n:], upper=False)
    white = torch.linalg.solve_triangular(factor, y[:, :n, None], upper=False)
    mean = (cross * white).sum(1)
    variance = 1 + prior.noise_variance - cross.square().sum(1)
    return mean, variance


@dataclass(frozen=True)
class GPGap:
    """How far a network is from the exact posterior of its prior, at one context size.

    Attributes
    ----------
    n : int
        Rows of the context.
    exact : float
        Mean −log p of the exact posterior, in nats.
    gap : float
        Mean of the network's −log q less the exact one on the same queries: an unbiased estimate of
        the expected Kullback-Leibler divergence.
    standard_error : float
        Of ``gap``, over data sets.
    mean_error : float
        Root mean square of (network's mean − exact mean) / exact standard deviation.
    variance_ratio : float
        Mean of the network's variance over the exact one.
    coverage : float
        Share of targets in the network's central 90 % intervals.
    """

    n: int
    exact: float
    gap: float
    standard_error: float
    mean_error: float
    variance_ratio: float
    coverage: float


@torch.no_grad()
def gp_gap(
    model: PFN,
    prior: GPPrior,
    n: int,
    *,
    n_sets: int = 1000,
    n_queries: int = 8,
    random_state: int = 0,
    batch: int = 250,
) -> GPGap:
    """Compare a network with the exact posterior of the GP prior that it was trained on.

    Parameters
    ----------
    model : PFN
        Network, trained on ``prior``.
    prior : GPPrior
        Gaussian process with known hyper-parameters.
    n : int
        Rows of the context.
    n_sets, n_queries : int
        Fresh data sets, and queries of each.
    random_state : int, default=0
        Seed of the data sets.
    batch : int, default=250
        Data sets at a time.

    Returns
    -------
    GPGap
        Paired on the same queries.
    """
    assert model.borders is not None
    generator = torch.Generator().manual_seed(random_state)
    gaps, exacts, errors, ratios, hits = [], [], [], [], []
    d = model.config.max_features
    for start in range(0, n_sets, batch):
        size = min(batch, n_sets - start)
        X, y = prior(size, n + n_queries, min(d, prior.max_features), generator)
        exact = exact_gp_loss(prior, X, y, n)
        mean, variance = exact_gp(prior, X, y, n)
        Xc, yc, Xq, _ = preprocess(X[:, :n], y[:, :n], X[:, n:], model.config)
        bars = BarDistribution(model(Xc, yc, Xq).double(), model.borders)
        target = y[:, n:].double()
        gaps.append((-bars.log_prob(target) - exact).mean(1))
        exacts.append(exact.mean(1))
        errors.append(((bars.mean - mean).square() / variance).mean(1))
        ratios.append((bars.variance / variance).mean(1))
        u = bars.cdf(target)
        hits.append(((u > 0.05) & (u < 0.95)).double().mean(1))
    gap = torch.cat(gaps)
    return GPGap(
        n=n,
        exact=float(torch.cat(exacts).mean()),
        gap=float(gap.mean()),
        standard_error=float(gap.std()) / math.sqrt(len(gap)),
        mean_error=math.sqrt(float(torch.cat(errors).mean())),
        variance_ratio=float(torch.cat(ratios).mean()),
        coverage=float(torch.cat(hits).mean()),
    )
