"""Linear layers with Gaussian weights by local reparameterisation: noise of each output its own.

    m = X μᵀ + β,    v = X² (σ²)ᵀ + τ²,    Y_s = m + √(v + δ) ξ_s,    ξ ~ N(0, 1)

(D. P. Kingma, T. Salimans, M. Welling, "Variational dropout and the local reparameterization
trick", NeurIPS 2015, arXiv 1506.02557, eq. 6.) For one row and one layer this is the law of
:func:`uq.kernels.sampled_linear`, and its gradients vary less, as rows are
independent; *only* for one row: covariances between rows, and draws of functions, are wrong.

On a GPU both products come from one reading of x, μ and σ, and no noise is in memory. The gradient
draws it again:

    dm = Σ_s g_s,  dv = Σ_s g_s ξ_s / (2√(v + δ)),  dX = dm μ + 2X ⊙ (dv σ²),
    dμ = dmᵀ X,    dσ = 2σ ⊙ (dvᵀ X²).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from uq.kernels.arguments import autocast_input, check_counters, check_shapes, signed
from uq.kernels.dispatch import cdiv, use_triton
from uq.kernels.philox import Purpose, sample_normals, stream
from uq.kernels.products import PROGRAMS, over_rows, tiles, turned, types

# Outputs that a program of the elementwise part of the gradient takes: rows × columns.
_BM, _BN = 16, 64
FLOOR = 1e-8
"""Keeps the square root differentiable at a variance of zero."""


def local_reparam_linear(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    seed: int,
    step: int = 0,
    tensor: int = 0,
    n_samples: int | None = None,
    first: int = 0,
    first_row: int = 0,
    bias: Tensor | None = None,
    bias_std: Tensor | None = None,
    mask: Tensor | None = None,
    rho: bool = False,
    floor: float = FLOOR,
) -> Tensor:
    """Apply a linear layer with Gaussian weights, the noise of each row and output drawn anew.

    Differentiable once with respect to ``x``, ``mean``, ``std``, ``bias`` and ``bias_std``.

    Parameters
    ----------
    x : Tensor of shape (rows, K) or (n_samples, rows, K)
        Inputs, the same for all draws or of each draw its own.
    mean, std : Tensor of shape (N, K)
        Means μ and standard deviations σ of the weights.
    seed : int
        64-bit key of the noise.
    step : int, default=0
        Counter of calls: other noise in each training step.
    tensor : int, default=0
        Number of this layer among those of one seed, below 2²⁴.
    n_samples : int, optional
        Number S of draws; one without an axis of its own by default.
    first, first_row : int, default=0
        Number of the first draw and of the first row: parts of a batch get the noise of the whole.
    bias, bias_std : Tensor of shape (N,), optional
        Means and standard deviations of the bias.
    mask : Tensor of shape (N, K), optional
        Weights where it is 0 or False are exactly zero.
    rho : bool, default=False
        Whether ``std`` and ``bias_std`` hold ρ, σ = log(1 + exp ρ).
    floor : float, default=1e-8
        δ, which keeps the square root differentiable at a variance of zero.

    Returns
    -------
    Tensor of shape (rows, N), or (n_samples, rows, N) where ``n_samples`` is given

    Raises
    ------
    ParameterError
        If shapes do not fit, or a number is out of its range.

    Examples
    --------
    >>> import torch
    >>> from uq.kernels import local_reparam_linear
    >>> x, mean, std = torch.ones(5, 3), torch.zeros(2, 3), torch.ones(2, 3)
    >>> y = local_reparam_linear(x, mean, std, seed=0)
    >>> y.shape, bool((y == y[:1]).any(1)[1:].any())  # equal rows have noise of their own
    (torch.Size([5, 2]), False)
    """
    count = 1 if n_samples is None else n_samples
    check_shapes("local_reparam_linear", x, mean, std, count, bias, bias_std, mask)
    rows = x.shape[-2]
    check_counters("local_reparam_linear", (first_row + rows) * mean.shape[0], tensor, step, first)
    x = autocast_input(x)
    channel = stream(Purpose.OUTPUT, tensor)
    if use_triton(x):
        y = torch.ops.uq.local_reparam_linear(
            x, mean, std, bias, bias_std, mask,
            count, signed(seed), step, channel, first, first_row, rho, floor,
        )[0]  # fmt: skip
    else:
        noise = sample_normals(
            seed, rows * mean.shape[0], first, count, channel, step, x.device,
            offset=first_row * mean.shape[0],
        )  # fmt: skip
        noise = noise.to(x.dtype).view(count, rows, -1)
        y = reference(x, mean, std, noise, bias, bias_std, mask, rho, floor)
    return y[0] if n_samples is None else y


def reference(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    noise: Tensor,
    bias: Tensor | None = None,
    bias_std: Tensor | None = None,
    mask: Tensor | None = None,
    rho: bool = False,
    floor: float = FLOOR,
) -> Tensor:
    """The same in plain torch at given noise ξ of shape (n_samples, rows, N)."""
    if rho:
        std = F.softplus(std)
        bias_std = None if bias_std is None else F.softplus(bias_std)
    if mask is not None:
        mean, std = mean * mask, std * mask
    m = F.linear(x, mean.to(x.dtype), None if bias is None else bias.to(x.dtype))
    variance_of_bias = None if bias_std is None else bias_std.square().to(x.dtype)
    v = F.linear(x.square(), std.square().to(x.dtype), variance_of_bias)
    return torch.addcmul(m, (v + floor).sqrt(), noise)


# -- operators -----------------------------------------------------------------------------------

_COUNTERS = (
    "SymInt n_samples, SymInt seed, SymInt step, SymInt stream, SymInt first, SymInt first_row"
)


@torch.library.custom_op(
    "uq::local_reparam_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor mean, Tensor std, Tensor? bias, Tensor? bias_std, Tensor? mask, "
    f"{_COUNTERS}, bool rho, float floor) -> (Tensor, Tensor)",
)
def _forward(  # type: ignore[no-untyped-def]
    x, mean, std, bias, bias_std, mask, n_samples, seed, step, stream, first, first_row, rho, floor
):
    from uq.kernels.local_reparam_triton import forward_kernel

    shared, rows, n_in, n_out = x.ndim == 2, x.shape[-2], x.shape[-1], mean.shape[0]
    y, root = _outputs(x, mean, n_samples)
    x, how = x.contiguous(), _how(rows, x.dtype)
    grid = cdiv(rows, how["BM"]), cdiv(n_out, how["BN"]), 1 if shared else n_samples
    forward_kernel[grid](
        x, mean.contiguous(), std.contiguous(), x if mask is None else mask.contiguous(),
        x if bias is None else bias.contiguous(),
        x if bias_std is None else bias_std.contiguous(), y, root,
        seed, stream, step, first, first_row, floor, n_samples, rows, n_out, n_in,
        SHARED=shared, RHO=rho, MASK=mask is not None,
        BIAS=bias is not None, NOISY_BIAS=bias_std is not None, **how,
    )  # fmt: skip
    return y, root


def _how(rows: int, dtype: torch.dtype) -> dict[str, Any]:
    return tiles(rows, dtype) | types(dtype)


def _outputs(x: Tensor, mean: Tensor, n_samples: int) -> tuple[Tensor, Tensor]:
    rows, n_out = x.shape[-2], mean.shape[0]
    kind = torch.promote_types(x.dtype, torch.float32)
    planes = 1 if x.ndim == 2 else n_samples
    return x.new_empty(n_samples, rows, n_out), x.new_empty(planes, rows, n_out, dtype=kind)


@_forward.register_fake
def _(  # type: ignore[no-untyped-def]
    x, mean, std, bias, bias_std, mask, n_samples, seed, step, stream, first, first_row, rho, floor
):
    return _outputs(x, mean, n_samples)


@torch.library.custom_op(
    "uq::local_reparam_linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor root, Tensor x, Tensor mean, Tensor std, Tensor? bias_std, "
    f"Tensor? mask, {_COUNTERS}, bool rho, bool need_x, bool need_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(  # type: ignore[no-untyped-def]
    grad, root, x, mean, std, bias_std, mask, n_samples, seed, step, stream, first, first_row, rho, need_x, need_weight  # noqa: E501
):  # fmt: skip
    from uq.kernels.local_reparam_triton import input_kernel, moments_kernel, weight_kernel

    shared, rows, n_in, n_out = x.ndim == 2, x.shape[-2], x.shape[-1], mean.shape[0]
    x, how = x.contiguous(), _how(rows, x.dtype)
    dm, dv = torch.empty_like(root), torch.empty_like(root)
    moments_kernel[(cdiv(rows, _BM), cdiv(n_out, _BN), len(root))](
        grad.contiguous(), root, dm, dv, seed, stream, step, first, first_row,
        n_samples, rows, n_out, SHARED=shared, ACC=how["ACC"], BM=_BM, BN=_BN,
    )  # fmt: skip
    rows *= len(root)  # draws with inputs of their own are so many rows
    dx = x.new_empty(0)
    if need_x:
        dx = torch.empty_like(x)
        turn = turned(how)
        input_kernel[(cdiv(rows, turn["BM"]), cdiv(n_in, turn["BK"]))](
            x, mean.contiguous(), std.contiguous(), x if mask is None else mask.contiguous(),
            dm, dv, dx, rows, n_out, n_in, RHO=rho, MASK=mask is not None, **turn,
        )  # fmt: skip
    if not need_weight:
        return dx, *(x.new_empty(0) for _ in range(4))
    how = over_rows(how)
    across = cdiv(n_out, how["BN"]), cdiv(n_in, how["BK"])
    # Small weights and many rows: several programs a tile, whose sums are added in order.
    blocks = cdiv(rows, how["BM"])
    each = cdiv(blocks, min(blocks, cdiv(PROGRAMS, across[0] * across[1])))
    shares = cdiv(blocks, each)
    parts = [root.new_empty(shares, n_out, n_in) for _ in range(2)]
    weight_kernel[(*across, shares)](x, dm, dv, *parts, rows, n_out, n_in, each * how["BM"], **how)
    d_mean, d_square = (t.sum(0) for t in parts)
    d_std = 2 * d_square * (F.softplus(std) if rho else std)
    if rho:
        d_std = d_std * torch.sigmoid(std)
    if mask is not None:
        d_mean, d_std = d_mean * mask, d_std * mask
    d_bias, d_bias_std = dm.sum((0, 1)), dv.sum((0, 1))
    if bias_std is not None:
        d_bias_std = 2 * d_bias_std * (F.softplus(bias_std) if rho else bias_std)
        if rho:
            d_bias_std = d_bias_std * torch.sigmoid(bias_std)
    kind = mean.dtype
    return dx, d_mean.to(kind), d_std.to(std.dtype), d_bias.to(kind), d_bias_std.to(kind)


@_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad, root, x, mean, std, bias_std, mask, n_samples, seed, step, stream, first, first_row, rho, need_x, need_weight  # noqa: E501
):  # fmt: skip
    n = mean.shape[0]
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    if not need_weight:
        return dx, *(x.new_empty(0) for _ in range(4))
    return dx, torch.empty_like(mean), torch.empty_like(std), mean.new_empty(n), mean.new_empty(n)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, mean, std, _bias, bias_std, mask, *counters, _floor = inputs
    ctx.save_for_backward(output[1], x, mean, std, bias_std, mask)
    ctx.counters = counters
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    root, x, mean, std, bias_std, mask = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:5])
    given = torch.ops.uq.local_reparam_linear_backward(
        grad, root, x, mean, std, bias_std, mask, *ctx.counters, need_x, need_weight
    )
    wanted = ctx.needs_input_grad[:5]
    return (*(g if want else None for g, want in zip(given, wanted, strict=True)), *[None] * 9)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
