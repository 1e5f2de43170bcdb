"""Implicit variational inference with a linearised generator (LIVI).

θ = g(z) + σε, z ~ N(0, I_d), ε ~ N(0, I_m), is an implicit distribution over the m weights of a
network. Its entropy is that of the Gaussian which g makes where it is linearised at each z, with
J = ∂g/∂z:

    H(z) = ½ log det(σ²I_m + JJᵀ) + (m/2) log 2πe
         = ½ log det(σ²I_d + JᵀJ) + (m − d) log σ + (m/2) log 2πe          (bound L′),
    H(z) ≥ (d/2) log(σ² + s_min(J)²) + (m − d) log σ + (m/2) log 2πe       (bound L″),

and the objective is E[log p(D | θ) + log p(θ)] + E[H(z)]. For an affine g, L′ is Gaussian
variational inference, exactly. In general it is not a certified bound on the evidence: noise
values that g maps to the same weights are counted each for itself (g(z) = |z| gains log 2).

L″ needs products with J alone. The smallest singular value comes from a locally optimal block
conjugate gradient iteration (LOBPCG) on JᵀJ, without gradients; ‖Jv‖ at its vector v then has the
gradient of s_min. The iteration estimates s_min from above, so a truncated L″ may exceed L′.

References
----------
A. Uppal, K. Stensbo-Smidt, W. Boomsma, J. Frellsen, "Implicit Variational Inference for
High-Dimensional Posteriors", NeurIPS 2023, arXiv 2310.06643.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from uq.errors import ParameterError
from uq.inference.posterior import WeightPosterior, Weights
from uq.nn.bayesian import BayesianNetwork
from uq.nn.implicit import Generator, MatrixGenerator, WeightLayout
from uq.nn.network import Network
from uq.nn.priors import NormalPrior

Bound = Literal["exact", "smallest"]
BOUNDS = ("exact", "smallest")
# Below it the Gram matrix's rounding in float32 is as large as σ².
SMALLEST_NOISE = 1e-4
_LOG_2PI_E = math.log(2 * math.pi) + 1


class SingularJacobianWarning(UserWarning):
    """The generator's Jacobian cannot be handled as it should; the message says what was done."""


# -- entropy -------------------------------------------------------------------------------------


def linearized_entropy(
    generator: Generator,
    z: Tensor,
    sigma: float | Tensor,
    *,
    probes: int | None = None,
    rng: torch.Generator | None = None,
) -> Tensor:
    """Entropy H(z) of the linearised generator, through the smaller Gram matrix (bound L′).

    Parameters
    ----------
    generator : Generator
        Maps noise (S, d) to weights (S, m).
    z : Tensor of shape (S, d)
        Where it is linearised.
    sigma : float or Tensor
        Standard deviation σ > 0 of the noise on the weights.
    probes : int, optional
        Random directions that the gradient is estimated with, without bias; by default it is
        exact, at three times the cost. The value is exact in any case. With G = (σ²I + JᵀJ)⁻¹, a
        directional derivative ½ tr(G Δ) has variance ‖√G Δ √G‖²_F / (2 probes).
    rng : torch.Generator, optional
        For the probes.

    Returns
    -------
    Tensor of shape (S,)
        In nats, in float64; differentiable, through J too. Where JᵀJ + σ²I is not positive definite
        to rounding, its eigenvalues are taken, none below σ², with a warning.
    """
    d, m = generator.noise_dim, generator.n_weights
    variance = torch.as_tensor(sigma, dtype=torch.float64, device=z.device).square()
    if d > m:
        jacobian = generator.jacobian(z)
        gram = jacobian @ jacobian.mT
        log_det, _ = _log_det(gram.double(), variance)
    elif probes is None or probes >= d:
        log_det, _ = _log_det(generator.gram(z).double(), variance)
    else:
        with torch.no_grad():
            log_det, factor = _log_det(generator.gram(z).double(), variance)
            # E[uuᵀ] = G, so that E[‖Ju‖²] with u held fixed has the gradient of log det.
            signs = torch.randint(0, 2, (len(z), d, probes), device=z.device, generator=rng)
            u = torch.linalg.solve_triangular(factor.mT, 2.0 * signs.double() - 1, upper=True)
        energy = generator.energy(z, u.mT.to(z.dtype)).mean(-1).double()
        log_det = log_det + (energy - energy.detach())
    return 0.5 * (log_det + (m - min(d, m)) * variance.log() + m * _LOG_2PI_E)


