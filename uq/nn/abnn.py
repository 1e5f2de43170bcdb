"""Bayesian normalisation layers (ABNN): noise on the scale of any normalisation layer.

With x̂ the normalised activation, γ the layer's scale and β its shift,

    y = γ x̂ (1 + αε) + β,    ε ~ N(0, 1)              (eq. 6 of the authors' talk, with α)

in training and in prediction. The shape of ε says what one draw is:

    "channel"   one ε per entry of γ and forward pass: the weights γ(1 + αε), one function for all
                rows. Costs nothing: it is the plain layer with other numbers.
    "sample"    one ε per entry of γ and row.
    "element"   one ε per activation: Gaussian dropout on x̂ at rate p = α²/(1 + α²). No function;
                the noise averages out over positions, so that it needs a larger α.

For "channel" and "sample", q(γ) = N(γ, α²γ²): the posterior of variational dropout at a fixed rate,
whose KL to the log-uniform prior does not depend on γ.

G. Franchi et al., "Make Me a BNN: A Simple Strategy for Estimating Bayesian Uncertainty from
Pre-trained Models", CVPR 2024, arXiv 2312.15297.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from uq.errors import ParameterError

NoiseShape = Literal["channel", "sample", "element"]
NOISE_SHAPES = ("channel", "sample", "element")
# Noise on single elements averages out over positions, noise on a channel does not.
DEFAULT_ALPHA = {"channel": 0.03, "sample": 0.03, "element": 0.1}

_PER_CHANNEL = (_BatchNorm, _InstanceNorm, nn.GroupNorm)  # γ lies on the axis after the rows
_LAST_AXES = (nn.LayerNorm, nn.RMSNorm)  # γ lies on the last axes
NORM_LAYERS = _PER_CHANNEL + _LAST_AXES
_PLAIN_FORWARDS = {cls.forward for cls in (*NORM_LAYERS, nn.SyncBatchNorm)}


class BayesianNorm(nn.Module):
    """What a normalisation layer becomes: a subclass of its own class, with noise on its scale.

    Made by :func:`bayesian_norm`. Parameters, buffers and their names, ``eps``, ``momentum`` and
    whatever a subclass does besides are those of the source layer. The noise is there in eval mode,
    too; :func:`without_noise` turns it off.

    Attributes
    ----------
    alpha : float
        Standard deviation of the noise, as a share of γ.
    noise_shape : {"channel", "sample", "element"}
        What shares a noise number.
    generator : torch.Generator or None
        Where the noise comes from; None is torch's global generator.
    deterministic : bool
        True makes it the plain layer.
    frozen_statistics : bool
        True makes batch normalisation keep to its running statistics in train mode.

    See Also
    --------
    bayesian_norm : makes one of a layer; its example shows the noise.
    """

    weight: nn.Parameter
    alpha: float
    noise_shape: NoiseShape
    generator: torch.Generator | None
    deterministic: bool
    frozen_statistics: bool
    _source_class: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` under noise; shapes as in the source layer."""
        if self.deterministic or self.alpha == 0:
            return cast(Tensor, super().forward(x))
        if self.noise_shape == "channel":
            return self._normalise(x, perturb(self.weight, self._noise(self.weight.shape)))
        out = self._normalise(x, self.weight, shift=False)
        shape = out.shape if self.noise_shape == "element" else self._row_shape(out)
        out = perturb(out, self._noise(shape))
        bias = self._bias()
        return out if bias is None else out + bias.view(self._scale_shape(out))

    def train(self, mode: bool = True) -> BayesianNorm:
        """Set the mode of the statistics; the noise does not depend on it."""
        return super().train(mode and not self.frozen_statistics)

    def extra_repr(self) -> str:
        """Add the noise to what the source layer shows."""
        return f"{super().extra_repr()}, alpha={self.alpha}, noise_shape={self.noise_shape!r}"

    def __reduce__(self) -> Any:
        # The class is made on demand and has no name to be found by.
        return _restore, (self._source_class, self.__dict__)

    def _bias(self) -> Tensor | None:
        return getattr(self, "bias", None)

    def _noise(self, shape: Any) -> Tensor:
        # In float32: half precision would round 1 + αε, not αε.
        device = self.weight.device
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        noise = torch.randn(shape, generator=self.generator, device=device, dtype=dtype)
        return noise.mul_(self.alpha)

    def _normalise(self, x: Tensor, weight: Tensor, *, shift: bool = True) -> Tensor:
        """Run the source layer with other weights, which hide its own for the time being."""
        hidden = {"weight": weight} if shift else {"weight": weight, "bias": None}
        self.__dict__.update(hidden)
        try:
            return cast(Tensor, super().forward(x))
        finally:
            for name in hidden:
                self.__dict__.pop(name, None)

    def _scale_shape(self, out: Tensor) -> tuple[int, ...]:
        """Shape in which γ multiplies ``out``, an axis of length 1 for the rows included."""
        scale = tuple(self.weight.shape)
        if isinstance(self, _LAST_AXES):
            return (1,) * (out.ndim - len(scale)) + scale
        behind = out.ndim - 2
        if isinstance(self, _InstanceNorm) and out.ndim == self._get_no_batch_dim():
            return (*scale, *(1,) * (behind + 1))
        return (1, *scale, *(1,) * behind)

    def _row_shape(self, out: Tensor) -> tuple[int, ...]:
        shape = self._scale_shape(out)
        has_rows = out.ndim > self.weight.ndim and shape[0] == 1
        return (out.shape[0], *shape[1:]) if has_rows else shape


