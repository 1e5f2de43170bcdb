"""scikit-learn's ``check_estimator`` on every estimator, counted: passed, skipped, failed."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

from sklearn.utils.estimator_checks import check_estimator

from tests.contract.estimators import CASES
from tests.contract.test_sklearn import for_checks


def run() -> list[dict[str, Any]]:
    """Check everything of the registry."""
    rows = []
    for case in CASES:
        model = for_checks(*case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counts = Counter(r["status"] for r in check_estimator(model, on_fail=None))
        rows.append(
            {"estimator": type(model).__name__}
            | {status: counts[status] for status in ("passed", "skipped", "xfail", "failed")}
        )
    return rows
