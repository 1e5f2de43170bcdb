"""Resampling kernels, interpreted: against the reference, NumPy's search, and their laws."""

import math

import numpy as np
import pytest
import torch

from uq.errors import DataError, ParameterError
from uq.inference import SMCSampler
from uq.inference import resampling as inference
from uq.kernels import philox, resampling
from uq.kernels.resampling import SCHEMES, normalize, resample, take

pytest.importorskip("triton")


@pytest.fixture(params=["triton", "reference"])
def backend(request, monkeypatch):
    monkeypatch.setenv("UQ_KERNELS", request.param)
    return request.param


def both(monkeypatch, call):
    ends = []
    for choice in ("triton", "reference"):
        monkeypatch.setenv("UQ_KERNELS", choice)
        ends.append(call())
    return ends


def hard_weights(size, runs=4):
    """Far from zero, with NaN, with +inf, without any weight, and with zeros at both ends."""
    g = torch.Generator().manual_seed(size)
    x = 3 * torch.randn(runs, size, generator=g, dtype=torch.float64) - 1e4
    x[0, ::3], x[0, 1] = math.nan, math.inf
    x[1] = -math.inf
    x[2, : size // 3] = -math.inf
    x[2, -size // 4 :] = -math.inf
    return x


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("size", "n", "tile", "run"),
    [
        (50, 50, 4096, 16384),  # a run in a tile
        (150, 90, 64, 16384),  # a run in several tiles, one program
        (150, 210, 64, 64),  # the three-phase sum
    ],
)
def test_kernel_is_the_reference(monkeypatch, scheme, size, n, tile, run):
    x = hard_weights(size)
    values = torch.randn(4, size, 5)
    monkeypatch.setattr(resampling, "TILE", tile)
    monkeypatch.setattr(resampling, "RUN", run)
    ours, wanted = both(monkeypatch, lambda: resample(x, scheme, -7, step=3, n=n, values=values))
    # Sums in another order: a tie within 1e-15 would differ, at odds of 1e-12.
    assert torch.equal(ours.ancestors, wanted.ancestors)
    assert torch.equal(ours.values, wanted.values)
    for a, b in zip(ours.weights, wanted.weights, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-13, atol=1e-12)
    assert ours.weights.degenerate.tolist() == [False, True, False, False]
    assert ours.resampled.all()
    # No particle without weight is an ancestor.
    usable = torch.isfinite(x)
    usable[1] = True
    assert usable.gather(-1, ours.ancestors).all()
    assert (ours.ancestors.diff() >= 0).all()


@pytest.mark.parametrize("tile", [64, 4096])
def test_ancestors_are_numpys(backend, monkeypatch, tile):
    """NumPy's own sums and search, by the definitions, with the words of the contract."""
    monkeypatch.setattr(resampling, "TILE", tile)
    size, n = 130, 130
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    run = torch.arange(2)[:, None]
    index = torch.arange(n + 1)
    u = philox.unit64(philox.words(9, index, run, 3 << 24, 5)[0]).numpy()
    for r in range(2):
        w = np.exp(x[r].numpy())
        w /= w.sum()
        c = np.cumsum(w)
        c[-1] = 1.0
        times = np.cumsum(-np.log(u[r]))
        points = {
            "systematic": (np.arange(n) + u[r, 0]) / n,
            "stratified": (np.arange(n) + u[r, :n]) / n,
            "multinomial": times[:n] / times[n],
        }
        for scheme, point in points.items():
            found = resample(x, scheme, 9, step=5).ancestors[r].numpy()
            assert np.array_equal(found, np.searchsorted(c, point, side="right")), scheme
        copies = np.floor(n * w)
        rest = n - copies.sum()
        c = np.cumsum(n * w - copies) / rest
        c[-1] = 1.0
        extra = np.searchsorted(c, (np.arange(rest) + u[r, 0]) / rest, side="right")
        counts = copies + np.bincount(extra, minlength=size)
        found = resample(x, "residual", 9, step=5).ancestors[r].numpy()
        assert np.array_equal(np.bincount(found, minlength=size), counts)


def test_zero_weight_first_at_the_smallest_uniform(backend, monkeypatch):
    """w = (0, ½, ½), the uniforms as small as they come: 1, 1, 2, never 0."""
    x = torch.tensor([0.0, 0.5, 0.5]).log()

    def smallest(seed, c0, c1, c2, c3):
        shape = torch.broadcast_tensors(c0, torch.as_tensor(c1))[0]
        return (torch.zeros_like(shape),) * 4

    if backend == "triton":
        from uq.kernels import resampling_triton

        monkeypatch.setattr(
            resampling_triton,
            "uniform64",
            lambda word: (word * 0).to(resampling_triton.tl.float64) + 2.0**-33,
        )
    else:
        monkeypatch.setattr(resampling, "words", smallest)
    for scheme in ("systematic", "stratified", "residual"):
        found = resample(x, scheme, 0).ancestors.tolist()
        assert found == [1, 1, 2], scheme


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shift_changes_nothing(backend, scheme):
    g = torch.Generator().manual_seed(3)
    # Multiples of 1/1024: adding 10⁴ to them is exact.
    x = torch.randint(-4000, 4000, (2, 40), generator=g).double() / 1024
    base = resample(x, scheme, 5)
    for shift in (1e4, -1e4):
        moved = resample(x + shift, scheme, 5)
        assert torch.equal(moved.ancestors, base.ancestors)
        torch.testing.assert_close(moved.weights.log_sum, base.weights.log_sum + shift)


@pytest.mark.parametrize("threshold", [0.3, 0.999, 1.0])
def test_resamples_below_the_threshold(backend, threshold):
    x = torch.stack([torch.zeros(32), torch.arange(32.0), torch.linspace(0, 3, 32)])
    values = torch.randn(3, 32, 2)
    found = resample(x, "systematic", 2, threshold=threshold, values=values)
    wanted = found.weights.ess <= threshold * 32 if threshold < 1 else torch.ones(3).bool()
    assert torch.equal(found.resampled, wanted)
    for r in range(3):
        if wanted[r]:
            assert (found.log_weights[r] == -math.log(32)).all()
        else:
            assert torch.equal(found.ancestors[r], torch.arange(32))
            assert torch.equal(found.log_weights[r], found.weights.log_weights[r])
        assert torch.equal(found.values[r], values[r][found.ancestors[r]])


def test_runs_are_independent_of_each_other(backend):
    """A run's ancestors are the same whatever runs follow it, and differ between runs and steps."""
    x = torch.zeros(3, 40)
    three = resample(x, "stratified", 1).ancestors
    assert torch.equal(resample(x[:2], "stratified", 1).ancestors, three[:2])
    x = torch.randn(40).expand(3, 40)
    three = resample(x, "stratified", 1).ancestors
    assert not torch.equal(three[0], three[1])
    assert not torch.equal(resample(x, "stratified", 1, step=1).ancestors, three)
    same = resample(x, "stratified", torch.tensor(1)).ancestors
    assert torch.equal(same, three)


@pytest.mark.statistical
@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_of_copies(scheme):
    """Unbiased, and within what each scheme allows; 4,000 runs of the reference."""
    w = torch.tensor([0.02, 0.4, 0.0, 0.13, 0.25, 0.2])
    runs, n = 4000, 20
    found = resample(w.log().expand(runs, 6), scheme, 11, n=n).ancestors
    counts = torch.nn.functional.one_hot(found, 6).sum(1).double()
    expected = n * w.double()
    slack = {"systematic": 1, "residual": 1, "stratified": 2, "multinomial": n}[scheme]
    assert ((counts - expected).abs() < slack + 1e-9).all()
    # Five standard errors, at most those of the multinomial: odds of 6e-7 for each of six.
    error = (expected * (1 - w) / runs).sqrt()
    assert ((counts.mean(0) - expected).abs() <= 5 * error + 1e-12).all()


def test_take_is_gather(backend):
    values = torch.randn(3, 10, 2, 4)
    ancestors = torch.randint(0, 10, (3, 15))
    wanted = torch.stack([values[r][ancestors[r]] for r in range(3)])
    assert torch.equal(take(values, ancestors), wanted)
    assert torch.equal(
        take(values.transpose(1, 0)[:3], ancestors.clamp(max=2)),
        torch.stack([values[:, r][ancestors[r].clamp(max=2)] for r in range(3)]),
    )
    assert torch.equal(take(values[0, :, 0, 0], ancestors[0]), values[0, :, 0, 0][ancestors[0]])


def test_normalize_alone(monkeypatch):
    x = hard_weights(100)
    ours, wanted = both(monkeypatch, lambda: normalize(x))
    for a, b, c in zip(ours, wanted, inference.normalize(x), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-13, atol=1e-12)
        torch.testing.assert_close(a.double(), c.double(), rtol=1e-12, atol=1e-11)


# -- in the sampler ----------------------------------------------------------------------------


def test_inference_reaches_the_kernels(monkeypatch):
    """The functions that a sampler calls, forced onto the kernels, use the generator's seed."""
    monkeypatch.setenv("UQ_KERNELS", "triton")
    x = torch.randn(2, 30)
    g = torch.Generator().manual_seed(4)
    seed = torch.randint(-(2**63), 2**63 - 1, (), generator=torch.Generator().manual_seed(4))
    weights = inference.normalize(x)
    found, log_w, resampled = inference.resample_below(weights, 0.9, "residual", g)
    wanted = resample(weights.log_weights, "residual", seed, threshold=0.9)
    assert torch.equal(found, wanted.ancestors)
    assert torch.equal(log_w, wanted.log_weights)
    assert torch.equal(resampled, wanted.resampled)
    particles = torch.randn(2, 30, 3)
    assert torch.equal(inference.take(particles, found), take(particles, found))


@pytest.mark.statistical
def test_sampler_on_kernels(monkeypatch):
    """N(0, 1) prior, one observation of variance ¼ at 1: evidence and mean are known."""
    monkeypatch.setenv("UQ_KERNELS", "triton")

    def log_normal(x, mean, variance):
        return -0.5 * ((x - mean) ** 2 / variance + math.log(2 * math.pi * variance))

    result = SMCSampler(
        lambda shape, g: torch.randn(*shape, 1, generator=g),
        lambda t: log_normal(t[..., 0], 0.0, 1.0),
        lambda t: log_normal(t[..., 0], 1.0, 0.25),
        n_particles=400,
        n_runs=3,
        schedule=[0.3, 1.0],
    ).run(seed=0)
    # 1,200 particles; the estimated standard error of the three runs is below 0.06.
    evidence = log_normal(torch.tensor(1.0), 0.0, 1.25)
    assert (result.log_evidence - evidence).abs().max() < 0.25
    mean = (result.log_weights.exp() * result.particles[..., 0]).sum(-1)
    assert (mean - 0.8).abs().max() < 5 * math.sqrt(0.2 / 100)


def test_compiles():
    """One operator each to torch.compile and to fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        found = resample(torch.empty(2, 7), "residual", 1, values=torch.empty(2, 7, 3))
        assert found.ancestors.shape == (2, 7)
        assert found.values.shape == (2, 7, 3)
        assert found.resampled.dtype == torch.bool
        assert normalize(torch.empty(2, 7)).degenerate.shape == (2,)
        assert take(torch.empty(2, 7, 3), torch.zeros(2, 4, dtype=torch.int64)).shape == (2, 4, 3)
    x = torch.randn(2, 7)
    for op, args in (
        (torch.ops.uq.normalize_particles, (x,)),
        (torch.ops.uq.resample_particles, (x, "stratified", None, 1, 2, 7, 3.0, x[..., None])),
        (torch.ops.uq.take_particles, (x[..., None], torch.zeros(2, 3, dtype=torch.int64))),
    ):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: resample(torch.zeros(3), "best", 0), ParameterError, "scheme"),
        (lambda: resample(torch.zeros(0), "systematic", 0), DataError, "at least one"),
        (lambda: resample(torch.zeros(3).long(), "systematic", 0), DataError, "floating"),
        (lambda: resample(torch.zeros(3), "systematic", 0, n=0), ParameterError, "n must be"),
        (
            lambda: resample(torch.zeros(3), "systematic", 0, n=2, threshold=0.5),
            ParameterError,
            "threshold",
        ),
        (
            lambda: resample(torch.zeros(3), "systematic", 0, values=torch.zeros(2, 3)),
            DataError,
            "values",
        ),
        (lambda: take(torch.zeros(3, 2), torch.zeros(4)), DataError, "int64"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
