"""The one list of methods: what they are called, where they live, what they cost.

Everything that goes through all methods (the command line, ``uq.methods()``, the contract tests)
reads this list, so that a new method is covered everywhere by adding its line.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from uq.errors import ParameterError

if TYPE_CHECKING:
    import pandas as pd

Task = Literal["classification", "regression"]


@dataclass(frozen=True)
class Method:
    """One row of ``uq.methods()``."""

    name: str
    module: str
    tasks: tuple[Task, ...]
    cost: str
    needs: str
    paper: str

    def class_name(self, task: Task) -> str:
        """Name of the estimator for ``task``."""
        return self.name + ("Classifier" if task == "classification" else "Regressor")


_BOTH: tuple[Task, ...] = ("classification", "regression")

METHODS: dict[str, Method] = {
    "ivon": Method(
        "IVON",
        "uq.models.ivon",
        _BOTH,
        "1 network; S forward passes to predict",
        "any differentiable network without BatchNorm",
        "Shen et al., ICML 2024, arXiv 2402.17641",
    ),
    "vbll": Method(
        "VBLL",
        "uq.models.vbll",
        _BOTH,
        "1 network; 1 forward pass to predict",
        "any network body; Bayesian last layer",
        "Harrison et al., ICLR 2024, arXiv 2404.11599",
    ),
    "ssvi": Method(
        "SSVI",
        "uq.models.ssvi",
        _BOTH,
        "1 sparse network; S sparse forward passes to predict",
        "any network of Linear and Conv layers",
        "Li et al., ICLR 2024, arXiv 2402.11025",
    ),
    "sdm": Method(
        "SDM",
        "uq.models.sdm",
        ("classification",),
        "1 adaptor; 1 forward pass and a search of the training rows to predict",
        "embeddings, a trained network or a fitted classifier; few classes",
        "Schmaltz, Findings of ACL 2026, arXiv 2509.12760",
    ),
    "evidential": Method(
        "Evidential",
        "uq.models.evidential",
        _BOTH,
        "1 network; 1 forward pass to predict",
        "any network; ranks rows, amounts of epistemic uncertainty mean little",
        "Deng et al., ICML 2023, arXiv 2303.02045; Amini et al., NeurIPS 2020, arXiv 1910.02600",
    ),
    "etp": Method(
        "ETP",
        "uq.models.etp",
        ("classification",),
        "1 network; 1 forward pass to predict",
        "any network; Linear layers become variational",
        "Kandemir et al., ICLR 2022, arXiv 2106.01216",
    ),
    "implicit": Method(
        "ImplicitVI",
        "uq.models.implicit",
        _BOTH,
        "1 generator of weights; S forward passes to predict",
        "any network without BatchNorm; weights correlated across layers",
        "Uppal et al., NeurIPS 2023, arXiv 2310.06643",
    ),
    "abnn": Method(
        "ABNN",
        "uq.models.abnn",
        _BOTH,
        "1 trained network + a few epochs for M sets of norms; (M + 1) S forward passes to predict",
        "any network with normalisation layers",
        "Franchi et al., CVPR 2024, arXiv 2312.15297",
    ),
    "nuts": Method(
        "NUTS",
        "uq.models.nuts",
        _BOTH,
        "thousands of gradients of all rows; 1,000 forward passes to predict",
        "a small network, some thousand rows; the exact posterior",
        "Hoffman & Gelman, JMLR 2014, arXiv 1111.4246",
    ),
    "pbnn": Method(
        "PartialBNN",
        "uq.models.pbnn",
        _BOTH,
        "1 network, one layer of it S times; S passes of the layers from there to predict",
        "any network without BatchNorm; a layer of some 100 weights to be Bayesian",
        "Zhao et al., AISTATS 2024, arXiv 2310.19608",
    ),
    "masked": Method(
        "MaskedBNN",
        "uq.models.masked_bnn",
        _BOTH,
        "thousands of gradients of all rows; hundreds of passes of small networks to predict",
        "a small network, some thousand rows; samples its width, too",
        "Kong et al., ICML 2023, arXiv 2305.14765",
    ),
    "gp": Method(
        "GP",
        "uq.models.gp",
        _BOTH,
        "cube of the rows, or of the inducing points; 1 product to predict",
        "a table of few columns, or a network body below the kernel",
        "Rasmussen & Williams 2006; Hensman et al., AISTATS 2015, arXiv 1411.2005",
    ),
    "pfn": Method(
        "PFN",
        "uq.models.pfn",
        _BOTH,
        "no training; square of the rows once, then 1 pass of n per row to predict",
        "a table of about 10 columns or classes; weights come with the package",
        "Müller et al., ICLR 2022, arXiv 2112.10510",
    ),
    "ensemble": Method(
        "Ensemble",
        "uq.models.ensemble",
        _BOTH,
        "M networks; M forward passes to predict",
        "any network",
        "Lakshminarayanan et al., NeurIPS 2017, arXiv 1612.01474",
    ),
    "map": Method(
        "MAP",
        "uq.models.map",
        _BOTH,
        "1 network; 1 forward pass to predict",
        "any network; no epistemic uncertainty",
        "the deterministic baseline",
    ),
}

# What a comparison takes unless it is told: the cost of a few networks each.
QUICK = ("ivon", "vbll", "ensemble", "map")


def estimator_class(method: str, task: Task) -> type[Any]:
    """Return the estimator class of ``method`` (a key of ``METHODS``) for ``task``.

    Raises
    ------
    ParameterError
        If there is no such method, or it does not do ``task``.
    """
    found = METHODS.get(method.lower())
    if found is None:
        raise ParameterError(f"method {method!r} is unknown; choose from {', '.join(METHODS)}.")
    if task not in found.tasks:
        raise ParameterError(f"method {method!r} does not do {task}, only {found.tasks[0]}.")
    cls: type[Any] = getattr(import_module(found.module), found.class_name(task))
    return cls


def methods() -> pd.DataFrame:
    """Table of the methods: estimators, tasks, cost, what they need, paper.

    Returns
    -------
    pandas.DataFrame
        Indexed by the name that ``uq compare --methods`` takes; columns classifier, regressor (""
        where there is none), cost, needs, paper.

    Examples
    --------
    >>> import uq
    >>> uq.methods().loc["ivon", "classifier"]
    'IVONClassifier'
    """
    import pandas as pd

    rows = [
        {
            "method": key,
            "classifier": m.class_name("classification") if "classification" in m.tasks else "",
            "regressor": m.class_name("regression") if "regression" in m.tasks else "",
            "cost": m.cost,
            "needs": m.needs,
            "paper": m.paper,
        }
        for key, m in METHODS.items()
    ]
    return pd.DataFrame(rows).set_index("method")
