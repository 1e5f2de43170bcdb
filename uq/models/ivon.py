"""IVON: a Gaussian posterior over all weights, learned at the cost of Adam.

The optimizer and its equations are in :mod:`uq.inference.ivon`. With λ = N training rows and prior
N(0, s² I), weight decay is δ = 1/(λ s²); the initial curvature h₀ is chosen so that the initial
posterior standard deviation is ``init_std``, and β₂ = max(0.998, 1 − 2/steps), so that the
curvature forgets h₀ within the run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import asdict, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from uq.distributions import Predictive
from uq.errors import DataError, ParameterError
from uq.inference.ivon import IVON
from uq.inference.ivon_influence import LeaveOneOut, leave_one_out
from uq.inference.posterior import MixturePosterior, NormalPosterior
from uq.inference.training import TrainingResult, cosine_schedule, warn_interrupted
from uq.models.base import Estimator, estimator
from uq.models.checks import check_number
from uq.models.documentation import documented
from uq.models.ensemble import initial_networks
from uq.models.objectives import NetworkObjective, TrainingData
from uq.models.tasks import Classifier, NetworkRegressor
from uq.nn.network import Network
from uq.nn.priors import NormalPrior

_NOISY = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def warn_of_noise(name: str, network: nn.Module) -> None:
    """Warn the caller of ``fit`` of modules that do not fit weights under noise."""
    noisy = [m for m in network.modules() if isinstance(m, _NOISY) and getattr(m, "p", 1) > 0]
    found = sorted({type(m).__name__ for m in noisy})
    if found:
        warnings.warn(
            f"{name}: module holds {', '.join(found)}. Batch normalisation collects its statistics "
            "under noisy weights, and they are wrong at other draws; dropout adds noise that IVON "
            "takes for curvature. Use GroupNorm or LayerNorm, and no dropout.",
            UserWarning,
            stacklevel=4,
        )


def posterior_optimizer(
    parameters: Iterable[Tensor],
    *,
    n_effective: float,
    n_steps: int,
    generator: torch.Generator,
    lr: float,
    prior_scale: float,
    init_std: float,
    beta2: float | None = None,
    temperature: float = 1.0,
    **settings: Any,
) -> IVON:
    """IVON for the posterior of ``n_effective`` rows under N(0, prior_scale²), over n_steps."""
    # Tempering scales the likelihood alone: the prior keeps its precision λδ.
    ess = n_effective / temperature
    decay = NormalPrior(prior_scale).precision / ess
    return IVON(
        parameters,
        lr,
        ess=ess,
        weight_decay=decay,
        beta2=max(0.998, 1 - 2 / n_steps) if beta2 is None else beta2,
        hess_init=max(0.0, 1 / (ess * init_std**2) - decay),
        generator=generator,
        **settings,
    )


@estimator
class _IVON(Estimator):
    lr: float = 0.1
    prior_scale: float = 0.4
    init_std: float = 0.02
    beta2: float | None = None
    temperature: float = 1.0
    mc_samples: int = 1
    clip_radius: float = math.inf
    n_samples: int = 64
    n_members: int = 1

    n_members_: int = field(init=False)
    diagnostics_: dict[str, float] = field(init=False)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number(self, "prior_scale", above=0)
        check_number(self, "init_std", above=0)
        check_number(self, "beta2", at_least=0, below=1, optional=True)
        check_number(self, "temperature", above=0)
        check_number(self, "mc_samples", at_least=1, integer=True)
        check_number(self, "clip_radius", above=0)
        check_number(self, "n_samples", at_least=1, integer=True)
        check_number(self, "n_members", at_least=1, integer=True)
        if self.init_std > self.prior_scale:
            raise ParameterError(
                f"{type(self).__name__}: init_std must be <= prior_scale (the posterior starts "
                f"inside the prior), got {self.init_std!r} > {self.prior_scale!r}."
            )

    @property
    def _trains_in_processes(self) -> bool:
        return True

    def _infer(
        self, data: TrainingData
    ) -> tuple[NormalPosterior | MixturePosterior, TrainingResult]:
        if self.n_members == 1:
            networks = [self._network()]
        else:
            networks = initial_networks(self, self.n_members, data)
        warn_of_noise(type(self).__name__, networks[0])
        members: list[NormalPosterior] = []
        for i, network in enumerate(networks):
            try:
                member, result = self._fit_member(network, i, data)
            except KeyboardInterrupt:
                if not members:
                    raise
                result.stop_reason = "interrupted"  # of the member before
                warn_interrupted(type(self).__name__, f"the first {len(members)} members are kept")
                break
            if result.best_epoch > 0:
                members.append(member)
            if result.error is not None or result.stop_reason == "interrupted":
                break
        if not members:
            raise result.error or KeyboardInterrupt
        result.best_epoch = max(result.best_epoch, 1)  # there are members to keep
        self.n_members_ = len(members)
        return self._join(members, data.seeds.predict), result

    def _fit_member(
        self, network: Network, i: int, data: TrainingData
    ) -> tuple[NormalPosterior, TrainingResult]:
        """Train one network in place."""
        network.to(data.fabric.device)
        n_steps = self._n_epochs(data) * len(data.batches)
        optimizer = posterior_optimizer(
            network.parameters(),
            n_effective=data.n_effective,
            n_steps=n_steps,
            # Each process has noise of its own, and IVON averages over them itself.
            generator=data.generator(data.seeds.noise + i + (data.fabric.global_rank << 32)),
            sync=data.fabric.world_size > 1,
            lr=self.lr,
            prior_scale=self.prior_scale,
            init_std=self.init_std,
            beta2=self.beta2,
            temperature=self.temperature,
            mc_samples=self.mc_samples,
            clip_radius=self.clip_radius,
        )
        result = self._train(
            NetworkObjective(network),
            optimizer,
            data,
            schedule=cosine_schedule(n_steps),
            extra_state=optimizer.curvature,
        )
        (diagnosis,) = optimizer.diagnostics(warn=False)
        self.diagnostics_ = asdict(diagnosis)
        # The default beta2 leaves little of the initial curvature, except in a run that is too
        # short for anything; a beta2 that was asked for may leave all of it.
        if diagnosis.noise_share > 0.5 or self.beta2 is not None:
            optimizer.diagnostics()
        return optimizer.posterior(network, data.seeds.predict + i), result

    def _join(
        self, members: list[NormalPosterior], seed: int
    ) -> NormalPosterior | MixturePosterior:
        return members[0] if self.n_members == 1 else MixturePosterior(members, seed)

    def _build_posterior(self) -> NormalPosterior | MixturePosterior:
        members = [NormalPosterior(self._network(), {}) for _ in range(self.n_members_)]
        return self._join(members, 0)

    # -- beyond prediction -------------------------------------------------------------------

    def predict_distribution_at_mean(self, X: Any) -> Predictive:
        """Predict with the mean weights alone ("IVON@mean"): one forward pass a network.

        Parameters
        ----------
        X : array-like of shape (n, d)
            Inputs.

        Returns
        -------
        Predictive
            As from :meth:`predict_distribution`, of one draw (of ``n_members``): without the
            uncertainty about the weights, and with no epistemic part for a single network.
        """
        x, index = self._posterior_at(X)
        posterior = cast("NormalPosterior | MixturePosterior", self.posterior_)
        dist = self._user_scale(posterior.at_mean(x))
        dist.index = index
        return dist

    def sensitivity(self, X: Any, y: Any, sample_weight: Any = None) -> np.ndarray:
        """Tell how much each training row moves its own prediction.

        Parameters
        ----------
        X, y, sample_weight
            Rows that were given to ``fit``, all or some of them.

        Returns
        -------
        ndarray of shape (n,)
            Σ_k |Δf_k|, where Δf is the first-order move of the network's outputs at the row when
            the row is left out: logits, or means in standardised units (and raw noise scales, with
            heteroscedastic noise). Large values mark influential, atypical and mislabelled rows.

        References
        ----------
        P. Nickl et al., "The Memory Perturbation Equation", NeurIPS 2023, arXiv 2310.19273.

        Examples
        --------
        >>> from sklearn.datasets import load_wine
        >>> from uq import IVONClassifier
        >>> X, y = load_wine(return_X_y=True)
        >>> model = IVONClassifier(max_epochs=60, random_state=0).fit(X, y)
        >>> model.sensitivity(X, y).shape
        (178,)
        """
        parts = self._left_out(X, y, sample_weight)
        return torch.stack([p.sensitivity for p in parts]).mean(0).double().numpy()

    def leave_one_out(self, X: Any, y: Any, sample_weight: Any = None) -> Predictive:
        """Predict each training row as if the model had been fitted without it.

        Parameters
        ----------
        X, y, sample_weight
            Rows that were given to ``fit``, all or some of them.

        Returns
        -------
        Predictive
            At the mean weights, moved to first order. It may be scored and reported like a
            prediction on held-out rows.

        See Also
        --------
        uq.inference.leave_one_out : the estimate itself.
        """
        parts = self._left_out(X, y, sample_weight)
        posterior = cast("NormalPosterior | MixturePosterior", self.posterior_)
        network = self._members(posterior)[0].network
        stacked = tuple(torch.stack(ts) for ts in zip(*(p.parameters for p in parts), strict=True))
        return self._user_scale(network.likelihood.predictive(stacked))

    def generalization_nll(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Estimate the test loss of the mean weights from training rows alone.

        Parameters
        ----------
        X, y, sample_weight
            Rows that were given to ``fit``.

        Returns
        -------
        float
            Mean negative log likelihood of :meth:`leave_one_out`, in nats, in target units.
        """
        rows = -self._log_prob(self.leave_one_out(X, y, sample_weight), self._targets(y))
        return float(np.average(rows.numpy(), weights=sample_weight))

    def _left_out(self, X: Any, y: Any, sample_weight: Any) -> list[LeaveOneOut]:
        x, _ = self._posterior_at(X)
        y = self._targets(y)
        # A column too few would be broadcast over all targets.
        per_row = () if getattr(self, "y_is_1d_", True) else (len(getattr(self, "y_mean_", ())),)
        if y.shape != (len(x), *per_row):
            raise DataError(
                f"{type(self).__name__}: y must have shape {(len(x), *per_row)}, as X and the "
                f"targets that were fitted have, got {y.shape}."
            )
        target = torch.as_tensor(self._encode_targets(y)).to(x.device)
        target = target.to(x.dtype) if target.is_floating_point() else target
        weight = np.ones(len(x)) if sample_weight is None else np.asarray(sample_weight, float)
        if weight.shape != (len(x),) or not (np.isfinite(weight) & (weight >= 0)).all():
            raise DataError(
                f"{type(self).__name__}: sample_weight must hold {len(x)} finite numbers >= 0."
            )
        times = torch.as_tensor(weight / self.params_["temperature"])
        posterior = cast("NormalPosterior | MixturePosterior", self.posterior_)
        return [leave_one_out(m, x, target, weight=times) for m in self._members(posterior)]

    @staticmethod
    def _members(posterior: NormalPosterior | MixturePosterior) -> list[NormalPosterior]:
        return posterior.members if isinstance(posterior, MixturePosterior) else [posterior]

    @staticmethod
    def _targets(y: Any) -> np.ndarray:
        return y.detach().cpu().numpy() if isinstance(y, torch.Tensor) else np.asarray(y)


