"""UCI regression: ours and peers on standard splits, and MC dropout as its authors published it.

The first 5 of 20 standard splits, or of 10 folds of the other tables. Of ``quantile-gb`` there is
no NLL, as it has no density. Targets of wine_red are whole numbers, and rows repeat: a density
gains without bound by narrow peaks there, as that of gp-sklearn does. MAP-norm is MAP on the
network with layer normalisation that ABNN takes.
"""

from __future__ import annotations

from typing import Any

from benchmarks.data import Split, published_mc_dropout, regression_split
from benchmarks.harness import Method, Suite
from benchmarks.methods import REGRESSION_PEERS, ours, too_dear
from benchmarks.scores import score_regression

# Their rows.
TABLES = {
    "yacht": 308,
    "autompg": 392,
    "boston": 506,
    "stock": 536,
    "energy": 768,
    "concrete": 1030,
    "airfoil": 1503,
    "wine_red": 1599,
    "skillcraft": 3338,
    "parkinsons": 5875,
    "power": 9568,
}
PUBLISHED = "mc-dropout-published"
STANDARD = ("yacht", "boston", "energy", "concrete", "wine_red", "power")


class Published:
    """Nothing to fit: the authors' own numbers, one hidden layer of 50, tuned by grid search."""

    def fit(self, X: Any, y: Any) -> None: ...


def score(model: Any, data: Split, name: str, split: int) -> dict[str, Any]:
    """Scores on the test rows, or those that were published of them."""
    if isinstance(model, Published):
        return published_mc_dropout(name, split) | {"predict_seconds": 0.0}
    return score_regression(model, data, name, split)


def left_out(name: str, method: str, split: int) -> str:
    """Why a method is not run on a split of a table."""
    if method == PUBLISHED:
        return "" if name in STANDARD else "published on the six standard tables only"
    return too_dear(method, split, TABLES[name])


SUITE = Suite(
    name="uci-regression",
    sets=dict.fromkeys(TABLES, 5),
    methods={
        **ours("regression"),
        **REGRESSION_PEERS,
        PUBLISHED: Method(lambda name, seed: Published()),
    },
    load=regression_split,
    score=score,
    left_out=left_out,
)