def perturb(weight: Tensor, noise: Tensor) -> Tensor:
    """Return w(1 + noise) in the type of w, rounded once."""
    return (
        torch.addcmul(weight, weight, noise)
        if weight.dtype == noise.dtype
        else ((weight * (1 + noise)).to(weight.dtype))
    )


_CLASSES: dict[type[nn.Module], type[BayesianNorm]] = {}


def _bayesian_class(source: type[nn.Module]) -> type[BayesianNorm]:
    if source not in _CLASSES:
        body = {"_source_class": source, "__module__": __name__, "__doc__": BayesianNorm.__doc__}
        made = type(f"Bayesian{source.__name__}", (BayesianNorm, source), body)
        _CLASSES[source] = cast("type[BayesianNorm]", made)
    return _CLASSES[source]


def _restore(source: type[nn.Module], state: dict[str, Any]) -> BayesianNorm:
    cls = _bayesian_class(source)
    layer = cls.__new__(cls)
    layer.__dict__.update(state)
    return layer


def bayesian_norm(
    layer: nn.Module,
    alpha: float | None = None,
    noise_shape: NoiseShape = "channel",
    generator: torch.Generator | None = None,
) -> BayesianNorm:
    """Return a copy of a normalisation layer with Gaussian noise on its scale.

    Parameters
    ----------
    layer : Module
        BatchNorm1d, 2d, 3d, SyncBatchNorm, LayerNorm, RMSNorm, GroupNorm, InstanceNorm1d, 2d, 3d or
        a subclass. A layer without scale and shift gets γ = 1 and β = 0.
    alpha : float, optional
        Standard deviation of the noise as a share of the scale: by default 0.03, and 0.1 for
        "element". Above 0.3 it costs accuracy.
    noise_shape : {"channel", "sample", "element"}, default="channel"
        One noise number per channel, per row and channel, or per activation.
    generator : torch.Generator, optional
        Source of the noise; torch's global generator by default.

    Returns
    -------
    BayesianNorm
        Of the layer's own class, too; the layer stays as it is.

    Raises
    ------
    ParameterError
        If the layer is no normalisation layer, was never called (lazy layers), normalises by the
        batch in prediction (``track_running_stats=False``), has a scale that is not a parameter,
        or is in half precision in which the noise would be lost; or if a subclass with a forward of
        its own meets a ``noise_shape`` other than "channel".

    Examples
    --------
    >>> import torch
    >>> from uq.nn import bayesian_norm
    >>> layer = bayesian_norm(torch.nn.LayerNorm(4), alpha=0.1)
    >>> x = torch.randn(3, 4)
    >>> bool((layer(x) == layer(x)).any())
    False
    """
    refuse_lazy(layer)
    layer = copy.deepcopy(layer)
    make_bayesian(layer, alpha, noise_shape, generator, type(layer).__name__)
    return cast(BayesianNorm, layer)


def refuse_lazy(module: nn.Module) -> None:
    """Raise a ParameterError if ``module`` has parameters that are still without a shape."""
    lazy = [k for k, t in (*module.named_parameters(), *module.named_buffers()) if is_lazy(t)]
    if lazy:
        raise ParameterError(
            f"{lazy[0]} is lazy and has no shape: run the module on a batch first."
        )


def _check_noise(alpha: float | None, noise_shape: str) -> None:
    if noise_shape not in NOISE_SHAPES:
        raise ParameterError(
            f"noise_shape must be one of {', '.join(map(repr, NOISE_SHAPES))}, got {noise_shape!r}."
        )
    if alpha is not None and not 0 <= alpha < float("inf"):
        raise ParameterError(f"alpha must be a finite number >= 0, got {alpha!r}.")


