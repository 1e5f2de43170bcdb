"""Posterior of SSVI: draws of the active weights of a compact network, and the same for Pyro."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import Normal
from pyro.nn import PyroModule
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Independent, constraints, kl_divergence, register_kl
from torch.func import functional_call

from uq.distributions import Predictive
from uq.distributions.base import TorchDistribution
from uq.errors import ParameterError
from uq.inference.posterior import NormalPosterior, WeightPosterior, Weights, monte_carlo
from uq.kernels import use_triton
from uq.nn.network import Network
from uq.nn.sampled import sampled_network
from uq.nn.ssvi import Product, SparseGaussian, count_active, layer_densities, sparse_weights
from uq.nn.ssvi_compact import CompactLayer, compact_weights, densify

# Rows that go through compressed rows at once: their activations should stay in the cache.
_ROWS = 1024


class SparsePosterior(WeightPosterior):
    """Independent Normals over the active weights of a compact network; the others are zero.

    Parameters
    ----------
    network : Network
        In compact form, by :func:`uq.nn.ssvi_compact.compact`. Biases and other parameters are
        points.
    seed : int, default=0
        Seed of the draws: predicting twice gives the same numbers.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import SparsePosterior
    >>> from uq.nn import MLP, CategoricalLikelihood, Network
    >>> from uq.nn.ssvi import sparsify
    >>> from uq.nn.ssvi_compact import compact
    >>> network = Network(sparsify(MLP(20, (30,), 3), density=0.1), CategoricalLikelihood(3))
    >>> SparsePosterior(compact(network))(torch.randn(5, 20), n_samples=8).n_draws
    8
    """

    def __init__(self, network: Network, seed: int = 0) -> None:
        super().__init__(network, seed)
        self._weights = compact_weights(network)

    @property
    def by_rows(self) -> bool:
        """Whether some product is faster by compressed rows than dense."""
        return any(m.by_rows for m in self.network.modules() if isinstance(m, CompactLayer))

    def sampler(self, n: int, generator: torch.Generator) -> Callable[[int], Weights]:
        """Draw m + σz over the active weights, each draw from one flat noise vector."""
        mean = torch.cat([w.mean.detach() for w in self._weights.values()])
        std = torch.cat([w.std for w in self._weights.values()])
        sizes = [w.n_active for w in self._weights.values()]

        def draw(k: int) -> Weights:
            noise = [
                torch.randn(std.shape, generator=generator, dtype=std.dtype, device=std.device)
                for _ in range(k)
            ]
            parts = torch.stack(noise).mul_(std).add_(mean).split(sizes, -1)
            return {f"{name}.mean": p for name, p in zip(self._weights, parts, strict=True)}

        return draw

    def forward(self, x: Tensor, n_samples: int = 64) -> Predictive:
        """Mixture over ``n_samples`` weight draws, by compressed rows where they are faster."""
        return self.network.likelihood.predictive(self.outputs(x, n_samples))

    def outputs(self, x: Tensor, n: int) -> tuple[Tensor, ...]:
        """What the network gives under n weight draws; a GPU draws those of linear layers in place.

        Its noise is counted: draws that :meth:`sampler` gives are others, of the same law.
        """
        draw = self.sampler(n, self.generator(x.device))
        if self.by_rows:
            return self._one_by_one(draw, n, x)
        if use_triton(x):
            stds = {f"{name}.mean": w.std for name, w in self._weights.items()}
            layers: dict[nn.Module, Any] = {
                m: (m.weight.dense(), m.weight.dense(m.weight.std), m.bias)
                for m in self.network.modules()
                if isinstance(m, CompactLayer) and isinstance(m.operation, Product)
            }
            drawn = sampled_network(self.network, x, stds, int(self.seed), layers)
            if drawn is not None:
                return monte_carlo(drawn.network, drawn.sampler(), n, x)
        return monte_carlo(self.network, draw, n, x)

    def at_mean(self, x: Tensor) -> Predictive:
        """Predict with the mean weights alone: one forward pass, no epistemic uncertainty."""
        means = {f"{name}.mean": w.mean.detach()[None] for name, w in self._weights.items()}
        return self.network.likelihood.predictive(self._one_by_one(lambda _: means, 1, x))

    def _one_by_one(self, draw: Callable[[int], Weights], n: int, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs of each draw, which products with compressed rows cannot take together."""
        self.network.eval()
        draws: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            for _ in range(n):
                weights = {name: w[0] for name, w in draw(1).items()}
                parts = [functional_call(self.network, weights, (r,)) for r in x.split(_ROWS)]
                draws.append(tuple(torch.cat(ts).cpu() for ts in zip(*parts, strict=True)))
        return tuple(torch.stack(ts) for ts in zip(*draws, strict=True))

    def to_dense(self) -> NormalPosterior:
        """Return the same posterior over ordinary layers, with zeros written out."""
        network, stds = densify(self.network)
        assert isinstance(network, Network)
        return NormalPosterior(network, stds, int(self.seed))

    def to_pyro(self) -> tuple[SparseBayesianNetwork, Callable[..., None]]:
        """Return the Pyro model over the active weights, and this posterior as its guide.

        Examples
        --------
        ``Predictive(model, guide=guide, num_samples=64)(x)["y"]`` samples the predictive, and
        ``TraceMeanField_ELBO().loss(model, guide, x, y)`` is −ELBO in nats.
        """

        def guide(x: Tensor, y: Tensor | None = None) -> None:
            for name, w in self._weights.items():
                pyro.sample(name, Normal(w.mean.detach(), w.std, validate_args=False).to_event(1))

        return SparseBayesianNetwork(self.network), guide


