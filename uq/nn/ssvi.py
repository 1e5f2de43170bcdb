"""Sparse Gaussian weights: few entries are random, all others are zero, at every step.

Layers of sparse subspace variational inference (SSVI): J. Li et al., "Training Bayesian Neural
Networks with Sparse Subspace Variational Inference", ICLR 2024, arXiv 2402.11025. Of the d entries
of a weight tensor s are active,

    q(w_i) = N(μ_i, σ_i²) for active i, δ_0 otherwise,      σ = softplus(ρ),
    KL(q ‖ p) over the active ones = Σ log(σ₀/σ_i) + (σ_i² + μ_i²) / (2σ₀²) − ½,   p = N(0, σ₀²).

Only the s pairs (μ, ρ) and the positions are stored, so that optimizers hold nothing for the other
entries. In training mode layers use the local reparameterisation

    out = m + √v ξ,    m = W_μ x + b,    v = W_{σ²} x²,    ξ ~ N(0, 1) for each row and output,

in eval mode the means. :mod:`uq.inference.ssvi` moves the active set.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor, nn
from torch.nn import functional as F

from uq.errors import ParameterError
from uq.kernels import local_reparam_linear, use_triton
from uq.kernels.arguments import fresh_seed
from uq.kernels.sparse_linear import Pattern, compression_pays, sparse_product

ALLOCATIONS = ("uniform", "erdos_renyi")
# Keeps the square root differentiable where an input is all zero.
_VARIANCE_FLOOR = 1e-10


# -- what a layer does with its weight ---------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """x Wᵀ + b."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer with the given weight."""
        return F.linear(x, weight, bias)


@dataclass(frozen=True)
class Convolution:
    """Convolution in one to three dimensions, with the settings of the layer that it comes from."""

    dimensions: int
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    pad: tuple[int, ...]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer with the given weight."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.pad, mode=self.padding_mode), 0  # type: ignore[assignment]
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.dimensions - 1]
        out: Tensor = convolve(x, weight, bias, self.stride, padding, self.dilation, self.groups)
        return out