def _log_det(gram: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Log determinant of M = ``gram`` + variance · I, and L with LLᵀ = M."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(gram + variance * eye)
    if not bool(info.any()):
        return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1), factor
    if not bool(gram.isfinite().all()):
        nan = torch.full_like(gram, math.nan)  # the training loop knows what to do with it
        return nan[..., 0, 0] * gram.sum((-2, -1)), nan
    warnings.warn(
        "the generator's Jacobian is singular to rounding: JᵀJ + σ²I is not positive definite. Its "
        "eigenvalues below σ² were set to σ². Raise weight_noise, or use float64.",
        SingularJacobianWarning,
        stacklevel=3,
    )
    values, vectors = torch.linalg.eigh(gram + variance * eye)
    values = values.clamp(min=float(variance))
    # Only the determinant is differentiated: eigenvectors have no gradient where values meet.
    root = torch.linalg.qr((vectors * values.sqrt()[..., None, :]).detach().mT)[1].mT
    return values.log().sum(-1), root


def smallest_singular_value(
    generator: Generator,
    z: Tensor,
    *,
    iterations: int = 12,
    rng: torch.Generator | None = None,
) -> Tensor:
    """Estimate the smallest singular value of J at each row of ``z``, from above.

    Parameters
    ----------
    generator : Generator
        Maps noise (S, d) to weights (S, m).
    z : Tensor of shape (S, d)
        Where its Jacobian is taken.
    iterations : int, default=12
        Steps of the iteration; 5 overestimate by up to a half where d is close to m, 30 by 1 %.
    rng : torch.Generator, optional
        For the starting vector.

    Returns
    -------
    Tensor of shape (S,)
        ‖Jv‖ with v held fixed: the gradient of a converged s_min. Where the iteration meets NaN,
        the last finite v is used, with a warning.
    """
    s, d = z.shape
    with torch.no_grad():
        v = _normalized(torch.randn(s, 1, d, dtype=z.dtype, device=z.device, generator=rng))
        product = generator.normal_product(z)
        image, step = product(v), torch.empty(s, 0, d, dtype=z.dtype, device=z.device)
        for _ in range(iterations):
            residual = image - (v * image).sum(-1, keepdim=True) * v
            basis = torch.cat([v, _normalized(residual), step], 1)
            basis = torch.linalg.qr(basis.mT)[0].mT.contiguous()
            images = product(basis)
            small = (basis @ images.mT).double()
            if not bool(small.isfinite().all()):
                warnings.warn(
                    "the iteration for the smallest singular value met NaN or infinity; its last "
                    "finite vector is used. Lower lr, or raise weight_noise.",
                    SingularJacobianWarning,
                    stacklevel=2,
                )
                break
            ritz = torch.linalg.eigh(0.5 * (small + small.mT))[1][:, :, :1].to(z.dtype)
            new = _normalized(ritz.mT @ basis)
            step = _normalized(new - (new * v).sum(-1, keepdim=True) * v)
            v, image = new, ritz.mT @ images
    return generator.push(z, v)[:, 0].norm(dim=-1)


def _normalized(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)


def smallest_value_entropy(
    generator: Generator,
    z: Tensor,
    sigma: float | Tensor,
    *,
    iterations: int = 12,
    rng: torch.Generator | None = None,
) -> Tensor:
    """Bound of H(z) by the smallest singular value (L″), in float64; see the module's equations.

    Parameters
    ----------
    generator, z, sigma
        As for :func:`linearized_entropy`.
    iterations, rng
        As for :func:`smallest_singular_value`.

    Raises
    ------
    ParameterError
        If d > m, where the smallest singular value is 0 whatever the generator does.
    """
    d, m = generator.noise_dim, generator.n_weights
    if d > m:
        raise ParameterError(
            f"bound='smallest' needs a generator with noise_dim <= n_weights, got {d} > {m}: J has "
            "a null space, and s_min = 0. Lower noise_dim, or use bound='exact'."
        )
    value = smallest_singular_value(generator, z, iterations=iterations, rng=rng).double()
    variance = torch.as_tensor(sigma, dtype=torch.float64, device=z.device).square()
    return 0.5 * (d * (variance + value.square()).log() + (m - d) * variance.log() + m * _LOG_2PI_E)


