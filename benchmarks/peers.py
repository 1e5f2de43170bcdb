"""What a user would pick instead, each with ``fit(X, y)`` and ``predict_distribution(X)``.

The reference packages of methods of ours (``vbll``, ``ivon-opt``, ``laplace-torch``) run on our
network and in our training loop: same rows, batches, steps and held-out rows; only the head, the
optimizer or what follows the training is theirs. Packages are imported where they are used, so
that one that is not installed gives rows with its error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.interpolate import interp1d
from sklearn.base import BaseEstimator
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
)
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from sklearn.linear_model import BayesianRidge, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from uq import IVONRegressor, MAPClassifier, MAPRegressor, VBLLRegressor
from uq.distributions import CategoricalMixture, Empirical, NormalMixture
from uq.inference.posterior import NormalPosterior
from uq.inference.training import TrainingResult, cosine_schedule
from uq.models.objectives import NetworkObjective, TrainingData
from uq.nn import MLP
from uq.nn.network import Network

Arrays = np.ndarray


def normal(mean: Arrays, std: Arrays) -> NormalMixture:
    """One Normal for each row."""
    return NormalMixture(torch.as_tensor(mean)[None], torch.as_tensor(std)[None])


def categorical(probs: Arrays) -> CategoricalMixture:
    """Class probabilities as a predictive distribution."""
    return CategoricalMixture(torch.as_tensor(probs, dtype=torch.float64).log()[None])


def mlp_with_norm(d_in: int, d_out: int) -> MLP:
    """The network that ABNN takes by default, for MAP."""
    return MLP(d_in, (64, 64), d_out, norm=True)


# -- regression ------------------------------------------------------------------------------------


class Ridge:
    """Linear regression, its penalty by the evidence (scikit-learn's BayesianRidge)."""

    def fit(self, X: Arrays, y: Arrays) -> Ridge:
        self.model = make_pipeline(StandardScaler(), BayesianRidge()).fit(X, y)
        return self

    def predict_distribution(self, X: Arrays) -> NormalMixture:
        return normal(*self.model.predict(X, return_std=True))


class SklearnGP:
    """scikit-learn's exact Gaussian process: Matérn 5/2, a length for each column, noise."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fit(self, X: Arrays, y: Arrays) -> SklearnGP:
        kernel = ConstantKernel() * Matern(np.ones(X.shape[1]), nu=2.5) + WhiteKernel()
        gp = GaussianProcessRegressor(kernel, normalize_y=True, random_state=self.seed)
        self.model = make_pipeline(StandardScaler(), gp).fit(X, y)
        return self

    def predict_distribution(self, X: Arrays) -> NormalMixture:
        # Its deviation is that of a new target: the WhiteKernel is a part of the kernel.
        return normal(*self.model.predict(X, return_std=True))


class QuantileBoosting:
    """Gradient boosting of 20 quantiles, one model each, straight between; it has no density."""

    levels = (np.arange(20) + 0.5) / 20
    draws = (np.arange(200) + 0.5) / 200

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fit(self, X: Arrays, y: Arrays) -> QuantileBoosting:
        self.models = [
            HistGradientBoostingRegressor(loss="quantile", quantile=q, random_state=self.seed).fit(
                X, y
            )
            for q in self.levels
        ]
        return self

    def predict_distribution(self, X: Arrays) -> Empirical:
        # As equally likely draws, quantiles at (i - 1/2)/200 give its CRPS and intervals.
        values = np.sort([model.predict(X) for model in self.models], axis=0)
        return Empirical(
            interp1d(self.levels, values, axis=0, fill_value="extrapolate")(self.draws)
        )


class NGBoost:
    """Natural gradient boosting of a Normal, stopped early on a tenth of the rows.

    All of the package's 500 rounds leave Normals that are much too narrow on small tables.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fit(self, X: Arrays, y: Arrays) -> NGBoost:
        import ngboost

        model = ngboost.NGBRegressor(
            verbose=False, random_state=self.seed, early_stopping_rounds=50, validation_fraction=0.1
        )
        self.model = model.fit(X, y)
        return self

    def predict_distribution(self, X: Arrays) -> NormalMixture:
        found = self.model.pred_dist(X).params
        return normal(found["loc"], found["scale"])


# -- classification --------------------------------------------------------------------------------


@dataclass
class SklearnClassifier:
    """A classifier of scikit-learn whose probabilities of 0 are no certainty.

    Shares of trees and steps of an isotonic fit can be exactly 0, an infinite NLL; all
    probabilities are drawn to 1/K by the weight of one row in n: p ← (n p + 1/K)/(n + 1).
    """

    model: BaseEstimator

    def fit(self, X: Arrays, y: Arrays) -> SklearnClassifier:
        self.n = len(X)
        self.model.fit(X, y)
        return self

    def predict_distribution(self, X: Arrays) -> CategoricalMixture:
        p = self.model.predict_proba(X)
        return categorical((self.n * p + 1 / p.shape[1]) / (self.n + 1))


def logistic_regression() -> SklearnClassifier:
    return SklearnClassifier(make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)))


