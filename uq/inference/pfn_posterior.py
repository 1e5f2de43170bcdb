"""Prediction with a prior-data fitted network: the context, and views of it that are averaged.

A network answers for a table of at most so many columns and classes. ``PFNPosterior`` holds a
context of any size and asks the network about views of it:

* where there are too many columns, their leading principal components; up to twice as many, a
  random subset of them in every other view;
* columns as they are, and each after a Yeo-Johnson transform in half of the views; targets, too,
  whose borders are mapped back (the order of columns makes no difference to the network);
* classes under random codes; where there are too many, a random tree of groups, whose
  probabilities multiply: P(class) = P(group) P(class | group);
* random subsets of a context that is longer than ``max_context``;
* the k nearest context rows of each query (T. Nagler, "Statistical Foundations of Prior-Data Fitted
  Networks", ICML 2023, §5.4), where ``localize`` asks for it.

Views are averaged as densities or probabilities. They are no draws from a posterior: what they
disagree about is how the network breaks symmetries, not what the data leave open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from uq.distributions import CategoricalMixture, Predictive
from uq.distributions.bar import BarDistribution
from uq.inference.pfn_transforms import PowerTransform, principal_axes
from uq.inference.posterior import Posterior
from uq.nn.pfn import PFN, PFNCache
from uq.nn.pfn_tables import PFNConfig, PFNScaling

# Rows that one pass of the network sees: of activations there are some kB a row.
_QUERY_ROWS = 2048
_LOCAL_ROWS = 40_000


class Expert:
    """A network with one context: what it says of queries, in its own units.

    Parameters
    ----------
    network : PFN
        Network.
    x : Tensor of shape (n, d)
        Context, at most ``max_features`` columns, NaN where missing.
    y : Tensor of shape (B, n)
        Targets of B tasks on the same rows, or codes of classes (B = 1).
    weight : Tensor of shape (n,), optional
        Weights of the rows.
    n_near : int, optional
        Answer each query from its so many nearest rows, in standardised columns.
    """

    def __init__(
        self,
        network: PFN,
        x: Tensor,
        y: Tensor,
        weight: Tensor | None = None,
        n_near: int | None = None,
    ) -> None:
        self.network: PFN = network
        self.x: Tensor = x
        self.y: Tensor = y
        self.weight: Tensor | None = weight
        self.n_near: int | None = None if n_near is None or n_near >= len(x) else n_near
        tasks = self._tasks(x, y, weight)
        self.scaling: PFNScaling = PFNScaling.fit(*tasks[:2], network.config, tasks[2])
        self._cache: PFNCache | None = None
        if self.n_near is not None:
            self._points = self._standardised(x)

    @staticmethod
    def _tasks(x: Tensor, y: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        b = len(y)
        w = None if weight is None else weight.expand(b, -1)
        return x.expand(b, *x.shape), y, w

    def _standardised(self, x: Tensor) -> Tensor:
        z = (x - self.scaling.x_mean[0]) / self.scaling.x_scale[0]
        return torch.where(self.scaling.used[0], z, 0.0).nan_to_num(0.0)

    def encode(self) -> PFNCache:
        """Keys and values of the context, computed once."""
        if self._cache is None:
            x, y, weight = self._tasks(self.x, self.y, self.weight)
            scaled = self.scaling.features(x), self.scaling.targets(y)
            self._cache = self.network.encode(*scaled, weight)
        return self._cache

    def logits(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, q, K) of queries (q, d); mean and scale (B, q or 1) of their units."""
        if self.n_near is not None:
            step = max(1, _LOCAL_ROWS // self.n_near)
            parts = [self._local(rows, self.n_near) for rows in queries.split(step)]
            logits, mean, scale = (torch.cat(ts, 1) for ts in zip(*parts, strict=True))
            return logits, mean, scale
        cache, b = self.encode(), len(self.y)
        out = []
        for rows in queries.split(_QUERY_ROWS):
            features = self.scaling.features(rows.expand(b, *rows.shape))
            out.append(self.network.query(cache, features))
        return torch.cat(out, 1), self.scaling.y_mean, self.scaling.y_scale

    def _local(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        # Equal distances: the earlier row, which a stable sort keeps in front.
        distance = torch.cdist(self._standardised(queries), self._points)
        near = distance.sort(dim=1, stable=True).indices[:, :k]
        weight = None if self.weight is None else self.weight[near]
        answers = []
        for y in self.y:
            scaling = PFNScaling.fit(self.x[near], y[near], self.network.config, weight)
            prepared = scaling.features(self.x[near]), scaling.targets(y[near])
            logits = self.network(*prepared, scaling.features(queries[:, None]), weight)
            answers.append((logits[:, 0], scaling.y_mean[:, 0], scaling.y_scale[:, 0]))
        logits, mean, scale = (torch.stack(ts) for ts in zip(*answers, strict=True))
        return logits, mean, scale


class _ClassTree:
    """Classes in groups, as many as the network has outputs, and a tree for each group of several.

    The order of the classes is random where ``generator`` is given.
    """

    def __init__(
        self,
        network: PFN,
        classes: Tensor,
        x: Tensor,
        y: Tensor,
        weight: Tensor | None,
        n_near: int | None,
        generator: torch.Generator | None,
    ) -> None:
        most = network.config.n_outputs
        if generator is not None:
            classes = classes[torch.randperm(len(classes), generator=generator).to(classes.device)]
        # Groups as large as full trees one level lower can take.
        size = 1
        while size * most < len(classes):
            size *= most
        self.groups = classes.tensor_split(math.ceil(len(classes) / size))
        code = torch.zeros(int(classes.max()) + 1, dtype=torch.long, device=classes.device)
        for g, group in enumerate(self.groups):
            code[group] = g
        self.expert = Expert(network, x, code[y][None], weight, n_near)
        self.children: list[_ClassTree | None] = []
        for group in self.groups:
            rows = torch.isin(y, group)
            w = None if weight is None else weight[rows]
            inside = (network, group, x[rows], y[rows], w, n_near, generator)
            self.children.append(_ClassTree(*inside) if len(group) > 1 else None)

    def experts(self) -> list[Expert]:
        """This node's and all below."""
        below = [e for child in self.children if child for e in child.experts()]
        return [self.expert, *below]

    def log_probs(self, queries: Tensor, n_classes: int) -> Tensor:
        """Log probabilities (q, n_classes), −inf for classes that are not in this tree."""
        logits = self.expert.logits(queries)[0][0, :, : len(self.groups)]
        logp = torch.log_softmax(logits.double(), -1)
        out = logp.new_full((len(queries), n_classes), -torch.inf)
        for g, (group, child) in enumerate(zip(self.groups, self.children, strict=True)):
            if child is None:
                out[:, group] = logp[:, g : g + 1]
            else:
                below = child.log_probs(queries, n_classes)
                out[:, group] = logp[:, g : g + 1] + below[:, group]
        return out


def _bends_columns(v: int, classes: bool) -> bool:
    """Whether view ``v`` transforms the columns: of regression, targets are in every other one."""
    return v % 2 == 1 if classes else v % 4 >= 2


def _any_width(config: PFNConfig, d: int) -> PFNConfig:
    """To take statistics of more columns than the network has."""
    return replace(config, max_features=d, scaled=True)


def _batched(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight[None]


@dataclass
class _View:
    """One way to put the context to the network."""

    columns: Tensor | None = None
    axes: Tensor | None = None
    centre: Tensor | None = None
    spread: Tensor | None = None
    experts: tuple[Expert, ...] = ()
    tree: _ClassTree | None = None
    bend: PowerTransform | None = None
    power: PowerTransform | None = None

    def inputs(self, x: Tensor) -> Tensor:
        """Columns that the network sees."""
        if self.centre is not None and self.spread is not None:
            x = (x - self.centre) / self.spread
        if self.axes is not None:
            x = x.nan_to_num(0.0) @ self.axes
        if self.columns is not None:
            x = x[:, self.columns]
        return x if self.bend is None else self.bend(x.T).T


class PFNPosterior(Posterior):
    """Prior-data fitted network with a context of any size; see the module's docstring.

    Parameters
    ----------
    network : PFN
        Network.
    x : Tensor of shape (n, d)
        Context rows, NaN where missing.
    y : Tensor of shape (n, m), or (n,) positions of classes
        Targets.
    weight : Tensor of shape (n,)
        Weights of the rows, as if they were there so many times.
    n_classes : int, optional
        Number of classes; None for regression.
    n_views : int, default=1
        Views that are averaged. A single view takes columns, classes and targets as they are.
    n_near : int, optional
        Answer each query from its so many nearest rows.
    max_context : int, optional
        Rows that a view takes of a longer context.
    body : Module, optional
        Frozen network whose outputs are the columns, for queries; ``x`` holds them already.
    seed : int, default=0
        Of the views.
    """

    x: Tensor
    gap: Tensor
    y: Tensor
    weight: Tensor

    def __init__(
        self,
        network: PFN,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        *,
        n_classes: int | None = None,
        n_views: int = 1,
        n_near: int | None = None,
        max_context: int | None = None,
        body: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.body: nn.Module = nn.Identity() if body is None else body
        self.network = network
        gap = x.isnan()
        parts = {"x": torch.where(gap, 0.0, x), "gap": gap, "y": y, "weight": weight}
        for name, tensor in parts.items():
            self.register_buffer(name, tensor)
        self.n_classes: int | None = n_classes
        self.n_views: int = n_views
        self.n_near: int | None = n_near
        self.max_context: int | None = max_context
        self._views: list[_View] = []

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._views = []  # their tensors are elsewhere, or of another type
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_views": []}

    def views(self) -> list[_View]:
        """Make the views and encode their contexts, at the first call."""
        if not self._views:
            with torch.no_grad():
                self._views = self._make_views()
        return self._views

    def _make_views(self) -> list[_View]:
        generator = torch.Generator().manual_seed(int(self.seed))
        d, most = self.x.shape[1], self.network.config.max_features
        weighted = not bool((self.weight == 1).all())
        scaled = self.network.config.scaled
        context = self.x.masked_fill(self.gap, torch.nan)
        views = []
        for v in range(self._n_distinct()):
            x, y, weight = context, self.y, self.weight if weighted else None
            if self.max_context is not None and len(x) > self.max_context:
                rows = self._subset(self.max_context, generator)
                x, y, weight = x[rows], y[rows], None if weight is None else weight[rows]
            view = _View()
            if scaled:
                none = x.new_zeros(1, len(x))
                wide = _any_width(self.network.config, d)
                scaling = PFNScaling.fit(x[None], none, wide, _batched(weight))
                view.centre, view.spread = scaling.x_mean[0], scaling.x_scale[0]
            if d > most:
                order = torch.randperm(d, generator=generator).to(x.device)
                # A random subset of many columns holds too little.
                if v % 2 == 0 or d > 2 * most:
                    view.axes = principal_axes(view.inputs(x), most, weight).to(x.dtype)
                else:
                    view.columns = order[:most].sort().values
            if scaled and _bends_columns(v, self.n_classes is not None):
                view.bend = PowerTransform(view.inputs(x).T, weight)
            self._ask(view, view.inputs(x), y, weight, v, generator)
            views.append(view)
        return views

    def _n_distinct(self) -> int:
        """Views asked for, without those that would repeat another."""
        random = self.x.shape[1] > self.network.config.max_features
        random |= self.n_classes is not None
        random |= self.max_context is not None and len(self.x) > self.max_context
        if random:
            return self.n_views
        return min(self.n_views, 4 if self.network.config.scaled else 1)

    def _subset(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` random rows, one of each class among them."""
        rows = torch.randperm(len(self.x), generator=generator).to(self.x.device)
        if self.n_classes is not None:
            y, order = self.y[rows].sort(stable=True)
            first = order[torch.cat([y.new_ones(1, dtype=torch.bool), y.diff() > 0])]
            rest = torch.ones_like(rows, dtype=torch.bool)
            rest[first] = False
            rows = torch.cat([rows[first], rows[rest]])
            n = max(n, len(first))
        return rows[:n].sort().values

    def _ask(
        self,
        view: _View,
        x: Tensor,
        y: Tensor,
        weight: Tensor | None,
        v: int,
        generator: torch.Generator,
    ) -> None:
        """Give the view its experts, with their contexts encoded."""
        if self.n_classes is not None:
            plain = v == 0 and self.n_classes <= self.network.config.n_outputs
            classes = torch.arange(self.n_classes, device=x.device)
            order = None if plain else generator
            view.tree = _ClassTree(self.network, classes, x, y, weight, self.n_near, order)
            view.experts = tuple(view.tree.experts())
        else:
            targets = y.T
            # The expert standardises what comes out of the transform.
            if v % 2 == 1 and self.network.config.scaled:
                view.power = PowerTransform(targets, weight, reach=0.5)
                targets = view.power(targets)
            view.experts = (Expert(self.network, x, targets, weight, self.n_near),)
        for expert in view.experts:
            if expert.n_near is None:
                expert.encode()

    def forward(self, x: Tensor, n_samples: int = 1) -> Predictive:
        """Average of the views at the rows of ``x``: bars, or class probabilities."""
        with torch.no_grad():
            x = self.body(x).flatten(1)
            if self.n_classes is None:
                return self._bars(x)
            logps = [
                view.tree.log_probs(view.inputs(x), self.n_classes)
                for view in self.views()
                if view.tree is not None
            ]
            logp = torch.stack(logps).logsumexp(0) - math.log(len(logps))
        return CategoricalMixture(logp[None].cpu())

    def _bars(self, x: Tensor) -> BarDistribution:
        borders: Any = self.network.borders
        parts = []
        for view in self.views():
            logits, mean, scale = view.experts[0].logits(view.inputs(x))
            bars = mean[..., None].double() + scale[..., None].double() * borders.double()
            if view.power is not None:
                bars = view.power.inverse(bars)
            # Tasks (outputs) come first in the network, rows in the distribution.
            logits, bars = logits.double().transpose(0, 1).cpu(), bars.transpose(0, 1).cpu()
            parts.append(BarDistribution(logits, bars, validate_args=False))
        return parts[0] if len(parts) == 1 else BarDistribution.average(parts)

    def functions(self, x: Tensor, n: int) -> Tensor:
        """The one mean or probability function there is, (1, rows, m or n_classes)."""
        dist: Any = self(x)
        return (dist.mean if self.n_classes is None else dist.probs)[None]


def choose_neighbours(posterior: PFNPosterior, held_out: int = 200) -> int | None:
    """Number of nearest rows with a better log score on held-out rows; None for all of them.

    A fifth of the context, at most ``held_out`` rows, is predicted from the rest: by all rows, by
    min(500, n^{4/(d + 4)}) nearest ones, at least 20 (Nagler's rate), and by a fifth, 50 to 500.
    Nearest rows are taken where they gain more than two standard errors of the paired difference:
    most often they lose.

    Parameters
    ----------
    posterior : PFNPosterior
        Whose context and settings are taken; one view is enough to choose.
    held_out : int, default=200
        Most rows that are held out.
    """
    x = posterior.x.masked_fill(posterior.gap, torch.nan)
    n, d = x.shape
    generator = torch.Generator().manual_seed(int(posterior.seed) + 1)
    rows = torch.randperm(n, generator=generator).to(posterior.x.device)
    m = min(held_out, max(1, n // 5))
    test, rest = rows[:m], rows[m:]
    candidates: set[int] = {
        max(20, min(500, math.ceil(n ** (4 / (d + 4))))),
        max(50, min(500, n // 5)),
    }
    weight = posterior.weight[test].cpu().double()
    weight = weight / weight.sum()
    best, chosen, plain = 0.0, None, torch.zeros(())
    for k in (None, *sorted(candidates)):
        if k is not None and k >= len(rest):
            continue
        trial = PFNPosterior(
            posterior.network,
            x[rest],
            posterior.y[rest],
            posterior.weight[rest],
            n_classes=posterior.n_classes,
            n_near=k,
            max_context=posterior.max_context,
            seed=int(posterior.seed),
        )
        dist: Any = trial(x[test])
        y = posterior.y[test].cpu()
        score = dist.log_prob(y) if posterior.n_classes is not None else dist.log_prob(y).sum(1)
        if k is None:
            plain = score
            continue
        gain = score - plain
        mean = float((gain * weight).sum())
        error = float(((gain - mean).square() * weight.square()).sum().sqrt())
        if mean > max(best, 2 * error):
            best, chosen = mean, k
    return chosen
