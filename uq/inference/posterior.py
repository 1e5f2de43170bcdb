"""Posteriors: what a method inferred, callable on a tensor.

``posterior(x)`` gives the predictive distribution at the rows of ``x``. Two kinds: a distribution
over all weights, predicted by Monte Carlo over stacked weight draws (``monte_carlo``), and a
Bayesian last layer on features, predicted in closed form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from uq.distributions import NormalMixture, Predictive, mixture
from uq.distributions.classification import CategoricalMixture
from uq.kernels import use_triton
from uq.nn.bayesian import BayesianNetwork, normal_guide
from uq.nn.network import Network
from uq.nn.priors import NormalPrior
from uq.nn.sampled import sampled_network
from uq.nn.vbll import BayesianLastLayer
from uq.threads import turns

Weights = dict[str, Tensor]
# Activations and weights of one chunk: on a CPU they should stay in the cache, on a GPU there
# should be enough of them to fill it.
MEMORY_BUDGET_MB = {"cpu": 16, "cuda": 512}
_FEATURE_ROWS = 8192


class Posterior(nn.Module, ABC):
    """What a method inferred. ``state_dict()`` holds all of it.

    Estimators keep theirs as ``model.posterior_``.

    Parameters
    ----------
    seed : int, default=0
        Seed of the draws: predicting twice gives the same numbers.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import DrawsPosterior
    >>> from uq.nn import MLP, CategoricalLikelihood, Network
    >>> networks = [Network(MLP(2, (4,), 3), CategoricalLikelihood(3)) for _ in range(5)]
    >>> posterior = DrawsPosterior.stack(networks)
    >>> x = torch.randn(7, 2)
    >>> posterior(x).probs.shape  # a predictive distribution, as estimators give
    torch.Size([7, 3])
    >>> posterior.functions(x, 2).shape  # two functions, at all rows
    torch.Size([2, 7, 3])
    """

    seed: Tensor
    """Seed of the draws that a prediction uses: predicting twice gives the same numbers."""

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        with turns(self):
            return next(t.dtype for t in self.state_dict().values() if t.is_floating_point())

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.register_buffer("seed", torch.tensor(seed))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Predict; threads that share a posterior take turns."""
        with turns(self):
            return super().__call__(*args, **kwargs)

    def generator(self, device: torch.device) -> torch.Generator:
        """Return a generator on ``device`` at the stored seed."""
        return torch.Generator(device).manual_seed(int(self.seed))

    @abstractmethod
    def forward(self, x: Tensor, n_samples: int = 64) -> Predictive:
        """Predictive distribution at the rows of ``x``, on the CPU."""

    @abstractmethod
    def functions(self, x: Tensor, n: int) -> Tensor:
        """Draw functions and evaluate them at ``x``.

        Returns
        -------
        Tensor of shape (n, rows, m or n_classes)
            Noise-free means, or class probabilities; one draw is one function at all rows.
        """


class WeightPosterior(Posterior):
    """Posterior over all weights of a network."""

    def __init__(self, network: Network, seed: int = 0) -> None:
        super().__init__(seed)
        self.network = network

    @abstractmethod
    def sampler(self, n: int, generator: torch.Generator) -> Callable[[int], Weights]:
        """Return a function that gives the next k of n weight draws, stacked on a first axis.

        Draw s must not depend on how the draws are split into calls.
        """

    @property
    def max_draws(self) -> int | None:
        """Number of distinct draws, where it is finite."""
        return None

    def forward(self, x: Tensor, n_samples: int = 64) -> Predictive:
        """Mixture over ``n_samples`` weight draws (all of them where there are fewer)."""
        n = n_samples if self.max_draws is None else self.max_draws
        return self.network.likelihood.predictive(self.outputs(x, n))

    def outputs(self, x: Tensor, n: int) -> tuple[Tensor, ...]:
        """What the network gives under n weight draws, draws first."""
        return monte_carlo(self.network, self.sampler(n, self.generator(x.device)), n, x)

    def functions(self, x: Tensor, n: int) -> Tensor:
        """Draw weights; see :meth:`Posterior.functions`."""
        if self.max_draws is not None:
            n = min(n, self.max_draws)
        return _function_values(self(x, n))


