"""IVON: a Gaussian posterior over all weights, learned at the cost of Adam.

The optimizer and its equations are in :mod:`uq.inference.ivon`. With λ = N training rows and prior
N(0, s² I), weight decay is δ = 1/(λ s²); the initial curvature h₀ is chosen so that the initial
posterior standard deviation is ``init_std``, and β₂ = max(0.998, 1 − 2/steps), so that the
curvature forgets h₀ within the run.
"""

from __future__ import annotations

import math

from uq.errors import ParameterError
from uq.inference.ivon import IVON
from uq.inference.posterior import NormalPosterior
from uq.inference.training import TrainingResult, cosine_schedule
from uq.models.base import (
    Classifier,
    Estimator,
    NetworkObjective,
    NetworkRegressor,
    TrainingData,
    estimator,
)
from uq.models.checks import check_number
from uq.models.documentation import documented
from uq.nn.priors import NormalPrior


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

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number(self, "prior_scale", above=0)
        check_number(self, "init_std", above=0)
        check_number(self, "beta2", at_least=0, below=1, optional=True)
        check_number(self, "temperature", above=0)
        check_number(self, "mc_samples", at_least=1, integer=True)
        check_number(self, "clip_radius", above=0)
        check_number(self, "n_samples", at_least=1, integer=True)
        if self.init_std > self.prior_scale:
            raise ParameterError(
                f"{type(self).__name__}: init_std must be <= prior_scale (the posterior starts "
                f"inside the prior), got {self.init_std!r} > {self.prior_scale!r}."
            )

    def _infer(self, data: TrainingData) -> tuple[NormalPosterior, TrainingResult]:
        network = self._network().to(data.fabric.device)
        n_steps = self._n_epochs(data) * len(data.batches)
        # Tempering scales the likelihood alone: the prior keeps its precision λδ.
        ess = data.n_effective / self.temperature
        decay = NormalPrior(self.prior_scale).precision / ess
        optimizer = IVON(
            network.parameters(),
            self.lr,
            ess=ess,
            weight_decay=decay,
            beta2=max(0.998, 1 - 2 / n_steps) if self.beta2 is None else self.beta2,
            hess_init=max(0.0, 1 / (ess * self.init_std**2) - decay),
            mc_samples=self.mc_samples,
            clip_radius=self.clip_radius,
            generator=data.generator(data.seeds.noise),
        )
        result = self._train(
            NetworkObjective(network),
            optimizer,
            data,
            schedule=cosine_schedule(n_steps),
            extra_state=optimizer.curvature,
        )
        stds = optimizer.posterior_std()
        named = {k: stds[p] for k, p in network.named_parameters() if p in stds}
        return NormalPosterior(network, named, data.seeds.predict), result

    def _build_posterior(self) -> NormalPosterior:
        return NormalPosterior(self._network(), {})


_PARAMETERS = """\
prior_scale : float, default=0.4
        Standard deviation of the Gaussian prior on every weight: smaller for few or noisy rows
        (0.2), larger for many clean ones (1.0). Weight decays of other optimizers do not carry
        over.
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
        Weight draws that a prediction averages over."""


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
    classes_ : ndarray of shape (n_classes,)
        Labels.

    Notes
    -----
    The posterior is mean-field: it leaves out correlations between weights, so uncertainty hardly
    grows in a gap between clusters of data, and on few rows with little noise, predictions are too
    cautious. Modules with batch normalisation or dropout add noise of their own and are better
    replaced (GroupNorm, LayerNorm). With ``patience`` the held-out score is that of the mean
    weights.

    References
    ----------
    Y. Shen et al., "Variational Learning is Effective for Large Deep Networks", ICML 2024,
    arXiv 2402.17641.

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

    Notes
    -----
    The predictive is the mixture of the draws' Normals, not one moment-matched Normal. The
    posterior is mean-field: it leaves out correlations between weights, so uncertainty hardly grows
    in a gap between clusters of data, and on few rows with little noise, intervals are too wide.
    With ``patience`` the held-out score is that of the mean weights.

    References
    ----------
    Y. Shen et al., "Variational Learning is Effective for Large Deep Networks", ICML 2024,
    arXiv 2402.17641.

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
