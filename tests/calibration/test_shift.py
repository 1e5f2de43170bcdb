from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kstest, mannwhitneyu, norm
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import uq
from uq.calibration import (
    accuracy,
    auroc,
    brier_score,
    crps,
    epistemic_drift,
    expected_calibration_error,
    negative_log_likelihood,
    shift_curve,
)
from uq.distributions import CategoricalMixture, NormalMixture, Parametric
from uq.errors import DataError, NoEpistemicError, ParameterError

N = 20_000


def grid(n=N):
    """A normal sample without chance."""
    return norm.ppf((np.arange(n) + 0.5) / n)


def moved(delta, n=N, scale=1.0):
    """Predictions N(delta, scale²) of n rows."""
    return NormalMixture(torch.full((1, n), float(delta)).double(), torch.tensor(scale).double())


def coin(n, right, confidence):
    """Labels and probabilities of n rows with given shares of right labels and confidence."""
    y = (np.arange(n) >= right * n).astype(int)  # class 0 is predicted
    return y, np.tile([confidence, 1 - confidence], (n, 1))


def spread(scores):
    """Predictions with two draws ±√s, whose epistemic variance is s."""
    s = torch.as_tensor(np.asarray(scores, float)).sqrt()
    return NormalMixture(torch.stack([s, -s]), torch.tensor(1.0).double())


@pytest.fixture(scope="module")
def digits():
    """An ensemble, held-out digits, and their predictions under noise of growing strength."""
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, test_size=600, random_state=0)
    model = uq.EnsembleClassifier(
        n_members=5, hidden=(32,), max_epochs=15, patience=None, lr=0.02, random_state=0
    ).fit(X, y)
    noise = np.random.default_rng(0).normal(size=X_test.shape)
    return y_test, {d: model.predict_distribution(X_test + d * noise) for d in (0, 0.5, 1, 2)}


# -- curves --------------------------------------------------------------------------------------


def test_a_gaussian_whose_inputs_move_has_the_closed_form():
    intensities = (0.0, 0.5, 1.0, 2.0)
    curve = shift_curve(grid(), {d: moved(d) for d in intensities})
    assert curve.intensities == intensities
    assert curve.n_rows == (N,) * 4
    z = norm.ppf(0.95)
    for d, found in zip(intensities, curve.estimates, strict=True):
        # The outermost of the grid lies within its cell, which takes about 1/N off the variance.
        nll = found["negative_log_likelihood"]
        assert nll.value == pytest.approx(0.5 * math.log(2 * math.pi) + (1 + d**2) / 2, abs=2e-4)
        assert found["rmse"].value == pytest.approx(math.sqrt(1 + d**2), abs=2e-4)
        inside = norm.cdf(z + d) - norm.cdf(-z + d)
        assert found["coverage_90"].value == pytest.approx(inside, abs=2 / N)
        assert found["sharpness"].value == pytest.approx(1.0, abs=1e-12)
        assert math.isnan(found["mean_epistemic"].value)
        # Var ½(y − d)² = (2 + 4d²)/4. A 2.5 % quantile of 1000 resamples errs by .085 of it.
        error = math.sqrt((2 + 4 * d**2) / 4 / N)
        assert nll.low == pytest.approx(nll.value - 1.96 * error, abs=5 * 0.085 * error)
        assert nll.high == pytest.approx(nll.value + 1.96 * error, abs=5 * 0.085 * error)


def test_values_are_those_of_the_metrics(digits):
    y, predictions = digits
    names = ["brier_score", "accuracy", "expected_calibration_error", "negative_log_likelihood"]
    curve = shift_curve(y, predictions, metrics=names, n_resamples=100)
    metrics = [brier_score, accuracy, expected_calibration_error, negative_log_likelihood]
    frame = curve.to_frame().set_index(["metric", "intensity"])
    for d, dist in predictions.items():
        for name, metric in zip(names, metrics, strict=True):
            assert frame.value[name, d] == pytest.approx(metric(y, dist), rel=1e-12)
    assert (frame.low <= frame.value).all()
    assert (frame.value <= frame.high).all()
    assert list(dict.fromkeys(frame.index.get_level_values(0))) == names


