"""Local reparameterisation: the interpreted kernel against plain torch at the same noise."""

import pytest
import torch

from uq.errors import ParameterError
from uq.kernels import local_reparam_linear, sampled_linear

SEED, STEP, TENSOR = 2**31 + 5, 2, 9


def inputs(samples, rows, n_in, n_out, *, shared, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=dtype)

    x = draw(rows, n_in) if shared else draw(samples, rows, n_in)
    mean, std, bias, bias_std = draw(n_out, n_in), draw(n_out, n_in), draw(n_out), draw(n_out)
    return {"x": x, "mean": mean, "std": std.exp(), "bias": bias, "bias_std": bias_std.exp()}


def ours(x, mean, std, **rest):
    return local_reparam_linear(x, mean, std, seed=SEED, step=STEP, tensor=TENSOR, **rest)


def with_gradients(given, **rest):
    leaves = {k: t.clone().requires_grad_() for k, t in given.items()}
    y = ours(**leaves, **rest)
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(y.shape, generator=g, dtype=y.dtype)
    (y * weight).sum().backward()
    return [y.detach(), *(t.grad for t in leaves.values())]


def assert_close(a, b, tolerance=1e-5):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * float(y.abs().max()))


@pytest.mark.parametrize(
    ("samples", "first", "shared", "rho", "masked"),
    [(None, 0, True, False, False), (6, 3, False, True, True), (7, 1, True, True, False)],
)
def test_kernel_equals_reference(monkeypatch, samples, first, shared, rho, masked):
    given = inputs(samples, 17, 40, 24, shared=shared)
    rest = {"n_samples": samples, "first": first, "first_row": 4, "rho": rho}
    if masked:
        rest["mask"] = torch.rand(24, 40) < 0.5
    monkeypatch.setenv("UQ_KERNELS", "reference")
    expected = with_gradients(given, **rest)
    monkeypatch.setenv("UQ_KERNELS", "triton")
    assert_close(with_gradients(given, **rest), expected)


def test_tiles_and_shares_change_nothing(monkeypatch):
    monkeypatch.setenv("UQ_KERNELS", "triton")
    given = inputs(2, 33, 20, 17, shared=True)
    found = []
    for tiles, programs in (((16, 16, 16), 1), ((32, 16, 32), 400)):
        how = dict(zip(("BM", "BN", "BK"), tiles, strict=True))
        monkeypatch.setattr("uq.kernels.local_reparam.tiles", lambda *_, how=how: how)
        monkeypatch.setattr("uq.kernels.local_reparam.PROGRAMS", programs)
        found.append(with_gradients(given, n_samples=2))
    assert_close(found[0], found[1])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_parts_of_a_batch_have_the_noise_of_the_whole(monkeypatch, backend):
    monkeypatch.setenv("UQ_KERNELS", backend)
    given = inputs(16, 12, 5, 7, shared=True)
    every = ours(**given, n_samples=16)
    assert_close([ours(**given, n_samples=7, first=5)], [every[5:12]], 1e-6)
    part = given | {"x": given["x"][8:]}
    assert_close([ours(**part, n_samples=16, first_row=8)], [every[:, 8:]], 1e-6)
    assert_close([ours(**given)], [every[0]], 1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_in_float64(monkeypatch, shared):
    monkeypatch.setenv("UQ_KERNELS", "triton")
    given = inputs(3, 2, 3, 2, shared=shared, dtype=torch.float64)

    def f(x, mean, std, bias, bias_std):
        return ours(x, mean, std, bias=bias, bias_std=bias_std, n_samples=3, rho=True)

    leaves = [t.requires_grad_() for t in given.values()]
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


def test_without_variance_it_is_a_linear_layer(monkeypatch):
    """Outputs to the floor's root; no gradient is NaN where a variance is zero."""
    monkeypatch.setenv("UQ_KERNELS", "triton")
    given = inputs(1, 9, 20, 6, shared=True)
    given |= {"std": torch.zeros(6, 20), "bias_std": torch.zeros(6)}
    found = with_gradients(given, floor=0.0)
    plain = torch.nn.functional.linear(given["x"], given["mean"], given["bias"])
    assert_close(found[:1], [plain], 1e-6)
    assert all(bool(t.isfinite().all()) for t in found)


@pytest.mark.statistical
def test_moments_are_those_of_drawn_weights_and_rows_are_independent():
    """Means and variances to 4.5 standard errors (24 numbers, false failures below 1e-3).

    Identical rows: correlation 0 to 4.5/√n here, 1 under drawn weights.
    """
    g = torch.Generator().manual_seed(2)
    x, mean, std = (torch.randn(s, generator=g) for s in ((3, 10), (4, 10), (4, 10)))
    x[2], std, n = x[1], std.exp(), 4096
    y = local_reparam_linear(x, mean, std, n_samples=n, seed=11)
    variance = x.square() @ std.square().T
    assert float(((y.mean(0) - x @ mean.T) / (variance / n).sqrt()).abs().max()) < 4.5
    assert float((y.var(0) / variance - 1).abs().max()) < 4.5 * (2 / n) ** 0.5

    def correlation(y):
        z = (y - y.mean(0)) / y.std(0)
        return (z[:, 1] * z[:, 2]).mean(0)

    assert float(correlation(y).abs().max()) < 4.5 / n**0.5
    drawn = sampled_linear(x, mean, std, n_samples=n, seed=11)
    assert float((correlation(drawn) - 1).abs().max()) < 1e-3


def test_compiles_without_breaks(monkeypatch):
    """The operator that CUDA tensors go through; here with the interpreter behind it."""
    monkeypatch.setenv("UQ_KERNELS", "triton")
    given = inputs(2, 3, 5, 4, shared=True)

    def f(x, mean, std, bias, bias_std):
        return torch.ops.uq.local_reparam_linear(
            x, mean, std, bias, bias_std, None, 2, 1, 0, 0, 0, 0, False, 1e-8
        )[0]

    leaves = [[t.clone().requires_grad_() for t in given.values()] for _ in range(2)]
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for run, part in zip((compiled, f), leaves, strict=True):
        run(*part).square().sum().backward()
    assert_close([t.grad for t in leaves[0]], [t.grad for t in leaves[1]], 1e-6)


def test_bad_arguments():
    with pytest.raises(ParameterError, match=r"local_reparam_linear: x must be \(rows, 5\)"):
        local_reparam_linear(torch.ones(3, 4), torch.ones(2, 5), torch.ones(2, 5), seed=0)