# -- the distribution over weights ---------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """Draws of weights and the noise that they were made of."""

    noise: Tensor
    """z, (S, d)."""
    flat: Tensor
    """θ = g(z) + σε, (S, m)."""
    weights: Weights
    """The same by parameter name, (S, …)."""


class ImplicitWeights(nn.Module):
    """Implicit distribution over the trainable weights of any module.

    Parameters
    ----------
    module : Module
        Gives names, shapes and starting values; it is neither changed nor trained. No batch
        normalisation: its statistics would be those of another draw.
    generator : Generator, optional
        By default a :class:`uq.nn.implicit.MatrixGenerator` with a head per layer, centred at the
        module's own weights.
    weight_noise : float, default=0.01
        Standard deviation of the noise on every weight.
    init_std : float, default=0.05
        Standard deviation of the weights at the start, with the default generator.

    Raises
    ------
    ParameterError
        If ``module`` has no trainable parameters or holds batch normalisation, ``generator`` does
        not make as many weights as it has, or ``weight_noise`` is out of [1e-4, 0.5].

    Examples
    --------
    Variational inference in plain torch, of any loss:

    >>> import torch
    >>> from torch import nn
    >>> from torch.nn import functional as F
    >>> from uq.nn import NormalPrior
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(90, 4), torch.arange(90) % 3
    >>> net = nn.Sequential(nn.Linear(4, 16), nn.ELU(), nn.Linear(16, 3))
    >>> q = ImplicitWeights(net)
    >>> optimizer = torch.optim.Adam(q.parameters(), 3e-3)
    >>> for _ in range(5):
    ...     draw = q.draw(4)
    ...     logits = q.evaluate(draw.weights, x)
    ...     nll = F.cross_entropy(logits.flatten(0, 1), y.repeat(4))
    ...     loss = nll + q.kl(draw, NormalPrior(1.0)).mean() / len(x)
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     _ = optimizer.step()
    >>> logits.shape
    torch.Size([4, 90, 3])
    """

    weight_noise: Tensor

    def __init__(
        self,
        module: nn.Module,
        generator: Generator | None = None,
        *,
        weight_noise: float = 0.01,
        init_std: float = 0.05,
    ) -> None:
        super().__init__()
        found = {
            type(layer).__name__
            for layer in module.modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats
        }
        if found:
            raise ParameterError(
                f"module holds {', '.join(sorted(found))}, whose running statistics would mix "
                "those of different weight draws; use GroupNorm or LayerNorm, or "
                "track_running_stats=False."
            )
        if not SMALLEST_NOISE <= weight_noise <= 0.5:
            raise ParameterError(
                f"weight_noise must be within [{SMALLEST_NOISE}, 0.5], got {weight_noise!r}: the "
                "entropy's gradient vanishes in a wider noise, and a narrower one leaves it to "
                "rounding."
            )
        self._module = [module]  # in a list: its parameters are not this module's
        self.layout: WeightLayout = WeightLayout(module)
        if generator is None:
            generator = MatrixGenerator.for_layout(self.layout)
            start = {k: p.detach() for k, p in module.named_parameters()}
            flat = self.layout.flatten(start)
            generator.to(flat.device, flat.dtype)
            if flat.device.type != "meta":
                generator.center(flat, init_std)
        if generator.n_weights != self.layout.n_weights:
            raise ParameterError(
                f"generator makes {generator.n_weights} weights, but {type(module).__name__} has "
                f"{self.layout.n_weights} trainable ones."
            )
        self.generator = generator
        dtype = next((p.dtype for p in generator.parameters()), torch.get_default_dtype())
        self.register_buffer("weight_noise", torch.tensor(float(weight_noise), dtype=dtype))

    @property
    def module(self) -> nn.Module:
        """The module whose weights are generated."""
        return self._module[0]

    def draw(self, n: int, rng: torch.Generator | None = None) -> Draw:
        """Draw weights ``n`` times, differentiable with respect to the generator."""
        like: Any = {"dtype": self.weight_noise.dtype, "device": self.weight_noise.device}
        z = torch.empty(n, self.generator.noise_dim, **like)
        flat = torch.empty(n, self.generator.n_weights, **like)
        for row, noise in zip(z, flat, strict=True):
            row.normal_(generator=rng)
            noise.normal_(generator=rng)
        flat = flat.mul_(self.weight_noise).add_(self.generator(z))
        return Draw(z, flat, self.layout.unflatten(flat))

    def entropy(
        self,
        z: Tensor,
        bound: Bound = "exact",
        *,
        sv_iterations: int = 12,
        probes: int | None = None,
        rng: torch.Generator | None = None,
    ) -> Tensor:
        """Linearised entropy at noise ``z`` (S, d), in nats (S,): "exact" L′ or "smallest" L″."""
        if bound == "exact":
            return linearized_entropy(self.generator, z, self.weight_noise, probes=probes, rng=rng)
        if bound == "smallest":
            return smallest_value_entropy(
                self.generator, z, self.weight_noise, iterations=sv_iterations, rng=rng
            )
        raise ParameterError(f"bound must be one of {', '.join(BOUNDS)}, got {bound!r}.")

    def kl(
        self,
        draw: Draw,
        prior: Any,
        bound: Bound = "exact",
        *,
        entropy_weight: float = 1.0,
        sv_iterations: int = 12,
        probes: int | None = None,
        rng: torch.Generator | None = None,
    ) -> Tensor:
        """Approximate KL(q ‖ prior) at each draw: −H(z) − log p(θ), in nats.

        Parameters
        ----------
        draw : Draw
            From :meth:`draw`.
        prior : NormalPrior or object with ``distribution(parameter)``
            The latter gives the Pyro distribution of one weight tensor, all of it one event.
        bound : {"exact", "smallest"}, default="exact"
            Of the entropy: L′ or L″.
        entropy_weight : float, default=1.0
            Factor on the entropy; 0 leaves it out, and q then collapses.
        sv_iterations : int
            Steps to the smallest singular value, of L″.
        probes : int, optional
            Random directions for the gradient of L′; by default it is exact.
        rng : torch.Generator, optional
            Of the probes and of the start of the iteration.

        Returns
        -------
        Tensor of shape (S,)
            In the dtype of the weights.
        """
        kl = -self.log_prior(draw, prior)
        if entropy_weight:
            entropy = self.entropy(
                draw.noise, bound, sv_iterations=sv_iterations, probes=probes, rng=rng
            )
            kl = kl - entropy_weight * entropy.to(kl.dtype)
        return kl

    def log_prior(self, draw: Draw, prior: Any) -> Tensor:
        """Log density of each draw under ``prior``, (S,)."""
        if isinstance(prior, NormalPrior):
            constant = math.log(prior.scale) + 0.5 * math.log(2 * math.pi)
            squares = draw.flat.square().sum(-1)
            return -0.5 * prior.precision * squares - self.generator.n_weights * constant
        parameters = dict(self.module.named_parameters())
        terms = [
            prior.distribution(parameters[k].detach()).log_prob(w) for k, w in draw.weights.items()
        ]
        return torch.stack(terms).sum(0)

    def evaluate(self, weights: Weights, *inputs: Any) -> Any:
        """Call the module under each draw; outputs with an axis of draws in front.

        One call a draw: as fast as a vectorised one for the few draws of a training step, and fit
        for any module.
        """
        n = len(next(iter(weights.values())))
        # Torch's own tying leaves a module that is held twice with the swapped weights.
        weights = weights | {k: weights[name] for k, name in self.layout.aliases.items()}
        each = [
            functional_call(
                self.module, {k: w[s] for k, w in weights.items()}, inputs, tie_weights=False
            )
            for s in range(n)
        ]
        return tree_map(lambda *ts: torch.stack(ts), *each)

    @torch.no_grad()
    def block_correlation(self, n: int = 2048, rng: torch.Generator | None = None) -> Tensor:
        """Root mean square correlation between the weights of any two layers.

        Parameters
        ----------
        n : int, default=2048
            Draws that it is estimated from.
        rng : torch.Generator, optional
            For the draws.

        Returns
        -------
        Tensor of shape (blocks, blocks)
            In the order of ``layout.blocks``; what n draws of independent weights would show is
            taken off, so 0 is a mean-field posterior. The diagonal is within a layer, without the
            correlation of each weight with itself.
        """
        sizes = [math.prod(block.shape) for block in self.layout.blocks]
        grams = []
        for part in self.draw(n, rng).flat.double().split(sizes, -1):
            part = part - part.mean(0)
            part = part / part.norm(dim=0).clamp(min=torch.finfo(part.dtype).tiny)
            grams.append((part @ part.mT).flatten())
        stacked = torch.stack(grams)
        size = torch.tensor(sizes, dtype=torch.float64, device=stacked.device)
        total, pairs = stacked @ stacked.mT, size[:, None] * size
        total.diagonal().sub_(size)
        pairs.diagonal().sub_(size)
        mean_square = total / pairs.clamp(min=1) - 1 / (n - 1)
        mean_square[pairs == 0] = 0
        return mean_square.clamp(min=0).sqrt()

    @torch.no_grad()
    def covariance(
        self, first: str, second: str, n: int = 2048, rng: torch.Generator | None = None
    ) -> Tensor:
        """Covariance between two parameters, flattened, estimated from ``n`` draws."""
        known = [name for block in self.layout.blocks for name in block.names]
        for name in (first, second):
            if name not in known:
                raise ParameterError(f"{name!r} is not a parameter; choose from {known}.")
        weights = self.draw(n, rng).weights
        a, b = (weights[k].flatten(1).double() for k in (first, second))
        return (a - a.mean(0)).mT @ (b - b.mean(0)) / (n - 1)