def test_noise_costs_accuracy_and_an_ensemble_notices(digits):
    y, predictions = digits
    curve = shift_curve(y, predictions)
    frame = curve.to_frame().pivot(index="intensity", columns="metric", values="value")
    assert frame["accuracy"].is_monotonic_decreasing
    assert frame["accuracy"][0] > 0.9 > 0.7 > frame["accuracy"][2]
    assert frame["mean_entropy"].is_monotonic_increasing
    assert frame["mean_epistemic"].is_monotonic_increasing
    assert curve.check().verdict == "lags behind"  # as in figure 1 of Ovadia et al.
    assert epistemic_drift(predictions[0], predictions[2]).p_value < 1e-6


def test_intensities_are_sorted_and_rows_may_differ():
    labels = {2: grid(100), 0.5: grid(300)}
    curve = shift_curve(labels, {2: moved(2, 100), 0.5: moved(0.5, 300)}, metrics=["crps"])
    assert curve.intensities == (0.5, 2.0)
    assert curve.n_rows == (300, 100)
    assert curve.estimates[1]["crps"].value == crps(grid(100), moved(2, 100))


def test_probabilities_and_named_labels():
    y, p = coin(100, 0.8, 0.9)
    names = np.array(["yes", "no"])
    frame = pd.DataFrame(p, columns=names)
    curve = shift_curve(names[y], {0: frame, 1: frame[["no", "yes"]]}, metrics=["accuracy"])
    assert [e["accuracy"].value for e in curve.estimates] == [0.8, 0.8]


def test_several_outputs():
    y = np.stack([grid(400), 3 * grid(400)], 1)
    dist = {
        d: NormalMixture(torch.full((1, *y.shape), d).double(), torch.tensor([1.0, 3.0]).double())
        for d in (0.0, 1.0)
    }
    curve = shift_curve(y, dist)
    assert [e["crps"].value for e in curve.estimates] == [crps(y, d) for d in dist.values()]


def test_a_single_row_has_no_interval():
    curve = shift_curve([0.0], {0: moved(0, 1), 1: moved(1, 1)}, metrics=["rmse"])
    assert curve.to_frame()["value"].tolist() == [0.0, 1.0]
    assert curve.to_frame()[["low", "high"]].isna().all(axis=None)
    with pytest.raises(DataError, match="at least two rows"):
        curve.check()


# -- the check -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "confidence", "verdict"),
    [
        (0.9, 0.9, "no rise in error"),
        (0.9, 0.6, "no rise in error"),
        (0.6, 0.95, "unaware"),
        (0.6, 0.9, "unaware"),
        (0.6, 0.8, "lags behind"),
        (0.6, 0.6, "keeps pace"),
        (0.6, 0.501, "overshoots"),
    ],
)
def test_verdicts_for_classes(right, confidence, verdict):
    y, before = coin(1000, 0.9, 0.9)
    y_after, after = coin(1000, right, confidence)
    curve = shift_curve({0: y, 3: y_after}, {0: before, 3: after}, metrics=["accuracy"])
    check = curve.check()
    assert check.verdict == verdict
    assert check.error.value == pytest.approx(0.9 - right)
    assert check.uncertainty.value == pytest.approx(0.9 - confidence)
    assert check.unannounced.value == pytest.approx(confidence - right)
    # Variances of independent shares add; a quantile of 1000 resamples errs by .085 deviations.
    error = math.sqrt((0.9 * 0.1 + right * (1 - right)) / 1000)
    tolerance = 5 * 0.085 * error + 1e-3  # shares come in steps of 1/1000
    assert check.error.low == pytest.approx(0.9 - right - 1.96 * error, abs=tolerance)
    assert check.error.high == pytest.approx(0.9 - right + 1.96 * error, abs=tolerance)
    assert str(check).startswith("From intensity 0 to 3, the error rate changes by")