Operation = Product | Convolution
_CONVOLUTIONS: dict[type, int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
SUPPORTED = (nn.Linear, *_CONVOLUTIONS)
# Their parameters may have several axes, and are no weights between units.
_NORMS = (nn.LayerNorm, nn.RMSNorm)


def _operation(layer: nn.Module) -> Operation:
    if type(layer) is nn.Linear:
        return Product()
    assert isinstance(layer, nn.modules.conv._ConvNd)
    return Convolution(
        _CONVOLUTIONS[type(layer)],
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.padding_mode,
        tuple(layer._reversed_padding_repeated_twice),
    )


# -- weights and layers ------------------------------------------------------------------------


class SparseGaussian(nn.Module):
    """Gaussian over ``n_active`` entries of a tensor; the others are exactly zero.

    Parameters
    ----------
    initial : Tensor
        Initial means. The active entries are a random set (torch's global generator), and their
        means are multiplied by √(n/n_active), which keeps the variance of what the layer puts out.
    n_active : int
        Number s of active entries; it never changes.
    prior_scale : float
        Standard deviation σ₀ of the prior N(0, σ₀²) on each active entry.
    init_std : float
        Initial standard deviation, as a share of σ₀.

    Attributes
    ----------
    mean, rho : Parameter of shape (s,)
        Means μ and ρ, σ = softplus(ρ).
    index : Tensor of shape (s,)
        Flat positions of the active entries, ascending.
    """

    index: Tensor

    def __init__(
        self, initial: Tensor, n_active: int, prior_scale: float, init_std: float = 0.1
    ) -> None:
        super().__init__()
        self.shape: tuple[int, ...] = tuple(initial.shape)
        self.n: int = initial.numel()
        self.prior_scale = prior_scale
        if n_active == self.n:
            index = torch.arange(self.n, device=initial.device)
        else:
            index = torch.randperm(self.n, device=initial.device)[:n_active].sort().values
        values = initial.detach().reshape(-1)[index] * math.sqrt(self.n / n_active)
        self.mean: nn.Parameter = nn.Parameter(values)
        std = init_std * prior_scale
        self.rho: nn.Parameter = nn.Parameter(
            torch.full_like(values, std + math.log(-math.expm1(-std)))
        )
        self.register_buffer("index", index)
        self._pattern: tuple[Any, Pattern] | None = None
        self._grown: Tensor | None = None
        self._keep: Tensor | None = None

    def extra_repr(self) -> str:
        """Shape and number of active entries."""
        return f"{self.shape}, n_active={self.n_active}, prior_scale={self.prior_scale:.4g}"

    @property
    def n_active(self) -> int:
        """Number of active entries."""
        return len(self.mean)

    @property
    def std(self) -> Tensor:
        """Standard deviations of the active entries, shape (s,)."""
        return F.softplus(self.rho)

    @property
    def mask(self) -> Tensor:
        """Which entries are active, in the full shape."""
        return self.scatter(torch.ones_like(self.mean)).bool()

    @property
    def prior(self) -> TorchDistribution:
        """Pyro prior over the active entries, all of them one event."""
        scale = torch.full_like(self.mean.detach(), self.prior_scale)
        return Normal(torch.zeros_like(scale), scale, validate_args=False).to_event(1)

    def scatter(self, values: Tensor) -> Tensor:
        """Put one value for each active entry into a tensor of the full shape, zero elsewhere."""
        if self.n_active == self.n:
            return values.view(self.shape)
        return values.new_zeros(self.n).scatter(0, self.index, values).view(self.shape)

    @property
    def by_rows(self) -> bool:
        """Whether products should go through compressed rows: on a CPU, sparse, large."""
        size = self.shape[0], self.n // self.shape[0]
        return self._grown is None and compression_pays(self.n_active, size, self.mean)

    def pattern(self) -> Pattern:
        """Active positions of a matrix, until the next exchange."""
        key = self.index.data_ptr(), self.index._version
        if self._pattern is None or self._pattern[0] != key:
            self._pattern = key, Pattern.of(self.index, (self.shape[0], self.shape[1]))
        return self._pattern[1]

    def mean_tensor(self) -> Tensor:
        """Means in the full shape."""
        return self.scatter(self.mean) if self._grown is None else self._grown

    def std_tensor(self) -> Tensor:
        """Standard deviations in the full shape."""
        return self.scatter(self._kept(self.std))

    def variance_tensor(self) -> Tensor:
        """Variances in the full shape."""
        return self.scatter(self._kept(self.std).square())

    def noise(self) -> Tensor:
        """Draw σz at the active entries."""
        std = self._kept(self.std)
        return std * torch.randn_like(std)

    def sample(self) -> Tensor:
        """Draw the tensor, reparameterised."""
        return self.mean_tensor() + self.scatter(self.noise())

    def kl(self) -> Tensor:
        """KL(q ‖ prior) over the active entries, in nats."""
        std, s = self.std, self.prior_scale
        squares = (std.square() + self.mean.square()).sum() / (2 * s**2)
        return squares - std.log().sum() + self.n_active * (math.log(s) - 0.5)

    def _kept(self, values: Tensor) -> Tensor:
        return values if self._keep is None else values * self._keep

    # -- gradients of entries that are not active ----------------------------------------------

    def begin_growth(self, keep: Tensor | None) -> None:
        """Collect gradients with respect to all entries until :meth:`end_growth`.

        Parameters
        ----------
        keep : bool Tensor of shape (s,), optional
            Active entries that take part; the others count as zero meanwhile.
        """
        self._keep = keep
        dense = self.scatter(self._kept(self.mean.detach()))
        self._grown = dense.clone().requires_grad_()

    def end_growth(self) -> Tensor:
        """Return the gradients since :meth:`begin_growth`, shape (n,)."""
        assert self._grown is not None
        gradient = self._grown.grad
        flat = torch.zeros_like(self._grown) if gradient is None else gradient
        self._grown = self._keep = None
        return flat.detach().reshape(-1)


class SparseGaussianLayer(nn.Module):
    """Linear or convolutional layer whose weight is a :class:`SparseGaussian`.

    In training mode the output carries weight noise: of each row and output its own (local
    reparameterisation), or one draw of the weight for all rows with ``same_noise``. In eval mode
    the weight is its mean. The bias is an ordinary parameter.
    """

    def __init__(
        self, operation: Operation, weight: SparseGaussian, bias: nn.Parameter | None
    ) -> None:
        super().__init__()
        self.operation = operation
        self.weight = weight
        self.bias = bias
        self.same_noise = False

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the output at ``x``."""
        weight, square = self.weight, x.square()
        if self.by_rows:
            mean = self._by_rows(x, weight.mean)
            return mean, sparse_product(square, weight.std.square(), weight.pattern())
        mean = self.operation(x, weight.mean_tensor(), self.bias)
        return mean, self.operation(square, weight.variance_tensor(), None)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        weight = self.weight
        if not self.training or self.same_noise:
            if self.by_rows:
                values = weight.mean + weight.noise() if self.training else weight.mean
                return self._by_rows(x, values)
            tensor = weight.sample() if self.training else weight.mean_tensor()
            return self.operation(x, tensor, self.bias)
        if isinstance(self.operation, Product) and use_triton(x):
            rows = x.reshape(-1, x.shape[-1])
            out = local_reparam_linear(
                rows,
                weight.mean_tensor(),
                weight.std_tensor(),
                seed=fresh_seed(),
                bias=self.bias,
                floor=_VARIANCE_FLOOR,
            )
            return out.view(*x.shape[:-1], -1)
        mean, variance = self.moments(x)
        if not isinstance(self.operation, Product):
            # Fast convolutions may round a variance of zero to below it.
            variance = variance.clamp_min(0)
        std = (variance + _VARIANCE_FLOOR).sqrt()
        return torch.addcmul(mean, std, torch.randn_like(mean))

    @property
    def by_rows(self) -> bool:
        """Whether products go through compressed rows."""
        return isinstance(self.operation, Product) and self.weight.by_rows

    def _by_rows(self, x: Tensor, values: Tensor) -> Tensor:
        out = sparse_product(x, values, self.weight.pattern())
        return out if self.bias is None else out + self.bias


def sparse_weights(module: nn.Module) -> dict[str, SparseGaussian]:
    """The :class:`SparseGaussian` parts of a module, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, SparseGaussian)}


