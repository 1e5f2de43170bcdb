"""Any Pyro model as a posterior: draws of its latent sites, in a parameter store of its own.

A model is a callable ``model(x, y=None)`` with one site that observes ``y``, under a plate over the
rows. Variational inference and Markov chains both end in draws of the sites that are not of single
rows; a prediction conditions the model on each draw and reads the distribution of ``y`` off it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch import distributions as td

from uq.distributions import CategoricalMixture, NormalMixture, Parametric, Predictive
from uq.errors import ParameterError
from uq.inference.posterior import Posterior
from uq.inference.training import isolated_rng, warn_interrupted

Model = Callable[..., Any]


@contextmanager
def own_store(values: Mapping[str, Tensor] | None = None) -> Iterator[Any]:
    """Use an empty parameter store, or one of ``values``; the caller's comes back after."""
    store = pyro.get_param_store()
    with store.scope():
        for name, value in (values or {}).items():
            store[name] = value.detach()
        yield store


class _Weigh(Messenger):
    """Scale the log density of the observed site row by row."""

    def __init__(self, site: str, weight: Tensor) -> None:
        super().__init__()
        self.site, self.weight = site, weight

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.site and msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.weight


def weighted(model: Model, site: str, weight: Tensor | None) -> Model:
    """Return the model with a factor on each row's log likelihood."""
    return model if weight is None else _Weigh(site, weight)(model)


def sites_of(model: Model, x: Tensor, y: Tensor) -> tuple[str, list[str]]:
    """Name of the site that observes ``y``, and names of the latent sites shared by all rows.

    Raises
    ------
    ParameterError
        If not exactly one site is observed, or it is not one batch element a row.
    """
    with torch.no_grad():
        trace = poutine.trace(model).get_trace(x, y)
    samples = {n: s for n, s in trace.nodes.items() if s["type"] == "sample"}
    plates = {n for n, s in samples.items() if type(s["fn"]).__name__ == "_Subsample"}
    observed = [n for n, s in samples.items() if s["is_observed"] and n not in plates]
    if len(observed) != 1:
        raise ParameterError(
            f"model must observe y at one site, pyro.sample(name, …, obs=y), got {observed}."
        )
    fn: Any = samples[observed[0]]["fn"]
    if tuple(fn.batch_shape)[-1:] != (len(x),):
        raise ParameterError(
            f"model: the observed site must have a batch element for each of {len(x)} rows, got "
            f"batch shape {tuple(fn.batch_shape)}; put it under pyro.plate('data', len(x)), with "
            "several targets as an event (.to_event(1))."
        )
    rows = {f.name for f in samples[observed[0]]["cond_indep_stack"] if f.size == len(x)}
    latent = [
        name
        for name, s in samples.items()
        if not s["is_observed"] and not rows & {f.name for f in s["cond_indep_stack"]}
    ]
    return observed[0], [n for n in latent if n not in plates]


def draw_from_guide(guide: Model, sites: list[str], n: int, *args: Any) -> dict[str, Tensor]:
    """Draw ``n`` values of each site: (n, …)."""
    draws: dict[str, list[Tensor]] = {name: [] for name in sites}
    with torch.no_grad():
        for _ in range(n):
            trace = poutine.trace(guide).get_trace(*args)
            for name in sites:
                if name not in trace.nodes:
                    raise ParameterError(f"guide: it has no site {name!r}, which the model has.")
                value: Any = trace.nodes[name]["value"]
                draws[name].append(value)
    return {name: torch.stack(values) for name, values in draws.items()}


def draw_chains(
    make_kernel: Callable[[Model], Any],
    model: Model,
    sites: list[str],
    args: tuple[Any, ...],
    *,
    n_chains: int,
    n_warmup: int,
    n_draws: int,
    seed: int,
    verbose: int = 0,
    description: str = "MCMC",
) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    """Run chains of a Pyro kernel one after another.

    Returns
    -------
    draws : dict of Tensor
        (chains, draws, …) of each site.
    sample_stats : dict of Tensor
        "diverging" and "acceptance_rate" (the mean of its chain), where the kernel tells them.
    interrupted : bool
        Then whole chains are kept, or the draws so far of the first.
    """
    chains: list[dict[str, Tensor]] = []
    stats: list[dict[str, Tensor]] = []
    interrupted = False
    for chain in range(n_chains):
        states: list[dict[str, Tensor]] = []
        told: dict[str, Any] = {}

        # As the chain goes, since Pyro throws all of it away at an interrupt.
        def keep(kernel: Any, params: dict[str, Tensor], stage: str, i: int) -> None:
            if not stage.lower().startswith("warmup"):
                back = getattr(kernel, "transforms", None) or {}
                states.append(  # noqa: B023
                    {k: (back[k].inv(v) if k in back else v).detach() for k, v in params.items()}
                )
                told.update(kernel.diagnostics())  # noqa: B023

        mcmc = MCMC(
            make_kernel(model),
            n_draws,
            warmup_steps=n_warmup,
            hook_fn=keep,
            disable_progbar=verbose < 1,
        )
        with isolated_rng(seed + chain, torch.device("cpu")):
            try:
                mcmc.run(*args)
            except KeyboardInterrupt:
                interrupted = True
        if interrupted:
            if not chains and not states:
                raise KeyboardInterrupt
            warn_interrupted(
                f"{description}, in chain {chain + 1}",
                f"{len(chains)} whole chains are kept" if chains else f"{len(states)} draws kept",
            )
            if chains:
                break
        chains.append({name: torch.stack([s[name] for s in states]) for name in sites})
        stats.append(_stats(told, len(states)))
        if interrupted:
            break
    draws = {name: torch.stack([c[name] for c in chains]) for name in sites}
    known = [name for name in stats[0] if all(name in s for s in stats)]
    return draws, {name: torch.stack([s[name] for s in stats]) for name in known}, interrupted


