"""The SMC sampler: conjugate and enumerated posteriors, evidence and its error, moves, ranks."""

import math
import signal

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch.distributions import Normal

from uq.errors import DataError, FitInterruptedWarning, ParameterError
from uq.inference import HMC, DataSchedule, ParticleWarning, RandomWalk, SMCSampler
from uq.inference.checkpoints import Checkpoints

N, S, RUNS = 100, 2000, 12
statistical = pytest.mark.statistical


# -- Normal mean: y ~ N(θ, 1), θ ~ N(0, 1) -------------------------------------------------------


def rows(n=N):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, generator=g, dtype=torch.float64) + 0.7


def prior(shape, generator):
    return torch.randn(*shape, 1, generator=generator, dtype=torch.float64)


def log_prior(theta):
    return Normal(0.0, 1.0).log_prob(theta).sum(-1)


def log_likelihood(theta, part=slice(None)):
    y = rows()[part]
    # Sums over rows, without the (particles × rows) matrix.
    quadratic = y.square().sum() - 2 * theta[..., 0] * y.sum() + len(y) * theta[..., 0].square()
    return -0.5 * quadratic - 0.5 * len(y) * math.log(2 * math.pi)


def exact():
    """Mean and variance of the posterior, and log evidence."""
    y = rows()
    cov = np.eye(N) + 1
    evidence = stats.multivariate_normal(np.zeros(N), cov).logpdf(y.numpy())
    return float(y.sum()) / (N + 1), 1 / (N + 1), float(evidence)


def sampler(schedule="adaptive", move=None, **settings):
    settings = {"n_particles": S, "n_runs": RUNS} | settings
    return SMCSampler(prior, log_prior, log_likelihood, move, schedule=schedule, **settings)


def moments(result):
    w = result.log_weights.exp()
    mean = (w * result.particles[..., 0]).sum(-1)
    return mean, (w * (result.particles[..., 0] - mean[..., None]).square()).sum(-1)


SCHEDULES = {
    "adaptive": "adaptive",
    "temperatures": (0.001, 0.01, 0.05, 0.2, 0.5, 1.0),
    "row by row": DataSchedule(N),
    "ten rows": DataSchedule(N, 10),
}


@statistical
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("move", [RandomWalk, HMC])
def test_conjugate_posterior_and_evidence(schedule, move):
    if move is HMC and isinstance(schedule, DataSchedule) and schedule.batch_size == 1:
        schedule = DataSchedule(N, 25)
    result = sampler(schedule, move()).run(0)
    mean, variance, evidence = exact()
    found_mean, found_variance = moments(result)
    # Deviations over 12 runs are within 3 of their unit √(V/S); 5 leaves room, a move that ignored
    # the last rows would be off by tens.
    assert float((found_mean - mean).abs().max()) < 5 * math.sqrt(variance / S)
    assert bool(((found_variance / variance > 0.85) & (found_variance / variance < 1.15)).all())
    assert float(found_variance.mean()) == pytest.approx(variance, rel=0.05)
    # One run's standard deviation is about 0.05 here.
    assert float((result.log_evidence - evidence).abs().max()) < 0.25
    pooled = result.log_evidence.logsumexp(0) - math.log(RUNS)
    assert float(pooled) == pytest.approx(evidence, abs=0.07)
    assert len(result.ess) == len(result.temperatures) == len(result.acceptance)
    torch.testing.assert_close(result.temperatures[-1], torch.ones(RUNS).double())


@statistical
@pytest.mark.parametrize(
    ("resampling", "low", "high"), [("multinomial", 0.6, 1.7), ("systematic", 0.8, 2.2)]
)
def test_standard_error_of_the_evidence(resampling, low, high):
    """Against the spread over 60 runs, known to 9 %; above it for schemes of little noise."""
    result = sampler((0.01, 0.1, 0.4, 1.0), n_runs=60, resampling=resampling).run(0)
    spread = float(result.log_evidence.std())
    root_mean_square = float(result.log_evidence_se.square().mean().sqrt())
    assert low < root_mean_square / spread < high


@statistical
def test_evidence_of_a_given_schedule_is_unbiased():
    """E[Ẑ] = Z exactly: over 400 runs of 100 particles, in units of the standard error."""
    schedule = (0.003, 0.02, 0.1, 0.4, 1.0)
    result = sampler(schedule, n_runs=400, n_particles=100).run(0)
    ratio = (result.log_evidence - exact()[2]).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / 20
    # The log is biased by −Var/2: that the mean of logs is 0 would be wrong.
    assert float(ratio.log().mean()) < 0


