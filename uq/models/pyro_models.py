"""Bring your own model: any Pyro model behind the interface of the other estimators."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import field, replace
from typing import Any, cast

import numpy as np
import pyro
import torch
from pyro.infer import Trace_ELBO
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from uq.distributions import Predictive, RealPredictive
from uq.errors import ParameterError
from uq.inference.data import ArrayBatches
from uq.inference.diagnostics import Diagnostics, diagnose
from uq.inference.pyro_models import (
    PyroPosterior,
    draw_chains,
    draw_from_guide,
    own_store,
    sites_of,
    weighted,
)
from uq.inference.training import TrainingResult, cosine_schedule
from uq.models.base import Estimator, estimator
from uq.models.chains import HoldsDraws
from uq.models.checks import check_number
from uq.models.objectives import Objective, TrainingData
from uq.models.tasks import Classifier, Regressor

_EPOCHS = 2000
_DTYPES = {
    str(kind): kind
    for kind in (torch.float32, torch.float64, torch.int64, torch.int32, torch.bool, torch.uint8)
}


class _SVI(Objective):
    """−ELBO/N of a model and a guide, whose parameters live in the open store."""

    def __init__(self, model: Any, guide: Any, shape_targets: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._pair = [model, guide]  # in a list: the store holds their parameters
        self._targets = shape_targets
        self.elbo = Trace_ELBO()

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Estimate −ELBO/N by one draw from the guide."""
        loss: Tensor = self.elbo.differentiable_loss(*self._pair, x, self._targets(y))
        return loss / len(x)

    def held_out_nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Nothing is held out."""
        raise NotImplementedError


@estimator
class _PyroModel(HoldsDraws, Estimator):
    model: Any = field(default=None, kw_only=False)
    guide: Any = None
    kernel: Any = None
    n_draws: int = 250
    n_chains: int = 4
    n_warmup: int = 250
    lr: float = 0.01

    # The model is the network, and takes all rows at once.
    module: Any = field(init=False, default=None)
    hidden: Sequence[int] = field(init=False, default=())
    batch_size: int | None = field(init=False, default=None)
    patience: Any = field(init=False, default=None)

    site_: str = field(init=False)
    draw_shapes_: dict[str, Any] = field(init=False)
    param_shapes_: dict[str, Any] = field(init=False)
    n_chains_: int = field(init=False)
    sample_stats_: dict[str, np.ndarray] = field(init=False)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number(self, "n_draws", at_least=1, integer=True)
        check_number(self, "n_chains", at_least=1, integer=True)
        check_number(self, "n_warmup", at_least=0, integer=True)
        name = type(self).__name__
        if not callable(self.model):
            raise ParameterError(
                f"{name}: model must be a Pyro model, a callable model(x, y=None), got "
                f"{self.model!r}."
            )
        if (self.guide is None) == (self.kernel is None):
            raise ParameterError(
                f"{name}: give either guide=, for variational inference, or kernel=, for MCMC "
                "(pyro.infer.NUTS, say)."
            )
        for argument in ("guide", "kernel"):
            value = getattr(self, argument)
            if value is not None and not callable(value):
                raise ParameterError(f"{name}: {argument} must be callable, got {value!r}.")

    @property
    def _takes_any_rows(self) -> bool:
        return True

    @property
    def _standardizes(self) -> bool:
        return False  # the priors of the model are in the user's units

    def _target_tensor(self, y: Tensor) -> Tensor:
        """Targets as the model observes them."""
        return y

    def _infer(self, data: TrainingData) -> tuple[PyroPosterior, TrainingResult]:
        batches = data.batches
        parts = [batches.tensors] if isinstance(batches, ArrayBatches) else list(batches)
        x, y, *weight = (torch.cat(ts) for ts in zip(*parts, strict=True))
        counts = weight[0] * (data.n_effective / len(x)) if weight else None
        observed = self._target_tensor(y)
        model = copy.deepcopy(self.model)
        if isinstance(model, nn.Module):
            model.to(x.device, self._dtype)
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)  # of the numbers that priors are written with
        try:
            with own_store() as store:
                self.site_, sites = sites_of(model, x, observed)
                store.clear()
                target = weighted(model, self.site_, counts)
                if self.kernel is not None:
                    draws, result = self._run_chains(target, sites, (x, observed), data)
                else:
                    draws, result = self._run_svi(target, sites, x, y, data)
                own = set() if not isinstance(model, nn.Module) else _names(model)
                params = {k: v.detach().clone() for k, v in store.items() if k not in own}
                params = {k: v for k, v in params.items() if k in self._seen(model, x)}
        finally:
            torch.set_default_dtype(dtype)
        self.draw_shapes_ = {k: [list(t.shape), str(t.dtype)] for k, t in draws.items()}
        self.param_shapes_ = {k: [list(t.shape), str(t.dtype)] for k, t in params.items()}
        return PyroPosterior(model, self.site_, draws, params, data.seeds.predict), result

    def _seen(self, model: Any, x: Tensor) -> set[str]:
        """Names of the parameters that the model asks for: not those of the guide."""
        with torch.no_grad():
            trace = pyro.poutine.trace(model, param_only=True).get_trace(x)
        return {name for name, site in trace.nodes.items() if site["type"] == "param"}

    def _run_chains(
        self, model: Any, sites: list[str], args: tuple[Tensor, Tensor], data: TrainingData
    ) -> tuple[dict[str, Tensor], TrainingResult]:
        draws, stats, interrupted = draw_chains(
            self.kernel,
            model,
            sites,
            args,
            n_chains=self.n_chains,
            n_warmup=self.n_warmup,
            n_draws=self.n_draws,
            seed=data.seeds.noise,
            verbose=self.verbose,
            description=type(self).__name__,
        )
        self.n_chains_ = len(next(iter(draws.values())))
        self.sample_stats_ = {k: t.numpy() for k, t in stats.items()}
        reason = "interrupted" if interrupted else "max_epochs"
        result = TrainingResult(stop_reason=reason, best_epoch=1)
        return {k: t.flatten(0, 1) for k, t in draws.items()}, result

    def _run_svi(
        self, model: Any, sites: list[str], x: Tensor, y: Tensor, data: TrainingData
    ) -> tuple[dict[str, Tensor], TrainingResult]:
        # A class of guides, such as pyro.infer.autoguide.AutoNormal, is made for the model.
        made = isinstance(self.guide, type)
        guide = self.guide(model) if made else copy.deepcopy(self.guide)
        objective = _SVI(model, guide, self._target_tensor)
        draw_from_guide(guide, sites, 1, x, self._target_tensor(y))  # has it all the sites?
        with torch.no_grad():
            objective(x, y)  # fills the store
        store = pyro.get_param_store()
        learned = [p for _, p in store.named_parameters() if p.requires_grad]
        if not learned:
            raise ParameterError(f"{type(self).__name__}: guide has no parameters to learn.")
        optimizer = torch.optim.Adam(learned, self.lr)
        whole = ArrayBatches(x, y, batch_size=None, generator=data.generator(0))
        data = replace(data, batches=whole, held_out=None)
        schedule = cosine_schedule(self._n_epochs(data))
        result = self._train(objective, optimizer, data, schedule=schedule, extra_state=learned)
        self.n_chains_, self.sample_stats_ = 1, {}
        draws = draw_from_guide(guide, sites, self.n_draws, x, self._target_tensor(y))
        return draws, result

    def _n_epochs(self, data: TrainingData) -> int:
        return self.max_epochs or _EPOCHS

    def diagnostics(self, X: Any) -> Diagnostics:
        """Say whether chains can be trusted: of all shared sites, and of predictions at ``X``.

        Raises
        ------
        ParameterError
            If the model was fitted by a guide, whose draws are independent.
        """
        check_is_fitted(self)
        if not self.sample_stats_:
            raise ParameterError(
                f"{type(self).__name__}: diagnostics are of Markov chains; fit with kernel=."
            )
        advice = "raise the kernel's target_accept_prob, or give the sites similar scales"
        return diagnose(self.to_inference_data(X), divergence_advice=advice)

    def _quantities(self) -> dict[str, Tensor]:
        posterior: Any = self.posterior_
        return dict(posterior.draws)

    def _log_likelihood(self, X: Any, y: np.ndarray) -> Tensor:
        posterior: Any = self.posterior_
        x, _ = self._posterior_at(X)
        target = self._target_tensor(torch.as_tensor(self._encode_targets(y)).to(x.device))
        rows = [d.log_prob(target) for d in posterior.distributions(x)]
        # Several targets are independent given the draw.
        return torch.stack([r.sum(-1) if r.ndim == 2 else r for r in rows]).double()

    def _build_posterior(self) -> PyroPosterior:
        def empty(shapes: dict[str, Any]) -> dict[str, Tensor]:
            return {
                k: torch.empty(shape, dtype=_DTYPES[kind]) for k, (shape, kind) in shapes.items()
            }

        model = copy.deepcopy(self.model)
        return PyroPosterior(model, self.site_, empty(self.draw_shapes_), empty(self.param_shapes_))


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}


_PARAMETERS = """\
model : callable
        Pyro model ``model(x, y=None)``: samples its latent sites and observes ``y`` at one site,
        under ``pyro.plate("data", len(x))`` (several targets as an event). A Module is copied.
    guide : callable or class, optional
        For variational inference: a guide ``guide(x, y=None)``, or a class of guides that is called
        on the model, such as ``pyro.infer.autoguide.AutoNormal``.
    kernel : callable, optional
        For MCMC, in place of a guide: called on the model, it gives a Pyro kernel;
        ``pyro.infer.NUTS``, or ``functools.partial(NUTS, target_accept_prob=0.9)``.
    n_draws : int, default=250
        Draws from the guide, or of each chain. All of them predict.
    n_chains : int, default=4
        Markov chains, run one after another.
    n_warmup : int, default=250
        Transitions of each chain that are thrown away.
    max_epochs : int, optional
        Steps of variational inference on all rows, by Adam; 2,000 by default.
    lr : float, default=0.01
        Learning rate at its peak; 5 % warm-up, then cosine to 0.
    device, precision, random_state, callbacks, checkpoint_dir, checkpoint_every, verbose
        As for the other estimators. Numbers that the model creates are of ``precision``; chains
        are not written to checkpoints, variational inference is.
    strategy : {"auto"}, default="auto"
        One process.

    Attributes
    ----------
    posterior_ : uq.inference.pyro_models.PyroPosterior
        Draws of the sites that all rows share.
    site_ : str
        Name of the site that observes y.
    n_chains_ : int
        Chains held; 1 for a guide.
    sample_stats_ : dict of ndarray
        "diverging", "acceptance_rate", ``(n_chains_, n_draws)``, where the kernel tells them.
    history_, stop_reason_, n_epochs_
        As for the other estimators, of variational inference.
    {classes}

    Notes
    -----
    Inputs and targets are taken in their units: the model's priors say what these are. Pyro's
    parameter store is the estimator's own while it runs; yours is not touched. Latent sites of
    single rows are drawn from the model anew in a prediction. :func:`uq.load` takes the model by
    ``module=``; guide and kernel are not stored."""


@estimator
class PyroRegressor(_PyroModel, Regressor):
    """Predict by a Pyro model of your own.

    Parameters
    ----------
    {all}

    Examples
    --------
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from sklearn.datasets import load_diabetes
    >>> from uq import PyroRegressor
    >>> def model(x, y=None):
    ...     weight = pyro.sample("weight", dist.Normal(0, 500).expand([x.shape[1]]).to_event(1))
    ...     scale = pyro.sample("scale", dist.LogNormal(4.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         return pyro.sample("y", dist.Normal(150 + x @ weight, scale), obs=y)
    >>> X, y = load_diabetes(return_X_y=True)
    >>> regressor = PyroRegressor(model, guide=AutoNormal, max_epochs=50, n_draws=20)
    >>> regressor.fit(X, y).predict_distribution(X[:3]).batch_shape
    torch.Size([3])
    """

    def _learn_target_scale(self, y: np.ndarray, weight: np.ndarray | None) -> None:
        self.y_mean_: np.ndarray = np.zeros(y.shape[1])
        self.y_scale_: np.ndarray = np.ones(y.shape[1])

    def _target_tensor(self, y: Tensor) -> Tensor:
        return y[:, 0] if self.y_is_1d_ else y

    def _user_scale(self, dist: Any) -> Predictive:
        dist = cast(RealPredictive, dist)  # in the model's units, which are the user's
        return dist.output(0) if self.y_is_1d_ else dist


@estimator
class PyroClassifier(_PyroModel, Classifier):
    """Classify by a Pyro model of your own, whose site ``y`` is Categorical or Bernoulli.

    Parameters
    ----------
    {all}

    Examples
    --------
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from sklearn.datasets import load_iris
    >>> from uq import PyroClassifier
    >>> def model(x, y=None):
    ...     weight = pyro.sample("weight", dist.Normal(0, 1).expand([x.shape[1], 3]).to_event(2))
    ...     with pyro.plate("data", len(x)):
    ...         return pyro.sample("y", dist.Categorical(logits=x @ weight), obs=y)
    >>> X, y = load_iris(return_X_y=True)
    >>> classifier = PyroClassifier(model, guide=AutoNormal, max_epochs=50, n_draws=20)
    >>> classifier.fit(X, y).predict_proba(X[:2]).shape
    (2, 3)
    """

    def _target_tensor(self, y: Tensor) -> Tensor:
        return y.to(self._dtype) if len(self.classes_) == 2 else y


_CLASSES = """\
classes_ : ndarray of shape (n_classes,)
        Labels; the model observes their positions, as floats where there are two (Bernoulli)."""

for _cls, _own in ((PyroClassifier, _CLASSES), (PyroRegressor, "")):
    _filled = _PARAMETERS.replace("    {classes}\n", f"    {_own}\n" if _own else "")
    _cls.__doc__ = (_cls.__doc__ or "").replace("{all}", _filled)