class DrawsPosterior(WeightPosterior):
    """A finite set of weight draws of equal weight: ensemble members, one MAP estimate.

    Parameters
    ----------
    network : Network
        Gives the architecture.
    draws : dict of Tensor
        Parameters and buffers by name, stacked on a first axis of draws.
    seed : int, default=0
        Seed of the draws: predicting twice gives the same numbers.

    Examples
    --------
    A deep ensemble of networks that were trained elsewhere:

    >>> import torch
    >>> from uq.inference import DrawsPosterior
    >>> from uq.nn import MLP, Network, NormalLikelihood
    >>> networks = [Network(MLP(2, (8,), 1), NormalLikelihood(1)) for _ in range(3)]
    >>> dist = DrawsPosterior.stack(networks)(torch.zeros(5, 2))
    >>> dist.n_draws, dist.epistemic.shape
    (3, torch.Size([5, 1]))
    """

    def __init__(self, network: Network, draws: Weights, seed: int = 0) -> None:
        super().__init__(network, seed)
        self._names = list(draws)
        # Module names hold dots, which buffer names must not.
        for i, name in enumerate(self._names):
            self.register_buffer(f"draw_{i}", draws[name])

    @classmethod
    def stack(cls, networks: list[Network], seed: int = 0) -> DrawsPosterior:
        """Build the posterior whose draws are the weights of ``networks``."""
        states = [_weights(network) for network in networks]
        draws = {k: torch.stack([s[k].detach() for s in states]) for k in states[0]}
        return cls(networks[0], draws, seed)

    @property
    def draws(self) -> Weights:
        """The stacked weights by name."""
        return {name: getattr(self, f"draw_{i}") for i, name in enumerate(self._names)}

    @property
    def max_draws(self) -> int:
        """Number of draws held."""
        return next(iter(self.draws.values())).shape[0]

    def functions(self, x: Tensor, n: int) -> Tensor:
        """Evaluate n of the draws, spread evenly over all; see :meth:`Posterior.functions`."""
        if n >= self.max_draws:
            return super().functions(x, n)
        rows = (torch.arange(n, device=x.device) + 0.5).mul(self.max_draws / n).long()
        some = DrawsPosterior(self.network, {k: t[rows] for k, t in self.draws.items()})
        return some.functions(x, n)

    def sampler(self, n: int, generator: torch.Generator) -> Callable[[int], Weights]:
        """Hand out the stored draws in order."""
        position = 0

        def draw(k: int) -> Weights:
            nonlocal position
            position += k
            return {name: t[position - k : position] for name, t in self.draws.items()}

        return draw


