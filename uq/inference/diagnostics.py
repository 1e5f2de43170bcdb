"""Can a sampling run be trusted? Diagnostics of draws by chain, through ArviZ.

:func:`to_inference_data` makes an ``xarray.DataTree`` of any sampler's draws, which ArviZ from 0.23
reads. :func:`diagnose` turns it into a table and, where something is wrong, into sentences that
say what to change. Quantities to look at are predictions, log likelihood and noise: the weights of
a network can be permuted without changing it, so that their own R-hat says little.

A. Vehtari, A. Gelman, D. Simpson, B. Carpenter, P.-C. Bürkner, "Rank-normalization, folding, and
localization: An improved R-hat for assessing convergence of MCMC", Bayesian Analysis 16 (2021),
arXiv 1903.08008; E-BFMI: M. Betancourt, arXiv 1604.00695.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from uq.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from xarray import DataTree

# R-hat: 1.01 is the paper's threshold for one quantity; the largest of many predictions exceeds it
# by chance. ESS: at 100 the mean is known to a tenth of the posterior's standard deviation.
MAX_RHAT, MIN_ESS, MIN_BFMI, MAX_SATURATED = 1.05, 100, 0.3, 0.05
_ACCEPTANCE = (0.5, 0.99)


class Diagnostics(NamedTuple):
    """What :func:`diagnose` found; ``uq.calibration.report(…, diagnostics=…)`` shows it."""

    table: pd.DataFrame
    """A row for each quantity: "R-hat", "ESS bulk", "ESS tail", the worst of its elements; further
    rows hold numbers of the run in the column "value"."""
    warnings: tuple[str, ...]
    """Why the run cannot be trusted and what to change; empty for a good run."""


def to_inference_data(
    posterior: Mapping[str, Any],
    *,
    sample_stats: Mapping[str, Any] | None = None,
    log_likelihood: Mapping[str, Any] | None = None,
    posterior_predictive: Mapping[str, Any] | None = None,
    observed_data: Mapping[str, Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> DataTree:
    """Put draws into the groups that ArviZ knows.

    Parameters
    ----------
    posterior : mapping of str to array-like (chains, draws, …)
        Draws of each quantity. One particle system of SMC is one chain.
    sample_stats : mapping of str to array-like (chains, draws), optional
        Statistics of each draw, by ArviZ's names: "diverging", "acceptance_rate", "energy", "lp",
        "n_steps", "step_size", "reached_max_treedepth", or others.
    log_likelihood, posterior_predictive : mapping of str to array-like (chains, draws, rows, …)
        Of each row, for leave-one-out and predictive checks.
    observed_data : mapping of str to array-like, optional
        Targets.
    attrs : mapping, optional
        Attributes of the tree, such as the sampler's name or the log evidence.

    Returns
    -------
    xarray.DataTree
        With the groups that were given.

    Raises
    ------
    DataError
        If arrays lack the chain and draw axes, or differ in them.

    Examples
    --------
    >>> import numpy as np
    >>> from uq.inference.diagnostics import to_inference_data
    >>> tree = to_inference_data({"noise": np.random.default_rng(0).normal(size=(4, 100))})
    >>> dict(tree["posterior"].sizes)
    {'chain': 4, 'draw': 100}
    """
    from xarray import Dataset, DataTree

    sampled = {
        "posterior": posterior,
        "sample_stats": sample_stats,
        "log_likelihood": log_likelihood,
        "posterior_predictive": posterior_predictive,
    }
    shape: tuple[int, ...] | None = None
    groups: dict[str, Dataset] = {}
    for group, values in sampled.items():
        variables = {}
        for name, value in (values or {}).items():
            array = _array(value)
            if array.ndim < 2 or (shape is not None and array.shape[:2] != shape):
                raise DataError(
                    f"to_inference_data: {group}[{name!r}] has shape {array.shape}; expected "
                    f"{'(chains, draws, …)' if shape is None else (*shape, '…')}."
                )
            shape = array.shape[:2]
            rest = [f"{name}_dim_{i}" for i in range(array.ndim - 2)]
            variables[name] = (["chain", "draw", *rest], array)
        if variables and shape is not None:
            coords = {"chain": np.arange(shape[0]), "draw": np.arange(shape[1])}
            groups[group] = Dataset(variables, coords)
    if shape is None:
        raise DataError("to_inference_data: posterior is empty.")
    if observed_data:
        arrays = {k: _array(v) for k, v in observed_data.items()}
        groups["observed_data"] = Dataset(
            {k: ([f"{k}_dim_{i}" for i in range(a.ndim)], a) for k, a in arrays.items()}
        )
    tree = DataTree.from_dict(groups)
    tree.attrs.update(attrs or {})
    return tree


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def diagnose(
    tree: DataTree,
    *,
    quantities: Sequence[str] | None = None,
    extra: Mapping[str, float] | None = None,
    divergence_advice: str = "raise target_accept (to 0.95, say) or lower prior_scale",
    length_advice: str = "raise n_draws and n_warmup",
) -> Diagnostics:
    """Judge a run.

    Parameters
    ----------
    tree : DataTree
        From :func:`to_inference_data`, or ArviZ's own.
    quantities : sequence of str, optional
        Variables of the posterior to look at; all by default.
    extra : mapping of str to float, optional
        Further numbers to show: log evidence, share of unique ancestors.
    divergence_advice, length_advice : str
        What to change in this sampler.

    Returns
    -------
    Diagnostics
        Table and warnings.

    Examples
    --------
    >>> import numpy as np
    >>> from uq.inference.diagnostics import diagnose, to_inference_data
    >>> draws = np.random.default_rng(0).normal(size=(4, 200)) + np.arange(4)[:, None]
    >>> diagnose(to_inference_data({"mean": draws})).warnings[0]
    'The chains disagree about mean (R-hat ..., above 1.05): raise n_draws and n_warmup.'
    """
    import pandas as pd

    posterior = tree["posterior"].to_dataset()
    names = [str(k) for k in posterior.data_vars] if quantities is None else list(quantities)
    if missing := set(names) - set(posterior.data_vars):
        raise DataError(f"diagnose: the posterior has no {sorted(missing)}.")
    rows: dict[str, dict[str, float]] = {}
    said: list[str] = []
    n_chains, n_draws = (posterior.sizes[d] for d in ("chain", "draw"))
    if n_chains < 2:
        said.append("One chain alone cannot show that it has not converged: run at least 4.")
    measured = posterior[names]
    for name in names:
        rhat, bulk, tail = _measure(measured[name])
        rows[name] = {"R-hat": rhat, "ESS bulk": bulk, "ESS tail": tail}
        if not np.isfinite(rhat):
            said.append(
                f"{name} does not move or has too few draws ({n_draws}) to judge: {length_advice}."
            )
            continue
        if rhat > MAX_RHAT:
            said.append(
                f"The chains disagree about {name} (R-hat {rhat:.2f}, above {MAX_RHAT}): "
                f"{length_advice}."
            )
        if min(bulk, tail) < MIN_ESS:
            said.append(
                f"The {n_chains * n_draws:,} draws of {name} are worth {min(bulk, tail):.0f} "
                f"independent ones (below {MIN_ESS}): {length_advice}, or ask for means alone."
            )
    stats = tree["sample_stats"].to_dataset() if "sample_stats" in tree.children else None
    if stats is not None:
        numbers, more = _of_sampler(stats, divergence_advice, length_advice)
        rows |= {k: {"value": v} for k, v in numbers.items()}
        said += more
    rows |= {k: {"value": float(v)} for k, v in (extra or {}).items()}
    return Diagnostics(pd.DataFrame.from_dict(rows, orient="index"), tuple(said))


def _measure(variable: Any) -> tuple[float, float, float]:
    """Largest R-hat, smallest bulk and tail ESS over the elements of a variable."""
    if variable.sizes["draw"] < 4:
        return np.nan, np.nan, np.nan
    data = variable.to_dataset(name="q")
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # Of ArviZ's refactoring, and of constant elements, which are dealt with here.
        warnings.simplefilter("ignore")
        import arviz as az

        found = (az.rhat(data), az.ess(data, method="bulk"), az.ess(data, method="tail"))
    rhat, bulk, tail = (np.asarray(part["q"], float) for part in found)
    return float(np.max(rhat)), float(np.min(bulk)), float(np.min(tail))


def _of_sampler(
    stats: Any, divergence_advice: str, length_advice: str
) -> tuple[dict[str, float], list[str]]:
    numbers: dict[str, float] = {}
    said = []
    if "diverging" in stats:
        count = int(stats["diverging"].sum())
        numbers["divergences"] = count
        if count:
            share = 100 * count / stats["diverging"].size
            said.append(
                f"{count} trajectories ({share:.1f} %) diverged, so that parts of the posterior "
                f"may be missing: {divergence_advice}."
            )
    if "acceptance_rate" in stats:
        rates = np.asarray(stats["acceptance_rate"], float).mean(1)
        numbers["acceptance rate"] = float(rates.mean())
        low, high = _ACCEPTANCE
        if rates.min() < low:
            said.append(
                f"A chain accepts only {rates.min():.2f} of its proposals: {length_advice}, which "
                "adapts the step size for longer."
            )
        elif rates.max() > high:
            said.append(
                f"A chain accepts {rates.max():.3f} of its proposals, so that its steps are too "
                f"small to go far: {length_advice}."
            )
    if "reached_max_treedepth" in stats:
        share = float(stats["reached_max_treedepth"].mean())
        numbers["trajectories cut off"] = share
        if share > MAX_SATURATED:
            said.append(
                f"{100 * share:.0f} % of the trajectories were cut off before they turned: raise "
                "max_tree_depth, or n_warmup for a better mass matrix."
            )
    if "energy" in stats and stats.sizes["draw"] > 3:
        energy = np.asarray(stats["energy"], float)
        spread = energy.var(1)
        change = np.square(np.diff(energy, axis=1)).mean(1)
        bfmi = float((change / np.where(spread > 0, spread, np.nan)).min())
        numbers["E-BFMI"] = bfmi
        if bfmi < MIN_BFMI:
            said.append(
                f"Energies change too slowly (E-BFMI {bfmi:.2f}, below {MIN_BFMI}), so that tails "
                f"may be missing: {length_advice}."
            )
    return numbers, said