def test_one_particle_and_no_resampling_are_importance_sampling():
    one = sampler((1.0,), n_particles=1, n_runs=None)
    with pytest.raises(ParameterError, match="adaptive schedule needs n_particles >= 2"):
        sampler(n_particles=1)
    result = one.run(0)
    theta = prior((1, 1), torch.Generator().manual_seed(0))
    assert float(result.log_evidence) == pytest.approx(float(log_likelihood(theta)), rel=1e-12)
    assert math.isnan(float(result.log_evidence_se))
    # τ below 1/S never resamples: weights are those of the likelihood, particles the prior's.
    plain = sampler((0.5, 1.0), n_runs=None, n_particles=20, ess_threshold=1e-3)
    with pytest.warns(ParticleWarning, match="collapsed"):
        result = plain.run(0)
    theta = prior((1, 20), torch.Generator().manual_seed(0))
    torch.testing.assert_close(result.particles, theta[0])
    weights = log_likelihood(theta)[0].softmax(0)
    torch.testing.assert_close(result.log_weights.exp(), weights)


def test_adaptive_steps_keep_the_effective_size():
    result = sampler(ess_threshold=0.7).run(0)
    # All but the last step aim at the threshold exactly.
    before_last = result.temperatures < 1
    ess = result.ess[before_last]
    torch.testing.assert_close(ess, torch.full_like(ess, 0.7), atol=1e-3, rtol=0)
    assert bool((result.temperatures.diff(dim=0) >= 0).all())


def test_same_seed_same_particles_and_runs_differ():
    first, again = sampler().run(3), sampler().run(3)
    assert torch.equal(first.particles, again.particles)
    assert not torch.equal(first.particles, sampler().run(4).particles)
    assert len(first.log_evidence.unique()) == RUNS
    single = sampler(n_runs=None).run(3)
    assert single.particles.shape == (S, 1)
    assert single.log_evidence.ndim == 0
    assert single.resample(30).shape == (30, 1)
    assert first.resample(30).shape == (RUNS, 30, 1)
    found = single.diagnostics()
    assert isinstance(found["log_evidence"], float)
    assert found["ess"].shape == found["founders"].shape == found["temperatures"].shape


# -- moves ---------------------------------------------------------------------------------------


@statistical
@pytest.mark.parametrize("move", [RandomWalk(40), RandomWalk(40, "diagonal"), HMC(8, 10)])
def test_moves_reach_and_keep_a_correlated_normal(move):
    g = torch.Generator().manual_seed(0)
    cov = torch.tensor([[1.0, 0.9], [0.9, 1.5]], dtype=torch.float64)
    target = torch.distributions.MultivariateNormal(torch.tensor([1.0, -2.0]).double(), cov)
    theta = 0.5 * torch.randn(2, 4000, 2, generator=g, dtype=torch.float64)
    for _ in range(6):
        theta, rate = move(theta, target.log_prob, g)
    assert bool(((rate > 0.1) & (rate < 0.995)).all())
    # 8,000 particles: 4 standard errors of a mean are 0.05, of a (co)variance 6 √(2/8000) ≈ 0.1.
    flat = theta.reshape(-1, 2)
    torch.testing.assert_close(flat.mean(0), target.mean, atol=0.055, rtol=0)
    torch.testing.assert_close(flat.T.cov(), cov, atol=0.12, rtol=0)


@pytest.mark.parametrize("move", [RandomWalk(3), HMC(3, 3)])
def test_moves_reject_what_is_not_a_number(move):
    g = torch.Generator().manual_seed(0)
    theta = torch.rand(1, 200, 1, generator=g, dtype=torch.float64)

    def log_target(theta):
        return torch.where(theta > 0, 0 * theta, math.nan)[..., 0]

    theta, rate = move(theta, log_target, g)
    assert bool((theta > 0).all())
    assert 0 < float(rate) < 1


def test_a_move_of_the_users_own():
    calls = []

    def stay(theta, log_target, generator):
        calls.append(log_target(theta).shape)
        return theta, theta.new_full((len(theta),), 0.5)

    result = sampler(move=stay).run(0)
    assert calls
    assert set(calls) == {(RUNS, S)}
    # Without moves nothing but copies of the prior's draws are there.
    start = prior((RUNS, S), torch.Generator().manual_seed(0))
    assert set(result.particles[0].flatten().tolist()) <= set(start[0].flatten().tolist())


