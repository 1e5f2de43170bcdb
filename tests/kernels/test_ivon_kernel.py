"""IVON kernels, interpreted: against formulas in float64, the reference, and the block path."""

import math

import pytest
import torch
from torch import nn

from uq.errors import ParameterError
from uq.inference import IVON
from uq.inference.ivon_blocks import FlatGroup
from uq.inference.ivon_kernels import KernelGroup
from uq.kernels import ivon
from uq.kernels.ivon import Noise, Segments, Setting
from uq.kernels.philox import normal

pytest.importorskip("triton")
SIZES = ((3, 5), (1,), (1024,), (37, 31))  # one block exactly, less than one, and more
SETTINGS = [
    Setting(50.0, 1e-3, 0.9, 0.99, 0.1, bias=0.19),
    Setting(2000.0, 0.0, 0.5, 1 - 1e-5, 0.02, clip=1e-3),
]
NOISE = Noise(seed=2**63 + 11, step=4)


@pytest.fixture(params=["triton", "reference"])
def backend(request, monkeypatch):
    monkeypatch.setenv("UQ_KERNELS", request.param)
    return request.param


class Case:
    """A network's state in the middle of training."""

    def __init__(self, dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        self.params = Segments([draw(*s) for s in SIZES], [0, 1, 0, 1])
        self.grads = self.params.with_tensors([draw(*s) for s in SIZES])
        n = self.params.n
        self.hess, self.momentum, self.mean = draw(n).abs() + 0.01, draw(n), draw(n)
        self.holds = torch.zeros(1, dtype=torch.int32)
        self.table = ivon.settings_table(SETTINGS, torch.device("cpu"))

    def sample(self, noise=NOISE):
        ivon.sample(self.params, self.hess, self.mean, self.holds, self.table, noise)

    def update(self, noise=NOISE, **kwargs):
        grads = None if "sums" in kwargs else self.grads
        return ivon.update(
            self.params,
            grads,
            self.hess,
            self.momentum,
            self.mean,
            self.holds,
            self.table,
            noise,
            **kwargs,
        )

    def flat(self):
        return torch.cat([p for p, _, _ in self.params.parts()])

    def by_element(self):
        """λ, δ, β₁, β₂, rate, clip, bias of each element, float64."""
        rows = torch.tensor([list(SETTINGS[g]) for g in self.params.groups], dtype=torch.float64)
        return rows.repeat_interleave(torch.tensor(self.params.sizes), 0).T


def step_in_float64(case, mean, z):
    """The formulas of the paper, in its own words."""
    ess, delta, beta1, beta2, rate, clip, bias = case.by_element()
    h, g = case.hess.double(), case.momentum.double()
    grad = torch.cat([p for p, _, _ in case.grads.parts()]).double()
    noise = z / torch.sqrt(ess * (h + delta))
    estimate = noise * grad * ess * (h + delta)  # ĥ, by Price's theorem
    rho = 1 - beta2
    new_h = beta2 * h + rho * estimate + 0.5 * rho**2 * (h - estimate) ** 2 / (h + delta)
    new_g = beta1 * g + (1 - beta1) * grad
    move = ((new_g / bias + delta * mean) / (new_h + delta)).clamp(-clip, clip)
    return new_h, new_g, mean - rate * move


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # A few roundings each of the terms; in float64 the settings are exact, and only those remain.
    [(torch.float32, 1e-6), (torch.float64, 1e-13)],
)
def test_step_is_the_papers(backend, dtype, tolerance):
    case = Case(dtype)
    mean = case.flat()
    z = normal(case.params.n, NOISE.seed, stream=NOISE.stream, step=NOISE.step).double()
    ess, delta, *_ = case.by_element()
    case.sample()
    assert int(case.holds) == 1
    assert torch.equal(case.mean, mean)
    wanted = mean + z / torch.sqrt(ess * (case.hess.double() + delta))
    # The kernel's cosine may differ by an ulp from the reference's, whatever dtype it is put into.
    torch.testing.assert_close(case.flat().double(), wanted, rtol=2e-6, atol=2e-6)

    h, g, m = step_in_float64(case, mean.double(), z)
    h_old = case.hess.clone()
    case.update()
    assert int(case.holds) == 0
    noisy = max(tolerance, 2e-6 if backend == "triton" else 0.0)
    torch.testing.assert_close(case.hess.double(), h, rtol=noisy, atol=noisy)
    torch.testing.assert_close(case.momentum.double(), g, rtol=tolerance, atol=tolerance)
    # The move is divided by h + δ, down to 0.01: its error by up to that much more.
    torch.testing.assert_close(case.flat().double(), m, rtol=noisy, atol=noisy * 0.1 / 0.01)
    assert (case.hess.double() + delta >= 0.5 * (h_old.double() + delta) * (1 - 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["sampled", "restored", "summed", "fused"])
def test_kernel_is_the_reference(monkeypatch, dtype, how):
    ends = []
    for choice in ("triton", "reference"):
        monkeypatch.setenv("UQ_KERNELS", choice)
        case = Case(dtype)
        case.sample()
        kwargs = {}
        if how == "fused":
            kwargs["next_step"] = 9
        elif how != "sampled":
            ivon.restore(case.params, case.mean, case.holds)
            kwargs["sampled"] = False
        if how == "summed":
            sums = torch.zeros(2, case.params.n, dtype=dtype)
            for step in (4, 5):
                ivon.accumulate(case.grads, case.hess, *sums, case.table, NOISE._replace(step=step))
            kwargs["sums"] = (*sums, 2)
        squares = case.update(**kwargs)
        ends.append((case.flat(), case.hess, case.momentum, case.mean, squares.sum()))
        assert int(case.holds) == (how == "fused")
    for one, two in zip(*ends, strict=True):
        # Normals differ by a few float32 ulp; see the test above for the factor of the mean.
        torch.testing.assert_close(one, two, rtol=5e-6, atol=2e-5)


def test_fused_is_step_and_sample(backend):
    """Bit by bit: one pass over memory changes nothing."""
    one, two = Case(), Case()
    for case in (one, two):
        case.sample()
    one.update(next_step=5)
    two.update()
    two.sample(NOISE._replace(step=5))
    for name in ("hess", "momentum", "mean"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert torch.equal(one.flat(), two.flat())
    assert int(one.holds) == int(two.holds) == 1


def test_blocks_change_nothing(monkeypatch):
    monkeypatch.setenv("UQ_KERNELS", "triton")
    ends = []
    for block in (128, 1024, 4096):
        monkeypatch.setattr(ivon, "BLOCK", block)
        case = Case()
        case.sample()
        case.update(next_step=5)
        ends.append((case.flat(), case.hess, case.momentum))
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


def test_restores_only_a_sample(backend):
    """An interrupt before the launch leaves parameters that hold the mean: they stay."""
    case = Case()
    before = case.flat()
    ivon.restore(case.params, case.mean, case.holds)
    assert torch.equal(case.flat(), before)
    case.sample()
    assert not torch.equal(case.flat(), before)
    ivon.restore(case.params, case.mean, case.holds)
    assert torch.equal(case.flat(), before)
    assert int(case.holds) == 0


# -- in the optimizer --------------------------------------------------------------------------


def train(monkeypatch, choice, *, steps=6, samples=1, closure=True, made="triton", saved=None):
    """Two groups, one clipped; returns the optimizer and the parameters."""
    g = torch.Generator().manual_seed(1)
    X, y = torch.randn(40, 4, generator=g), torch.randn(40, 1, generator=g)
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    groups = [
        {"params": net[0].parameters(), "clip_radius": 0.05},
        {"params": net[2].parameters(), "weight_decay": 1e-2},
    ]
    if made:
        monkeypatch.setenv("UQ_KERNELS", made)
    else:
        monkeypatch.delenv("UQ_KERNELS", raising=False)
    opt = IVON(
        groups,
        0.05,
        ess=40,
        beta2=0.9,
        hess_init=0.5,
        mc_samples=samples,
        generator=torch.Generator().manual_seed(3),
    )
    kind = KernelGroup if made else FlatGroup
    assert all(type(flat) is kind for flat in opt._flat)
    monkeypatch.setenv("UQ_KERNELS", choice)

    def loss():
        opt.zero_grad()
        value = (net(X) - y).square().mean()
        value.backward()
        return value

    if saved:
        net.load_state_dict(saved[0])
        opt.load_state_dict(saved[1])
    for _ in range(steps):
        if closure:
            opt.step(loss)
        else:
            for _ in range(samples):
                with opt.sampled_params(train=True):
                    loss()
            opt.step()
    return opt, net


def vector(net):
    return nn.utils.parameters_to_vector(net.parameters()).detach()


@pytest.mark.parametrize(("samples", "closure"), [(1, True), (1, False), (2, True)])
def test_optimizer_walks_the_references_way(monkeypatch, samples, closure):
    steps = 6 if samples == 1 else 3
    settings = {"steps": steps, "samples": samples, "closure": closure}
    opt, net = train(monkeypatch, "triton", **settings)
    opt2, net2 = train(monkeypatch, "reference", **settings)
    torch.testing.assert_close(vector(net), vector(net2), rtol=0, atol=1e-6)
    for a, b in zip(opt.curvature, opt2.curvature, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert abs(float(opt._flat[0].squares - opt2._flat[0].squares)) < 1e-5


def test_kernels_do_what_blocks_do(monkeypatch):
    """The path of the CPU, given the same noise, goes the same way."""
    opt, net = train(monkeypatch, "triton", steps=4)
    addresses = [(flat._noise.seed, flat._stream) for flat in opt._flat]
    sizes = [flat.n for flat in opt._flat]
    count = [0]

    def counted(self, *args, **kwargs):
        draw, group = divmod(count[0], 2)
        count[0] += 1
        assert self.numel() == sizes[group]
        seed, stream = addresses[group]
        return self.copy_(normal(self.numel(), seed, stream=stream, step=draw))

    monkeypatch.setattr(torch.Tensor, "normal_", counted)
    opt2, net2 = train(monkeypatch, "reference", steps=4, made=None)
    assert count[0] == 8
    # float32 over four steps, in which the noise is once subtracted from the mean: 1e-6 each.
    torch.testing.assert_close(vector(net), vector(net2), rtol=0, atol=1e-5)
    for a, b in zip(opt.curvature, opt2.curvature, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_resumes_bit_by_bit(monkeypatch):
    _, whole = train(monkeypatch, "reference", steps=6)
    opt, net = train(monkeypatch, "reference", steps=4)
    saved = (net.state_dict(), opt.state_dict())
    _, resumed = train(monkeypatch, "reference", steps=2, saved=saved)
    assert torch.equal(vector(whole), vector(resumed))


def test_storage_stays_and_autograd_hears_of_writes(monkeypatch):
    monkeypatch.setenv("UQ_KERNELS", "triton")
    w = nn.Parameter(torch.ones(5))
    place = w.data_ptr()
    opt = IVON([w], 0.1, ess=10)
    out = (w * w).sum()
    with opt.sampled_params():
        assert w.data_ptr() == place
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()
    assert torch.equal(w.detach(), torch.ones(5))
    with pytest.raises(ZeroDivisionError), opt.sampled_params():
        raise ZeroDivisionError
    assert torch.equal(w.detach(), torch.ones(5))


def test_other_layouts_stay_in_blocks(monkeypatch):
    monkeypatch.setenv("UQ_KERNELS", "triton")
    opt = IVON([nn.Parameter(torch.ones(4, 6).T)], 0.1, ess=10)
    assert type(opt._flat[0]) is FlatGroup


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Segments([]), "needs tensors"),
        (lambda: Segments([torch.ones(2, 3).T]), "contiguous"),
        (lambda: Segments([torch.ones(2), torch.ones(2).double()]), "one dtype"),
        (lambda: Segments([torch.ones(2).half()]), "float32 or float64"),
        (lambda: Segments([torch.ones(2)]).with_tensors([torch.ones(3)]), "sizes"),
        (lambda: Case().update(sums=None), "either grads or sums"),
        (lambda: Case().sample(NOISE._replace(step=2**32)), "below 2\\^32"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ParameterError, match=message):
        make()


def test_settings_table():
    row = ivon.settings_table(SETTINGS[0], torch.device("cpu"))[0].tolist()
    assert row == pytest.approx([50, 1e-3, 0.1, 0.5, 0.1 / 0.19, 1e-3 * 0.19, math.inf])
