"""Sparse Gaussian layers: equal to dense ones with zeros, whatever way the products take."""

import pytest
import torch

from uq.errors import ParameterError
from uq.kernels import local_reparam_linear, sampled_linear
from uq.kernels.sparse_linear import sparse_local_reparam_linear, sparse_sampled_linear

SIZE = (30, 40)


@pytest.fixture(params=["rows", "dense", "triton"])
def way(request, monkeypatch):
    """Through compressed rows, dense products, or the interpreted kernels."""
    monkeypatch.setenv("UQ_KERNELS", "triton" if request.param == "triton" else "reference")
    if request.param == "rows":
        monkeypatch.setattr("uq.kernels.sparse_linear.MIN_WEIGHTS", 1)
        monkeypatch.setattr("uq.kernels.sparse_linear.MAX_DENSITY", 1.0)
    return request.param


def weight(n_active=120):
    g = torch.Generator().manual_seed(0)
    index = torch.randperm(SIZE[0] * SIZE[1], generator=g)[:n_active].sort().values
    mean, std = torch.randn(n_active, generator=g), torch.rand(n_active, generator=g)
    return mean, std, index, torch.randn(9, SIZE[1], generator=g)


def dense(values, index):
    return torch.zeros(SIZE[0] * SIZE[1]).scatter(0, index, values).view(SIZE)


@pytest.mark.parametrize(
    ("sparse", "full"),
    [
        (sparse_sampled_linear, sampled_linear),
        (sparse_local_reparam_linear, local_reparam_linear),
    ],
)
def test_equals_dense_with_zeros(way, monkeypatch, sparse, full):
    mean, std, index, x = weight()
    bias = torch.randn(SIZE[0])
    how = {"n_samples": 5, "seed": 3, "step": 1, "tensor": 2, "first": 2}
    a = [t.clone().requires_grad_() for t in (x, mean, std, bias)]
    y = sparse(a[0], a[1], a[2], index, SIZE, bias=a[3], **how)
    y.square().sum().backward()
    monkeypatch.setenv("UQ_KERNELS", "reference")
    b = [t.clone().requires_grad_() for t in (x, mean, std, bias)]
    expected = full(b[0], dense(b[1], index), dense(b[2], index), bias=b[3], **how)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5 * float(q.grad.abs().max()))


def test_storage_order_changes_nothing(way):
    mean, std, index, x = weight()
    order = torch.randperm(len(index))
    for f in (sparse_sampled_linear, sparse_local_reparam_linear):
        a = f(x, mean, std, index, SIZE, n_samples=3, seed=1)
        b = f(x, mean[order], std[order], index[order], SIZE, n_samples=3, seed=1)
        assert torch.equal(a, b)


def test_weights_keep_their_draws_when_others_leave(way):
    """Without the entries of the upper half of the outputs, the lower half is the same."""
    mean, std, index, x = weight()
    every = sparse_sampled_linear(x, mean, std, index, SIZE, n_samples=4, seed=1)
    kept = index >= SIZE[0] // 2 * SIZE[1]
    some = sparse_sampled_linear(x, mean[kept], std[kept], index[kept], SIZE, n_samples=4, seed=1)
    lower = slice(SIZE[0] // 2, None)
    torch.testing.assert_close(some[..., lower], every[..., lower], rtol=1e-6, atol=1e-6)
    assert not some[..., : SIZE[0] // 2].any()


def test_bad_arguments():
    mean, std, index, x = weight()
    with pytest.raises(ParameterError, match="one value for each active entry"):
        sparse_sampled_linear(x, mean[1:], std, index, SIZE, n_samples=2, seed=0)
    with pytest.raises(ParameterError, match="positions from 0 to 1199"):
        sparse_local_reparam_linear(x, mean, std, index + 40, SIZE, seed=0)