# -- a banana by quadrature ----------------------------------------------------------------------


@statistical
def test_crescent_against_quadrature():
    """φ ~ N(0, diag(2, 1)), y_i ~ N(φ₂ + (φ₁² + 1)/2, 1): moments and evidence on a fine grid."""
    g = torch.Generator().manual_seed(0)
    y = 0.5 + torch.randn(100, generator=g, dtype=torch.float64)
    scale = torch.tensor([2.0, 1.0], dtype=torch.float64).sqrt()

    def likelihood(phi, part=slice(None)):
        center, rows = phi[..., 1] + 0.5 * (phi[..., 0].square() + 1), y[part]
        quadratic = rows.square().sum() - 2 * center * rows.sum() + len(rows) * center.square()
        return -0.5 * quadratic - 0.5 * len(rows) * math.log(2 * math.pi)

    def density(phi):
        return Normal(0.0, scale).log_prob(phi).sum(-1)

    a = torch.linspace(-4, 4, 801, dtype=torch.float64)
    b = torch.linspace(-9, 2, 2201, dtype=torch.float64)
    grid = torch.cartesian_prod(a, b)
    parts = [density(p) + likelihood(p) for p in grid.split(100_000)]
    log_p = torch.cat(parts)
    w = log_p.softmax(0)
    evidence = float(log_p.logsumexp(0)) + math.log(float((a[1] - a[0]) * (b[1] - b[0])))
    result = SMCSampler(
        lambda shape, g: scale * torch.randn(*shape, 2, generator=g, dtype=torch.float64),
        density,
        likelihood,
        schedule=DataSchedule(100),
        n_particles=4000,
    ).run(0)
    assert float(result.log_evidence) == pytest.approx(evidence, abs=0.15)
    found = result.log_weights.exp()
    for f in (lambda p: p[:, 1], lambda p: p[:, 0].square(), lambda p: p[:, 1].square()):
        expected = float(w @ f(grid))
        assert float(found @ f(result.particles)) == pytest.approx(expected, rel=0.07)


# -- Pyro ----------------------------------------------------------------------------------------


@statistical
def test_pyro_model_with_constraints():
    """Normal with unknown mean and precision: conjugate Normal-Gamma, evidence in closed form."""
    y = torch.tensor([1.1, 0.3, 2.0, 1.7, 0.9, 1.4])

    def model(y):
        precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
        mean = pyro.sample("mean", dist.Normal(0.0, precision.rsqrt()))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, precision.rsqrt()), obs=y)

    n, ys = len(y), y.double()
    a, b = 2 + n / 2, 1 + 0.5 * (ys.square().sum() - ys.sum() ** 2 / (n + 1))
    evidence = (
        math.lgamma(a) - math.lgamma(2.0) - a * math.log(b) - 0.5 * math.log(n + 1)
    ) - n / 2 * math.log(2 * math.pi)
    state = torch.get_rng_state()
    pyro.get_param_store().setdefault("mine", torch.ones(1))
    smc = SMCSampler.from_pyro(model, y, n_particles=1500, move=RandomWalk(5))
    result = smc.run(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(pyro.get_param_store().keys()) == {"mine"}
    pyro.get_param_store().clear()
    assert float(result.log_evidence) == pytest.approx(evidence, abs=0.15)
    w = result.log_weights.exp()
    precision = float(w @ result.particles["precision"].double())
    assert precision == pytest.approx(float(a / b), rel=0.05)
    assert float(w @ result.particles["mean"].double()) == pytest.approx(
        float(ys.sum() / (n + 1)), abs=0.04
    )
    assert result.resample(10)["mean"].shape == (10,)


def test_pyro_model_with_control_flow_goes_particle_by_particle():
    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = z.sum() if z[0] > 0 else z[1]
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    smc = SMCSampler.from_pyro(model, torch.tensor(0.5), n_particles=50, move=RandomWalk(1))
    result = smc.run(0)
    assert result.particles["z"].shape == (50, 2)
    theta = torch.tensor([[[1.0, 2.0], [-1.0, 2.0]]])
    expected = Normal(torch.tensor([[3.0, 2.0]]), 1.0).log_prob(torch.tensor(0.5))
    torch.testing.assert_close(smc.log_likelihood(theta), expected)


def test_pyro_models_that_do_not_fit():
    def discrete(y):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    def unobserved(y):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def subsampled(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=2) as i:
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])

    y = torch.ones(5)
    for model, said in (
        (discrete, r"k \(discrete\)"),
        (unobserved, "no site is observed"),
        (subsampled, "must not subsample"),
    ):
        with pytest.raises(ParameterError, match=said):
            SMCSampler.from_pyro(model, y)