class NormalPosterior(WeightPosterior):
    """Independent Normals over the weights; the network holds their means.

    Parameters
    ----------
    network : Network
        Means, and the architecture.
    stds : dict of Tensor
        Standard deviation of each parameter, by name.
    seed : int, default=0
        Seed of the draws: predicting twice gives the same numbers.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import NormalPosterior
    >>> from uq.nn import CategoricalLikelihood, Network
    >>> network = Network(torch.nn.Linear(1, 2, bias=False), CategoricalLikelihood(2))
    >>> _ = torch.nn.init.constant_(network.body.weight, 1.0)
    >>> posterior = NormalPosterior(network, {"body.weight": torch.full((2, 1), 0.5)})
    >>> posterior.at_mean(torch.ones(1, 1)).probs
    tensor([[0.5000, 0.5000]], dtype=torch.float64)
    >>> posterior(torch.ones(1, 1), n_samples=100).epistemic.item() > 0.01  # nats
    True
    """

    def __init__(self, network: Network, stds: Weights, seed: int = 0) -> None:
        super().__init__(network, seed)
        self._names = [name for name, _ in network.named_parameters()]
        for i, name in enumerate(self._names):
            std = stds.get(name)  # a frozen parameter has none
            known = dict(network.named_parameters())[name]
            self.register_buffer(f"std_{i}", torch.zeros_like(known) if std is None else std)

    @property
    def stds(self) -> Weights:
        """Standard deviations by parameter name."""
        return {name: getattr(self, f"std_{i}") for i, name in enumerate(self._names)}

    def to_pyro(self, prior: NormalPrior) -> tuple[BayesianNetwork, Callable[..., None]]:
        """Return the Pyro model of the network under ``prior``, and this posterior as its guide.

        Examples
        --------
        ``Predictive(model, guide=guide, num_samples=64)(x)["y"]`` samples the predictive.
        """
        means = {name: p.detach() for name, p in self.network.named_parameters() if p.requires_grad}
        return BayesianNetwork(self.network, prior), normal_guide(means, self.stds)

    def outputs(self, x: Tensor, n: int) -> tuple[Tensor, ...]:
        """What the network gives under n weight draws; a GPU draws those of linear layers in place.

        Its noise is counted: draws that :meth:`sampler` gives are others, of the same law.
        """
        if use_triton(x):
            drawn = sampled_network(self.network, x, self.stds, int(self.seed))
            if drawn is not None:
                return monte_carlo(drawn.network, drawn.sampler(), n, x)
        return super().outputs(x, n)

    def at_mean(self, x: Tensor) -> Predictive:
        """Predict with the mean weights alone: one forward pass, no epistemic uncertainty."""
        return self.network.likelihood.predictive(self.outputs_at_mean(x))

    def outputs_at_mean(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the network gives at the mean weights, with an axis of one draw in front."""
        means = {name: p.detach()[None] for name, p in self.network.named_parameters()}
        return monte_carlo(self.network, lambda _: means, 1, x)

    def sampler(self, n: int, generator: torch.Generator) -> Callable[[int], Weights]:
        """Draw m + σz, each draw from one flat noise vector of its own."""
        stds, means = self.stds, dict(self.network.named_parameters())
        sizes = [std.numel() for std in stds.values()]
        mean = torch.cat([means[k].detach().reshape(-1) for k in stds])
        std = torch.cat([s.reshape(-1) for s in stds.values()])

        def draw(k: int) -> Weights:
            flat = torch.stack(
                [
                    torch.randn(mean.shape, generator=generator, dtype=std.dtype, device=std.device)
                    for _ in range(k)
                ]
            )
            parts = flat.mul_(std).add_(mean).split(sizes, -1)
            return {
                name: part.view(k, *stds[name].shape)
                for name, part in zip(stds, parts, strict=True)
            }

        return draw


class MixturePosterior(Posterior):
    """Equal mixture of Normal posteriors over the weights of several networks.

    Parameters
    ----------
    members : list of NormalPosterior
        Over networks of one architecture that were trained from different initial weights; each
        with a seed of its own.
    seed : int, default=0
        Seed of the draws: predicting twice gives the same numbers.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import IVON, MixturePosterior
    >>> from uq.nn import MLP, CategoricalLikelihood, Network
    >>> networks = [Network(MLP(2, (4,), 3), CategoricalLikelihood(3)) for _ in range(2)]
    >>> members = [
    ...     IVON(net.parameters(), 0.1, ess=20).posterior(net, seed=i)
    ...     for i, net in enumerate(networks)
    ... ]
    >>> MixturePosterior(members)(torch.randn(5, 2), n_samples=8).n_draws  # 8 of each
    16
    """

    def __init__(self, members: list[NormalPosterior], seed: int = 0) -> None:
        super().__init__(seed)
        self._members = nn.ModuleList(members)

    @property
    def members(self) -> list[NormalPosterior]:
        """The posteriors that are mixed."""
        return [cast(NormalPosterior, member) for member in self._members]

    def forward(self, x: Tensor, n_samples: int = 64) -> Predictive:
        """Mixture over ``n_samples`` weight draws of each member."""
        return self._mixture([m.outputs(x, n_samples) for m in self.members])

    def at_mean(self, x: Tensor) -> Predictive:
        """Mixture over the mean weights of the members: a deep ensemble."""
        return self._mixture([m.outputs_at_mean(x) for m in self.members])

    def _mixture(self, parts: list[tuple[Tensor, ...]]) -> Predictive:
        parameters = tuple(torch.cat(ts) for ts in zip(*parts, strict=True))
        return self.members[0].network.likelihood.predictive(parameters)

    def functions(self, x: Tensor, n: int) -> Tensor:
        """Draw n functions, as evenly over the members as n allows."""
        share, rest = divmod(n, len(self.members))
        counts = [share + (i < rest) for i in range(len(self.members))]
        return torch.cat(
            [m.functions(x, k) for m, k in zip(self.members, counts, strict=True) if k]
        )


class LastLayerPosterior(Posterior):
    """Deterministic features and a Bayesian last layer.

    Parameters
    ----------
    body : Module
        Maps inputs to features (n, D).
    head : BayesianLastLayer
        Posterior over the last layer's weights.
    seed : int, default=0
        Seed of the draws: predicting twice gives the same numbers.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import LastLayerPosterior
    >>> from uq.nn import VBLLRegression
    >>> body, head = torch.nn.Linear(3, 16), VBLLRegression(16)  # trained by ``head.loss``
    >>> dist = LastLayerPosterior(body, head)(torch.randn(5, 3))
    >>> dist.stddev.shape  # in the units of the targets
    torch.Size([5, 1])
    """

    def __init__(self, body: nn.Module, head: BayesianLastLayer, seed: int = 0) -> None:
        super().__init__(seed)
        self.body = body
        self.head = head

    def features(self, x: Tensor) -> Tensor:
        """Features of each row, computed in chunks."""
        self.body.eval()
        with torch.no_grad():
            return torch.cat([self.body(rows) for rows in x.split(_FEATURE_ROWS)])

    def forward(self, x: Tensor, n_samples: int = 64) -> Predictive:
        """Closed form for regression; ``n_samples`` draws of the last layer for classes."""
        with torch.no_grad():
            dist = self.head.predictive(self.features(x), n_samples, self.generator(x.device))
        return dist.cpu()

    def functions(self, x: Tensor, n: int) -> Tensor:
        """Draw last layers; see :meth:`Posterior.functions`."""
        with torch.no_grad():
            return self.head.functions(self.features(x), n, self.generator(x.device)).cpu()


class BayesianFeaturesPosterior(LastLayerPosterior):
    """Features with a Normal posterior over the body's weights, and a Bayesian last layer.

    Parameters
    ----------
    body : Module
        Maps inputs to features (n, D); holds the means of its weights.
    head : BayesianLastLayer
        Posterior over the last layer's weights.
    stds : dict of Tensor
        Standard deviation of each parameter of the body, by name.
    seed : int, default=0
        Seed of the draws: predicting twice gives the same numbers.
    """

    def __init__(
        self, body: nn.Module, head: BayesianLastLayer, stds: Weights, seed: int = 0
    ) -> None:
        super().__init__(body, head, seed)
        self._names = [name for name, _ in body.named_parameters()]
        for i, (name, p) in enumerate(body.named_parameters()):
            self.register_buffer(f"std_{i}", stds.get(name, torch.zeros_like(p)))

    @property
    def stds(self) -> Weights:
        """Standard deviations of the body's parameters, by name."""
        return {name: getattr(self, f"std_{i}") for i, name in enumerate(self._names)}

    def forward(self, x: Tensor, n_samples: int = 64) -> Predictive:
        """Mixture over ``n_samples`` draws of the body of the head's predictive on its features."""
        generator = self.generator(x.device)
        with torch.no_grad():
            parts = [
                self.head.predictive(features, 1, generator)
                for features in self._draw_features(x, n_samples, generator)
            ]
        return mixture(parts).cpu()

    def functions(self, x: Tensor, n: int) -> Tensor:
        """Draw bodies, and a last layer for each; see :meth:`Posterior.functions`."""
        generator = self.generator(x.device)
        with torch.no_grad():
            parts = [
                self.head.functions(features, 1, generator)
                for features in self._draw_features(x, n, generator)
            ]
        return torch.cat(parts).cpu()

    def _draw_features(self, x: Tensor, n: int, generator: torch.Generator) -> Iterator[Tensor]:
        self.body.eval()
        means, stds = dict(self.body.named_parameters()), self.stds
        for _ in range(n):
            weights = {
                name: mean
                + stds[name]
                * torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
                for name, mean in means.items()
            }
            yield torch.cat(
                [functional_call(self.body, weights, (rows,)) for rows in x.split(_FEATURE_ROWS)]
            )


def _function_values(dist: Predictive) -> Tensor:
    if isinstance(dist, CategoricalMixture):
        return dist.logits.exp()
    return cast(NormalMixture, dist).loc


def _weights(network: nn.Module) -> Weights:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


# -- Monte-Carlo prediction ------------------------------------------------------------------


def monte_carlo(
    network: nn.Module,
    draw: Callable[[int], Weights],
    n_draws: int,
    x: Tensor,
    *,
    max_memory_mb: float | None = None,
) -> tuple[Tensor, ...]:
    """Evaluate ``network`` under many weight draws, vectorised over draws.

    Parameters
    ----------
    network : Module
        Maps x to a tuple of tensors with the rows first; used in eval mode.
    draw : callable
        ``draw(k)`` gives the next k weight draws, stacked on a first axis, by name. Weights that
        it does not name keep the network's own value.
    n_draws : int
        Number of draws in total.
    x : Tensor of shape (rows, …)
        Inputs.
    max_memory_mb : float, optional
        Bound on weights and activations of one chunk; draws, then rows are split to keep it. By
        default 16 on a CPU (what its cache holds) and 512 on a GPU.

    Returns
    -------
    tuple of Tensor
        What the network returns, on the CPU, with an axis of draws in front.
    """
    network.eval()
    if max_memory_mb is None:
        max_memory_mb = MEMORY_BUDGET_MB[x.device.type]
    budget = max_memory_mb * 2**20 / x.element_size()
    # Some networks need two rows (a squeeze() in user code), none more.
    per_row = _activation_elements(network, x[:2]) / max(1, len(x[:2]))
    per_draw = per_row * len(x) + sum(p.numel() for p in network.parameters())
    draws = int(min(n_draws, max(1, budget / per_draw)))
    rows = int(max(32, budget / (per_row * draws)))
    columns: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for start in range(0, n_draws, draws):
            weights = draw(min(draws, n_draws - start))
            parts = [_evaluate(network, weights, part) for part in x.split(rows)]
            columns.append(
                tuple(torch.cat([t.cpu() for t in ts], 1) for ts in zip(*parts, strict=True))
            )
    return tuple(torch.cat(ts, 0) for ts in zip(*columns, strict=True))


def _evaluate(network: nn.Module, weights: Weights, x: Tensor) -> tuple[Tensor, ...]:
    """Outputs under each of the stacked weights, draws first."""
    n = len(next(iter(weights.values())))
    if n > 1:
        call = vmap(lambda w: functional_call(network, w, (x,)))
        try:
            outputs: tuple[Tensor, ...] = call(weights)
            return outputs
        except RuntimeError as error:
            # Recurrent layers have no batching rule: go through the draws one by one.
            if "atching rule" not in str(error):
                raise
    each = [functional_call(network, {k: w[s] for k, w in weights.items()}, (x,)) for s in range(n)]
    return tuple(torch.stack(ts) for ts in zip(*each, strict=True))


def _activation_elements(network: nn.Module, x: Tensor) -> int:
    """Elements that the modules of one forward pass put out: what the memory budget counts."""
    total = x.numel()

    def count(_module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += output.numel()

    handles = [m.register_forward_hook(count) for m in network.modules() if not list(m.children())]
    try:
        with torch.no_grad():
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    return total