class SparseBayesianNetwork(PyroModule):
    """Pyro model of a compact network: the active weights of each layer are one sample site.

    Parameters
    ----------
    network : Network
        In compact form. Positions, biases and other parameters are used as they are.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self._network = [network]  # in a list: its parameters are not this module's

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Sample active weights and targets; condition on ``y`` where it is given."""
        (network,) = self._network
        weights = {}
        for name, w in compact_weights(network).items():
            scale = torch.full_like(w.std, w.prior_scale)
            prior = Normal(torch.zeros_like(scale), scale, validate_args=False).to_event(1)
            weights[f"{name}.mean"] = pyro.sample(name, prior)
        parameters = functional_call(network, weights, (x,))
        with pyro.plate("data", len(x)):
            value: Tensor = pyro.sample("y", network.likelihood.distribution(parameters), obs=y)
        return value


# -- on a user's own Pyro model ----------------------------------------------------------------


class SparseNormal(TorchDistribution):
    """Distribution of a :class:`uq.nn.ssvi.SparseGaussian`: Normal at its active entries, else 0.

    ``log_prob`` is the density over the active entries. ``kl_divergence`` to independent Normals
    is that over the active entries: the objective of SSVI.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, weight: SparseGaussian) -> None:
        self.weight = weight
        super().__init__(torch.Size(), torch.Size(weight.shape), validate_args=False)

    @property
    def support(self) -> Any:
        """Reals of the weight's shape."""
        return constraints.independent(constraints.real, len(self.weight.shape))

    @property
    def mean(self) -> Tensor:
        """Means in the full shape."""
        return self.weight.mean_tensor()

    @property
    def variance(self) -> Tensor:
        """Variances in the full shape."""
        return self.weight.variance_tensor()

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw, with zeros at the entries that are not active."""
        draws = [self.weight.sample() for _ in range(torch.Size(sample_shape).numel())]
        return torch.stack(draws).reshape(*sample_shape, *self.weight.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density over the active entries, in nats."""
        active = self.at_active(value)
        log_prob = Normal(self.weight.mean, self.weight.std, validate_args=False).log_prob(active)
        return self.weight._kept(log_prob).sum(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SparseNormal:
        """Return itself: there is no batch."""
        if torch.Size(batch_shape):
            raise ParameterError("SparseNormal has no batch; put no plate around the weight.")
        return self

    def at_active(self, value: Tensor) -> Tensor:
        """Entries of ``value`` at the active positions."""
        flat = value.expand(*value.shape[: value.ndim - len(self.weight.shape)], *self.weight.shape)
        return flat.flatten(-len(self.weight.shape))[..., self.weight.index]


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


@register_kl(SparseNormal, Independent)
def _kl_sparse_normal(q: SparseNormal, p: Any) -> Tensor:
    if not isinstance(p.base_dist, torch.distributions.Normal):
        raise NotImplementedError("the KL of sparse weights needs a Normal prior; use Trace_ELBO.")
    prior = Normal(q.at_active(p.base_dist.loc), q.at_active(p.base_dist.scale))
    rows = kl_divergence(Normal(q.weight.mean, q.weight.std, validate_args=False), prior)
    return q.weight._kept(rows).sum()


class SparseNormalGuide(nn.Module):
    """Sparse Gaussian guide for a Pyro model with priors of its own.

    Parameters
    ----------
    model : callable
        Pyro model. Latent sites of two or more axes (weights) become sparse, others (biases) are
        Gaussian without zeros.
    *args, **kwargs
        Passed to ``model`` once, to find its sites; the targets among them.
    density : float, default=0.1
        Active share of each weight, or of all together with "erdos_renyi".
    allocation : {"uniform", "erdos_renyi"}, default="uniform"
        See :func:`uq.nn.ssvi.layer_densities`.
    dense : sequence of str, default=()
        Weight sites without zeros.
    init_std : float, default=0.1
        Initial standard deviation, as a share of the prior's.

    Raises
    ------
    ParameterError
        If the model has no continuous latent site or one whose values are bounded (a scale, say),
        or if a weight would have no active entry.

    Notes
    -----
    Plain torch parameters; nothing is put into Pyro's parameter store. The objective is that of
    Pyro's ELBO: ``TraceMeanField_ELBO`` takes the KL over active weights alone; with ``Trace_ELBO``
    the prior density of zero weights adds a constant.

    Examples
    --------
    >>> import pyro.distributions as dist, pyro, torch
    >>> from pyro.infer import TraceMeanField_ELBO
    >>> from pyro.nn import PyroModule, PyroSample
    >>> from uq.inference import SSVI, SparseNormalGuide
    >>> class Model(PyroModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = PyroModule[torch.nn.Linear](20, 1, bias=False)
    ...         self.linear.weight = PyroSample(dist.Normal(0, 1.0).expand([1, 20]).to_event(2))
    ...     def forward(self, x, y=None):
    ...         loc = self.linear(x)[:, 0]
    ...         with pyro.plate("data", len(x)):
    ...             return pyro.sample("y", dist.Normal(loc, 0.1), obs=y)
    >>> x = torch.randn(100, 20)
    >>> y = x[:, 3]
    >>> model = Model()
    >>> guide = SparseNormalGuide(model, x, y, density=0.25)
    >>> elbo = TraceMeanField_ELBO()(model, guide)
    >>> opt = SSVI(guide, torch.optim.Adam(guide.parameters(), 0.1), n_steps=200, update_every=20)
    >>> def closure():
    ...     opt.zero_grad()
    ...     loss = elbo(x, y) / len(x)
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(200):
    ...     _ = opt.step(closure)
    >>> 3 in guide.weights["linear.weight"].index
    True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *args: Any,
        density: float = 0.1,
        allocation: str = "uniform",
        dense: tuple[str, ...] = (),
        init_std: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not 0 < density <= 1:
            raise ParameterError(f"SSVI: density must be a number in (0, 1], got {density!r}.")
        with torch.no_grad():
            trace = pyro.poutine.trace(model).get_trace(*args, **kwargs)
        sites: dict[str, Any] = {
            name: trace.nodes[name]
            for name in trace.stochastic_nodes
            if not site_is_subsample(trace.nodes[name])
        }
        if not sites or any(node["fn"].has_enumerate_support for node in sites.values()):
            raise ParameterError(
                "SSVI: the model needs latent sites, all of them continuous, got "
                f"{', '.join(sites) or 'none'}."
            )
        bounded = [name for name, node in sites.items() if not _is_real(node["fn"].support)]
        if bounded:
            raise ParameterError(
                f"SSVI: the guide is Gaussian, and site {bounded[0]!r} is not over all reals; give "
                "it a prior over its logarithm (or the like), or make it a parameter."
            )
        shapes = {
            name: tuple(node["value"].shape)
            for name, node in sites.items()
            if node["value"].ndim >= 2 and name not in dense
        }
        densities = layer_densities(shapes, density, allocation)
        self._names = list(sites)
        self._parts = nn.ModuleList()
        for name, node in sites.items():
            value = node["value"].detach()
            share = densities.get(name, 1.0)
            if round(share * value.numel()) < 1:
                raise ParameterError(
                    f"SSVI: density {share:.3g} leaves site {name!r} ({value.numel()} weights) "
                    "without any; raise density, or name the site in dense."
                )
            initial = value if name in shapes else torch.zeros_like(value)
            scale = float(node["fn"].variance.mean().sqrt())
            n_active = count_active(share, value.numel())
            self._parts.append(SparseGaussian(initial, n_active, scale, init_std))

    @property
    def weights(self) -> dict[str, SparseGaussian]:
        """The Gaussians by site."""
        return dict(zip(self._names, sparse_weights(self._parts).values(), strict=True))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample all sites; the arguments are the model's, and not used."""
        sites: dict[str, Any] = {name: SparseNormal(w) for name, w in self.weights.items()}
        return {name: pyro.sample(name, site) for name, site in sites.items()}