def make_bayesian(
    layer: nn.Module,
    alpha: float | None,
    noise_shape: NoiseShape,
    generator: torch.Generator | None,
    name: str,
    like: Tensor | None = None,
) -> None:
    """Turn the layer called ``name`` into a Bayesian one, in place; see :func:`bayesian_norm`.

    A scale and a shift that it lacks get the type and device of ``like``.
    """
    _check_noise(alpha, noise_shape)
    alpha = DEFAULT_ALPHA[noise_shape] if alpha is None else float(alpha)
    if isinstance(layer, BayesianNorm):
        source = layer._source_class
    else:
        source = type(layer)
        _check_layer(layer, name)
        _add_affine(layer, like)
    if noise_shape != "channel" and source.forward not in _PLAIN_FORWARDS:
        raise ParameterError(
            f"{name}, a {source.__name__}, has a forward of its own, into which noise_shape="
            f"{noise_shape!r} does not reach; use noise_shape='channel'."
        )
    dtype = cast(Tensor, layer.weight).dtype
    if 0 < alpha < torch.finfo(dtype).eps:
        raise ParameterError(
            f"{name}: alpha={alpha} is lost in the rounding of {dtype} "
            f"({torch.finfo(dtype).eps:.1g}); use module.float() or a larger alpha."
        )
    layer.__class__ = _bayesian_class(source)
    made = cast(BayesianNorm, layer)
    made.alpha, made.noise_shape, made.generator = alpha, noise_shape, generator
    made.deterministic = made.frozen_statistics = False


def _check_layer(layer: nn.Module, name: str) -> None:
    if not isinstance(layer, NORM_LAYERS):
        raise ParameterError(
            f"{name} is a {type(layer).__name__}, not a normalisation layer (BatchNorm, LayerNorm, "
            "RMSNorm, GroupNorm, InstanceNorm)."
        )
    if isinstance(layer, _BatchNorm) and layer.running_mean is None:
        raise ParameterError(
            f"{name} has no running statistics (track_running_stats=False): the prediction of a "
            "row would depend on the other rows. Collect them, or use GroupNorm."
        )
    if "weight" not in layer._parameters:
        raise ParameterError(
            f"{name}: the scale is not a parameter (is it parametrised?); remove the "
            "parametrisation first."
        )


def _add_affine(layer: nn.Module, like: Tensor | None) -> None:
    """Give a layer without scale and shift γ = 1 and β = 0."""
    if layer.weight is not None:
        return
    if isinstance(layer, _LAST_AXES):
        shape, flag = layer.normalized_shape, "elementwise_affine"
    else:
        shape = (layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features,)
        flag = "affine"
    like = next((b for b in layer.buffers() if b.is_floating_point()), like)
    setattr(layer, flag, True)
    factory = {} if like is None else {"device": like.device, "dtype": like.dtype}
    layer.weight = nn.Parameter(torch.ones(shape, **factory))
    if "bias" in layer._parameters:
        layer.bias = nn.Parameter(torch.zeros(shape, **factory))


def bayesian_layers(module: nn.Module) -> dict[str, BayesianNorm]:
    """Bayesian normalisation layers of ``module`` by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, BayesianNorm)}


@contextmanager
def layer_settings(module: nn.Module, **settings: Any) -> Iterator[nn.Module]:
    """Set attributes of all Bayesian normalisation layers inside a ``with`` block."""
    layers = list(bayesian_layers(module).values())
    before = [{name: getattr(layer, name) for name in settings} for layer in layers]
    try:
        for layer in layers:
            layer.__dict__.update(settings)
        yield module
    finally:
        for layer, values in zip(layers, before, strict=True):
            layer.__dict__.update(values)


def without_noise(module: nn.Module) -> AbstractContextManager[nn.Module]:
    """Turn the noise of all Bayesian normalisation layers off inside a ``with`` block.

    Parameters
    ----------
    module : Module
        Holds the layers, at any depth.

    Returns
    -------
    context manager
        Gives ``module``; the noise is back after the block, and after an error in it.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import bayesian_norm, without_noise
    >>> source, x = torch.nn.LayerNorm(4), torch.randn(3, 4)
    >>> layer = bayesian_norm(source, alpha=0.1)
    >>> with without_noise(layer):
    ...     bool((layer(x) == source(x)).all())
    True
    """
    return layer_settings(module, deterministic=True)
