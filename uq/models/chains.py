"""Diagnostics of the estimators that hold Markov chains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from uq.inference.diagnostics import Diagnostics, diagnose, to_inference_data
from uq.inference.posterior import DrawsPosterior, monte_carlo

if TYPE_CHECKING:
    from xarray import DataTree

_ROWS = 100


class ChainDiagnostics:
    """For estimators with ``n_chains_``, ``sample_stats_`` and a posterior of draws by chain."""

    n_chains_: int
    sample_stats_: dict[str, np.ndarray]

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
            Groups "posterior" (weights by name, "noise_scale" in target units for regression),
            "sample_stats", and with ``y`` "log_likelihood" and "observed_data".
        """
        chains = self.n_chains_

        def by_chain(array: Any) -> np.ndarray:
            a = array.numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
            return a.reshape(chains, -1, *a.shape[1:])

        posterior: DrawsPosterior = self.posterior_
        quantities = {k: by_chain(t.detach().cpu()) for k, t in posterior.draws.items()}
        raw = posterior.draws.get("likelihood.raw_scale")
        if raw is not None:
            offset: Any = posterior.network.likelihood.offset
            scale = (F.softplus(raw + offset) + 1e-3).double().cpu().numpy() * self.y_scale_
            quantities["noise_scale"] = by_chain(scale)
        log_likelihood = {}
        if X is not None:
            draws = self.posterior_.max_draws
            functions = self.sample_functions(X, draws)
            quantities["prediction"] = by_chain(functions)
            if y is not None:
                x, _ = self._posterior_at(X)
                draw = posterior.sampler(draws, posterior.generator(x.device))
                parameters = monte_carlo(posterior.network, draw, draws, x)
                target = torch.as_tensor(self._encode_targets(np.asarray(y)))
                rows = torch.stack(
                    [
                        -posterior.network.likelihood.nll(
                            tuple(p[s] for p in parameters),
                            target.to(parameters[0].dtype)
                            if target.is_floating_point()
                            else target,
                        )
                        for s in range(draws)
                    ]
                ).double()
                shift = float(np.log(getattr(self, "y_scale_", np.ones(1))).sum())
                log_likelihood["y"] = by_chain(rows - shift)
                quantities["log_likelihood"] = log_likelihood["y"].sum(-1)
        return to_inference_data(
            quantities,
            sample_stats=self.sample_stats_,
            log_likelihood=log_likelihood,
            observed_data=None if y is None else {"y": np.asarray(y)},
            attrs={"inference_library": "uq", "estimator": type(self).__name__},
        )

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