# -- bad input -----------------------------------------------------------------------------------


def test_nan_particles_get_no_weight():
    def half(theta):
        return torch.where(theta[..., 0] > 0, log_likelihood(theta), math.nan)

    result = SMCSampler(prior, log_prior, half, n_particles=S).run(0)
    assert bool((result.particles[result.log_weights > -20] > 0).all())
    # All of the posterior is above 0, so that the evidence is that of the whole line.
    assert float(result.log_evidence) == pytest.approx(exact()[2], abs=0.25)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_no_particle_possible(value):
    def nowhere(theta):
        return torch.full(theta.shape[:2], value)

    for schedule in ("adaptive", (0.5, 1.0)):
        smc = SMCSampler(prior, log_prior, nowhere, schedule=schedule)
        with pytest.raises(DataError, match=r"no particle has a finite log likelihood.*prior"):
            smc.run(0)


def test_collapse_is_said_with_the_remedy():
    # All rows at once: the weights of 200 particles become those of a few.
    smc = sampler(DataSchedule(N, N), n_runs=None, n_particles=30)
    with pytest.warns(ParticleWarning, match=r"collapsed.*More particles|Take more particles"):
        smc.run(2)

    def stuck(theta, log_target, generator):
        return theta, theta.new_zeros(len(theta))

    with pytest.warns(ParticleWarning, match="accepted at a rate of 0"):
        sampler(move=stuck).run(0)