@pytest.mark.parametrize(
    ("scale", "verdict"),
    [
        (1.0, "unaware"),
        (1.2, "lags behind"),
        (math.sqrt(2), "keeps pace"),
        (2.0, "overshoots"),
    ],
)
def test_verdicts_for_targets(scale, verdict):
    # Moved by 1, the RMSE is √2.
    curve = shift_curve(grid(2000), {0: moved(0, 2000), 1: moved(1, 2000, scale)})
    check = curve.check()
    assert check.verdict == verdict
    assert check.error.value == pytest.approx(math.sqrt(2) - 1, abs=1e-3)
    assert check.uncertainty.value == pytest.approx(scale - 1)
    assert "the RMSE changes by +0.41" in str(check)


def test_few_rows_leave_the_verdict_open():
    before, after = np.tile([0.95, 0.65], 8), np.tile([0.99, 0.55], 8)
    wrong = np.arange(16) % 4 == 0
    curve = shift_curve(
        {0: np.zeros(16, int), 1: wrong.astype(int)},
        {0: np.stack([before, 1 - before], 1), 1: np.stack([after, 1 - after], 1)},
        metrics=["accuracy"],
    )
    check = curve.check()
    assert check.error.low > 0
    assert check.uncertainty.low < 0 < check.uncertainty.high
    assert check.unannounced.low < 0 < check.unannounced.high
    assert check.verdict == "undecided"
    assert "too few rows" in str(check)


def test_rows_that_are_the_same_are_compared_pair_by_pair():
    y, p = coin(200, 0.7, 0.9)
    same = shift_curve(y, {0: p, 1: p}, metrics=["accuracy"]).check()
    assert same.error == (0, 0, 0)
    apart = shift_curve({0: y, 1: y}, {0: p, 1: p}, metrics=["accuracy"]).check()
    assert apart.error.value == 0
    error = math.sqrt(2 * 0.7 * 0.3 / 200)
    assert apart.error.high == pytest.approx(1.96 * error, abs=5 * 0.085 * error + 0.005)


@pytest.mark.statistical
@pytest.mark.parametrize("paired", [True, False])
def test_intervals_of_the_check_hold_what_they_promise(paired):
    # Calibrated at both intensities: error and uncertainty rise by as much, the truth is 0.
    rng = np.random.default_rng(0)
    n, repeats, held = 200, 200, 0
    for _ in range(repeats):
        p = rng.uniform(0.7, 1, size=n), rng.uniform(0.5, 0.8, size=n)
        u = rng.random(n)
        y = [(u if paired else rng.random(n)) > each for each in p]  # class 0 is predicted
        # One array of labels serves two sets of probabilities if the second flips its classes.
        probs = [np.stack([each, 1 - each], 1) for each in p]
        if paired:
            flip = y[0] != y[1]
            probs[1][flip] = probs[1][flip, ::-1]
            labels = y[0].astype(int)
        else:
            labels = {0: y[0].astype(int), 1: y[1].astype(int)}
        predictions = dict(enumerate(probs))
        curve = shift_curve(labels, predictions, metrics=["accuracy"], n_resamples=200)
        low, high = curve.check().unannounced[1:]
        held += low <= 0 <= high
    # 5 standard errors; percentiles of 200 resamples fall short of 95 % by about 1 %.
    assert held / repeats == pytest.approx(0.94, abs=5 * math.sqrt(0.06 * 0.94 / repeats))


