"""Stand-ins for the paper's results that run in a minute: digits with and without wrong labels."""

import numpy as np
import pytest

from benchmarks.ivon import clean_digits, gap, noisy_digits

pytestmark = pytest.mark.slow
SEEDS = range(3)


def mean(runs, method, metric):
    return np.mean([run[method][metric] for run in runs])


def test_noisy_labels():
    """S1: the mean weights beat SGD and AdamW in accuracy, NLL and detection of noise images."""
    runs = [noisy_digits(seed) for seed in SEEDS]
    for other in ("sgd", "adamw"):
        assert mean(runs, "ivon@mean", "accuracy") > mean(runs, other, "accuracy") + 0.02
        assert mean(runs, "ivon@mean", "nll") < mean(runs, other, "nll") - 0.05
        assert mean(runs, "ivon@mean", "auroc") > mean(runs, other, "auroc") + 0.05
    # A posterior that starts three times as wide drowns the network.
    assert noisy_digits(0, hess_init=0.1)["ivon@mean"]["accuracy"] < 0.6


def test_clean_labels():
    """S2: all are about as accurate; sampling is better at noise images than the mean.

    S3: NLL falls with the number of draws, and flattens.
    """
    runs = [clean_digits(seed) for seed in SEEDS]
    accuracies = [mean(runs, m, "accuracy") for m in ("ivon@mean", "ivon x 64", "sgd", "adamw")]
    assert max(accuracies) - min(accuracies) < 0.02
    aurocs = [mean(runs, m, "auroc") for m in ("ivon x 64", "ivon@mean", "adamw")]
    assert aurocs[0] > aurocs[1] > aurocs[2]
    one, eight, many, more = (mean(runs, f"ivon x {n}", "nll") for n in (1, 8, 32, 64))
    assert one > eight > many
    assert abs(more - many) < 0.2 * (eight - many)


def test_mean_field_widens_away_from_the_data_but_not_in_a_gap():
    """S4. That it does not in the gap is a property of mean-field (Foong et al., NeurIPS 2020)."""
    runs = [gap(seed) for seed in SEEDS]
    far, inside = (np.array([run[place] for run in runs]) for place in ("far", "gap"))
    assert (far > 1.5).all()
    assert (abs(inside - 1) < 0.15).all()