def _stats(told: dict[str, Any], n: int) -> dict[str, Tensor]:
    stats = {}
    if "divergences" in told:
        diverging = torch.zeros(n, dtype=torch.bool)
        diverging[[i for i in told["divergences"] if i < n]] = True
        stats["diverging"] = diverging
    if "acceptance rate" in told:
        stats["acceptance_rate"] = torch.full((n,), float(told["acceptance rate"])).double()
    return stats


class PyroPosterior(Posterior):
    """Draws of the latent sites of a Pyro model.

    Parameters
    ----------
    model : callable
        ``model(x, y=None)``; a Module is held with its parameters.
    site : str
        Name of the site that observes y.
    draws : dict of Tensor
        Values of the latent sites that are shared by all rows, stacked on a first axis.
    params : dict of Tensor
        What the parameter store held for the model.
    """

    def __init__(
        self,
        model: Model,
        site: str,
        draws: dict[str, Tensor],
        params: dict[str, Tensor],
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.site = site
        self.module: nn.Module | None = model if isinstance(model, nn.Module) else None
        self._function = None if self.module is not None else model
        self._names, self._params = list(draws), list(params)
        for i, value in enumerate(draws.values()):
            self.register_buffer(f"draw_{i}", value.detach())
        for i, value in enumerate(params.values()):
            self.register_buffer(f"param_{i}", value.detach())

    @property
    def draws(self) -> dict[str, Tensor]:
        """The stacked values by site."""
        return {name: getattr(self, f"draw_{i}") for i, name in enumerate(self._names)}

    @property
    def params(self) -> dict[str, Tensor]:
        """Values of the parameter store."""
        return {name: getattr(self, f"param_{i}") for i, name in enumerate(self._params)}

    @property
    def max_draws(self) -> int:
        """Number of draws held."""
        return len(next(iter(self.draws.values()))) if self._names else 1

    def distributions(self, x: Tensor, rows: Any = None) -> list[Any]:
        """Distribution of y given each draw (those at positions ``rows``)."""
        model: Any = self.module if self.module is not None else self._function
        found = []
        with torch.no_grad(), isolated_rng(int(self.seed), x.device), own_store(self.params):
            for s in range(self.max_draws) if rows is None else rows:
                values = {name: t[s] for name, t in self.draws.items()}
                trace = poutine.trace(poutine.condition(model, values)).get_trace(x)
                found.append(_plain(trace.nodes[self.site]["fn"]))
        return found

    def forward(self, x: Tensor, n_samples: int = 64) -> Predictive:
        """Mixture over all the draws."""
        return mixed(self.distributions(x))

    def functions(self, x: Tensor, n: int) -> Tensor:
        """Means or class probabilities of n draws, spread evenly over all."""
        n = min(n, self.max_draws)
        rows = ((torch.arange(n) + 0.5) * (self.max_draws / n)).long().tolist()
        parts = [_class_logits(d) for d in self.distributions(x, rows)]
        if parts[0] is not None:
            return torch.stack([p.softmax(-1) for p in parts if p is not None]).cpu()
        return _columns(torch.stack([d.mean for d in self.distributions(x, rows)])).cpu()


def _plain(fn: Any) -> Any:
    """Without Pyro's wrappers of the batch; outputs of a row as its last axis."""
    while isinstance(fn, td.Independent) or type(fn).__name__ in (
        "MaskedDistribution",
        "ExpandedDistribution",
    ):
        if type(fn).__name__ == "ExpandedDistribution":
            fn = fn.base_dist.expand(fn.batch_shape)
        else:
            fn = fn.base_dist
    return fn


def _class_logits(fn: Any) -> Tensor | None:
    if isinstance(fn, td.Categorical):
        return fn.logits.detach()
    if isinstance(fn, td.Bernoulli):
        return torch.stack([torch.zeros_like(fn.logits), fn.logits], -1).detach()
    return None


def mixed(parts: list[Any]) -> Predictive:
    """Equal mixture of the distributions of y under several draws."""
    logits = [_class_logits(fn) for fn in parts]
    if all(t is not None for t in logits):
        return CategoricalMixture(torch.stack([t for t in logits if t is not None]).cpu())
    if all(type(fn).__name__ == "Normal" for fn in parts):
        loc, scale = (torch.stack([getattr(fn, k) for fn in parts]) for k in ("loc", "scale"))
        return NormalMixture(_columns(loc).double().cpu(), _columns(scale).double().cpu())
    family: Any = type(parts[0])
    if any(type(fn) is not family for fn in parts):
        raise ParameterError("model: the family of the observed site changes between draws.")
    stacked = {
        k: _columns(torch.stack([getattr(fn, k).expand(fn.batch_shape) for fn in parts]))
        .double()
        .cpu()
        .movedim(0, -1)
        for k in family.arg_constraints
    }
    components = family(**stacked)
    equal = td.Categorical(torch.ones_like(next(iter(stacked.values()))))
    base = td.MixtureSameFamily(equal, components)
    share = components.mean.var(-1, correction=0) / base.variance
    known = bool(share.isfinite().all() & (share < 1).all())
    return Parametric(base, epistemic_share=share if known else None)


def _columns(t: Tensor) -> Tensor:
    t = t.detach()  # Pyro's parameters ask for gradients, whatever the context
    return t if t.ndim == 3 else t[..., None]
