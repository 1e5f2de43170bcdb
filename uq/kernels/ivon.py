"""Sample and step of IVON over the parameters of a network, in one launch each.

The state of IVON (see :mod:`uq.inference.ivon`) is a flat vector each of curvature h and momentum
g, and one that holds the mean while the parameters hold a sample. A table of segments says which
stretch of them belongs to which tensor and to which group of settings; the tensors themselves stay
where they are. Noise is not stored: the step draws it again (:mod:`uq.kernels.philox`), element i
of the flat vector at c0 = i.

Bytes moved for a parameter in float32: 16 to sample, 28 for a step (reads gradient, g, h, mean;
writes g, h, parameter), 32 for a step that also draws the next sample. The same formulas as a
dozen tensor operations move some 150; AdamW moves 28.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uq.errors import ParameterError
from uq.kernels.dispatch import use_triton
from uq.kernels.philox import Purpose, sample_normals

# Elements of a program's block.
BLOCK = 1024


class Setting(NamedTuple):
    """Settings of a group for one step, in the symbols of :mod:`uq.inference.ivon`."""

    ess: float
    """λ"""
    delta: float
    """δ"""
    beta1: float
    beta2: float
    rate: float
    """Learning rate, with whatever it is multiplied by."""
    clip: float = float("inf")
    """Bound on an element of the preconditioned update."""
    bias: float = 1.0
    """1 − β₁ᵗ where the momentum's bias is corrected."""


class Noise(NamedTuple):
    """Address of a sample's noise."""

    seed: int
    step: int
    """Number of the sample, below 2³²."""
    stream: int = Purpose.IVON << 24


