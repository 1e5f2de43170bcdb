"""Linear layers under many draws of their Gaussian weights, without the draws in memory.

    Y[s, b, n] = Σ_k X[s or 0, b, k] (μ[n, k] + σ[n, k] ε[s, n, k]) + β[n] + τ[n] ζ[s, n]

Written out, S draws of an N × K weight take S·N·K numbers for ε and as many for the weights. Here
the noise comes from counters (:mod:`uq.kernels.philox`): on a GPU each tile of weights is drawn in
registers, where it is used; elsewhere, and for more rows than that pays for, a few draws at a time
are written out. The gradient keeps the inputs alone and draws the same noise again:

    dμ = Σ_s dY_sᵀ X_s,    dσ = Σ_s (dY_sᵀ X_s) ε_s,    dX_s = dY_s W_s.

Draw s depends on (seed, step, tensor, s) and the position of a weight, not on the other draws, on
how rows are split, or on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uq.kernels.arguments import autocast_input, check_counters, check_shapes, signed
from uq.kernels.dispatch import cdiv, use_triton
from uq.kernels.philox import Purpose, sample_normals, stream
from uq.kernels.products import PROGRAMS, over_rows, tiles, turned, types

# Rows up to which drawing weights anew for each tile of rows is cheaper than writing them out.
_FUSED_ROWS = 256
# Elements of the weights that are written out at a time.
_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 26}


def sampled_linear(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    n_samples: int,
    seed: int,
    step: int = 0,
    tensor: int = 0,
    first: int = 0,
    bias: Tensor | None = None,
    bias_std: Tensor | None = None,
    mask: Tensor | None = None,
    rho: bool = False,
) -> Tensor:
    """Apply a linear layer under ``n_samples`` draws of its weight, and of its bias.

    Differentiable once with respect to ``x``, ``mean``, ``std``, ``bias`` and ``bias_std``, by
    drawing the noise again. One draw is one weight for all rows: right for joint draws of functions
    and their covariances; :func:`uq.kernels.local_reparam.local_reparam_linear` draws each row's
    output on its own.

    Parameters
    ----------
    x : Tensor of shape (rows, K) or (n_samples, rows, K)
        Inputs, the same for all draws or of each draw its own.
    mean, std : Tensor of shape (N, K)
        Means μ and standard deviations σ of the weights.
    n_samples : int
        Number S of draws.
    seed : int
        64-bit key of the noise.
    step : int, default=0
        Counter of calls: other noise in each training step.
    tensor : int, default=0
        Number of this weight among those of one seed, below 2²⁴.
    first : int, default=0
        Number of the first draw: draws 0 to 7 and then 8 to 15 are the 16 draws of one call.
    bias, bias_std : Tensor of shape (N,), optional
        Means and standard deviations of the bias; the bias is no random one without the latter.
    mask : Tensor of shape (N, K), optional
        Weights where it is 0 or False are exactly zero. The others keep their noise whatever the
        mask is.
    rho : bool, default=False
        Whether ``std`` and ``bias_std`` hold ρ, σ = log(1 + exp ρ).

    Returns
    -------
    Tensor of shape (n_samples, rows, N)

    Raises
    ------
    ParameterError
        If shapes do not fit, or a number is out of its range.

    Examples
    --------
    >>> import torch
    >>> from uq.kernels.linear import sampled_linear
    >>> x, mean, std = torch.ones(5, 3), torch.zeros(2, 3), torch.ones(2, 3)
    >>> y = sampled_linear(x, mean, std, n_samples=8, seed=0)
    >>> y.shape, bool((y == y[:, :1]).all())  # equal rows have equal outputs in each draw
    (torch.Size([8, 5, 2]), True)
    >>> later = sampled_linear(x, mean, std, n_samples=4, seed=0, first=4)
    >>> bool((later == y[4:]).all())
    True
    """
    check_shapes("sampled_linear", x, mean, std, n_samples, bias, bias_std, mask)
    check_counters("sampled_linear", mean.numel(), tensor, step, first)
    x = autocast_input(x)
    out: Tensor = torch.ops.uq.sampled_linear(
        x, mean, std, bias, bias_std, mask, n_samples, signed(seed), step, tensor, first, rho
    )
    return out


# -- operators -----------------------------------------------------------------------------------

_COUNTERS = "SymInt n_samples, SymInt seed, SymInt step, SymInt tensor, SymInt first, bool rho"


@torch.library.custom_op(
    "uq::sampled_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor mean, Tensor std, Tensor? bias, Tensor? bias_std, Tensor? mask, "
    f"{_COUNTERS}) -> Tensor",
)
def _forward(x, mean, std, bias, bias_std, mask, n_samples, seed, step, tensor, first, rho):  # type: ignore[no-untyped-def]
    call = _Call(x, mean, std, bias, bias_std, mask, n_samples, seed, step, tensor, first, rho)
    return call.fused_forward() if call.fused else call.forward()


@_forward.register_fake
def _(x, mean, std, bias, bias_std, mask, n_samples, seed, step, tensor, first, rho):  # type: ignore[no-untyped-def]
    return x.new_empty(n_samples, x.shape[-2], mean.shape[0])


@torch.library.custom_op(
    "uq::sampled_linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor mean, Tensor std, Tensor? bias_std, Tensor? mask, "
    f"{_COUNTERS}, bool need_x, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(  # type: ignore[no-untyped-def]
    grad, x, mean, std, bias_std, mask, n_samples, seed, step, tensor, first, rho, need_x, need_weight  # noqa: E501
):  # fmt: skip
    call = _Call(x, mean, std, None, bias_std, mask, n_samples, seed, step, tensor, first, rho)
    grad = grad.contiguous()
    run = call.fused_backward if call.fused else call.backward
    dx, *of_weight = run(grad, need_x, need_weight)
    empty = x.new_empty(0)
    if not need_weight:
        return (empty if dx is None else dx), *(x.new_empty(0) for _ in range(4))
    d_mean, d_std, d_bias, d_bias_std = of_weight
    if mask is not None:
        d_mean, d_std = d_mean * mask, d_std * mask
    if rho:
        d_std = d_std * torch.sigmoid(std)
        if bias_std is not None:
            d_bias_std = d_bias_std * torch.sigmoid(bias_std)
    return (
        empty if dx is None else dx,
        d_mean.to(mean.dtype), d_std.to(std.dtype), d_bias.to(mean.dtype),
        d_bias_std.to(mean.dtype),
    )  # fmt: skip


@_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad, x, mean, std, bias_std, mask, n_samples, seed, step, tensor, first, rho, need_x, need_weight  # noqa: E501
):  # fmt: skip
    n = mean.shape[0]
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    if not need_weight:
        return dx, *(x.new_empty(0) for _ in range(4))
    return dx, torch.empty_like(mean), torch.empty_like(std), mean.new_empty(n), mean.new_empty(n)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, mean, std, bias, bias_std, mask, *ctx.counters = inputs
    ctx.save_for_backward(x, mean, std, bias_std, mask)
    ctx.has_bias = bias is not None


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, mean, std, bias_std, mask = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:5])
    dx, d_mean, d_std, d_bias, d_bias_std = torch.ops.uq.sampled_linear_backward(
        grad, x, mean, std, bias_std, mask, *ctx.counters, need_x, need_weight
    )
    given = (dx, d_mean, d_std, d_bias, d_bias_std)
    wanted = ctx.needs_input_grad[:5]
    return (*(g if want else None for g, want in zip(given, wanted, strict=True)), *[None] * 7)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


# -- what they run -------------------------------------------------------------------------------


class _Call:
    """One call's tensors, contiguous, and its noise."""

    def __init__(
        self,
        x: Tensor,
        mean: Tensor,
        std: Tensor,
        bias: Tensor | None,
        bias_std: Tensor | None,
        mask: Tensor | None,
        n_samples: int,
        seed: int,
        step: int,
        tensor: int,
        first: int,
        rho: bool,
    ) -> None:
        self.x, self.mean, self.std = x.contiguous(), mean.contiguous(), std.contiguous()
        self.bias, self.bias_std, self.rho = bias, bias_std, rho
        self.mask = None if mask is None else mask.contiguous()
        self.n_samples, self.seed, self.step, self.first = n_samples, seed, step, first
        self.streams = stream(Purpose.WEIGHT, tensor), stream(Purpose.BIAS, tensor)
        self.shared = x.ndim == 2
        self.rows, self.n_in, self.n_out = x.shape[-2], x.shape[-1], mean.shape[0]
        self.triton = use_triton(x)

    @property
    def fused(self) -> bool:
        """Whether weights should be drawn in registers."""
        return self.triton and self.rows <= _FUSED_ROWS

    # -- a few draws at a time -------------------------------------------------------------------

    def _chunks(self) -> list[tuple[int, int]]:
        size = max(1, _CHUNK[self.x.device.type] // self.mean.numel())
        if size > 4:
            size -= size % 4
        return [(a, min(size, self.n_samples - a)) for a in range(0, self.n_samples, size)]

    def _noise(self, start: int, count: int, n: int, stream: int) -> Tensor:
        """Noise of draws from ``start`` on, (count, n)."""
        noise = sample_normals(
            self.seed, n, self.first + start, count, stream, self.step, self.x.device
        )
        return noise.to(self.mean.dtype)

    def _scales(self) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of the weights, zero where the mask is."""
        mean, std = self.mean, self.std
        if self.rho:
            std = torch.nn.functional.softplus(std)
        if self.mask is not None:
            mean, std = mean * self.mask, std * self.mask
        return mean, std

    def _biases(self, start: int, count: int) -> Tensor | None:
        """Biases of a few draws, (count or 1, N)."""
        if self.bias_std is None:
            return None if self.bias is None else self.bias[None]
        std = torch.nn.functional.softplus(self.bias_std) if self.rho else self.bias_std
        shift = std * self._noise(start, count, self.n_out, self.streams[1])
        return shift if self.bias is None else self.bias + shift

    def forward(self) -> Tensor:
        """Outputs, with a few draws of the weights written out at a time."""
        mean, std = self._scales()
        out = self.x.new_empty(self.n_samples, self.rows, self.n_out)
        for start, count in self._chunks():
            noise = self._noise(start, count, self.mean.numel(), self.streams[0])
            weights = torch.addcmul(mean, std, noise.view(count, self.n_out, self.n_in))
            weights = weights.to(self.x.dtype)
            at = slice(start, start + count)
            if self.shared:  # one large product is faster than several small ones
                flat = weights.view(-1, self.n_in) @ self.x.T
                out[at] = flat.view(count, self.n_out, self.rows).mT
            else:
                torch.bmm(self.x[at], weights.mT, out=out[at])
            biases = self._biases(start, count)
            if biases is not None:
                out[at] += biases[:, None].to(out.dtype)
        return out

    def backward(
        self, grad: Tensor, need_x: bool, need_weight: bool
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
        """Gradients by inputs, means, standard deviations, biases and theirs."""
        mean, std = self._scales()
        dx = torch.zeros_like(self.x) if need_x else None
        d_mean, d_std = torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        rows = grad.sum(1).to(mean.dtype)
        d_bias, d_bias_std = rows.sum(0), torch.zeros_like(rows[0])
        for start, count in self._chunks():
            noise = self._noise(start, count, self.mean.numel(), self.streams[0])
            noise = noise.view(count, self.n_out, self.n_in)
            at = slice(start, start + count)
            g = grad[at]
            if need_weight:
                if self.shared:
                    flat = g.permute(0, 2, 1).reshape(-1, self.rows) @ self.x
                    outer = flat.view(count, self.n_out, self.n_in)
                else:
                    outer = torch.bmm(g.mT, self.x[at])
                d_mean += outer.sum(0)
                d_std += (outer * noise).sum(0)
                if self.bias_std is not None:
                    d_bias_std += (
                        rows[at] * self._noise(start, count, self.n_out, self.streams[1])
                    ).sum(0)
            if dx is not None:
                weights = torch.addcmul(mean, std, noise).to(self.x.dtype)
                if self.shared:
                    wide = g.permute(1, 0, 2).reshape(self.rows, -1)
                    dx += wide @ weights.view(-1, self.n_in)
                else:
                    torch.bmm(g, weights, out=dx[at])
        return dx, d_mean, d_std, d_bias, d_bias_std

    # -- weights in registers --------------------------------------------------------------------

    def _launch(self) -> tuple[dict[str, Any], int]:
        groups = (self.first + self.n_samples - 1) // 4 - self.first // 4 + 1
        return tiles(self.rows, self.x.dtype) | types(self.x.dtype), groups

    def fused_forward(self) -> Tensor:
        """Outputs, with weights drawn in registers."""
        from uq.kernels.linear_triton import forward_kernel

        how, groups = self._launch()
        out = self.x.new_empty(self.n_samples, self.rows, self.n_out)
        if not self.shared:  # four tiles of inputs, for which memory is short
            how = how | {"num_stages": 1}
        grid = cdiv(self.rows, how["BM"]), cdiv(self.n_out, how["BN"]), groups
        none = self.x
        forward_kernel[grid](
            self.x, self.mean, self.std, none if self.mask is None else self.mask,
            none if self.bias is None else self.bias.contiguous(),
            none if self.bias_std is None else self.bias_std.contiguous(), out,
            self.seed, *self.streams, self.step, self.first,
            self.n_samples, self.rows, self.n_out, self.n_in,
            SHARED=self.shared, RHO=self.rho, MASK=self.mask is not None,
            BIAS=self.bias is not None, NOISY_BIAS=self.bias_std is not None, **how,
        )  # fmt: skip
        return out

    def fused_backward(
        self, grad: Tensor, need_x: bool, need_weight: bool
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
        """As :meth:`backward`, with weights drawn in registers."""
        from uq.kernels.linear_triton import input_kernel, weight_kernel

        how, groups = self._launch()
        sizes = self.n_samples, self.rows, self.n_out, self.n_in
        counters = self.seed, *self.streams, self.step, self.first
        dx = None
        if need_x:
            dx = torch.empty_like(self.x)
            turn = turned(how)
            along = cdiv(self.rows, turn["BM"]), cdiv(self.n_in, turn["BK"])
            none = self.x if self.mask is None else self.mask
            input_kernel[(*along, 1 if self.shared else groups)](
                grad, self.mean, self.std, none, dx,
                self.seed, self.streams[0], self.step, self.first, *sizes,
                SHARED=self.shared, RHO=self.rho, MASK=self.mask is not None, **turn,
            )  # fmt: skip
        high = self.mean.new_empty(0).to(torch.promote_types(self.x.dtype, torch.float32))
        if not need_weight:
            return dx, high, high, high, high
        across = cdiv(self.n_out, how["BN"]), cdiv(self.n_in, how["BK"])
        # Small weights and many draws: several programs a tile, whose sums are added in order.
        each = cdiv(groups, min(groups, cdiv(PROGRAMS, across[0] * across[1])))
        shares = cdiv(groups, each)
        of_weight = [high.new_empty(shares, self.n_out, self.n_in) for _ in range(2)]
        of_bias = [high.new_empty(shares, self.n_out) for _ in range(2)]
        weight_kernel[(*across, shares)](
            self.x, grad, *of_weight, *of_bias, *counters, *sizes, each, SHARED=self.shared,
            **over_rows(how),
        )  # fmt: skip
        d_mean, d_std, d_bias, d_bias_std = (t.sum(0) for t in (*of_weight, *of_bias))
        return dx, d_mean, d_std, d_bias, d_bias_std
