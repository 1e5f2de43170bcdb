"""scikit-learn's own checks on every estimator. There are no expected failures."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from tests.contract.estimators import CASES, make


def for_checks(method, task):
    # Full batch and no held-out rows: a weight of 2 is then a row given twice. In float64, since
    # the checks compare to 1e-7, which is float32's rounding.
    return make(
        method, task, max_epochs=25, lr=0.05, batch_size=None, patience=None, precision="64-true"
    )


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
# One check has a class of a single row, of which SDM says that it has none to calibrate with.
@pytest.mark.filterwarnings("ignore:SDMClassifier. no calibration row:UserWarning")
@parametrize_with_checks([for_checks(*case) for case in CASES if case[0] != "nuts"])
def test_scikit_learn_check(estimator, check):
    check(estimator)


# It compiles its sampler anew for each shape of data, and each check has its own.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks([for_checks(*case) for case in CASES if case[0] == "nuts"])
def test_scikit_learn_check_of_nuts(estimator, check):
    check(estimator)