class ImplicitPosterior(WeightPosterior):
    """Implicit posterior over all weights of a network.

    Parameters
    ----------
    network : Network
        Architecture; weights that do not require gradients keep their value.
    generator : Generator
        Makes the others.
    weight_noise : float
        Standard deviation of the noise on every weight.
    seed : int, default=0
        Seed of the draws: predicting twice gives the same numbers.
    **options
        ``init_std`` of :class:`ImplicitWeights`.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import ImplicitPosterior
    >>> from uq.nn import MLP, Network, NormalLikelihood
    >>> posterior = ImplicitPosterior(Network(MLP(1, (8,), 1), NormalLikelihood(1)), None, 0.01)
    >>> posterior(torch.zeros(5, 1), n_samples=10).n_draws  # posterior.q is what is trained
    10
    """

    def __init__(
        self,
        network: Network,
        generator: Generator | None,
        weight_noise: float,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(network, seed)
        self.q: ImplicitWeights = ImplicitWeights(
            network, generator, weight_noise=weight_noise, **options
        )

    def sampler(self, n: int, generator: torch.Generator) -> Callable[[int], Weights]:
        """Draw z and ε, each draw from one noise vector of its own."""

        def draw(k: int) -> Weights:
            with torch.no_grad():
                return self.q.draw(k, generator).weights

        return draw

    def to_pyro(
        self, prior: NormalPrior
    ) -> tuple[BayesianNetwork, Callable[..., dict[str, Tensor]]]:
        """Return the Pyro model of the network under ``prior``, and this posterior as its guide.

        Examples
        --------
        ``Predictive(model, guide=guide, num_samples=64)(x)["y"]`` samples the predictive.
        """

        def guide(x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
            draw = self.q.draw(1)
            if am_i_wrapped():  # otherwise there is nobody to tell
                entropy = self.q.entropy(draw.noise)[0]
                pyro.factor("implicit_entropy", -entropy, has_rsample=True)
            return {
                name: pyro.sample(name, dist.Delta(w[0], event_dim=w[0].ndim))
                for name, w in draw.weights.items()
            }

        return BayesianNetwork(self.network, prior), guide


class ImplicitGuide(AutoContinuous):
    """Pyro guide with an implicit distribution over all continuous latent variables of a model.

    For any Pyro model, constrained sites included; train it by ``pyro.infer.Trace_ELBO``, best as
    a module, ``elbo = Trace_ELBO()(model, guide)``: the generator's parameters are then those of
    ``elbo.parameters()``, and Pyro's parameter store stays empty.

    Parameters
    ----------
    model : callable
        Pyro model.
    generator : Generator, optional
        Makes the unconstrained latent vector; by default an :class:`uq.nn.implicit.MatrixGenerator`
        sized to it. It is made at the first call, so call the guide once before you build an
        optimizer.
    weight_noise : float, default=0.01
        Standard deviation of the noise on every unconstrained latent variable.
    bound : {"exact", "smallest"}, default="exact"
        L′ or L″.
    init_std : float, default=0.05
        Standard deviation at the start, with the default generator.

    Examples
    --------
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from pyro.infer import Trace_ELBO
    >>> from uq.inference import ImplicitGuide
    >>> def model(y):
    ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Exponential(rate), obs=y)
    >>> y = torch.tensor([0.5, 1.0, 1.5])
    >>> guide = ImplicitGuide(model)
    >>> _ = guide(y)  # makes the generator
    >>> elbo = Trace_ELBO()(model, guide)
    >>> optimizer = torch.optim.Adam(elbo.parameters(), 0.01)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     elbo(y).backward()
    ...     _ = optimizer.step()
    >>> bool(guide(y)["rate"] > 0)
    True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        generator: Generator | None = None,
        *,
        weight_noise: float = 0.01,
        bound: Bound = "exact",
        init_std: float = 0.05,
    ) -> None:
        super().__init__(model, init_loc_fn=init_to_sample)
        self.weight_noise = weight_noise
        self.bound = bound
        self.init_std = init_std
        # Not by attribute: access would put the generator into Pyro's parameter store.
        self._modules["generator"] = generator

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        start = self._init_loc()
        if self._modules["generator"] is None:
            generator = _for_vector(self.latent_dim).to(start.device, start.dtype)
            generator.center(start, self.init_std)
            self._modules["generator"] = generator
        made = self._generator().n_weights
        if made != self.latent_dim:
            raise ParameterError(
                f"generator makes {made} numbers, but the model has {self.latent_dim} latent ones."
            )

    def _generator(self) -> Generator:
        generator = self._modules["generator"]
        assert isinstance(generator, Generator)
        return generator

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draw the unconstrained latent vector, and add the entropy to the guide's log density."""
        generator = self._generator()
        p = next(generator.parameters())
        base = dist.Normal(p.new_zeros(generator.noise_dim), 1.0).to_event(1).mask(False)
        name = f"_{self._pyro_name}"
        z = pyro.sample(f"{name}_noise", base, infer={"is_auxiliary": True})
        batch, z = z.shape[:-1], z.reshape(-1, generator.noise_dim)
        flat = generator(z)
        flat = flat + self.weight_noise * torch.randn_like(flat)
        entropy = (linearized_entropy if self.bound == "exact" else smallest_value_entropy)(
            generator, z, self.weight_noise
        )
        if am_i_wrapped():  # otherwise there is nobody to tell
            pyro.factor(f"{name}_entropy", -entropy.to(p.dtype).view(batch), has_rsample=True)
        return flat.view(*batch, -1)


def _for_vector(n: int, noise_dim: int = 64) -> MatrixGenerator:
    """A generator of one matrix, as square as it can be, of ``n`` numbers."""
    columns = math.isqrt(n - 1) + 1
    noise_dim = min(noise_dim, n)
    side = max(k for k in range(1, math.isqrt(noise_dim) + 1) if noise_dim % k == 0)
    width = min(512, max(16, round(2 * n ** (1 / 3))))
    shape = (-(-n // columns), columns)
    return MatrixGenerator((side, noise_dim // side), [(width, width)] * 2, [shape], n)