def test_any_two_intensities_can_be_checked(digits):
    y, predictions = digits
    curve = shift_curve(y, predictions, metrics=["accuracy"], interval=0.8)
    check = curve.check(1, reference=0.5)
    assert (check.reference, check.intensity, check.interval) == (0.5, 1, 0.8)
    assert check.error.value == pytest.approx(
        accuracy(y, predictions[0.5]) - accuracy(y, predictions[1])
    )
    assert "80 % interval" in str(check)
    with pytest.raises(ParameterError, match="intensity must be one of"):
        curve.check(3)
    with pytest.raises(ParameterError, match="both 0; choose two"):
        curve.check(0)


# -- drawing -------------------------------------------------------------------------------------


@pytest.fixture
def figures():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


def test_plots_draw_the_numbers_of_the_frame(figures):
    predictions = {d: moved(d, 200) for d in (0.0, 1.0, 2.0)}
    curve = shift_curve(grid(200), predictions)
    axes = curve.plot(label="MAP")
    drawn = ["negative_log_likelihood", "crps", "rmse", "coverage_90", "sharpness"]
    assert len(axes) == len(drawn)  # there is no epistemic uncertainty to draw
    frame = curve.to_frame().set_index("metric")
    for ax, name in zip(axes, drawn, strict=True):
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), frame.loc[name, "value"])
        assert ax.lines[0].get_xdata().tolist() == [0, 1, 2]
    assert axes[3].lines[1].get_ydata() == [0.9, 0.9]
    again = curve.plot(drawn, axes=axes, label="other")
    assert again == axes
    assert [t.get_text() for t in axes[0].get_legend().get_texts()] == ["MAP", "other"]
    with pytest.raises(ParameterError, match="axes must hold 5"):
        curve.plot(axes=axes[:2])
    with pytest.raises(ParameterError, match=r"metrics must be among .*got 'accuracy'"):
        curve.plot(["accuracy"])


def test_infinite_scores_are_left_out_of_plots(figures):
    y, p = coin(100, 0.9, 1.0)
    _, q = coin(100, 0.9, 0.9)
    with pytest.warns(RuntimeWarning, match="probability 0"):
        curve = shift_curve(y, {0: q, 1: p}, metrics=["negative_log_likelihood"])
    assert curve.estimates[1]["negative_log_likelihood"].value == np.inf
    (ax,) = curve.plot()
    assert np.isnan(ax.lines[0].get_ydata()[1])


# -- errors of curves ----------------------------------------------------------------------------


def test_curves_refuse_what_does_not_fit():
    y, p = coin(10, 0.8, 0.9)
    both = {0: p, 1: p}
    with pytest.raises(DataError, match="at least two intensities"):
        shift_curve(y, {0: p})
    with pytest.raises(DataError, match="at least two intensities"):
        shift_curve(y, [p, p])
    with pytest.raises(DataError, match="intensities must be finite numbers, got 'fog'"):
        shift_curve(y, {"fog": p, 1: p})
    with pytest.raises(DataError, match=r"y_true has the intensities \[0, 2\]"):
        shift_curve({0: y, 2: y}, both)
    with pytest.raises(
        DataError, match=r"y_true at intensity 1 has shape \(10,\), expected \(9,\)"
    ):
        shift_curve(y, {0: p, 1: p[:9]})
    with pytest.raises(DataError, match="all of classes or all of real targets"):
        shift_curve(y, {0: p, 1: moved(0, 10)})
    with pytest.raises(ParameterError, match=r"metrics must be among .*got 'crps'"):
        shift_curve(y, both, metrics=["crps"])
    with pytest.raises(ParameterError, match="metrics is empty"):
        shift_curve(y, both, metrics=[])
    with pytest.raises(ParameterError, match="interval must lie in"):
        shift_curve(y, both, interval=95)
    with pytest.raises(ParameterError, match="n_resamples must be an integer >= 100"):
        shift_curve(y, both, n_resamples=5)


# -- drift ---------------------------------------------------------------------------------------

levels = np.array([0.1, 0.2, 0.2, 0.4, 0.5, 0.7])


