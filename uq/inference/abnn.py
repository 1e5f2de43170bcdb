"""ABNN: a trained network becomes Bayesian by noise on its normalisation layers, post hoc.

Each member starts from the same checkpoint with Bayesian normalisation layers (:mod:`uq.nn.abnn`)
and is fine-tuned for a few epochs on

    L(ω) = −Σ_i w(y_i) log p(y_i | x_i, ω) / Σ_i w(y_i)  +  weight decay,

where w is ``random_prior`` on ⌊√C⌋ random classes and 1 on the others, drawn once a member, so that
members drift to different places (the paper's E(ω)). By default only scales, shifts and batch
statistics move, and all members share one backbone. The predictive averages probabilities, never
logits, over members (the un-tuned network among them) and noise draws:

    p(y | x) = 1/(TL) Σ_m Σ_l p(y | f(x; ω_m, ε_ml)).

G. Franchi et al., "Make Me a BNN: A Simple Strategy for Estimating Bayesian Uncertainty from
Pre-trained Models", CVPR 2024, arXiv 2312.15297.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from uq.distributions import Predictive
from uq.distributions.classification import CategoricalMixture
from uq.distributions.regression import NormalMixture
from uq.errors import DataError, ParameterError
from uq.inference.posterior import (
    MEMORY_BUDGET_MB,
    WeightPosterior,
    Weights,
    _activation_elements,
    _function_values,
    monte_carlo,
)
from uq.nn.abnn import (
    NORM_LAYERS,
    BayesianNorm,
    NoiseShape,
    bayesian_layers,
    layer_settings,
    make_bayesian,
    perturb,
    refuse_lazy,
    without_noise,
)
from uq.nn.network import Network

Scope = Literal["norm", "all"]
SCOPES = ("norm", "all")


def to_abnn(
    module: nn.Module,
    *,
    alpha: float | None = None,
    noise_shape: NoiseShape = "channel",
    train_scope: Scope = "norm",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Return a copy of a trained network in which every normalisation layer is Bayesian.

    The copy gives another output at each call, in eval mode, too. It has the state-dict keys of
    ``module`` (and scales and shifts where a layer had none).

    Parameters
    ----------
    module : Module
        A network with normalisation layers: BatchNorm1d, 2d, 3d, SyncBatchNorm, LayerNorm, RMSNorm,
        GroupNorm, InstanceNorm, or subclasses. It is not changed.
    alpha : float, optional
        Standard deviation of the noise as a share of each scale: by default 0.03, and 0.1 for
        "element", whose noise averages out over positions.
    noise_shape : {"channel", "sample", "element"}, default="channel"
        One noise number per channel and forward pass (a draw of the weights, at no cost), per
        channel and row, or per activation (the authors' code).
    train_scope : {"norm", "all"}, default="norm"
        What is to be fine-tuned. With "norm" the copy shares the memory of all other parameters
        with ``module``, and they take no gradient: a member costs its normalisation layers. With
        "all" everything is copied.
    generator : torch.Generator, optional
        Source of the noise; torch's global generator by default.

    Returns
    -------
    Module
        In eval mode. Turn the noise off by :func:`uq.nn.without_noise`.

    Raises
    ------
    ParameterError
        If there is no normalisation layer, or one that cannot be used
        (:func:`uq.nn.bayesian_norm` says which).

    See Also
    --------
    insert_norms : for a network without normalisation layers.
    uq.ABNNClassifier : fine-tunes and predicts.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.nn import functional as F
    >>> from uq.inference import random_class_weights, to_abnn
    >>> trained = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    >>> x, y = torch.randn(60, 4), torch.arange(60) % 3
    >>> members = [to_abnn(trained) for _ in range(3)]
    >>> for member in members:
    ...     tuned = [p for p in member.parameters() if p.requires_grad]
    ...     optimizer = torch.optim.SGD(tuned, 0.005, momentum=0.9, nesterov=True)
    ...     weight = random_class_weights(3)
    ...     for _ in range(5):
    ...         optimizer.zero_grad()
    ...         F.cross_entropy(member(x), y, weight).backward()
    ...         optimizer.step()
    >>> draws = torch.stack([m(x).softmax(-1) for m in members for _ in range(10)])
    >>> draws.mean(0).shape
    torch.Size([60, 3])
    """
    _check_scope(train_scope)
    refuse_lazy(module)
    memo: dict[int, Any] = {}
    if train_scope == "norm":
        norms = [m for m in module.modules() if isinstance(m, NORM_LAYERS)]
        own = {id(p) for norm in norms for p in norm.parameters(recurse=False)}
        memo = {
            id(p): nn.Parameter(p.detach(), requires_grad=False)
            for p in module.parameters()
            if id(p) not in own
        }
    return convert(copy.deepcopy(module, memo), alpha, noise_shape, generator).eval()


