"""The estimators under contract: every method of the registry, small and quick to fit.

A new method is covered by its line in ``uq.models.registry``; only what makes it quick, where the
shared words do not do it, is said here.
"""

from typing import Any

import pytest

from uq.models.registry import METHODS, estimator_class

QUICK: dict[str, dict[str, Any]] = {
    "ivon": {"n_samples": 8, "lr": 0.1},
    "vbll": {},
    # A tenth of the few weights here would be too few to learn anything.
    "ssvi": {"n_samples": 8, "density": 0.5},
    "sdm": {},
    "evidential": {},
    "etp": {"memory_size": 4},
    "abnn": {"base_max_epochs": 30, "base_lr": 0.02, "n_members": 1, "n_samples": 4},
    # One chain: callbacks then see one Adam run, as with the other methods.
    "nuts": {"n_chains": 1, "n_warmup": 4, "n_draws": 8, "max_tree_depth": 3},
    "pbnn": {"n_particles": 100, "move_var": 1e-3},
    # One chain, as for NUTS.
    "masked": {
        "n_chains": 1,
        "n_warmup": 4,
        "n_draws": 8,
        "thin": 1,
        "n_leapfrog": 3,
        "n_mask_moves": 1,
    },
    "gp": {"hidden": (), "n_inducing": 16},
    "pfn": {"n_views": 2, "lr": 1e-4},
    "ensemble": {"n_members": 2},
    "implicit": {"n_samples": 8, "noise_dim": 4, "generator_width": 4, "mc_samples": 1},
    "map": {},
}
# Methods whose network gives features, of any width, instead of what the likelihood takes.
FEATURES = {"vbll", "sdm", "gp", "pfn"}
# Methods that predict by one function: no epistemic uncertainty.
SINGLE = {"map", "sdm", "pfn"}
# Methods in which nothing is drawn.
SEEDLESS = {("gp", "regression"), ("pfn", "regression")}
# Methods that take NaN, for missing.
TAKE_MISSING = {"pfn"}
# What makes a method train that does not by itself.
TRAINED: dict[str, dict[str, Any]] = {"pfn": {"fine_tune": True}}
# Methods that learn one level of noise.
CONSTANT_NOISE = {"gp", "masked"}
# Minutes rather than seconds on a thousand rows: posteriors of small data.
SAMPLERS = {"nuts", "masked"}
CASES = [(method, task) for method, m in METHODS.items() for task in m.tasks]
CLASSIFIERS = [c for c in CASES if c[1] == "classification"]
REGRESSORS = [c for c in CASES if c[1] == "regression"]

# For tests that compile samplers anew for each shape of network, which takes half a minute each.
COMPILED = [pytest.param(*c, marks=pytest.mark.slow) if c[0] == "nuts" else c for c in CASES]


def make_trained(method: str, task: str, **changes: Any) -> Any:
    """Build a small estimator that goes through epochs."""
    return make(method, task, **TRAINED.get(method, {}) | changes)


def make(method: str, task: str, **changes: Any) -> Any:
    """Build a small estimator: the real code path, a few steps."""
    shared = {"hidden": (16,), "max_epochs": 3, "batch_size": 32, "random_state": 0, "lr": 0.02}
    return estimator_class(method, task)(**shared | QUICK[method] | changes)
