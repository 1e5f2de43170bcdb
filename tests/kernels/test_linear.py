"""Sampled linear layers: the interpreted kernel, the reference, and noise written out by hand.

Where the noise is written out, it is taken from the reference generator at its address, so that
wrong addresses (one draw a row of the batch, noise shared by samples or by tiles) show.
"""

import pytest
import torch
from torch.nn import functional as F

import uq.kernels.linear as linear
from uq.errors import ParameterError
from uq.kernels import Purpose, normal, sampled_linear, stream

SEED, STEP, TENSOR = 2**40 + 7, 3, 5
BACKENDS = ("reference", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv("UQ_KERNELS", request.param)
    return request.param


def inputs(samples, rows, n_in, n_out, *, shared, dtype=torch.float32, bias=True):
    g = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=dtype)

    x = draw(rows, n_in) if shared else draw(samples, rows, n_in)
    given = {"x": x, "mean": draw(n_out, n_in), "std": draw(n_out, n_in).exp()}
    if bias:
        given |= {"bias": draw(n_out), "bias_std": draw(n_out).exp()}
    return given


def written_out(x, mean, std, bias=None, bias_std=None, mask=None, *, samples, first=0, rho=False):
    """The same with ε as tensors, differentiated by autograd."""
    sigma, tau = (std, bias_std) if not rho else (F.softplus(std), F.softplus(bias_std))
    how = {"samples": samples, "first": first, "step": STEP, "dtype": mean.dtype}
    eps = normal(tuple(mean.shape), SEED, stream=stream(Purpose.WEIGHT, TENSOR), **how)
    weight = mean + sigma * eps
    if mask is not None:
        weight = weight * mask
    y = torch.einsum("bk,snk->sbn" if x.ndim == 2 else "sbk,snk->sbn", x, weight)
    if bias is not None:
        zeta = normal(len(bias), SEED, stream=stream(Purpose.BIAS, TENSOR), **how)
        y = y + (bias + tau * zeta)[:, None]
    return y


def ours(x, mean, std, *, samples, **rest):
    return sampled_linear(
        x, mean, std, n_samples=samples, seed=SEED, step=STEP, tensor=TENSOR, **rest
    )


def with_gradients(f, given, **rest):
    leaves = {k: t.clone().requires_grad_() for k, t in given.items()}
    y = f(**leaves, **rest)
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(y.shape, generator=g, dtype=y.dtype)
    (y * weight).sum().backward()
    return [y.detach(), *(t.grad for t in leaves.values())]


def assert_close(a, b, tolerance=1e-5):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * float(y.abs().max()))


@pytest.mark.parametrize(
    ("samples", "first", "shared", "rho", "masked"),
    [(8, 0, True, False, False), (6, 3, False, True, True), (1, 2, True, True, False)],
)
def test_equals_noise_written_out(backend, samples, first, shared, rho, masked):
    # 24 × 40 and 17 rows: nothing divides a tile, and there are several tiles of inputs.
    given = inputs(samples, 17, 40, 24, shared=shared)
    rest = {"samples": samples, "first": first, "rho": rho}
    if masked:
        rest["mask"] = torch.rand(24, 40) < 0.5
    assert_close(with_gradients(ours, given, **rest), with_gradients(written_out, given, **rest))


def test_chunks_of_draws_change_nothing(monkeypatch):
    given = inputs(11, 5, 6, 3, shared=True)
    whole = with_gradients(ours, given, samples=11)
    monkeypatch.setitem(linear._CHUNK, "cpu", 5 * 18)
    assert_close(with_gradients(ours, given, samples=11), whole, 1e-6)


def test_many_rows_are_not_fused(monkeypatch):
    monkeypatch.setenv("UQ_KERNELS", "triton")
    monkeypatch.setattr(linear, "_FUSED_ROWS", 4)
    monkeypatch.setattr(linear._Call, "fused_forward", None)
    given = inputs(3, 5, 6, 3, shared=False)
    found = with_gradients(ours, given, samples=3)
    assert_close(found, with_gradients(written_out, given, samples=3))


@pytest.mark.parametrize("shared", [True, False])
def test_tiles_and_shares_change_nothing(monkeypatch, shared):
    monkeypatch.setenv("UQ_KERNELS", "triton")
    given = inputs(5, 17, 20, 17, shared=shared)
    found = []
    for tiles, programs in (((16, 16, 16), 1), ((32, 16, 32), 400)):
        how = dict(zip(("BM", "BN", "BK"), tiles, strict=True))
        monkeypatch.setattr(linear, "tiles", lambda *_, how=how: how)
        monkeypatch.setattr(linear, "PROGRAMS", programs)
        found.append(with_gradients(ours, given, samples=5))
    assert_close(found[0], found[1])