def test_drift_is_the_rank_test_with_the_area_it_stands_for():
    new = [0.2, 0.6, 0.9, 0.9]
    drift = epistemic_drift(spread(levels), spread(new))
    assert (drift.kind, drift.unit) == ("epistemic", "squared target units")
    assert drift.auroc == pytest.approx(auroc(levels, new))
    assert drift.p_value == pytest.approx(mannwhitneyu(new, levels).pvalue)
    assert drift.reference == pytest.approx(levels.mean())
    assert drift.shift == pytest.approx(np.mean(new) - levels.mean())
    assert (drift.n_reference, drift.n_new) == (6, 4)


def test_small_samples_have_exact_p_values():
    drift = epistemic_drift(spread([1, 2, 3, 4]), spread([5, 6, 7, 8]))
    assert drift.auroc == 1.0
    assert drift.p_value == pytest.approx(2 / math.comb(8, 4))
    one = epistemic_drift(spread(np.arange(1, 40)), spread([50.0]))
    assert one.p_value == pytest.approx(2 / 40)
    assert math.isnan(one.low)
    assert "nan" in str(one)


def test_the_other_way_round():
    new = np.array([0.3, 0.6, 0.9])
    there = epistemic_drift(spread(levels), spread(new))
    back = epistemic_drift(spread(new), spread(levels))
    assert back.shift == pytest.approx(-there.shift)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert back.auroc == pytest.approx(1 - there.auroc)
    assert back.p_value == pytest.approx(there.p_value)


@pytest.mark.statistical
def test_p_values_are_uniform_without_drift():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(1000):
        scores = rng.gamma(0.5, size=210)  # heavy on both sides, like mutual information
        found.append(epistemic_drift(spread(scores[:120]), spread(scores[120:])))
    # Reject a right test once in 1e6; 1000 values miss a uniform law by .08 at most.
    assert kstest([d.p_value for d in found], "uniform").pvalue > 1e-6
    held = np.mean([d.low <= 0 <= d.high for d in found])
    assert held == pytest.approx(0.95, abs=5 * math.sqrt(0.05 * 0.95 / 1000))


@pytest.mark.statistical
def test_a_drift_is_found_as_often_as_theory_says():
    # Normal scores moved by half a deviation, 100 rows each: the rank test has the power of a
    # t-test with 3/π of the rows, and the interval of the mean covers the truth.
    rng = np.random.default_rng(0)
    repeats = 500
    found = [
        epistemic_drift(spread(rng.normal(10, size=100)), spread(rng.normal(10.5, size=100)))
        for _ in range(repeats)
    ]
    power = norm.cdf(0.5 * math.sqrt(50 * 3 / math.pi) - norm.ppf(0.975))
    share = np.mean([d.p_value < 0.05 for d in found])
    assert share == pytest.approx(power, abs=5 * math.sqrt(power * (1 - power) / repeats))
    held = np.mean([d.low <= 0.5 <= d.high for d in found])
    assert held == pytest.approx(0.95, abs=5 * math.sqrt(0.05 * 0.95 / repeats))
    # Var AUROC ≤ A(1 − A)/100, here of a mean.
    expected = norm.cdf(0.5 / math.sqrt(2))
    error = math.sqrt(expected * (1 - expected) / 100 / repeats)
    assert np.mean([d.auroc for d in found]) == pytest.approx(expected, abs=5 * error)


def test_classes_are_compared_by_mutual_information():
    def votes(share):
        # Two sure draws that disagree on this share of the rows: log 2 nats there, else none.
        first = torch.zeros(50, dtype=torch.long)
        second = (torch.arange(50) < share * 50).long()
        return CategoricalMixture(100.0 * torch.nn.functional.one_hot(torch.stack([first, second])))

    drift = epistemic_drift(votes(0.2), votes(0.8))
    assert (drift.kind, drift.unit) == ("epistemic", "nats")
    assert drift.reference == pytest.approx(0.2 * math.log(2), rel=1e-6)
    assert drift.new == pytest.approx(0.8 * math.log(2), rel=1e-6)
    assert drift.auroc == pytest.approx(0.8)  # .64 ahead, .32 tied
    assert "nats on 50 reference rows" in str(drift)
    # The draws are sure, so that all of the entropy is mutual information.
    total = epistemic_drift(votes(0.2), votes(0.8), kind="total")
    assert total.kind == "total"
    assert total.new == pytest.approx(0.8 * math.log(2), rel=1e-6)