class Interrupting(RandomWalk):
    """Raises at the call of a number."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def __call__(self, *args):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().__call__(*args)


def test_an_interrupt_keeps_the_last_target():
    settings = {"schedule": (0.01, 0.05, 0.2, 1.0), "ess_threshold": 1.0}
    with pytest.warns(FitInterruptedWarning, match=r"SMCSampler: interrupted.*0\.2 of the way"):
        result = sampler(move=Interrupting(4), n_runs=None, **settings).run(0)
    assert result.interrupted
    assert result.temperatures.tolist() == [0.01, 0.05, 0.2]
    # Usable as what it is: the posterior at temperature 0.2.
    mean = float((result.log_weights.exp() * result.particles[:, 0]).sum())
    assert mean == pytest.approx(float(0.2 * rows().sum()) / (0.2 * N + 1), abs=0.05)
    with pytest.raises(KeyboardInterrupt):  # nothing was reached
        sampler(move=Interrupting(1), **settings).run(0)


def test_bad_arguments():
    for schedule in ("linear", (), (0.5,), (0.6, 0.4, 1.0), (0.0, 1.0), 3):
        with pytest.raises(ParameterError, match="schedule must be 'adaptive'"):
            sampler(schedule)
    for settings, said in (
        ({"n_particles": 0}, "n_particles must be an integer >= 1, got 0"),
        ({"n_runs": 2.5}, "n_runs must be an integer >= 1"),
        ({"ess_threshold": 0}, r"ess_threshold must be a number in \(0, 1\]"),
        ({"ess_threshold": 1.0}, "below 1 with an adaptive schedule"),
        ({"resampling": "best"}, "SMCSampler: scheme must be one of"),
        ({"schedule": DataSchedule(0)}, "DataSchedule: n_rows"),
    ):
        with pytest.raises(ParameterError, match=said):
            sampler(**settings)
    with pytest.raises(ParameterError, match="HMC: n_leapfrog"):
        HMC(0)
    with pytest.raises(DataError, match=r"one number a particle, shape \(1, 1000\)"):
        SMCSampler(prior, log_prior, lambda t: t).run(0)
    with pytest.raises(DataError, match="sample_prior"):
        SMCSampler(lambda s, g: torch.zeros(3), log_prior, log_likelihood).run(0)


# -- simulation-based calibration ----------------------------------------------------------------


def ranks(result, truth, n_draws):
    """Rank of the truth among draws of each run, for each coordinate."""
    g = torch.Generator().manual_seed(9)
    draws = result.resample(n_draws, g)
    return (draws < truth[:, None]).sum(1).numpy()


@pytest.mark.slow
@statistical
@pytest.mark.parametrize("model", ["linear", "logistic"])
@pytest.mark.parametrize("schedule", ["adaptive", "rows"])
def test_simulation_based_calibration(model, schedule):
    """Ranks of the truth among posterior draws are uniform (Talts et al. 2018)."""
    n_sets, n_rows, n_draws = 400, 20, 19
    g = torch.Generator().manual_seed(7)
    truth = torch.randn(n_sets, 2, generator=g, dtype=torch.float64)
    x = torch.randn(n_sets, n_rows, 2, generator=g, dtype=torch.float64)
    eta = (x @ truth[..., None])[..., 0]
    if model == "linear":
        y = eta + torch.randn(eta.shape, generator=g, dtype=torch.float64)
    else:
        y = (torch.rand(eta.shape, generator=g, dtype=torch.float64) < eta.sigmoid()).double()

    def likelihood(theta, part=slice(None)):
        mean = theta @ x[:, part].mT  # (sets, S, rows)
        target = y[:, None, part]
        if model == "linear":
            return -0.5 * (target - mean).square().sum(-1)
        return (target * mean - torch.nn.functional.softplus(mean)).sum(-1)

    result = SMCSampler(
        lambda shape, g: torch.randn(*shape, 2, generator=g, dtype=torch.float64),
        log_prior,
        likelihood,
        RandomWalk(5),
        n_particles=400,
        n_runs=n_sets,
        schedule=DataSchedule(n_rows) if schedule == "rows" else "adaptive",
    ).run(0)
    found = ranks(result, truth, n_draws)
    for j in range(2):
        # 20 ranks, 400 sets: χ² with 19 degrees of freedom at the level 1e-4.
        histogram = np.bincount(found[:, j], minlength=n_draws + 1)
        assert stats.chisquare(histogram).pvalue > 1e-4, histogram


@pytest.mark.parametrize("move", [RandomWalk, HMC])
@pytest.mark.parametrize("schedule", ["adaptive", [0.1, 0.3, 1.0], DataSchedule(6, 2)])
def test_a_killed_run_goes_on_to_the_same_bits(schedule, move, tmp_path, monkeypatch):
    """Also of several runs: steps of the moves, schedule and random numbers are taken up."""

    class Killed(BaseException):
        pass

    x = torch.linspace(-1, 1, 6, dtype=torch.float64)

    def log_likelihood(theta, rows=slice(None)):
        if len(calls) == kill_at:
            raise Killed
        calls.append(rows)
        residual = x[rows] - theta[..., :1]
        return -residual.square().sum(-1)

    def run(resume):
        found = Checkpoints(tmp_path / "run", 1, resume=resume, run={"format": 1, "seed": 0})
        return sampler().run(3, checkpoint=found.stage())

    def sampler():
        return SMCSampler(
            lambda shape, g: torch.randn(*shape, 2, generator=g, dtype=torch.float64),
            lambda theta: -0.5 * theta.square().sum(-1),
            log_likelihood,
            move(),
            n_particles=30,
            n_runs=2,
            schedule=schedule,
            ess_threshold=0.9,
        )

    calls, kill_at = [], None
    plain = sampler().run(3)
    assert len(plain.ess) > 2
    calls, kill_at = [], len(calls) - 1
    with pytest.raises(Killed):
        run(False)
    n_before, kill_at = len(calls), None
    resumed = run(True)
    assert len(calls) - n_before < n_before / 2  # it did not begin again
    calls.clear()
    again = run(True)
    assert not calls
    for name, value in vars(plain).items():
        for other in (resumed, again):
            torch.testing.assert_close(
                getattr(other, name), value, rtol=0, atol=0, equal_nan=True, msg=name
            )


def test_a_signal_between_targets_writes_the_particles(tmp_path):
    def log_likelihood(theta, rows):
        if rows == slice(3, 4):
            signal.raise_signal(signal.SIGINT)
        return -theta[..., 0].square()

    found = Checkpoints(tmp_path, "600s", resume=False, run={"format": 1, "seed": 0})
    sampler = SMCSampler(
        lambda shape, g: torch.randn(*shape, 1, generator=g),
        lambda theta: -0.5 * theta.square().sum(-1),
        log_likelihood,
        n_particles=50,
        schedule=DataSchedule(6),
    )
    with pytest.warns(FitInterruptedWarning, match=r"0\.667 of the way"):  # that target is finished
        result = sampler.run(0, checkpoint=found.stage())
    assert result.interrupted
    assert len(list(tmp_path.glob("stage-0000.step-*4.safetensors"))) == 1
