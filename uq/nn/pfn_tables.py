"""Sizes of a prior-data fitted network, and how tables become its inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from uq.errors import ParameterError

# Bounds on what a file may ask for: far above any sensible network, far below exhausted memory.
LIMITS = {
    "max_features": 4096,
    "n_outputs": 65536,
    "d_model": 8192,
    "n_layers": 256,
    "n_heads": 512,
    "d_ff": 65536,
    "context_tokens": 4096,
}


@dataclass(frozen=True)
class PFNConfig:
    """Sizes of a :class:`PFN` and how its inputs are prepared.

    Attributes
    ----------
    task : {"regression", "classification"}
        Bars over the target, or class probabilities.
    max_features : int
        Columns of the widest table; narrower ones are padded with zeros.
    n_outputs : int
        Number of bars K, or the largest number of classes.
    d_model : int
        Width of a token. 64 trains in minutes on a CPU.
    n_layers, n_heads, d_ff : int
        Blocks, attention heads (a divisor of ``d_model``) and hidden units of the MLPs.
    context_tokens : int
        Learned context rows; 0 gives a network that cannot count.
    scaled : bool
        True: features and targets are standardised with statistics of the context, and columns are
        put in the order of their association with the target (:func:`preprocess`). False: the
        prior has a scale of its own (a GP with fixed hyper-parameters); features lie in [0, 1] and
        targets are taken as they are.

    Examples
    --------
    >>> from uq.nn import PFN, PFNConfig
    >>> config = PFNConfig("classification", max_features=5, n_outputs=3, d_model=16, n_layers=2)
    >>> sum(p.numel() for p in PFN(config).parameters())
    13643
    """

    task: Literal["regression", "classification"]
    max_features: int
    n_outputs: int
    d_model: int = 64
    n_layers: int = 6
    n_heads: int = 4
    d_ff: int = 128
    context_tokens: int = 1
    scaled: bool = True

    def __post_init__(self) -> None:
        if self.task not in ("regression", "classification"):
            raise ParameterError(
                f"PFNConfig: task must be 'regression' or 'classification', got {self.task!r}."
            )
        for name, limit in LIMITS.items():
            value, least = getattr(self, name), 0 if name == "context_tokens" else 1
            if type(value) is not int or not least <= value <= limit:
                raise ParameterError(
                    f"PFNConfig: {name} must be a whole number from {least} to {limit}, "
                    f"got {value!r}."
                )
        if type(self.scaled) is not bool:
            raise ParameterError(f"PFNConfig: scaled must be True or False, got {self.scaled!r}.")
        if self.d_model % self.n_heads:
            raise ParameterError(
                f"PFNConfig: n_heads={self.n_heads} does not divide d_model={self.d_model}."
            )
        if self.n_outputs < 2:
            raise ParameterError(f"PFNConfig: n_outputs must be at least 2, got {self.n_outputs}.")


@dataclass(frozen=True)
class PFNScaling:
    """Statistics of contexts, and how to apply them to later rows.

    A network of rows reads columns by position, and would have to learn that their order and signs
    mean nothing. Here they are made to mean something: columns come in the order of their
    association with the target in the context, the strongest first, and for regression with the
    sign that makes the correlation positive. Predictions are then exactly invariant to the order of
    the columns, and for regression to their signs.

    Attributes
    ----------
    x_mean, x_scale : Tensor of shape (B, 1, d)
        Mean and standard deviation of each column.
    used : Tensor of shape (B, 1, d)
        Whether a column varies in the context; others become 0.
    order : Tensor of shape (B, 1, d)
        Column at each position.
    sign : Tensor of shape (B, 1, d)
        Factor ±1 of each column.
    y_mean, y_scale : Tensor of shape (B, 1)
        Of the target; the scale of a constant target is 1.
    config : PFNConfig
        Of the network that the rows are for.
    """

    x_mean: Tensor
    x_scale: Tensor
    used: Tensor
    order: Tensor
    sign: Tensor
    y_mean: Tensor
    y_scale: Tensor
    config: PFNConfig

    @classmethod
    def fit(
        cls, X: Tensor, y: Tensor, config: PFNConfig, weight: Tensor | None = None
    ) -> PFNScaling:
        """Take the statistics of contexts X (B, n, d), NaN where missing, and y (B, n).

        ``weight`` (B, n) counts rows as often as it says.
        """
        if X.ndim != 3 or y.shape != X.shape[:2]:
            raise ParameterError(
                f"PFN: contexts must have the shapes (B, n, d) and (B, n), got {tuple(X.shape)} "
                f"and {tuple(y.shape)}."
            )
        B, n, d = X.shape
        if d > config.max_features:
            raise ParameterError(
                f"PFN: {d} features, but the network has {config.max_features}; take a subset or "
                "a projection of the columns."
            )
        one = X.new_ones(B, 1, d)
        order = torch.arange(d, device=X.device).expand(B, 1, d)
        y_mean, y_scale = X.new_zeros(B, 1), X.new_ones(B, 1)
        if not config.scaled:
            # A uniform variable on [0, 1] has mean 1/2 and variance 1/12.
            x_mean, x_scale = 0.5 * one, one / math.sqrt(12)
            return cls(x_mean, x_scale, one.bool(), order, one, y_mean, y_scale, config)
        known = ~X.isnan()
        w = X.new_ones(B, n) if weight is None else weight.to(X.dtype)
        total = w.sum(1, keepdim=True)
        count = (known * w[..., None]).sum(1, keepdim=True)
        count = torch.where(count > 0, count, 1.0)
        mean = (torch.where(known, X, 0.0) * w[..., None]).sum(1, keepdim=True) / count
        away = torch.where(known, X - mean, 0.0)
        sd = ((away.square() * w[..., None]).sum(1, keepdim=True) / count).sqrt()
        # Rounding leaves a constant column a spread of some ulps of its size.
        used = sd > 16 * torch.finfo(X.dtype).eps * mean.abs()
        if config.task == "regression" and n:
            y = y.to(X.dtype)
            y_mean = (y * w).sum(1, keepdim=True) / total
            spread = (((y - y_mean).square() * w).sum(1, keepdim=True) / total).sqrt()
            varies = spread > 16 * torch.finfo(X.dtype).eps * y_mean.abs()
            y_scale = torch.where(varies, spread, 1.0)
        sd = torch.where(used, sd, 1.0)
        sign = one
        if n:
            z = torch.where(used & known, (X - mean) / sd, 0.0)
            if config.task == "regression":
                both = z * (w * (y - y_mean) / y_scale)[..., None]
                correlation = both.sum(1, keepdim=True) / total[..., None]
                sign = torch.where(correlation < 0, -1.0, one)
                strength = correlation.abs()
            else:  # variance between the classes
                member = F.one_hot(y.long(), config.n_outputs) * w[..., None]
                size = member.sum(1)[..., None]
                sums = member.transpose(1, 2) @ z
                between = sums.square() / torch.where(size > 0, size, 1.0)
                strength = (between.sum(1, keepdim=True) / total[..., None]).sqrt()
            # Rounded, so that the order of the rows cannot decide between columns that tie.
            strength = torch.where(used, strength.mul(1e4).round(), -1.0)
            order = strength.argsort(dim=-1, descending=True, stable=True)
        return cls(mean, sd, used, order, sign, y_mean, y_scale, config)

    def features(self, X: Tensor) -> Tensor:
        """Network inputs (B, rows, 2 * max_features) of rows X (B, rows, d).

        Standardised and ordered, 0 where missing or constant in the context; then the indicators of
        missing values. Values beyond 4 standard deviations grow with their logarithm only. Used
        columns are scaled by √(max_features / used), so that the size of a row does not depend on
        how many there are.
        """
        width = self.config.max_features
        missing = X.isnan() & self.used
        z = (X - self.x_mean) / self.x_scale * self.sign
        z = torch.where(self.used & ~missing, z, 0.0)
        if self.config.scaled:
            size = z.abs()
            z = torch.where(size > 4, z.sign() * (4 + (size - 3).clamp_min(1).log()), z)
        factor = (width / self.used.sum(-1, keepdim=True).clamp_min(1).to(z.dtype)).sqrt()
        where = self.order.expand(X.shape)
        z, missing = z.gather(-1, where), missing.gather(-1, where)
        pad = (0, width - X.shape[-1])
        return torch.cat([F.pad(z * factor, pad), F.pad(missing.to(z.dtype), pad)], -1)

    def targets(self, y: Tensor) -> Tensor:
        """Targets (B, rows) in the units of the network; class positions as they are."""
        if self.config.task == "classification":
            return y
        return (y.to(self.y_mean.dtype) - self.y_mean) / self.y_scale


def preprocess(
    X_context: Tensor, y_context: Tensor, X_query: Tensor, config: PFNConfig
) -> tuple[Tensor, Tensor, Tensor, PFNScaling]:
    """Prepare tables for a network with statistics of their contexts alone.

    Parameters
    ----------
    X_context : Tensor of shape (B, n, d)
        Features, NaN where missing, at most ``config.max_features`` columns.
    y_context : Tensor of shape (B, n)
        Targets, or class positions.
    X_query : Tensor of shape (B, m, d)
        Rows to predict.
    config : PFNConfig
        Of the network.

    Returns
    -------
    X_context, y_context, X_query : Tensor
        Arguments of :meth:`PFN.forward`.
    scaling : PFNScaling
        To prepare later queries, and to map predictions back: y = y_mean + y_scale · z.

    Raises
    ------
    ParameterError
        If the shapes do not fit, or there are more columns than the network has.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import PFNConfig, preprocess
    >>> config = PFNConfig("regression", max_features=3, n_outputs=10)
    >>> X = torch.tensor([[[0.0, 5.0], [1.0, 5.0], [2.0, 5.0]]])  # one table: 3 rows, 2 columns
    >>> Xc, yc, Xq, scaling = preprocess(X, torch.tensor([[10.0, 20.0, 30.0]]), X[:, :1], config)
    >>> Xc.shape, Xq.shape  # padded to 3 columns; as many say which cells are there
    (torch.Size([1, 3, 6]), torch.Size([1, 1, 6]))
    >>> scaling.y_mean + scaling.y_scale * yc  # back in the units of the target
    tensor([[10., 20., 30.]])
    """
    scaling = PFNScaling.fit(X_context, y_context, config)
    return (
        scaling.features(X_context),
        scaling.targets(y_context),
        scaling.features(X_query),
        scaling,
    )
