"""SSVI: mean-field variational inference in a sparse subspace that moves.

J. Li et al., "Training Bayesian Neural Networks with Sparse Subspace Variational Inference",
ICLR 2024, arXiv 2402.11025. Minimises, over φ = (μ, σ) and the set of s active weights,

    −E_q[log p(D | θ)]/N + (τ β / N) KL(q ‖ p),    q as in :mod:`uq.nn.ssvi`,

by gradient steps on φ and, every ΔT steps, an exchange of the active set (Algorithm 1): the
share r_t of each layer's active weights with the lowest score of q is removed, and as many
inactive weights with the largest |∂L/∂μ| are added, where

    r_t = (α/2) (1 + cos(π t / T_end)),    no exchange from T_end on.

The gradient that adds weights is taken with the removed ones at zero. Taken before the removal, as
the authors' code has it, a removed weight at its optimum has gradient zero and cannot come back,
so that even the best set of weights would not stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from uq.errors import ParameterError
from uq.nn.ssvi import SparseGaussian, SparseGaussianLayer, sparse_weights
from uq.nn.ssvi_compact import CompactLayer

CRITERIA = ("snr", "snr_abs", "mean", "mean_abs", "exp_abs", "snr_exp_abs", "random")
GROW_GRADS = ("post", "pre")

# Beyond it SNR(|θ|) equals |μ|/σ in double precision.
_FOLDED_LIMIT = 8.0


# -- scores: which active weights matter -------------------------------------------------------


def removal_score(criterion: str, mean: Tensor, std: Tensor) -> Tensor:
    """Score active weights; those with the lowest are removed.

    Parameters
    ----------
    criterion : str
        "snr": |μ|/σ. "mean": |μ|. "mean_abs": E|θ|. "snr_abs": E|θ|/sd|θ|. "exp_abs": log E e^|θ|.
        "snr_exp_abs": log of E e^|θ| / sd e^|θ|. "random": uniform noise, a control.
    mean, std : Tensor
        Of the active weights.

    Returns
    -------
    Tensor
        In float64.

    Notes
    -----
    "snr_abs" is a strictly increasing function of |μ|/σ, equal to 1.3236 at 0 with three
    derivatives of zero there, so that rounding hides the order of weights with |μ|/σ below 1e-4:
    :class:`SSVI` orders by |μ|/σ for both.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import removal_score
    >>> removal_score("snr", torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0]))  # the second goes
    tensor([2.0000, 0.5000], dtype=torch.float64)
    """
    mean, std = mean.double(), std.double()
    if criterion == "snr":
        return mean.abs() / std
    if criterion == "mean":
        return mean.abs()
    if criterion == "mean_abs":
        return torch.where(std > 0, std * _folded_mean(mean.abs() / std), mean.abs())
    if criterion == "snr_abs":
        r = mean.abs() / std
        small = r.clamp(max=_FOLDED_LIMIT)
        folded = _folded_mean(small)
        value = folded / (small.square() + 1 - folded.square()).sqrt()
        return torch.where(r > _FOLDED_LIMIT, r, value)
    if criterion == "exp_abs":
        return _log_mean_exp_abs(mean, std, 1.0)
    if criterion == "snr_exp_abs":
        once, twice = _log_mean_exp_abs(mean, std, 1.0), _log_mean_exp_abs(mean, std, 2.0)
        # log sd = ½ log(G(2) − G(1)²)
        gap = (2 * once - twice).clamp(max=-torch.finfo(mean.dtype).tiny)
        return once - 0.5 * (twice + torch.log(-torch.expm1(gap)))
    if criterion == "random":
        return torch.rand_like(mean)
    raise ParameterError(
        f"SSVI: criterion must be one of {', '.join(map(repr, CRITERIA))}, got {criterion!r}."
    )


def _folded_mean(r: Tensor) -> Tensor:
    """E|z + r| for standard normal z."""
    density = math.sqrt(2 / math.pi) * (-0.5 * r.square()).exp()
    return r * torch.erf(r / math.sqrt(2)) + density


def _log_mean_exp_abs(mean: Tensor, std: Tensor, rate: float) -> Tensor:
    """log E exp(rate |θ|) for θ ~ N(mean, std²)."""
    shift, r = rate * std, mean / std
    sides = [s * rate * mean + torch.special.log_ndtr(s * r + shift) for s in (1.0, -1.0)]
    return 0.5 * shift.square() + torch.logaddexp(*sides)


def replaced_share(t: int, t_end: float, share: float) -> float:
    """Share r_t of the active weights that the exchange at step ``t`` replaces."""
    return 0.5 * share * (1 + math.cos(math.pi * t / t_end)) if t < t_end else 0.0


def kl_warmup(done: float, total: float, share: float = 0.5) -> float:
    """Weight β of the KL after ``done`` of ``total`` epochs: linear to 1 at ``share`` of them."""
    return 1.0 if share == 0 else min(1.0, done / (share * total))


# -- the optimizer -----------------------------------------------------------------------------


class SSVI(Optimizer):
    """An optimizer, and every so many steps an exchange of active weights in place of its step.

    Parameters
    ----------
    module : Module
        Holds the sparse weights (:func:`uq.nn.ssvi.sparsify`, or a Pyro guide of
        :class:`uq.inference.SparseNormalGuide`).
    base : Optimizer
        Takes the gradient steps: any torch optimizer over the module's parameters. Its state for
        a removed weight (momentum, second moment) is cleared.
    n_steps : int
        Steps of the whole run.
    update_every : int, default=100
        ΔT, steps from one exchange to the next. Below about 20 new weights are judged before they
        have moved.
    replace : float, default=0.3
        α, share of the active weights that the first exchanges replace; 0 keeps the initial set.
    stop : float, default=0.75
        Share of the run after which the active set stays.
    criterion : str, default="snr"
        See :func:`removal_score`.
    grow_grad : {"post", "pre"}, default="post"
        Gradient that adds weights: with the removed ones at zero, or with all that were active.

    Raises
    ------
    ParameterError
        For a value out of its range, a module without sparse weights, or a ``base`` that lacks
        some of them.

    Notes
    -----
    ``step`` needs a closure that clears gradients, evaluates the loss at the current batch and
    calls ``backward``. It is called once a step, exchanges included. An exchange changes no
    parameter of a weight that stays. New weights start at mean 0 with the layer's mean ρ.

    The number to replace is rounded down, so that fewer than 1/α active weights of a layer (four by
    default) never change.

    The loss is a mean over rows in nats; the KL enters divided by the number of rows.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from uq.inference import SSVI
    >>> from uq.nn.ssvi import sparse_kl, sparsify
    >>> x = torch.randn(200, 30)
    >>> y = x[:, :1] - 2 * x[:, 1:2]
    >>> net = sparsify(nn.Linear(30, 1), density=0.2)
    >>> opt = SSVI(net, torch.optim.Adam(net.parameters(), 0.05), n_steps=300, update_every=20)
    >>> def closure():
    ...     opt.zero_grad()
    ...     loss = 50 * (net(x) - y).square().mean() + sparse_kl(net) / len(x)
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(300):
    ...     _ = opt.step(closure)
    >>> net.weight.index.tolist()[:2], net.weight.n_active
    ([0, 1], 6)
    """

    def __init__(
        self,
        module: nn.Module,
        base: Optimizer,
        *,
        n_steps: int,
        update_every: int = 100,
        replace: float = 0.3,
        stop: float = 0.75,
        criterion: str = "snr",
        grow_grad: str = "post",
    ) -> None:
        for name, whole in (("n_steps", n_steps), ("update_every", update_every)):
            if not isinstance(whole, int) or whole < 1:
                raise ParameterError(f"SSVI: {name} must be an integer >= 1, got {whole!r}.")
        for name, share in (("replace", replace), ("stop", stop)):
            if not 0 <= share <= 1:
                raise ParameterError(f"SSVI: {name} must be a number in [0, 1], got {share!r}.")
        for name, choice, known in (
            ("criterion", criterion, CRITERIA),
            ("grow_grad", grow_grad, GROW_GRADS),
        ):
            if choice not in known:
                raise ParameterError(
                    f"SSVI: {name} must be one of {', '.join(map(repr, known))}, got {choice!r}."
                )
        weights = sparse_weights(module)
        if not weights:
            raise ParameterError("SSVI: module has no sparse weights; make them by sparsify().")
        held = {id(p) for group in base.param_groups for p in group["params"]}
        for name, weight in weights.items():
            if id(weight.mean) not in held or id(weight.rho) not in held:
                raise ParameterError(
                    f"SSVI: base does not optimise {name!r}; build it over module.parameters()."
                )
        super().__init__(base.param_groups, {})
        # One set of groups and one state, whichever of the two is asked.
        self.param_groups, self.state = base.param_groups, base.state
        self.base = base
        self.weights: list[SparseGaussian] = [w for w in weights.values() if w.n_active < w.n]
        self.t_end: float = stop * n_steps
        self.update_every: int = update_every
        self.replace: float = replace
        self.criterion: str = criterion
        self.grow_grad: str = grow_grad
        self.t: int = 0
        self.n_updates: int = 0

    def state_dict(self) -> dict[str, Any]:
        """State of the base optimizer and the step count; positions are the module's."""
        return {"base": self.base.state_dict(), "t": self.t, "n_updates": self.n_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state of :meth:`state_dict`."""
        self.base.load_state_dict(state_dict["base"])
        self.param_groups, self.state = self.base.param_groups, self.base.state
        self.t, self.n_updates = state_dict["t"], state_dict["n_updates"]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a gradient step, or exchange active weights; return the loss of the closure.

        An exchange that would replace no weight is an ordinary step.
        """
        if closure is None:
            raise ParameterError("SSVI.step needs a closure that evaluates the loss.")
        self.t += 1
        if self.t % self.update_every == 0 and self.t < self.t_end:
            share = replaced_share(self.t, self.t_end, self.replace)
            counts = [int(w.n_active * share) for w in self.weights]
            if any(counts):
                return self._exchange(closure, counts)
        return self.base.step(closure)

    @torch.no_grad()
    def _exchange(self, closure: Callable[[], Any], counts: list[int]) -> Any:
        # Both scores order alike; |μ|/σ keeps the order that rounding hides in the other.
        criterion = "snr" if self.criterion == "snr_abs" else self.criterion
        kept = []
        for weight, count in zip(self.weights, counts, strict=True):
            score = removal_score(criterion, weight.mean, weight.std)
            keep = torch.zeros_like(score, dtype=torch.bool)
            keep[score.topk(weight.n_active - count).indices] = True
            kept.append(keep)
        post = self.grow_grad == "post"
        for weight, keep in zip(self.weights, kept, strict=True):
            weight.begin_growth(keep if post else None)
        try:
            with torch.enable_grad():
                loss = closure()
        finally:
            gradients = [weight.end_growth() for weight in self.weights]
        for weight, keep, gradient in zip(self.weights, kept, gradients, strict=True):
            if not post and weight.mean.grad is not None:  # what the KL adds at active weights
                gradient.index_add_(0, weight.index, weight.mean.grad)
            self._replace(weight, keep, gradient.abs())
        self.n_updates += 1
        return loss

    def _replace(self, weight: SparseGaussian, keep: Tensor, size: Tensor) -> None:
        """Give the places of removed weights to those with the largest gradient."""
        removed = (~keep).nonzero()[:, 0]
        if not len(removed):
            return
        size[weight.index[keep]] = -1
        grown = size.topk(len(removed)).indices
        # A removed weight that is added again keeps its parameters.
        old = weight.index[removed]
        places = removed[~torch.isin(old, grown)]
        weight.index[places] = grown[~torch.isin(grown, old)]
        born = {"mean": torch.zeros(()), "rho": weight.rho[keep].mean()}
        order = weight.index.argsort()
        weight.index.copy_(weight.index[order])
        for name, value in born.items():
            parameter = getattr(weight, name)
            parameter[places] = value.to(parameter)
            parameter.copy_(parameter[order])
            for state in self.state.get(parameter, {}).values():
                if isinstance(state, Tensor) and state.shape == parameter.shape:
                    state[places] = 0
                    state.copy_(state[order])


# -- accounting --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accounting:
    """What sparsity saves, counted over the layers that can be sparse."""

    n_weights: int
    """Weights of these layers."""
    n_active: int
    """Those that are not zero."""
    flops: int
    """Multiply-adds of the active weights for one row of input, at one draw."""
    dense_flops: int
    """Those of all weights."""
    n_bytes: int
    """Bytes of the whole network in compact form, other parameters included."""
    dense_bytes: int
    """Bytes of means and standard deviations of all weights, and the other parameters."""

    @property
    def sparsity(self) -> float:
        """Share of the weights that are zero."""
        return 1 - self.n_active / self.n_weights

    @property
    def flops_ratio(self) -> float:
        """Multiply-adds over those of the dense network."""
        return self.flops / self.dense_flops

    @property
    def size_ratio(self) -> float:
        """Bytes over those of dense means and standard deviations."""
        return self.n_bytes / self.dense_bytes


def account(module: nn.Module, x: Tensor) -> Accounting:
    """Count weights, multiply-adds and bytes of a network from :func:`uq.nn.ssvi_compact.compact`.

    Parameters
    ----------
    module : Module
        In compact form.
    x : Tensor
        A few rows of input.

    Returns
    -------
    Accounting
        A layer that is called several times a row counts several times in the multiply-adds.
    """
    flops = [0, 0]

    def count(layer: nn.Module, _inputs: object, output: Tensor) -> None:
        assert isinstance(layer, CompactLayer)
        weight = layer.weight
        # Each weight is used once at each position of the output.
        positions = output.numel() // len(x) // weight.shape[0]
        flops[0] += positions * weight.n_active
        flops[1] += positions * weight.n

    layers = [m for m in module.modules() if isinstance(m, CompactLayer)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            module(x)
    finally:
        for handle in handles:
            handle.remove()
    weights = [layer.weight for layer in layers]
    n_bytes = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    own = sum(t.numel() * t.element_size() for w in weights for t in w.state_dict().values())
    dense = sum(2 * w.n * w.mean.element_size() for w in weights)
    return Accounting(
        n_weights=sum(w.n for w in weights),
        n_active=sum(w.n_active for w in weights),
        flops=flops[0],
        dense_flops=flops[1],
        n_bytes=n_bytes,
        dense_bytes=n_bytes - own + dense,
    )


def set_same_noise(module: nn.Module, same_noise: bool) -> None:
    """Choose one weight draw for all rows, or noise of its own for each (the default)."""
    for part in module.modules():
        if isinstance(part, SparseGaussianLayer):
            part.same_noise = same_noise