def test_methods_without_epistemic_uncertainty_are_compared_by_the_total():
    scale = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).double()
    familiar, new = (NormalMixture(torch.zeros(1, 3).double(), s[None]) for s in scale)
    drift = epistemic_drift(familiar, new)
    assert drift.kind == "total"
    assert drift.shift == pytest.approx((77 - 14) / 3)
    assert "Mean total uncertainty" in str(drift)
    with pytest.raises(NoEpistemicError):
        epistemic_drift(familiar, new, kind="epistemic")
    # Asked for, the total is used although there is an epistemic part.
    total = epistemic_drift(spread(levels), spread(levels + 1), kind="total")
    assert (total.kind, total.reference) == ("total", pytest.approx(levels.mean() + 1))


def test_uncertainty_that_is_the_same_everywhere_shows_no_drift():
    drift = epistemic_drift(moved(0, 50), moved(5, 30))
    assert (drift.shift, drift.low, drift.high) == (0, 0, 0)
    assert (drift.auroc, drift.p_value) == (0.5, 1.0)
    assert str(drift).endswith("no drift that can be told from chance.")


def test_words_say_which_way():
    more = epistemic_drift(spread(np.arange(1, 20)), spread(np.arange(21, 40)))
    assert str(more).endswith("(p < 0.001): the model is more uncertain on new rows.")
    less = epistemic_drift(spread(np.arange(21, 40)), spread(np.arange(1, 20)))
    assert str(less).endswith("the model is less uncertain on new rows.")


def test_infinite_uncertainty_ranks_highest():
    df = torch.tensor([2.0, 3.0, 4.0]).double()  # variances ∞, 3 and 2
    heavy = Parametric(torch.distributions.StudentT(df))
    drift = epistemic_drift(heavy, heavy)
    assert (drift.auroc, drift.p_value) == (0.5, 1.0)
    drift = epistemic_drift(heavy[1:], heavy[:1])
    assert (drift.new, drift.shift, drift.auroc) == (np.inf, np.inf, 1.0)
    assert math.isnan(drift.low)


def test_held_out_halves_do_not_drift(digits):
    _, predictions = digits
    drift = epistemic_drift(predictions[0][:300], predictions[0][300:])
    assert drift.p_value > 1e-3
    assert 0.4 < drift.auroc < 0.6


def test_drift_refuses_what_does_not_fit():
    with pytest.raises(DataError, match="new must be a predictive distribution of uq, got a list"):
        epistemic_drift(spread(levels), [1.0])
    with pytest.raises(DataError, match="predictions of the same model"):
        epistemic_drift(spread(levels), CategoricalMixture(torch.zeros(2, 3, 2)))
    with pytest.raises(DataError, match="new holds no rows"):
        epistemic_drift(spread(levels), spread([]))
    with pytest.raises(ParameterError, match="kind must be"):
        epistemic_drift(spread(levels), spread(levels), kind="variance")
    with pytest.raises(ParameterError, match="interval must lie in"):
        epistemic_drift(spread(levels), spread(levels), interval=1.0)


def test_one_metric_may_be_a_string():
    y = np.arange(40) % 2
    shifted = {0.0: np.full((40, 2), 0.5), 1.0: np.tile([0.4, 0.6], (40, 1))}
    curve = shift_curve(y, shifted, metrics="accuracy", n_resamples=100)
    assert curve.to_frame()["metric"].unique().tolist()[-1] == "accuracy"
    curve.plot("accuracy")