def sparse_kl(module: nn.Module) -> Tensor:
    """Sum of the KL divergences of all sparse weights of ``module``, in nats."""
    return torch.stack([w.kl() for w in sparse_weights(module).values()]).sum()


# -- from an ordinary module -------------------------------------------------------------------


def count_active(density: float, n: int) -> int:
    """Active entries of a tensor of ``n`` at ``density``: n − ⌊(1 − density) n⌋."""
    # The small number undoes the rounding of 1 - density.
    return n - int((1 - density) * n + 1e-9 * n)


def layer_densities(
    shapes: Mapping[str, Sequence[int]], density: float, allocation: str
) -> dict[str, float]:
    """Share out a density over weight tensors.

    Parameters
    ----------
    shapes : mapping of str to shape
        Weight tensors.
    density : float
        Active share, in (0, 1].
    allocation : {"uniform", "erdos_renyi"}
        The same density everywhere; or in proportion to (sum of sides)/(product of sides), at most
        1, so that all tensors together reach ``density``: small tensors are denser.

    Returns
    -------
    dict of float
    """
    if allocation not in ALLOCATIONS:
        raise ParameterError(
            f"SSVI: allocation must be one of {', '.join(map(repr, ALLOCATIONS))}, "
            f"got {allocation!r}."
        )
    if allocation == "uniform":
        return dict.fromkeys(shapes, density)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    full: set[str] = set()
    while True:
        rest = [name for name in shapes if name not in full]
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in full)
        factor = budget / sum(raw[name] * sizes[name] for name in rest) if rest else 0.0
        above = {name for name in rest if factor * raw[name] > 1}
        if not above:
            return {n: 1.0 if n in full else min(1.0, factor * raw[n]) for n in shapes}
        full |= above