class Segments:
    """Tensors that a flat vector is made of, in order.

    Parameters
    ----------
    tensors : sequence of Tensor
        Contiguous, of one floating dtype (float32 or float64) on one device.
    groups : sequence of int, optional
        Group of settings of each tensor; 0 by default.

    Raises
    ------
    ParameterError
        For tensors that do not fit together, or 2³² elements and more.
    """

    def __init__(self, tensors: Sequence[Tensor], groups: Sequence[int] | None = None) -> None:
        self.tensors: list[Tensor] = list(tensors)
        self.groups: list[int] = [0] * len(self.tensors) if groups is None else list(groups)
        if not self.tensors or len(self.groups) != len(self.tensors):
            raise ParameterError(
                f"Segments: needs tensors, and a group for each, got {len(self.tensors)} tensors "
                f"and {len(self.groups)} groups."
            )
        like = self.tensors[0]
        for t in self.tensors:
            if t.dtype != like.dtype or t.device != like.device or not t.is_contiguous():
                raise ParameterError(
                    "Segments: tensors must be contiguous, of one dtype and on one device; got "
                    f"{t.dtype} on {t.device} with strides {t.stride()} after {like.dtype} on "
                    f"{like.device}."
                )
        if like.dtype not in (torch.float32, torch.float64):
            raise ParameterError(f"Segments: dtype must be float32 or float64, got {like.dtype}.")
        self.device: torch.device = like.device
        self.dtype: torch.dtype = like.dtype
        self.sizes: list[int] = [t.numel() for t in self.tensors]
        self.n: int = sum(self.sizes)
        if self.n >= 1 << 32:
            raise ParameterError(
                f"Segments: noise is counted in 32 bits, got {self.n} elements; make two of them."
            )
        self._tables: tuple[Tensor, ...] | None = None

    def with_tensors(self, tensors: Sequence[Tensor]) -> Segments:
        """Other tensors of the same sizes, such as gradients."""
        found = Segments(tensors, self.groups)
        if found.sizes != self.sizes or found.dtype != self.dtype or found.device != self.device:
            raise ParameterError(
                "Segments: tensors must have the sizes, dtype and device of the parameters, got "
                f"{found.sizes} of {found.dtype} for {self.sizes} of {self.dtype}."
            )
        return found

    def parts(self) -> list[tuple[Tensor, slice, int]]:
        """Each tensor as a vector, its place in the flat one, and its group."""
        found, start = [], 0
        for t, n, group in zip(self.tensors, self.sizes, self.groups, strict=True):
            found.append((t.detach().view(-1), slice(start, start + n), group))
            start += n
        return found

    def addresses(self) -> Tensor:
        """Where the tensors lie, as integers on the device."""
        return _to(torch.tensor([t.data_ptr() for t in self.tensors]), self.device)

    def written(self) -> None:
        """Tell autograd that a kernel wrote to the tensors behind its back."""
        torch.autograd.graph.increment_version(self.tensors)

    def tables(self) -> tuple[Tensor, ...]:
        """Segment and offset of each program; start, size and group of each segment."""
        if self._tables is None:
            sizes = torch.tensor(self.sizes)
            blocks = -(-sizes // BLOCK)
            segment = torch.arange(len(sizes)).repeat_interleave(blocks)
            first = blocks.cumsum(0) - blocks
            offset = (torch.arange(len(segment)) - first[segment]) * BLOCK
            columns = (segment, offset, sizes.cumsum(0) - sizes, sizes, torch.tensor(self.groups))
            self._tables = tuple(_to(c, self.device) for c in columns)
        return self._tables


def _to(table: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


def settings_table(settings: Setting | Sequence[Setting], device: torch.device) -> Tensor:
    """λ, δ, 1 − β₁, ρλ, rate/bias, δ·bias and clip·bias of each group, float64."""
    rows = [settings] if isinstance(settings, Setting) else list(settings)
    columns = [
        (
            s.ess,
            s.delta,
            1 - s.beta1,
            (1 - s.beta2) * s.ess,
            s.rate / s.bias,
            s.delta * s.bias,
            s.clip * s.bias,
        )
        for s in rows
    ]
    return _to(torch.tensor(columns, dtype=torch.float64), device)


def sample(
    params: Segments, hess: Tensor, mean: Tensor, holds: Tensor, settings: Tensor, noise: Noise
) -> None:
    """Keep the mean aside and put the sample m + z/√(λ(h + δ)) into the parameters.

    Parameters
    ----------
    params : Segments
    hess : Tensor of shape (n,)
        Curvature h; with δ it must be positive.
    mean : Tensor of shape (n,)
        Takes the mean.
    holds : Tensor of shape (1,), int32
        Becomes 1 when the parameters hold a sample, in the order of the device's work.
    settings : Tensor
        Of :func:`settings_table`.
    noise : Noise

    Examples
    --------
    >>> import torch
    >>> from uq.kernels.ivon import Noise, Segments, Setting, restore, sample, settings_table
    >>> w = torch.ones(4)
    >>> hess, mean, holds = torch.ones(4), torch.empty(4), torch.zeros(1, dtype=torch.int32)
    >>> table = settings_table(Setting(100.0, 0.0, 0.9, 0.999, 0.1), w.device)
    >>> sample(Segments([w]), hess, mean, holds, table, Noise(seed=0, step=0))
    >>> w
    tensor([...])
    >>> restore(Segments([w]), mean, holds)
    >>> w
    tensor([1., 1., 1., 1.])
    """
    _check(params, noise, hess, mean)
    if use_triton(hess, mean, holds, settings):
        from uq.kernels.ivon_triton import sample_kernel

        _launch(sample_kernel, params, params.addresses(), hess, mean, holds, settings, noise=noise)
        params.written()
        return
    for p, here, _ in params.parts():
        mean[here] = p
    holds.fill_(1)
    for p, here, group in params.parts():
        p.copy_(mean[here] + _noise(hess, here, settings[group], noise))


def restore(params: Segments, mean: Tensor, holds: Tensor) -> None:
    """Put the mean back where ``holds`` says that the parameters hold a sample."""
    if use_triton(mean, holds):
        from uq.kernels.ivon_triton import restore_kernel

        _launch(restore_kernel, params, params.addresses(), mean, holds)
        params.written()
    else:
        for p, here, _ in params.parts():
            p.copy_(torch.where(holds != 0, mean[here], p))
    holds.zero_()


def accumulate(
    grads: Segments,
    hess: Tensor,
    grad_sum: Tensor,
    price_sum: Tensor,
    drawn: Tensor,
    noise: Noise,
) -> None:
    """Add a sample's gradient, and its noise × gradient, to their sums.

    ``drawn`` is the settings table with which the sample was drawn; h is as it was then.
    """
    _check(grads, noise, hess, grad_sum, price_sum)
    if use_triton(hess, grad_sum, price_sum, drawn):
        from uq.kernels.ivon_triton import accumulate_kernel

        _launch(
            accumulate_kernel, grads, grads.addresses(), hess, grad_sum, price_sum, drawn,
            noise=noise,
        )  # fmt: skip
        return
    for g, here, group in grads.parts():
        grad_sum[here] += g
        price_sum[here] += _noise(hess, here, drawn[group], noise) * g


def update(
    params: Segments,
    grads: Segments | None,
    hess: Tensor,
    momentum: Tensor,
    mean: Tensor,
    holds: Tensor,
    settings: Tensor,
    noise: Noise,
    *,
    drawn: Tensor | None = None,
    sums: tuple[Tensor, Tensor, int] | None = None,
    sampled: bool = True,
    next_step: int | None = None,
) -> Tensor:
    """Step of curvature, momentum and mean.

    With n the noise of the sample that the gradient ĝ was taken at, and a = h + δ,

        c = n ĝ − h/(λa);   h ← h + ρλ a (c + ½ρλ c²);   g ← g + (1 − β₁)(ĝ − g)
        m ← m − rate · clip((g/bias + δm)/(h + δ))

    which is the step of :class:`uq.inference.IVON`, written so that ρ near 1e-5 does not drown in
    float32.

    Parameters
    ----------
    params, hess, mean, holds, noise
        As of :func:`sample`.
    grads : Segments or None
        Gradient of the one sample; None with ``sums``.
    momentum : Tensor of shape (n,)
    settings : Tensor
        Table of this step; ``drawn`` that of the sample, if it was another.
    sums : (Tensor, Tensor, int), optional
        Sums of :func:`accumulate` and the number of samples in them, in place of ``grads``.
    sampled : bool, default=True
        The parameters hold the sample, and ``mean`` the mean; otherwise the parameters the mean.
    next_step : int, optional
        Draw the sample of that number in the same pass: the parameters then hold it, and ``mean``
        the new mean. By default the parameters hold the new mean.

    Returns
    -------
    Tensor of shape (1,) or (number of blocks,)
        Its sum is Σ c² over all elements, of the type of products.
    """
    noise_next = noise._replace(step=next_step or 0)
    _check(params, noise, hess, momentum, mean)
    _check(params, noise_next, hess)
    if (grads is None) == (sums is None):
        raise ParameterError("ivon.update: give either grads or sums.")
    drawn = settings if drawn is None else drawn
    if use_triton(hess, momentum, mean, holds, settings, drawn):
        from uq.kernels.ivon_triton import update_kernel

        squares = torch.empty(len(params.tables()[0]), dtype=hess.dtype, device=hess.device)
        place = params.addresses()
        grad_sum, price_sum, n_summed = (hess, hess, 1) if sums is None else sums
        _launch(
            update_kernel, params, place, place if grads is None else grads.addresses(),
            hess, momentum, mean, grad_sum, price_sum, squares, holds, settings, drawn,
            noise=noise,
            numbers=(noise_next.step, n_summed),
            SAMPLED=sampled, SUMMED=sums is not None, NEXT=next_step is not None,
        )  # fmt: skip
        params.written()
        return squares
    squares = hess.new_zeros(1)
    gradients = params.parts() if grads is None else grads.parts()
    for (p, here, group), (grad, _, _) in zip(params.parts(), gradients, strict=True):
        ess, delta, keep, gain, rate, pull, radius = settings[group].to(hess.dtype).unbind()
        h, g = hess[here], momentum[here]
        m = mean[here] if sampled else p
        if sums is None:
            c = _noise(hess, here, drawn[group], noise) * grad
        else:
            grad, c = sums[0][here] / sums[2], sums[1][here] / sums[2]
        a = h + delta
        c = c - (1 / ess) * (h / a)
        squares += c.dot(c)
        h += gain * a * (c + 0.5 * gain * c * c)
        g += keep * (grad - g)
        new = m - rate * ((g + pull * m) / (h + delta)).clamp(-radius, radius)
        if next_step is None:
            p.copy_(new)
        else:
            mean[here] = new
            p.copy_(new + _noise(hess, here, settings[group], noise_next))
    holds.fill_(int(next_step is not None))
    return squares


def _noise(hess: Tensor, here: slice, setting: Tensor, noise: Noise) -> Tensor:
    """σz of a segment."""
    n = here.stop - here.start
    z = sample_normals(noise.seed, n, 0, 1, noise.stream, noise.step, hess.device, here.start)
    scale = (1 / setting[0].sqrt()).to(hess.dtype)
    return z[0].to(hess.dtype) * (scale * (hess[here] + setting[1].to(hess.dtype)).rsqrt())


def _check(params: Segments, noise: Noise, *vectors: Tensor) -> None:
    for v in vectors:
        if v.shape != (params.n,) or v.dtype != params.dtype or not v.is_contiguous():
            raise ParameterError(
                f"uq.kernels.ivon: state must be contiguous vectors of {params.n} {params.dtype}, "
                f"got {tuple(v.shape)} of {v.dtype}."
            )
    if not 0 <= noise.step < 1 << 32:
        raise ParameterError(f"uq.kernels.ivon: step must be below 2^32, got {noise.step!r}.")


def _launch(
    kernel: Any,
    params: Segments,
    *tensors: Tensor,
    noise: Noise | None = None,
    numbers: tuple[int, ...] = (),
    **settings: bool,
) -> None:
    import triton.language as tl

    tables = params.tables()
    if not len(tables[0]):
        return
    counters: tuple[int, ...] = ()
    if noise is not None:
        counters = (noise.seed & (1 << 64) - 1, noise.stream, noise.step, *numbers)
        settings["ACC"] = tl.float64 if params.dtype == torch.float64 else tl.float32
    kernel[(len(tables[0]),)](*tensors, *tables, *counters, BLOCK=BLOCK, **settings)