def test_draws_do_not_depend_on_their_number_or_on_rows(backend):
    given = inputs(16, 12, 5, 7, shared=True)
    every = ours(**given, samples=16)
    assert_close([ours(**given, samples=7, first=5)], [every[5:12]], 1e-6)
    some = given | {"x": given["x"][8:]}
    assert_close([ours(**some, samples=16)], [every[:, 8:]], 1e-6)


def test_without_spread_it_is_a_linear_layer(backend):
    given = inputs(5, 9, 20, 6, shared=True)
    given |= {"std": torch.zeros(6, 20), "bias_std": torch.zeros(6)}
    plain = F.linear(given["x"], given["mean"], given["bias"])
    assert_close(ours(**given, samples=5), plain.expand(5, -1, -1), 1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_in_float64(backend, shared):
    given = inputs(3, 2, 3, 2, shared=shared, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in given.values()]

    def f(x, mean, std, bias, bias_std):
        return ours(x, mean, std, bias=bias, bias_std=bias_std, samples=3, rho=True)

    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


def test_only_what_is_asked_for_is_differentiated(backend):
    given = inputs(4, 3, 5, 2, shared=False, bias=False)
    for wanted in given:
        leaves = {k: t.clone().requires_grad_(k == wanted) for k, t in given.items()}
        ours(**leaves, samples=4).sum().backward()
        assert [k for k, t in leaves.items() if t.grad is not None] == [wanted]


@pytest.mark.statistical
def test_moments_and_joint_draws():
    """Means to 4.5 standard errors, variances to 4.5 of theirs; one draw is one weight.

    2 × 6 outputs: false failures below 1e-4. Identical rows have correlation 1, other samples 0 to
    4.5/√n: this tells the estimator from local reparameterisation and from noise used twice.
    """
    g = torch.Generator().manual_seed(2)
    x, mean, std = (torch.randn(s, generator=g) for s in ((3, 10), (4, 10), (4, 10)))
    std, n = std.exp(), 4096
    x[2] = x[1]
    y = sampled_linear(x, mean, std, n_samples=n, seed=11)
    variance = x.square() @ std.square().T
    error = (y.mean(0) - x @ mean.T) / (variance / n).sqrt()
    assert float(error.abs().max()) < 4.5
    assert float((y.var(0) / variance - 1).abs().max()) < 4.5 * (2 / n) ** 0.5
    assert bool((y[:, 1] == y[:, 2]).all())
    z = (y - y.mean(0)) / y.std(0)
    assert float((z[1:] * z[:-1]).mean(0).abs().max()) < 4.5 / n**0.5
    # Two outputs are of different rows of the weight.
    assert float((z[:, 0, 0] * z[:, 0, 1]).mean().abs()) < 4.5 / n**0.5


def test_compiles_without_breaks():
    given = inputs(4, 3, 5, 2, shared=True)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    found = with_gradients(lambda **k: compiled(**k), given, samples=4)
    assert_close(found, with_gradients(ours, given, samples=4), 1e-6)


def test_operator_is_well_formed():
    given = inputs(4, 3, 5, 2, shared=True)
    arguments = (
        *(t.requires_grad_() for t in given.values()),
        None,
        4,
        SEED,
        STEP,
        TENSOR,
        0,
        True,
    )
    torch.library.opcheck(
        torch.ops.uq.sampled_linear, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_strided_inputs(backend):
    given = inputs(3, 6, 5, 4, shared=True)
    turned = {k: t.T.contiguous().T if t.ndim == 2 else t for k, t in given.items()}
    assert_close([ours(**turned, samples=3)], [ours(**given, samples=3)], 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": torch.ones(3, 5)}, r"one shape \(N, K\)"),
        ({"x": torch.ones(3, 4)}, r"x must be \(rows, 5\) or \(4, rows, 5\)"),
        ({"x": torch.ones(3, 6, 5)}, r"x must be \(rows, 5\) or \(4, rows, 5\)"),
        ({"bias": torch.ones(3)}, r"bias must have shape \(2,\)"),
        ({"n_samples": 0}, "n_samples must be at least 1"),
        ({"tensor": 1 << 24}, r"tensor must be from 0 to 2\^24"),
        ({"step": -1}, r"step must be from 0 to 2\^32"),
    ],
)
def test_bad_arguments(change, message):
    given = {"x": torch.ones(3, 5), "mean": torch.ones(2, 5), "std": torch.ones(2, 5)}
    with pytest.raises(ParameterError, match=message):
        sampled_linear(**{"n_samples": 4, "seed": 0} | given | change)