def convert(
    module: nn.Module,
    alpha: float | None,
    noise_shape: NoiseShape,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Make every normalisation layer of ``module`` Bayesian, in place; see :func:`to_abnn`."""
    found = [(name, m) for name, m in module.named_modules() if isinstance(m, NORM_LAYERS)]
    if not found:
        raise ParameterError(
            "module has no normalisation layer to put noise on (BatchNorm, LayerNorm, RMSNorm, "
            "GroupNorm, InstanceNorm). Train a network that has one, or insert layers that change "
            "nothing yet: uq.inference.insert_norms(module, X)."
        )
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    for name, layer in found:
        make_bayesian(layer, alpha, noise_shape, generator, name or type(layer).__name__, like)
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(True)
    for part in module.modules():
        # In eval mode, torch's fused path of transformers reads weights and passes layers by.
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0
        elif isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False
    return module


def _check_scope(train_scope: str) -> None:
    if train_scope not in SCOPES:
        raise ParameterError(f"train_scope must be 'norm' or 'all', got {train_scope!r}.")


def insert_norms(module: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy with a batch normalisation that changes nothing behind each hidden layer.

    Behind every linear layer on vectors and every convolution except the last, a BatchNorm with the
    mean μ̂ and variance v̂ of its inputs at ``x``, γ = √(v̂ + eps) and β = μ̂: in eval mode the
    identity, until ABNN puts noise on γ.

    Parameters
    ----------
    module : Module
        A trained network; not changed.
    x : Tensor of shape (n, …)
        A batch of training inputs, the more the better.

    Returns
    -------
    Module
        In eval mode, with the outputs of ``module``. The layer ``name`` is now ``name.0``.

    Raises
    ------
    ParameterError
        If there is no hidden layer to put one behind.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from uq.inference import insert_norms, to_abnn
    >>> trained = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> x = torch.randn(50, 4)
    >>> with_norms = insert_norms(trained, x)
    >>> torch.allclose(with_norms(x), trained(x), atol=1e-5)
    True
    >>> to_abnn(with_norms)[0][1].alpha
    0.03
    """
    module = copy.deepcopy(module).eval()
    seen: dict[nn.Module, list[Tensor]] = {}

    def look(layer: nn.Module, _inputs: object, out: Tensor) -> None:
        flat = out.movedim(1, -1).flatten(0, -2)
        seen.setdefault(layer, []).append(torch.stack([flat.mean(0), flat.var(0, correction=0)]))
        wanted.setdefault(layer, isinstance(layer, nn.Linear) and out.ndim != 2)

    wanted: dict[nn.Module, bool] = {}
    kinds: dict[type, Any] = {nn.Linear: nn.BatchNorm1d, nn.Conv1d: nn.BatchNorm1d}
    kinds |= {nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
    handles = [m.register_forward_hook(look) for m in module.modules() if type(m) in kinds]
    try:
        with torch.no_grad():
            module(x)
    finally:
        for handle in handles:
            handle.remove()
    # A layer that is called twice has no one mean; a linear layer on sequences, no channel axis 1.
    hidden = [m for m in list(seen)[:-1] if len(seen[m]) == 1 and not wanted[m]]
    if not hidden:
        raise ParameterError(
            f"insert_norms: {type(module).__name__} has no linear layer on vectors or convolution "
            "besides its last layer; add normalisation layers and train it again."
        )
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if child in hidden:
                mean, variance = seen[child][0]
                norm = kinds[type(child)](len(mean), device=mean.device, dtype=mean.dtype)
                norm.running_mean, norm.running_var = mean, variance
                with torch.no_grad():
                    norm.weight.copy_((variance + norm.eps).sqrt())
                    norm.bias.copy_(mean)
                setattr(parent, name, nn.Sequential(child, norm.eval()))
    return module


def random_class_weights(
    n_classes: int, random_prior: float = 7.0, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draw the loss weights of one member: ``random_prior`` on ⌊√C⌋ classes, 1 on the others.

    Parameters
    ----------
    n_classes : int
        Number of classes C.
    random_prior : float, default=7.0
        Weight of the favoured classes, as in the authors' scripts; 1 favours none.
    generator : torch.Generator, optional
        Source of the draw; torch's global generator by default.

    Returns
    -------
    Tensor of shape (C,)

    Examples
    --------
    >>> from uq.inference import random_class_weights
    >>> random_class_weights(10).sum()
    tensor(28.)
    """
    if n_classes < 1 or not 0 <= random_prior < math.inf:
        raise ParameterError(
            "random_class_weights: n_classes must be >= 1 and random_prior >= 0, got "
            f"{n_classes!r} and {random_prior!r}."
        )
    device = "cpu" if generator is None else generator.device
    weights = torch.ones(n_classes, device=device)
    order = torch.randperm(n_classes, generator=generator, device=device)
    weights[order[: math.isqrt(n_classes)]] = random_prior
    return weights


def tuned_names(network: Network, train_scope: Scope) -> list[str]:
    """Names of the parameters and buffers that a member has for itself."""
    parameters, buffers = dict(network.named_parameters()), dict(network.named_buffers())
    if train_scope == "all":
        return [*parameters, *buffers]
    norms = tuple(f"{name}." for name in bayesian_layers(network))
    # The likelihood, too: it holds the noise of the targets.
    return [name for name in (*parameters, *buffers) if name.startswith((*norms, "likelihood."))]


class ABNNPosterior(WeightPosterior):
    """Members that share a backbone, and noise on the scales of their normalisation layers.

    Parameters
    ----------
    network : Network
        Its body comes from :func:`to_abnn`; gives what the members share.
    members : dict of Tensor
        What each of T members has for itself, by name, stacked on a first axis.
    seed : int, default=0
        Seed of the noise.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from uq.inference import ABNNPosterior, to_abnn
    >>> from uq.nn import CategoricalLikelihood, Network
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    >>> members = [to_abnn(net) for _ in range(2)]  # each fine-tuned
    >>> own = {
    ...     f"body.1.{name}": torch.stack([getattr(m[1], name).detach() for m in members])
    ...     for name in ("weight", "bias")
    ... }
    >>> posterior = ABNNPosterior(Network(members[0], CategoricalLikelihood(3)), own)
    >>> posterior(torch.randn(5, 4), n_samples=10).n_draws  # 10 of each member
    20
    """

    def __init__(self, network: Network, members: Weights, seed: int = 0) -> None:
        super().__init__(network, seed)
        self._names = list(members)
        # Module names hold dots, which buffer names must not.
        for i, name in enumerate(self._names):
            self.register_buffer(f"member_{i}", members[name])

    @property
    def members(self) -> Weights:
        """What the members have for themselves, stacked, by name."""
        return {name: getattr(self, f"member_{i}") for i, name in enumerate(self._names)}

    @property
    def n_members(self) -> int:
        """Number of members T."""
        return len(next(iter(self.members.values())))

    @property
    def noise_shape(self) -> NoiseShape:
        """What shares a noise number."""
        return self._layers()[0][1].noise_shape

    def _layers(self) -> list[tuple[str, BayesianNorm]]:
        return list(bayesian_layers(self.network).items())

    def forward(self, x: Tensor, n_samples: int = 10) -> Predictive:
        """Mixture over ``n_samples`` noise draws of each member; draw s is one of member s mod T.

        Noise per channel is shared by all rows: a draw is one function. Other noise is drawn anew
        for each row.
        """
        if self.noise_shape == "channel":
            parameters = self._by_channel(x, self.n_members * n_samples)
        else:
            parameters = self._by_row(x, n_samples)
        return self.network.likelihood.predictive(parameters)

    def functions(self, x: Tensor, n: int) -> Tensor:
        """Draw functions, members in turn; see :meth:`Posterior.functions`.

        Raises
        ------
        ParameterError
            Unless ``noise_shape`` is "channel": other noise makes no functions.
        """
        if self.noise_shape != "channel":
            raise ParameterError(
                f"noise_shape={self.noise_shape!r} draws noise for each row, which makes no "
                "functions; use noise_shape='channel'."
            )
        return _function_values(self.network.likelihood.predictive(self._by_channel(x, n)))

    def _by_channel(self, x: Tensor, n: int) -> tuple[Tensor, ...]:
        with without_noise(self.network):  # it comes with the weights
            draw = self.sampler(n, self.generator(x.device))
            return monte_carlo(self.network, draw, n, x)

    def sampler(self, n: int, generator: torch.Generator) -> Callable[[int], Weights]:
        """Draw the weights of members in turn, their scales γ(1 + αε) with ε of each draw's own."""
        members, count = self.members, self.n_members
        # Layers may share one scale: it has the name and the noise of the first.
        first = {id(layer.weight): (name, layer) for name, layer in reversed(self._layers())}
        layers = [(f"{name}.weight", layer.alpha) for name, layer in reversed(first.values())]
        shapes = [members[name].shape[1:] for name, _ in layers]
        sizes = [shape.numel() for shape in shapes]
        dtype = torch.promote_types(members[layers[0][0]].dtype, torch.float32)
        position = 0

        def draw(k: int) -> Weights:
            nonlocal position
            which = torch.arange(position, position + k, device=generator.device) % count
            position += k
            weights = {name: t[which] for name, t in members.items()}
            flat = torch.stack(
                [
                    torch.randn(
                        sum(sizes), generator=generator, dtype=dtype, device=generator.device
                    )
                    for _ in range(k)
                ]
            )
            for (name, alpha), shape, noise in zip(
                layers, shapes, flat.split(sizes, 1), strict=True
            ):
                weights[name] = perturb(weights[name], alpha * noise.view(k, *shape))
            return weights

        return draw

    def _by_row(self, x: Tensor, n_samples: int) -> tuple[Tensor, ...]:
        """Outputs under noise of each row's own: the draws of a member are more rows of a batch."""
        network = self.network.eval()
        budget = MEMORY_BUDGET_MB[x.device.type] * 2**20 / x.element_size()
        with without_noise(network):  # which would come from torch's global generator
            per_row = _activation_elements(network, x[:2]) / max(1, len(x[:2]))
        rows = min(len(x), max(32, int(budget / per_row)))
        draws = min(n_samples, max(1, int(budget / per_row / rows)))
        outputs = []
        with torch.no_grad(), layer_settings(network, generator=self.generator(x.device)):
            for m in range(self.n_members):
                weights = {name: t[m] for name, t in self.members.items()}
                parts = [_row_draws(network, weights, p, n_samples, draws) for p in x.split(rows)]
                outputs.append([torch.cat(ts, 1) for ts in zip(*parts, strict=True)])
        # (T, L, rows, …) to draws in which members take turns.
        return tuple(torch.stack(ts, 1).flatten(0, 1) for ts in zip(*outputs, strict=True))


def _row_draws(
    network: nn.Module, weights: Weights, x: Tensor, n: int, at_once: int
) -> tuple[Tensor, ...]:
    """Outputs of ``n`` passes over ``x``, with an axis of draws in front, on the CPU."""
    columns: list[list[Tensor]] = []
    for start in range(0, n, at_once):
        k = min(at_once, n - start)
        tiled = x.repeat(k, *(1,) * (x.ndim - 1))
        outputs: tuple[Tensor, ...] = functional_call(network, weights, (tiled,))
        columns.append([t.cpu().unflatten(0, (k, len(x))) for t in outputs])
    return tuple(torch.cat(ts) for ts in zip(*columns, strict=True))


def epistemic_parts(dist: Predictive, n_members: int) -> dict[str, Tensor]:
    """Split epistemic uncertainty into what members disagree on and what the noise adds.

    Parameters
    ----------
    dist : CategoricalMixture or NormalMixture
        From :class:`ABNNPosterior` (or any whose draw s is one of member s mod T).
    n_members : int
        Number of members T.

    Returns
    -------
    dict of Tensor
        "between_members" H(p̄) − mean_m H(p̄_m) and "within_members" mean_m [H(p̄_m) −
        mean_l H(p_ml)], in nats; for real targets the variance of the members' means, and the mean
        over members of the variance of their draws' means. They add up to ``dist.epistemic``.

    Raises
    ------
    DataError
        If the draws are no multiple of ``n_members``.

    Examples
    --------
    >>> import torch
    >>> from uq.distributions import NormalMixture
    >>> from uq.inference import epistemic_parts
    >>> means = torch.tensor([[0.0], [4.0], [2.0], [4.0]])  # draws of members 0, 1, 0, 1; one row
    >>> parts = epistemic_parts(NormalMixture(means, torch.tensor(1.0)), n_members=2)
    >>> parts["between_members"].item(), parts["within_members"].item()  # squared target units
    (2.25, 0.5)
    """
    if dist.n_draws % n_members:
        raise DataError(f"epistemic_parts: {dist.n_draws} draws are not L × {n_members} members.")
    if isinstance(dist, CategoricalMixture):
        p = dist.logits.double().exp().unflatten(0, (-1, n_members))
        each = p.mean(0)
        whole = each.mean(0)
        return {
            "between_members": _kl(each, whole).mean(0),
            "within_members": _kl(p, each).mean((0, 1)),
        }
    loc = cast(NormalMixture, dist).loc.double().unflatten(0, (-1, n_members))
    each = loc.mean(0)
    return {
        "between_members": (each - each.mean(0)).square().mean(0),
        "within_members": (loc - each).square().mean((0, 1)),
    }


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL divergence over the last axis; its mean over p with mean q is H(q) − mean H(p)."""
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1).clamp_min(0.0)


def quantile_edges(batches: Iterable[tuple[Tensor, ...]], n_bins: int) -> Tensor:
    """Inner edges of ``n_bins`` quantile bins of the targets' mean over outputs.

    Weights of the rows count as repetitions.
    """
    parts = [(y.mean(-1), w[0] if w else torch.ones_like(y[:, 0])) for _, y, *w in batches]
    value, weight = (torch.cat(ts) for ts in zip(*parts, strict=True))
    value, order = value.sort()
    share = weight[order].double().cumsum(0)
    levels = torch.arange(1, n_bins, device=value.device, dtype=torch.float64) / n_bins
    # A weight that is rounded must not shift an edge to the next row.
    at = torch.searchsorted(share / share[-1] + 1e-12, levels)
    return value[at]
