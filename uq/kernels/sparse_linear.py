"""Linear layers with sparse Gaussian weights: work for the active entries alone, where it pays.

Of an N × K weight a few entries are Gaussian, at flat positions n·K + k, and all others are zero.
On a CPU products go through compressed rows, gradients included: for out = x Wᵀ both keep to the
pattern,

    dx = g W,    dW_ij = Σ_b g_bi x_bj at active (i, j) alone.

Against dense products (one core, 256 rows, 1024 × 1024 weights) each of the three is 10 times as
fast at a density of 0.03, 2.7 times at 0.1 and alike at about 0.25. On a GPU tensor cores make up
for all zeros above a density of a few hundredths, so that weights are scattered and go through the
dense kernels (a mask beside a dense weight: ``mask`` of :func:`uq.kernels.sampled_linear` and
:func:`uq.kernels.local_reparam_linear`).

Weight noise is addressed by the dense position: a weight keeps its draw when others come and go.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from uq.errors import ParameterError
from uq.kernels.arguments import check_counters, check_shapes
from uq.kernels.dispatch import cdiv
from uq.kernels.linear import sampled_linear
from uq.kernels.local_reparam import FLOOR, local_reparam_linear
from uq.kernels.philox import Purpose, normals, sample_normals, stream

# Where training through compressed rows beats dense products, measured on one core.
MAX_DENSITY = 0.2
MIN_WEIGHTS = 1 << 17


def can_compress(like: Tensor) -> bool:
    """Whether products with compressed rows of ``like``'s type can run where it lies."""
    return (
        like.device.type == "cpu"
        and like.dtype in (torch.float32, torch.float64)
        and torch.backends.mkl.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
def _silence_beta_warning() -> None:
    """Torch calls its compressed tensors beta, once a process; what is used here is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [1.0], size=(1, 1))


def compressed(row_starts: Tensor, columns: Tensor, values: Tensor, size: Any) -> Tensor:
    """A matrix of compressed rows; positions are int32, which MKL takes as they are."""
    _silence_beta_warning()
    return torch.sparse_csr_tensor(row_starts, columns, values, size=size)


@dataclass(frozen=True)
class Pattern:
    """Positions of the active entries of a matrix, by rows and by columns."""

    size: tuple[int, int]
    row_starts: Tensor
    columns: Tensor
    column_starts: Tensor
    rows: Tensor
    order: Tensor
    """Order that sorts the entries by columns."""

    @classmethod
    def of(cls, index: Tensor, size: tuple[int, int]) -> Pattern:
        """From flat positions, ascending."""
        n_rows, n_columns = size
        row, column = index // n_columns, index % n_columns
        order = (column * n_rows + row).argsort()
        return cls(
            size,
            _starts(row, n_rows),
            column.int(),
            _starts(column, n_columns),
            row[order].int(),
            order,
        )

    @property
    def index(self) -> Tensor:
        """Flat positions of the active entries, ascending."""
        counts = self.row_starts.diff().long()
        row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        return row * self.size[1] + self.columns

    def matrix(self, values: Tensor) -> Tensor:
        """The matrix with ``values`` at its active entries."""
        return compressed(self.row_starts, self.columns, values, self.size)

    def transposed(self, values: Tensor) -> Tensor:
        """Its transpose."""
        size = self.size[1], self.size[0]
        return compressed(self.column_starts, self.rows, values[self.order], size)


def _starts(group: Tensor, n: int) -> Tensor:
    counts = torch.bincount(group, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
        columns = x.T.contiguous()  # free where x is the output of such a product
        ctx.save_for_backward(columns, values)
        ctx.pattern = pattern
        return (pattern.matrix(values) @ columns).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        columns, values = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        gradient = gradient.T.contiguous()
        dx = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = (pattern.transposed(values) @ gradient).T
        if ctx.needs_input_grad[1]:
            zeros = pattern.matrix(torch.zeros_like(values))
            dvalues = torch.sparse.sampled_addmm(zeros, gradient, columns.T).values()
        return dx, dvalues, None


def sparse_product(x: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """x Wᵀ for x of shape (…, columns) and W of shape (rows, columns), differentiable once."""
    rows = x.reshape(-1, x.shape[-1])
    out = cast(Tensor, _Product.apply(rows, values, pattern))
    return out.reshape(*x.shape[:-1], -1)


# -- layers --------------------------------------------------------------------------------------


def compression_pays(n_active: int, size: tuple[int, int], like: Tensor) -> bool:
    """Whether products should go through compressed rows: on a CPU, sparse, large."""
    n = size[0] * size[1]
    return n_active <= MAX_DENSITY * n and n >= MIN_WEIGHTS and can_compress(like)


def _scatter(values: Tensor, index: Tensor, size: tuple[int, int]) -> Tensor:
    return values.new_zeros(size[0] * size[1]).scatter(0, index, values).view(size)


def _check(what: str, mean: Tensor, std: Tensor, index: Tensor, size: tuple[int, int]) -> None:
    if mean.ndim != 1 or not mean.shape == std.shape == index.shape:
        raise ParameterError(
            f"{what}: mean, std and index need one value for each active entry, got "
            f"{tuple(mean.shape)}, {tuple(std.shape)} and {tuple(index.shape)}."
        )
    n = size[0] * size[1]
    if (
        index.device.type == "cpu"
        and len(index)
        and not 0 <= int(index.min()) <= int(index.max()) < n
    ):
        raise ParameterError(
            f"{what}: index must hold positions from 0 to {n - 1} of a weight {size}, got "
            f"{int(index.min())} to {int(index.max())}."
        )


def _ordered(
    mean: Tensor, std: Tensor, index: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Pattern]:
    """Values by ascending positions, and their pattern."""
    order = index.argsort()
    return mean[order], std[order], Pattern.of(index[order], size)


def sparse_sampled_linear(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    index: Tensor,
    size: tuple[int, int],
    *,
    n_samples: int,
    seed: int,
    step: int = 0,
    tensor: int = 0,
    first: int = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """:func:`uq.kernels.sampled_linear` of a sparse weight.

    Parameters
    ----------
    x : Tensor of shape (rows, K) or (n_samples, rows, K)
        Inputs.
    mean, std, index : Tensor of shape (s,)
        Means, standard deviations and flat positions of the active entries, in any order.
    size : tuple of int
        Shape (N, K) of the weight.
    n_samples, seed, step, tensor, first
        As of :func:`uq.kernels.sampled_linear`: the draws are those of the dense weight with zero
        standard deviations.
    bias : Tensor of shape (N,), optional
        Added to the outputs.

    Returns
    -------
    Tensor of shape (n_samples, rows, N)

    Examples
    --------
    >>> import torch
    >>> from uq.kernels.sparse_linear import sparse_sampled_linear
    >>> index = torch.tensor([0, 5])
    >>> mean, std = torch.ones(2), torch.full((2,), 0.1)
    >>> sparse_sampled_linear(torch.ones(4, 3), mean, std, index, (2, 3), n_samples=8, seed=0).shape
    torch.Size([8, 4, 2])
    """
    _check("sparse_sampled_linear", mean, std, index, size)
    if not compression_pays(len(mean), size, mean):
        return sampled_linear(
            x, _scatter(mean, index, size), _scatter(std, index, size), n_samples=n_samples,
            seed=seed, step=step, tensor=tensor, first=first, bias=bias,
        )  # fmt: skip
    like = mean.new_empty(1).expand(size)
    check_shapes("sparse_sampled_linear", x, like, like, n_samples, bias, None, None)
    check_counters("sparse_sampled_linear", size[0] * size[1], tensor, step, first)
    mean, std, pattern = _ordered(mean, std, index, size)
    channel, groups = stream(Purpose.WEIGHT, tensor), range(first // 4, cdiv(first + n_samples, 4))
    noise = torch.cat([normals(seed, pattern.index, g, channel, step) for g in groups])
    noise = noise[first % 4 : first % 4 + n_samples].to(mean.dtype)
    out = torch.stack(
        [
            sparse_product(x if x.ndim == 2 else x[s], mean + std * z, pattern)
            for s, z in enumerate(noise)
        ]
    )
    return out if bias is None else out + bias


def sparse_local_reparam_linear(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    index: Tensor,
    size: tuple[int, int],
    *,
    seed: int,
    step: int = 0,
    tensor: int = 0,
    n_samples: int | None = None,
    first: int = 0,
    first_row: int = 0,
    bias: Tensor | None = None,
    floor: float = FLOOR,
) -> Tensor:
    """:func:`uq.kernels.local_reparam_linear` of a sparse weight.

    Parameters
    ----------
    x : Tensor of shape (rows, K) or (n_samples, rows, K)
        Inputs.
    mean, std, index, size, bias
        As of :func:`sparse_sampled_linear`.
    seed, step, tensor, n_samples, first, first_row, floor
        As of :func:`uq.kernels.local_reparam_linear`.

    Returns
    -------
    Tensor of shape (rows, N), or (n_samples, rows, N) where ``n_samples`` is given
    """
    _check("sparse_local_reparam_linear", mean, std, index, size)
    if not compression_pays(len(mean), size, mean):
        return local_reparam_linear(
            x, _scatter(mean, index, size), _scatter(std, index, size), seed=seed, step=step,
            tensor=tensor, n_samples=n_samples, first=first, first_row=first_row, bias=bias,
            floor=floor,
        )  # fmt: skip
    count, rows = 1 if n_samples is None else n_samples, x.shape[-2]
    like = mean.new_empty(1).expand(size)
    check_shapes("sparse_local_reparam_linear", x, like, like, count, bias, None, None)
    mean, std, pattern = _ordered(mean, std, index, size)
    m = sparse_product(x, mean, pattern)
    v = sparse_product(x.square(), std.square(), pattern)
    noise = sample_normals(
        seed, rows * size[0], first, count, stream(Purpose.OUTPUT, tensor), step, x.device,
        first_row * size[0],
    )  # fmt: skip
    m = m if bias is None else m + bias
    out = torch.addcmul(m, (v + floor).sqrt(), noise.to(x.dtype).view(count, rows, -1))
    return out[0] if n_samples is None else out