def boosting_isotonic(seed: int) -> SklearnClassifier:
    boosting = HistGradientBoostingClassifier(random_state=seed)
    return SklearnClassifier(CalibratedClassifierCV(boosting, method="isotonic", cv=5))


def random_forest(seed: int) -> SklearnClassifier:
    return SklearnClassifier(RandomForestClassifier(500, random_state=seed))


# -- laplace-torch: a Laplace approximation of our MAP network -------------------------------------


class _Laplace:
    """The package's default (last layer, Kronecker factors), prior by marginal likelihood."""

    likelihood: str
    dtype: torch.dtype

    def __init__(self, base: Any) -> None:
        self.base = base

    def fit(self, X: Arrays, y: Arrays) -> Any:
        from laplace import Laplace

        self.base.fit(X, y)
        network = self.base.posterior_.network
        arguments: dict[str, Any] = {}
        if self.likelihood == "regression":
            _, scale = network.likelihood(torch.zeros(1, 1))
            arguments["sigma_noise"] = float(scale.detach())
        self.model = Laplace(network.body, self.likelihood, **arguments)
        inputs = self.base._input_tensor(np.asarray(X), predicting=True)
        targets = torch.as_tensor(self._targets(y), dtype=self.dtype)
        self.model.fit(DataLoader(TensorDataset(inputs, targets), batch_size=256))
        self.model.optimize_prior_precision(method="marglik")
        return self

    def _targets(self, y: Arrays) -> Arrays:
        found: Arrays = self.base._encode_targets(y)
        return found

    def _predictive(self, X: Arrays) -> Any:
        parts = self.base._input_tensor(np.asarray(X), predicting=True).split(512)
        return [self.model(part) for part in parts]


class LaplaceRegressor(_Laplace):
    likelihood, dtype = "regression", torch.float32

    def __init__(self, seed: int) -> None:
        super().__init__(MAPRegressor(random_state=seed, device="cpu"))

    def predict_distribution(self, X: Arrays) -> Any:
        found = self._predictive(X)
        mean = torch.cat([m for m, _ in found])[:, 0].double().detach()
        variance = torch.cat([v for _, v in found])[:, 0, 0].double().detach()
        scale = (variance + float(self.model.sigma_noise) ** 2).sqrt()
        return self.base._user_scale(NormalMixture(mean[None, :, None], scale[None, :, None]))


class LaplaceClassifier(_Laplace):
    likelihood, dtype = "classification", torch.long

    def __init__(self, base: MAPClassifier) -> None:
        super().__init__(base)

    def predict_distribution(self, X: Arrays) -> CategoricalMixture:
        return categorical(torch.cat(self._predictive(X)).detach().numpy())


