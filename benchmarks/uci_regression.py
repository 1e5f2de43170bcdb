"""UCI regression: ours and peers on standard splits, and MC dropout as its authors published it.

Rows of each table, planned splits: 20 standard ones, or 10 folds of the other tables; 5 where a
split takes many minutes of all methods. Of ``quantile-gb`` there is no NLL, as it has no density.
"""

from __future__ import annotations

from typing import Any

from benchmarks.data import Split, published_mc_dropout, regression_split
from benchmarks.harness import Method, Suite
from benchmarks.methods import REGRESSION_PEERS, ours, too_dear
from benchmarks.scores import score_regression

# Rows, planned splits.
TABLES = {
    "yacht": (308, 20),
    "autompg": (392, 10),
    "boston": (506, 20),
    "stock": (536, 10),
    "energy": (768, 20),
    "concrete": (1030, 20),
    "airfoil": (1503, 10),
    "wine_red": (1599, 20),
    "skillcraft": (3338, 5),
    "parkinsons": (5875, 5),
    "power": (9568, 5),
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
    return too_dear(method, split, TABLES[name][0])


SUITE = Suite(
    name="uci-regression",
    sets={name: splits for name, (_, splits) in TABLES.items()},
    methods={
        **ours("regression"),
        **REGRESSION_PEERS,
        PUBLISHED: Method(lambda name, seed: Published()),
    },
    load=regression_split,
    score=score,
    left_out=left_out,
)