def sparsify(
    module: nn.Module,
    density: float = 0.1,
    *,
    allocation: str = "uniform",
    prior_scale: float = 1.0,
    init_std: float = 0.1,
    dense: Sequence[str] | None = None,
) -> nn.Module:
    """Copy a module with sparse Gaussian weights in place of its linear and convolutional ones.

    Parameters
    ----------
    module : Module
        Any module whose weights are in ``Linear``, ``Conv1d``, ``Conv2d`` or ``Conv3d`` layers;
        biases and normalisation layers stay ordinary parameters. Never changed.
    density : float, default=0.1
        Active share of each sparse layer ("uniform"), or of all ("erdos_renyi").
    allocation : {"uniform", "erdos_renyi"}, default="uniform"
        See :func:`layer_densities`.
    prior_scale : float, default=1.0
        Standard deviation of the prior, times 1/√(fan-in × density): at 1 the prior keeps the
        variance of a layer's input.
    init_std : float, default=0.1
        Initial standard deviation, as a share of the prior's.
    dense : sequence of str, optional
        Names of layers at density 1. By default the last one with "uniform" where there are
        several (the output layer is small, and each of its weights matters), else none.

    Returns
    -------
    Module
        In training mode.

    Raises
    ------
    ParameterError
        If there is no such layer, if another type of layer holds weights (it is named), if layers
        share a weight, or if a layer would be left with no weight. Weights that do not require
        gradients are left as they are, whatever the layer.

    Examples
    --------
    >>> import torch
    >>> from uq.nn.ssvi import sparsify, sparse_weights
    >>> net = sparsify(torch.nn.Sequential(torch.nn.Linear(50, 20), torch.nn.Linear(20, 2)), 0.1)
    >>> {name: w.n_active for name, w in sparse_weights(net).items()}
    {'0.weight': 100, '1.weight': 40}
    """
    if not isinstance(density, int | float) or not 0 < density <= 1:
        raise ParameterError(f"SSVI: density must be a number in (0, 1], got {density!r}.")
    module = copy.deepcopy(module)
    layers = _find_layers(module)
    if dense is None:
        dense = list(layers)[-1:] if allocation == "uniform" and len(layers) > 1 else ()
    unknown = sorted(set(dense) - set(layers))
    if unknown:
        raise ParameterError(
            f"SSVI: dense names {unknown[0]!r}, but the layers are {', '.join(layers)}."
        )
    shapes = {n: tuple(m.weight.shape) for n, m in layers.items() if n not in dense}  # type: ignore[arg-type]
    densities = dict.fromkeys(layers, 1.0) | layer_densities(shapes, density, allocation)
    swapped: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        n = weight.numel()
        if round(densities[name] * n) < 1:
            raise ParameterError(
                f"SSVI: density {densities[name]:.3g} leaves layer {name!r} ({n} weights) without "
                f"any; at least {1 / n:.3g} is needed. Raise density, or keep that layer dense."
            )
        n_active = count_active(densities[name], n)
        fan_in = n / weight.shape[0] * n_active / n
        sparse = SparseGaussian(weight, n_active, prior_scale / math.sqrt(fan_in), init_std)
        swapped[id(layer)] = SparseGaussianLayer(_operation(layer), sparse, layer.bias)  # type: ignore[arg-type]
    return swap(module, swapped).train()


def _find_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Layers to make sparse, by name; complain of weights elsewhere."""
    layers: dict[str, nn.Module] = {}
    other: list[str] = []
    owners: dict[int, str] = {}
    for name, part in module.named_modules():
        supported = type(part) in SUPPORTED
        if isinstance(part, _NORMS):
            continue
        for parameter in part._parameters.values():
            if parameter is None or not parameter.requires_grad or parameter.ndim < 2:
                continue
            if not supported:
                other.append(f"{type(part).__name__} ({name or 'the module itself'})")
                break
            if id(parameter) in owners:
                raise ParameterError(
                    f"SSVI: layers {owners[id(parameter)]!r} and {name!r} share a weight, which "
                    "cannot be sparse in two layers; give each its own."
                )
            owners[id(parameter)] = name
            layers[name] = part
    names = ", ".join(kind.__name__ for kind in SUPPORTED)
    if other:
        raise ParameterError(
            f"SSVI: module holds weights in {', '.join(other)}, which it cannot make sparse; "
            f"supported are {names}. Replace these layers, or freeze their weights "
            "(requires_grad=False) to keep them as they are."
        )
    if not layers:
        kinds = sorted({type(m).__name__ for m in module.modules()})
        raise ParameterError(
            f"SSVI: module holds no trainable layer of {names} (it has {', '.join(kinds)}), so "
            "that nothing can be sparse."
        )
    return layers


def swap(module: nn.Module, swapped: Mapping[int, nn.Module]) -> nn.Module:
    """Put modules in the place of others, which are named by ``id``, wherever they occur."""
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if id(child) in swapped:
                parent._modules[name] = swapped[id(child)]
    return swapped.get(id(module), module)
