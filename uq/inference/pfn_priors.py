"""Priors over data sets, from which prior-data fitted networks learn.

A prior is any callable ::

    sample(batch, n, d, generator) -> X, y

that draws ``batch`` data sets of ``n`` rows and ``d`` columns: X (batch, n, d) float32, raw values,
NaN where missing; y (batch, n), float32 for regression, int64 labels 0..C−1 for classification.
Rows must be exchangeable: training takes the first as the context and the others as queries. All
randomness comes from ``generator``. Attributes are optional: ``task``, "regression" unless given;
``max_features`` and ``max_classes``, 10 unless given; ``scaled``, whether inputs and targets are
standardised by the context, True unless given; ``describe()``, a dictionary for the model card.

:func:`pfn_prior` has those that ship: Gaussian processes with known and with random
hyper-parameters (Müller et al., ICLR 2022, arXiv 2112.10510, §5.1–5.2), Bayesian neural networks
(§5.3), structural causal models (Hollmann et al., ICLR 2023, arXiv 2207.01848, §4) and the mixtures
for tables (:mod:`uq.inference.pfn_tabular`) that the shipped weights learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from uq.errors import DataError, ParameterError
from uq.inference.pfn_mechanisms import integers, normal, uniform

Task = Literal["regression", "classification"]
_JITTER = 1e-8


class Prior(Protocol):
    """What :func:`sample_prior` and pre-training call; see the module's docstring."""

    def __call__(
        self, batch: int, n: int, d: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw ``batch`` data sets of ``n`` rows and ``d`` columns."""


def sample_prior(
    prior: Callable[..., Any], batch: int, n: int, d: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw from a prior and check what comes.

    Parameters
    ----------
    prior : callable
        See the module's docstring.
    batch, n, d : int
        Data sets, rows of each, columns of each.
    generator : torch.Generator
        All randomness.

    Returns
    -------
    Tensor (batch, n, d) float32, Tensor (batch, n) float32 or int64
        Inputs and targets.

    Raises
    ------
    DataError
        If the prior returns another shape or dtype, infinite inputs, targets that are missing or
        infinite, or labels outside 0..max_classes−1.

    Examples
    --------
    A prior of one's own is a function; here straight lines through the origin with noise:

    >>> import torch
    >>> def lines(batch, n, d, generator):
    ...     x = torch.randn(batch, n, d, generator=generator)
    ...     slope = torch.randn(batch, d, 1, generator=generator)
    ...     noise = torch.randn(batch, n, generator=generator)
    ...     return x, (x @ slope).squeeze(-1) + 0.1 * noise
    >>> x, y = sample_prior(lines, 4, 20, 2, torch.Generator().manual_seed(0))
    >>> x.shape, y.shape
    (torch.Size([4, 20, 2]), torch.Size([4, 20]))
    """
    name = getattr(prior, "__name__", type(prior).__name__)
    drawn = prior(batch, n, d, generator)
    if not (isinstance(drawn, tuple) and len(drawn) == 2):
        raise DataError(f"Prior {name}: returned {type(drawn).__name__}, expected a tuple (X, y).")
    x, y = drawn
    for label, value, shape in (("X", x, (batch, n, d)), ("y", y, (batch, n))):
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            got = tuple(value.shape) if hasattr(value, "shape") else type(value).__name__
            raise DataError(
                f"Prior {name}: {label} has shape {got}, expected a tensor of shape {shape}: "
                "(batch, n, d) for X, (batch, n) for y."
            )
    if x.dtype != torch.float32:
        raise DataError(f"Prior {name}: X has dtype {x.dtype}, expected torch.float32.")
    if torch.isinf(x).any():
        raise DataError(f"Prior {name}: X has infinite values; missing ones are NaN.")
    classification = prior_task(prior) == "classification"
    expected = torch.int64 if classification else torch.float32
    if y.dtype != expected:
        raise DataError(
            f"Prior {name}: y has dtype {y.dtype}, expected {expected} for "
            f"{prior_task(prior)}; give the callable an attribute task if it is the other."
        )
    if classification:
        most = int(getattr(prior, "max_classes", 10))
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= most:
            raise DataError(
                f"Prior {name}: labels from {low} to {high}, expected 0 to {most - 1} "
                f"(max_classes = {most})."
            )
    elif not torch.isfinite(y).all():
        raise DataError(f"Prior {name}: y has missing or infinite values; targets must be finite.")
    return x, y


def prior_task(prior: Any) -> Task:
    """Task of a prior: its attribute ``task``, "regression" unless given."""
    task: Task = getattr(prior, "task", "regression")
    if task not in ("regression", "classification"):
        raise ParameterError(f"Prior: task must be 'regression' or 'classification', got {task!r}.")
    return task


@contextmanager
def pyro_randomness(generator: torch.Generator) -> Iterator[None]:
    """Let Pyro, which draws from torch's global generator, draw from ``generator`` instead."""
    device = generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _Described:
    """Dataclass priors say their names and fields for the model card."""

    def describe(self) -> dict[str, Any]:
        """Name and hyper-parameters, as text and numbers."""
        options = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {"prior": type(self).__name__} | {
            name: value if isinstance(value, int | float | str | None) else _as_text(value)
            for name, value in options.items()
        }


def _as_text(value: Any) -> str:
    parameters = getattr(value, "arg_constraints", None)
    if not parameters:
        return getattr(value, "__name__", str(value))
    names = ", ".join(f"{n}={float(getattr(value, n)):g}" for n in parameters)
    return f"{type(value).__name__}({names})"


def rbf_covariance(x: Tensor, lengthscale: Tensor | float) -> Tensor:
    """exp(−‖x − x′‖²/(2ℓ²)) of rows (B, n, d) with one ℓ a data set, (B,) or a number."""
    scale = torch.as_tensor(lengthscale, dtype=x.dtype, device=x.device).reshape(-1, 1, 1)
    x = x / scale
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.exp(-0.5 * distance.square())


def _gp_draw(x: Tensor, lengthscale: Any, noise: Any, generator: torch.Generator) -> Tensor:
    """Noisy values (B, n) of zero-mean unit-variance Gaussian processes at rows (B, n, d)."""
    x = x.double()
    noise = torch.as_tensor(noise, dtype=x.dtype, device=x.device).reshape(-1, 1)
    covariance = rbf_covariance(x, lengthscale)
    covariance.diagonal(dim1=-2, dim2=-1).add_(noise + _JITTER)
    factor = torch.linalg.cholesky(covariance)
    white = torch.randn(*x.shape[:2], 1, generator=generator, device=x.device, dtype=torch.float64)
    return (factor @ white).squeeze(-1).float()


@dataclass(frozen=True)
class GPPrior(_Described):
    """Gaussian process with known hyper-parameters: x ~ U[0, 1]^d, y = f(x) + N(0, σ²).

    Parameters
    ----------
    lengthscale : float, default=0.2
        ℓ of the kernel exp(−‖x − x′‖²/(2ℓ²)).
    noise_variance : float, default=0.01
        σ². Noise of a tenth of the function's standard deviation is what a head of some 200 buckets
        still resolves; the paper's 1e-4 needs 1,000 and long training.
    max_features : int, default=1
        Most columns that are drawn.
    """

    lengthscale: float = 0.2
    noise_variance: float = 0.01
    max_features: int = 1

    task = "regression"
    scaled = False

    def __call__(
        self, batch: int, n: int, d: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw data sets, factorised in float64."""
        x = uniform(generator, batch, n, d)
        return x, _gp_draw(x, self.lengthscale, self.noise_variance, generator)


@dataclass(frozen=True)
class GPHyperPrior(_Described):
    """Gaussian process whose lengthscale and noise are drawn for every data set.

    Parameters
    ----------
    lengthscale : pyro.distributions.Distribution, default=Gamma(3, 6)
        Prior of ℓ; the paper's.
    noise_variance : pyro.distributions.Distribution, default=Gamma(1.1, 20)
        Prior of σ². The paper's Gamma(1e-4, 1) is practically free of noise.
    min_noise : float, default=1e-3
        Noise variances below it are raised to it.
    max_features : int, default=1
        Most columns that are drawn.
    """

    lengthscale: Any = field(default_factory=lambda: dist.Gamma(3.0, 6.0))
    noise_variance: Any = field(default_factory=lambda: dist.Gamma(1.1, 20.0))
    min_noise: float = 1e-3
    max_features: int = 1

    task = "regression"
    scaled = False

    def hyperparameters(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw (ℓ, σ²), each (batch,)."""
        with pyro_randomness(generator):
            lengthscale = self.lengthscale.sample((batch,))
            noise = self.noise_variance.sample((batch,)).clamp_min(self.min_noise)
        return lengthscale.to(generator.device), noise.to(generator.device)

    def __call__(
        self, batch: int, n: int, d: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw data sets, factorised in float64."""
        lengthscale, noise = self.hyperparameters(batch, generator)
        x = uniform(generator, batch, n, d)
        return x, _gp_draw(x, lengthscale, noise, generator)


@dataclass(frozen=True)
class BNNPrior(_Described):
    """Bayesian neural network: x ~ N(0, 1)^d through tanh layers with Normal weights.

    Parameters
    ----------
    task : {"regression", "classification"}, default="regression"
        Classes are drawn from the softmax of the outputs.
    hidden : int, default=64
        Width of the layers.
    layers : int, default=2
        Hidden layers.
    weight_scale : float, default=1.5
        Weights are N(0, scale²/fan-in), biases N(0, 1).
    noise_scale : pyro.distributions.Distribution, default=LogNormal(log 0.1, 1)
        Prior of the noise's standard deviation, drawn for every data set. Regression only.
    max_features, max_classes : int, default=10
        Most columns and classes; every data set draws its number of classes, from 2.
    """

    task: Task = "regression"
    hidden: int = 64
    layers: int = 2
    weight_scale: float = 1.5
    noise_scale: Any = field(default_factory=lambda: dist.LogNormal(-2.302585, 1.0))
    max_features: int = 10
    max_classes: int = 10

    scaled = True

    def __call__(
        self, batch: int, n: int, d: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw data sets, each with weights of its own."""
        x = normal(generator, batch, n, d)
        values = x
        for _ in range(self.layers):
            fan_in = values.shape[2]
            weights = normal(generator, batch, fan_in, self.hidden) / fan_in**0.5
            bias = normal(generator, batch, 1, self.hidden)
            values = torch.tanh(self.weight_scale * (values @ weights) + bias)
        outputs = self.max_classes if self.task == "classification" else 1
        fan_in = values.shape[2]
        weights = normal(generator, batch, fan_in, outputs) / fan_in**0.5
        values = self.weight_scale * (values @ weights) + normal(generator, batch, 1, outputs)
        if self.task == "classification":
            classes = integers(generator, 2, self.max_classes, batch, 1, 1)
            index = torch.arange(outputs, device=x.device)
            # Logits of unit scale leave classes hard to tell: threefold is about 70 % accuracy.
            logits = (3 * values).masked_fill(index >= classes, -torch.inf)
            gumbel = -uniform(generator, batch, n, outputs).log().neg().clamp_min(1e-30).log()
            return x, (logits + gumbel).argmax(2)
        with pyro_randomness(generator):
            scale = self.noise_scale.sample((batch, 1)).to(x.device)
        return x, values.squeeze(2) + scale * normal(generator, batch, n)


@dataclass(frozen=True)
class PyroPrior(_Described):
    """Any Pyro model as a prior: the same program can be the oracle that NUTS samples.

    Parameters
    ----------
    model : callable
        ``model(n, d)`` draws one data set and returns X (n, d) and y (n,). With
        ``vectorised=True`` it is ``model(batch, n, d)`` and returns (batch, n, d) and (batch, n),
        which is many times faster.
    task : {"regression", "classification"}, default="regression"
        What y is.
    vectorised : bool, default=False
        See ``model``.
    scaled : bool, default=True
        Whether inputs and targets are standardised by the context.
    max_features, max_classes : int, default=10
        Most columns and classes.
    """

    model: Callable[..., tuple[Tensor, Tensor]]
    task: Task = "regression"
    vectorised: bool = False
    scaled: bool = True
    max_features: int = 10
    max_classes: int = 10

    def __call__(
        self, batch: int, n: int, d: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Run the model; Pyro's draws come from ``generator``."""
        dtype = torch.int64 if self.task == "classification" else torch.float32
        with pyro_randomness(generator), torch.no_grad(), pyro.poutine.block():
            if self.vectorised:
                x, y = self.model(batch, n, d)
            else:
                sets = [self.model(n, d) for _ in range(batch)]
                x, y = (torch.stack(part) for part in zip(*sets, strict=True))
        return x.float().to(generator.device), y.to(generator.device, dtype)


def pfn_prior(name: str, **options: Any) -> Any:
    """Make a prior by its name.

    Parameters
    ----------
    name : {"gp", "gp-hyper", "bnn", "scm", "tabular-regression", "tabular-classification"}
        :class:`GPPrior`, :class:`GPHyperPrior`, :class:`BNNPrior`, or
        :class:`~uq.inference.pfn_tabular.TabularPrior` with causal graphs alone or with all of its
        mechanisms.
    **options
        Its parameters.

    Returns
    -------
    Prior
        A callable ``sample(batch, n, d, generator)``.

    Raises
    ------
    ParameterError
        If the name or an option is unknown.

    Examples
    --------
    >>> prior = pfn_prior("tabular-classification", max_classes=3)
    >>> x, y = prior(8, 50, 4, torch.Generator().manual_seed(0))
    >>> x.shape, int(y.max()) < 3
    (torch.Size([8, 50, 4]), True)
    """
    from uq.inference.pfn_tabular import TabularPrior

    made: dict[str, Callable[..., Any]] = {
        "gp": GPPrior,
        "gp-hyper": GPHyperPrior,
        "bnn": BNNPrior,
        "scm": lambda **o: TabularPrior(**({"causal": 1.0} | o)),
        "tabular-regression": lambda **o: TabularPrior(task="regression", **o),
        "tabular-classification": lambda **o: TabularPrior(task="classification", **o),
    }
    if name not in made:
        raise ParameterError(f"pfn_prior: unknown prior {name!r}; there are {', '.join(made)}.")
    try:
        return made[name](**options)
    except TypeError as error:
        raise ParameterError(f"pfn_prior({name!r}): {error}.") from None
