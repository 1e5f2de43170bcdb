"""Diagnostics of the estimators that hold draws: a tree for ArviZ, and whether chains agree."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn import functional as F

from uq.inference.diagnostics import Diagnostics, diagnose, to_inference_data
from uq.inference.posterior import DrawsPosterior, monte_carlo

if TYPE_CHECKING:
    from xarray import DataTree

_ROWS = 100


class HoldsDraws(ABC):
    """For estimators with ``n_chains_``, ``sample_stats_`` and a posterior of draws by chain."""

    n_chains_: int
    sample_stats_: dict[str, np.ndarray]
    posterior_: Any

    def to_inference_data(self: Any, X: Any = None, y: Any = None) -> DataTree:
        """Return the draws as an ``xarray.DataTree`` for ArviZ.

        Parameters
        ----------
        X : array-like of shape (n, d), optional
            Rows at which functions are recorded: "prediction" in the posterior, in target units or
            as class probabilities.
        y : array-like, optional
            Their targets; adds the log likelihood of each row (in target units) and its sum.

        Returns
        -------
        DataTree
            Groups "posterior" (weights or sites by name, "noise_scale" of a network in target units
            for regression), "sample_stats", and with ``y`` "log_likelihood" and "observed_data".
            Draws that are not of Markov chains are one chain.
        """
        check_is_fitted(self)

        def by_chain(values: Any) -> np.ndarray:
            a = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
            return a.reshape(self.n_chains_, -1, *a.shape[1:])

        quantities = {name: by_chain(values) for name, values in self._quantities().items()}
        log_likelihood = {}
        if X is not None:
            functions = self.sample_functions(X, self.posterior_.max_draws)
            quantities["prediction"] = by_chain(functions)
            if y is not None:
                log_likelihood["y"] = by_chain(self._log_likelihood(X, np.asarray(y)))
                quantities["log_likelihood"] = log_likelihood["y"].sum(-1)
        return to_inference_data(
            quantities,
            sample_stats=self.sample_stats_,
            log_likelihood=log_likelihood,
            observed_data=None if y is None else {"y": np.asarray(y)},
            attrs={"inference_library": "uq", "estimator": type(self).__name__},
        )

    @abstractmethod
    def _quantities(self) -> dict[str, Tensor]:
        """What was sampled, (draws, …) each."""

    @abstractmethod
    def _log_likelihood(self, X: Any, y: np.ndarray) -> Tensor:
        """Log likelihood of each row under each draw, (draws, rows), in target units."""


class ChainDiagnostics(HoldsDraws):
    """For networks whose weights were sampled by Markov chains."""

    def _quantities(self: Any) -> dict[str, Tensor]:
        posterior: DrawsPosterior = self.posterior_
        quantities = dict(posterior.draws)
        raw = quantities.get("likelihood.raw_scale")
        if raw is not None:
            offset: Any = posterior.network.likelihood.offset
            scale = (F.softplus(raw + offset) + 1e-3).double().cpu()
            quantities["noise_scale"] = scale * torch.as_tensor(self.y_scale_)
        return quantities

    def _log_likelihood(self: Any, X: Any, y: np.ndarray) -> Tensor:
        posterior: DrawsPosterior = self.posterior_
        draws = posterior.max_draws
        x, _ = self._posterior_at(X)
        parameters = monte_carlo(
            posterior.network, posterior.sampler(draws, posterior.generator(x.device)), draws, x
        )
        target = torch.as_tensor(self._encode_targets(y))
        target = target.to(parameters[0].dtype) if target.is_floating_point() else target
        likelihood = posterior.network.likelihood
        rows = [-likelihood.nll(tuple(p[s] for p in parameters), target) for s in range(draws)]
        return torch.stack(rows).double() - float(np.log(getattr(self, "y_scale_", 1.0)).sum())

    def diagnostics(self: Any, X: Any, y: Any = None) -> Diagnostics:
        """Say whether the run can be trusted; ``uq.calibration.report`` shows what it says.

        Parameters
        ----------
        X : array-like of shape (n, d)
            Rows at which predictions are judged: R-hat and effective sample size of the worst of
            the first 100.
        y : array-like, optional
            Their targets, to judge the log likelihood, too.

        Returns
        -------
        uq.inference.diagnostics.Diagnostics
            Table and warnings, each of which says what to change.
        """
        some = X.iloc[:_ROWS] if hasattr(X, "iloc") else X[:_ROWS]
        tree = self.to_inference_data(some, None if y is None else np.asarray(y)[:_ROWS])
        wanted = ("prediction", "log_likelihood", "noise_scale")
        found = diagnose(tree, quantities=[k for k in wanted if k in tree["posterior"].data_vars])
        if self.sample_stats_:
            return found
        why = "No draws: sampling was interrupted before the end of warm-up; fit again."
        return Diagnostics(found.table, (why, *found.warnings))