# -- MC dropout ------------------------------------------------------------------------------------


class MCDropoutClassifier:
    """A network with dropout, trained as ours are; draws are passes with dropout left on."""

    def __init__(self, base: MAPClassifier, n_samples: int = 64) -> None:
        self.base, self.n_samples = base, n_samples

    def fit(self, X: Arrays, y: Arrays) -> MCDropoutClassifier:
        self.base.fit(X, y)
        return self

    @torch.no_grad()
    def predict_distribution(self, X: Arrays) -> CategoricalMixture:
        body = self.base.posterior_.network.body
        for part in body.modules():
            part.training = isinstance(part, nn.Dropout)
        inputs = self.base._input_tensor(np.asarray(X), predicting=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            draws = [
                torch.cat([body(part) for part in inputs.split(1024)])
                for _ in range(self.n_samples)
            ]
        return CategoricalMixture(torch.stack(draws))


# -- the reference packages inside our loop --------------------------------------------------------


class PackageHead(nn.Module):
    """``vbll.Regression`` as our training loop calls a head.

    Its prior of the noise is that of the package's tutorials. Its noise starts at 1 in units of the
    standardised target: the package draws the start of ln σ from N(0, ln² wishart_scale), from
    which a budget of a few thousand steps often does not come back.
    """

    def __init__(self, n_features: int, n_outputs: int) -> None:
        import vbll

        super().__init__()
        self.head = vbll.Regression(n_features, n_outputs, 1.0, "dense", wishart_scale=0.1)
        nn.init.zeros_(self.head.noise_logdiag)
        # Read by the estimator to place the sums of a closed form, which this head has not.
        self.register_buffer("prior_variance", torch.tensor(1.0))

    def loss(self, features: Tensor, y: Tensor, n_rows: float, weight: Any = None) -> Tensor:
        self.head.regularization_weight = 1 / n_rows
        loss: Tensor = self.head(features).train_loss_fn(y)
        return loss

    def predictive(self, features: Tensor, n_samples: int, generator: Any) -> NormalMixture:
        dist = self.head(features).predictive
        mean, scale = dist.mean.double(), dist.variance.double().sqrt()
        return NormalMixture(mean[None], scale[None])


class PackageVBLL(VBLLRegressor):
    """VBLL with the head of the ``vbll`` package."""

    def _head(self, n_features: int) -> Any:
        return PackageHead(n_features, len(self.y_mean_))


class PackageStep(torch.optim.Optimizer):
    """``ivon.IVON`` stepped by a closure."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        with self.optimizer.sampled_params(train=True):
            loss = closure()
        self.optimizer.step()
        return loss


class PackageIVON(IVONRegressor):
    """IVON with the optimizer of the ``ivon-opt`` package."""

    def _fit_member(
        self, network: Network, i: int, data: TrainingData
    ) -> tuple[NormalPosterior, TrainingResult]:
        import ivon

        n_steps = self._n_epochs(data) * len(data.batches)
        ess = data.n_effective
        decay = self.prior_scale**-2 / ess
        theirs = ivon.IVON(
            network.parameters(),
            self.lr,
            ess=ess,
            weight_decay=decay,
            beta2=max(0.998, 1 - 2 / n_steps),
            hess_init=1 / (ess * self.init_std**2) - decay,
        )
        schedule = cosine_schedule(n_steps)
        objective = NetworkObjective(network)
        result = self._train(objective, PackageStep(theirs), data, schedule=schedule)
        self.diagnostics_ = {}
        (group,) = theirs.param_groups
        flat = (ess * (group["hess"] + decay)).rsqrt()
        parts = flat.split([p.numel() for p in network.parameters()])
        stds = {
            name: part.view_as(p).clone()
            for (name, p), part in zip(network.named_parameters(), parts, strict=True)
        }
        return NormalPosterior(network, stds, data.seeds.predict), result