_PARAMETERS = """\
prior_scale : float, default=0.4
        Standard deviation of the Gaussian prior on every weight: smaller for few or noisy rows
        (0.2), larger for clean ones (1.0). A wide prior lets noisy rows be over-fitted before the
        curvature has settled; a narrow one smooths a clean curve away. Weight decays of other
        optimizers do not carry over.
    init_std : float, default=0.02
        Posterior standard deviation at the start; much above 0.1 drowns a small network in noise.
    beta2 : float, optional
        Memory of the curvature; by default max(0.998, 1 − 2/steps).
    temperature : float, default=1.0
        1 is the Bayesian posterior; below 1 the likelihood counts more (a colder posterior).
    mc_samples : int, default=1
        Weight samples per training step.
    clip_radius : float, default=inf
        Bound on each coordinate of the preconditioned update.
    n_samples : int, default=64
        Weight draws of each network that a prediction averages over; 16 come close.
    n_members : int, default=1
        Networks trained from different initial weights; more than one gives the mixture of their
        posteriors ("multi-IVON")."""


@documented(lr="0.1", own=_PARAMETERS)
@estimator
class IVONClassifier(_IVON, Classifier):
    """Classify with a Gaussian posterior over all weights, learned by IVON.

    Parameters
    ----------
    {shared}
    {own}
    {tail}

    Attributes
    ----------
    {fitted}
    n_members_ : int
        Networks held: fewer than asked for after an interrupt.
    diagnostics_ : dict of float
        What became of the curvature: the fields of ``IVON.diagnostics()``, of the last network.
    classes_ : ndarray of shape (n_classes,)
        Labels.

    Notes
    -----
    The posterior is mean-field: it leaves out correlations between weights, so uncertainty hardly
    grows in a gap between clusters of data, and on few rows with little noise, predictions are too
    cautious. Modules with batch normalisation or dropout add noise of their own and are better
    replaced (GroupNorm, LayerNorm). Few rows of many columns with noisy labels are over-fitted
    within the default prior: lower ``prior_scale``, or take ``patience="auto"``, whose held-out
    score is that of the mean weights.

    References
    ----------
    Y. Shen et al., "Variational Learning is Effective for Large Deep Networks", ICML 2024,
    arXiv 2402.17641, Algorithm 1.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> from uq import IVONClassifier
    >>> X, y = load_wine(return_X_y=True)
    >>> model = IVONClassifier(max_epochs=60, random_state=0).fit(X, y)
    >>> dist = model.predict_distribution(X[:2])
    >>> dist.n_draws, bool((dist.epistemic >= 0).all())
    (64, True)
    """


@documented(lr="0.1", own=_PARAMETERS)
@estimator
class IVONRegressor(_IVON, NetworkRegressor):
    """Predict real targets with a Gaussian posterior over all weights, learned by IVON.

    Parameters
    ----------
    {shared}
    {own}
    {noise}
    {tail}

    Attributes
    ----------
    {fitted}
    n_members_ : int
        Networks held: fewer than asked for after an interrupt.
    diagnostics_ : dict of float
        What became of the curvature: the fields of ``IVON.diagnostics()``, of the last network.

    Notes
    -----
    The predictive is the mixture of the draws' Normals, not one moment-matched Normal. The
    posterior is mean-field: it leaves out correlations between weights, so uncertainty hardly grows
    in a gap between clusters of data, and on few rows with little noise, intervals are too wide.
    With ``patience`` the held-out score is that of the mean weights.

    References
    ----------
    Y. Shen et al., "Variational Learning is Effective for Large Deep Networks", ICML 2024,
    arXiv 2402.17641, Algorithm 1.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from uq import IVONRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = IVONRegressor(max_epochs=60, random_state=0).fit(X, y)
    >>> lower, upper = model.predict_interval(X[:3], coverage=0.9)
    >>> bool((lower < upper).all())
    True
    """
