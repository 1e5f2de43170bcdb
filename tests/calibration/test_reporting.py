from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from uq.calibration import (
    Report,
    auroc,
    brier_score,
    compare,
    crps,
    expected_calibration_error,
    mean_interval_width,
    negative_log_likelihood,
    ood_score,
    quantile_calibration_error,
    report,
)
from uq.calibration.bootstrap import Resampling, sample_metrics
from uq.calibration.class_definitions import ACCURACY
from uq.calibration.curves import coverage_curve, pit_curve, reliability_curve, risk_coverage
from uq.calibration.grouping import confidence_p_value
from uq.calibration.plots import reliability_figure, to_svg
from uq.calibration.rows import ClassificationRows, Names, RegressionRows
from uq.distributions import (
    CategoricalMixture,
    DirichletCategorical,
    Empirical,
    NormalMixture,
    Parametric,
    Recalibrated,
)
from uq.errors import DataError, LoadError, ParameterError, SaveError

N, K = 400, 4
LABELS = np.array(["ant", "bee", "cow", "dog"])
rng = np.random.default_rng(0)
TRUTH = rng.standard_normal((N, K)) * 2
Y_CLASS = LABELS[(TRUTH + rng.gumbel(size=(N, K))).argmax(1)]
CENTRE = rng.standard_normal(N)
Y_REAL = CENTRE + 0.5 * rng.standard_normal(N)


def classifier(temperature=1.0, n_draws=3, n=N):
    noise = np.random.default_rng(1).standard_normal((n_draws, n, K))
    return CategoricalMixture(
        torch.as_tensor(temperature * TRUTH[:n] + 0.1 * noise), classes=LABELS
    )


def regressor(scale=0.5, n_draws=3, shift=0.0, n=N):
    noise = np.random.default_rng(1).standard_normal((n_draws, n))
    return NormalMixture(torch.as_tensor(CENTRE[:n] + shift + 0.05 * noise), torch.tensor(scale))


SITE = np.where(np.arange(N) % 4 == 0, "a", "b")


@pytest.fixture(scope="module")
def classified() -> Report:
    methods = {"good": classifier(), "sure": classifier(4.0, n_draws=1)}
    ood = {"good": classifier(0.3, n=50), "sure": classifier(3.0, n_draws=1, n=50)}
    notes = {"data": "toy", "seconds": {"good": 1.23456}}
    return compare(methods, Y_CLASS, ood=ood, groups={"site": SITE}, notes=notes)


@pytest.fixture(scope="module")
def regressed() -> Report:
    methods = {"good": regressor(), "narrow": regressor(0.25), "wide": regressor(1.5, n_draws=1)}
    return compare(methods, Y_REAL, title="Toy <regression>", groups={"site": SITE})


# -- numbers -----------------------------------------------------------------------------------


def test_values_are_those_of_the_functions(classified, regressed):
    frame = classified.to_frame()
    for metric in (negative_log_likelihood, brier_score, expected_calibration_error):
        assert frame.loc["good", metric.__name__] == pytest.approx(metric(Y_CLASS, classifier()))
    scores = ood_score(classifier()), ood_score(classifier(0.3, n=50))
    assert frame.loc["good", "auroc"] == pytest.approx(auroc(*scores))
    frame = regressed.to_frame()
    for metric in (negative_log_likelihood, crps, quantile_calibration_error):
        assert frame.loc["narrow", metric.__name__] == pytest.approx(
            metric(Y_REAL, regressor(0.25))
        )
    width = mean_interval_width(Y_REAL, regressor(0.25), coverage=0.5)
    assert frame.loc["narrow", "width_50"] == pytest.approx(width)


def test_the_split_of_uncertainty_adds_up(classified, regressed):
    row = regressed.to_frame().loc["good"]
    total = row["mean_aleatoric"] ** 2 + row["mean_epistemic"] ** 2
    assert row["sharpness"] ** 2 == pytest.approx(total)
    assert np.isnan(classified.to_frame().loc["sure", "mean_epistemic"])


def test_metrics_are_tidy_and_intervals_hold_the_values(classified, regressed):
    for r in (classified, regressed):
        frame = r.to_frame(intervals=True)
        numbers = ["value", "low", "high"]
        assert list(frame.columns) == ["method", "metric", *numbers, "limit", "p_value", "note"]
        assert len(frame) == len(r.methods) * len(r.definitions)
        known = frame.dropna(subset=numbers)
        assert len(known) > 0.8 * len(frame)
        rounding = 1e-12 * known.value.abs()
        assert (known.low <= known.value + rounding).all()
        assert (known.high >= known.value - rounding).all()


def test_intervals_of_a_mean_have_the_width_of_the_central_limit_theorem():
    rows = ClassificationRows(Y_CLASS, classifier(), Names("test"))
    replicates = sample_metrics([rows], [ACCURACY], Resampling(n_resamples=800)).replicates
    assert replicates.shape == (800, 1, 1)
    expected = rows.correct.std() / np.sqrt(N)
    # The standard error of a standard deviation from B replicates is 1/√(2B) of it; 5 of them.
    assert replicates.std() == pytest.approx(expected, rel=5 / np.sqrt(2 * 800))


def test_intervals_of_an_error_that_is_zero_start_at_zero():
    # 7 of 10 right at .7: every resample has a larger error than the data.
    d = CategoricalMixture(torch.tensor([[[0.7, 0.2, 0.1]] * 10]).log())
    r = report(d, [0] * 7 + [1] * 3)
    estimate = r.methods["model"].estimates["expected_calibration_error"]
    assert estimate.value == pytest.approx(0.0, abs=1e-7)
    assert estimate.low == pytest.approx(0.0, abs=1e-7)
    assert 0.05 < estimate.high < 0.3


def test_best_and_tied_methods_are_marked():
    twin = compare({"a": regressor(), "b": regressor(), "c": regressor(2.0)}, Y_REAL)
    standing = {m: e.estimates["crps"].standing for m, e in twin.methods.items()}
    assert standing == {"a": "best", "b": "best", "c": ""}
    close = compare({"a": regressor(0.5), "b": regressor(0.5, shift=1e-3)}, Y_REAL)
    assert {e.estimates["crps"].standing for e in close.methods.values()} == {"best", "tied"}
    assert {e.estimates["width_90"].standing for e in close.methods.values()} == {""}
    assert report(regressor(), Y_REAL).methods["model"].estimates["crps"].standing == ""


def test_pairing_tells_apart_methods_whose_own_intervals_overlap():
    r = compare({"a": regressor(0.5), "b": regressor(0.6)}, Y_REAL)
    a, b = (r.methods[m].estimates["negative_log_likelihood"] for m in "ab")
    assert a.high > b.low
    assert (a.standing, b.standing) == ("best", "")


def test_the_same_call_gives_the_same_report(classified):
    again = report(classifier(), Y_CLASS, name="good")
    assert again.to_html() == report(classifier(), Y_CLASS, name="good").to_html()
    for metric in ("brier_score", "expected_calibration_error"):
        assert again.methods["good"].estimates[metric].low == pytest.approx(
            classified.methods["good"].estimates[metric].low, rel=1e-12
        )


def test_reliability_curve_counts_every_row_and_bands_hold_calibrated_bins():
    curve = reliability_curve(ClassificationRows(Y_CLASS, classifier(), Names("test")))
    assert sum(curve["count"]) == N
    assert curve["accuracy"][0] is None  # no confidence is below 1/4
    full = [i for i, c in enumerate(curve["count"]) if c]
    hits = sum(round(curve["accuracy"][i] * curve["count"][i]) for i in full)
    assert hits / N == pytest.approx(report(classifier(), Y_CLASS).to_frame()["accuracy"].item())
    inside = [curve["band_low"][i] <= curve["accuracy"][i] <= curve["band_high"][i] for i in full]
    assert sum(inside) >= len(full) - 3


def test_pit_curve_pools_outputs():
    y = np.stack([Y_REAL, Y_REAL], 1)
    d = NormalMixture(torch.as_tensor(np.stack([CENTRE, CENTRE], -1)[None]), torch.tensor(0.5))
    curve = pit_curve(RegressionRows(y, d, Names("test")))
    assert sum(curve["count"]) == 2 * N
    assert sum(curve["share"]) == pytest.approx(1.0)
    # The outputs are copies of one another, so the band must not narrow.
    one = NormalMixture(torch.as_tensor(CENTRE[None]), torch.tensor(0.5))
    single = pit_curve(RegressionRows(Y_REAL, one, Names("test")))
    assert curve["band_low"] == single["band_low"]


# -- findings ----------------------------------------------------------------------------------


def said(prediction, y, section="calibration", **arguments) -> str:
    return report(prediction, y, **arguments).methods["model"].verdicts[section]


def test_calibration_of_classifiers_in_words(classified):
    good, sure = (classified.methods[m].verdicts["calibration"] for m in ("good", "sure"))
    assert good.startswith("Confidence matches accuracy: accuracy 0.")
    assert sure.startswith("Over-confident: accuracy 0.")
    assert said(classifier(0.3), Y_CLASS).startswith("Under-confident: accuracy 0.")


@pytest.mark.parametrize(
    ("right", "finding"),
    # At confidence .9 the 95 % range of a calibrated method is 3563 to 3637 of 4000 right.
    [(3440, "Over-"), (3555, "Slightly over-"), (3580, "Confidence m"), (3645, "Slightly under-")],
)
def test_verdicts_know_the_noise(right, finding):
    d = CategoricalMixture(torch.tensor([[[0.9, 0.05, 0.05]]]).log().expand(1, 4000, 3))
    assert said(d, [0] * right + [1] * (4000 - right)).startswith(finding)


def test_confidence_right_on_average_only_is_found_out():
    """Half the rows at .6 are right in 9 of 10, half at .9 in 6 of 10: a gap of 0 on average."""
    p = torch.tensor([0.6, 0.9]).repeat(500)
    d = CategoricalMixture(torch.stack([p, 1 - p], -1).log()[None])
    wrong = np.tile(np.arange(10) < 1, 50), np.tile(np.arange(10) < 4, 50)
    y = np.stack(wrong, 1).astype(int).ravel()
    assert said(d, y).startswith("Confidence is right on average (accuracy 0.750")


def test_the_numbers_of_a_range_have_as_many_figures():
    rng = np.random.default_rng(1)
    for scale in (0.01, 1.0, 59.2):
        y = scale * rng.normal(size=50)
        dist = NormalMixture(torch.zeros(1, 50), torch.tensor(scale))
        said = report(dist, y, name="m").methods["m"].verdicts["accuracy"]
        found = re.match(r"Typical error \(RMSE\) (\S+) \((\S+) to (\S+)\)", said)
        assert found is not None
        for number in found.groups():
            assert len(number.replace(".", "").lstrip("0")) == 4


def test_calibration_of_regressors_in_words(regressed):
    good, narrow, wide = (m.verdicts["calibration"] for m in regressed.methods.values())
    assert re.fullmatch(
        r"90 % intervals hold \d\d\.\d % of .* targets: no further off than chance .*levels\.",
        good,
    )
    assert narrow.endswith("too narrow.")
    assert wide.endswith("too wide.")
    assert "Predictions run low: " in said(regressor(shift=-0.5), Y_REAL)
    assert "Predictions run high: " in said(regressor(shift=0.5), Y_REAL)


def test_a_handful_of_rows_proves_nothing():
    assert said(regressor(n=3, n_draws=1), CENTRE[:3] + 1e-3) == (
        "90 % intervals hold 100.0 % of the held-out targets: nothing against it, but "
        "3 rows are few."
    )


def test_ood_verdicts_follow_the_interval_of_the_auroc():
    ood = {"ood": classifier(4.0)}
    assert "Less uncertain on OOD inputs" in said(classifier(0.3), Y_CLASS, "awareness", **ood)
    same = report(classifier(), Y_CLASS, ood=classifier())
    assert "Does not tell OOD inputs" in same.methods["model"].verdicts["awareness"]
    assert same.to_frame()["auroc"].item() == pytest.approx(0.5)


def test_awareness_of_errors_in_words():
    assert said(classifier(), Y_CLASS, "awareness").startswith("Errors are less confident")
    flat = CategoricalMixture(torch.tensor([[[1.0, 0, 0, 0]]]).expand(1, N, 4), classes=LABELS)
    assert said(flat, Y_CLASS, "awareness").startswith("Confidence does not tell errors")
    perfect = CategoricalMixture(10 * torch.eye(4)[None], classes=LABELS)
    assert "every label was predicted right" in said(perfect, LABELS, "awareness")
    scale = torch.as_tensor(np.where(np.arange(N) % 2, 0.1, 3.0))
    y = CENTRE + scale.numpy() * np.random.default_rng(3).standard_normal(N)
    d = NormalMixture(torch.as_tensor(CENTRE)[None], scale[None])
    assert said(d, y, "awareness").startswith("Errors are smaller where the variance is")


def test_a_constant_prediction_is_the_measure():
    text = said(classifier(), Y_CLASS, "comparison")
    assert text.startswith("Better than one constant prediction for all rows: log score")
    assert said(classifier(9.0), Y_CLASS, "comparison").startswith("Worse than one constant")
    share = np.array([np.mean(label == Y_CLASS) for label in LABELS])
    own = CategoricalMixture(torch.as_tensor(np.log(share)).expand(1, N, K), classes=LABELS)
    r = report(own, Y_CLASS)
    # The frequencies themselves score their entropy.
    assert r.baseline["negative_log_likelihood"] == pytest.approx(-share @ np.log(share))
    assert r.to_frame()["negative_log_likelihood"].item() == pytest.approx(-share @ np.log(share))
    assert r.methods["model"].verdicts["comparison"].startswith("Not distinguishable")


def test_the_constant_prediction_of_targets_by_its_definition():
    b = report(regressor(), Y_REAL).baseline
    normal = NormalMixture(
        torch.full((1, N), Y_REAL.mean(), dtype=torch.float64), torch.tensor(Y_REAL.std())
    )
    assert b["negative_log_likelihood"] == pytest.approx(negative_log_likelihood(Y_REAL, normal))
    assert b["rmse"] == pytest.approx(Y_REAL.std())
    assert b["mae"] == pytest.approx(np.abs(Y_REAL - np.median(Y_REAL)).mean())
    pairs = np.abs(Y_REAL[:, None] - Y_REAL)
    assert b["crps"] == pytest.approx(pairs.mean() / 2)  # E|Y − y| − ½ E|Y − Y′|


def test_predictions_without_a_density_are_judged_by_crps():
    d = Parametric(torch.distributions.Normal(torch.as_tensor(CENTRE), 0.5))
    draws = d.sample((200,), generator=torch.Generator().manual_seed(0))
    r = compare({"draws": Empirical(draws), "exact": d}, Y_REAL)
    e = r.methods["draws"].estimates["negative_log_likelihood"]
    assert np.isnan(e.value)
    assert e.note == "a distribution given by samples has no density"
    assert r.summary.startswith("Best CRPS: ")
    assert "CRPS" in r.methods["draws"].verdicts["comparison"]
    assert "has no density" in r.to_html()


# -- what to pick ------------------------------------------------------------------------------


def test_the_ranking_is_of_the_paired_differences():
    r = compare({"wide": regressor(scale=2.0), "good": regressor()}, Y_REAL)
    first, second = r.ranking
    d = next(d for d in r.differences if d.metric == "negative_log_likelihood")
    assert (first.method, first.behind, first.tied) == ("good", 0.0, True)
    assert (d.first, d.second, d.winner) == ("wide", "good", "good")
    assert (second.behind, second.behind_low, second.behind_high) == (d.value, d.low, d.high)
    assert second.value - first.value == pytest.approx(second.behind)
    assert not second.tied
    assert (first.fault, second.fault) == ("", "intervals too wide")
    turned = compare({"good": regressor(), "wide": regressor(scale=2.0)}, Y_REAL).ranking[1]
    assert turned.behind_low <= turned.behind <= turned.behind_high
    assert turned.behind == pytest.approx(second.behind)


def test_what_to_pick_is_calibrated_before_quick_and_quick_before_best():
    same = {"a": regressor(), "b": regressor(shift=1e-3), "wide": regressor(scale=2.0)}
    seconds = {"a": 9.0, "b": 2.0, "wide": 0.1}
    r = compare(same, Y_REAL, fit_seconds=seconds)
    assert {x.method for x in r.ranking if x.tied} == {"a", "b"}
    assert r.recommendation.startswith("Pick b: ")
    assert "of two such methods it fits quickest (2 s, the others up to 9 s)" in r.recommendation
    first = r.ranking[0].method
    assert compare(same, Y_REAL).recommendation == (
        f"Pick {first}: it has the best log score, and nothing is against its calibration."
    )
    for text in (str(r), r.to_html(), r.to_markdown()):
        assert "intervals too wide" in text


def test_of_equal_scores_the_one_that_tells_ood_rows_is_picked():
    same = {"blind": classifier(), "aware": classifier(1.01)}
    ood = {"blind": classifier(1.0, n=50), "aware": classifier(0.05, n=50)}
    seconds = {"blind": 1.0, "aware": 5.0}
    r = compare(same, Y_CLASS, ood=ood, fit_seconds=seconds)
    assert all(x.tied for x in r.ranking)
    assert r.recommendation.startswith("Pick aware: ")
    auroc = r.methods["aware"].estimates["auroc"].value
    assert f"it tells OOD rows better than others of these (AUROC {auroc:.3f})" in r.recommendation
    without = compare(same, Y_CLASS, fit_seconds=seconds).recommendation
    assert without.startswith("Pick blind: ")


def test_a_pick_with_a_fault_says_how_to_mend_it_and_a_useless_one_is_none():
    narrow = compare({"a": regressor(scale=0.38), "b": regressor(scale=0.2)}, Y_REAL)
    assert narrow.recommendation == (
        "Pick a: it has the best log score. Mend its calibration (intervals too narrow), as by "
        "uq.calibration.VarianceScaling."
    )
    sure = compare({"a": classifier(4.0, n_draws=1), "b": classifier(40.0, n_draws=1)}, Y_CLASS)
    assert "over-confident" in {x.fault for x in sure.ranking}
    off = {"a": regressor(shift=30.0), "b": regressor(shift=31.0)}
    assert compare(off, Y_REAL).recommendation.startswith("Pick none: no log score is better than")


def test_one_method_has_no_ranking(regressed):
    assert report(regressor(), Y_REAL).ranking == []
    assert report(regressor(), Y_REAL).recommendation == ""
    read = Report.from_dict(json.loads(json.dumps(regressed.to_dict())))
    assert (read.ranking, read.recommendation) == (regressed.ranking, regressed.recommendation)


@pytest.mark.parametrize("seconds", [{"c": 1.0}, {"a": -1.0}, {"a": float("nan")}])
def test_seconds_to_fit_must_be_of_the_methods(seconds):
    with pytest.raises(ParameterError, match="fit_seconds"):
        compare({"a": regressor(), "b": regressor()}, Y_REAL, fit_seconds=seconds)


# -- groups ------------------------------------------------------------------------------------


def test_groups_have_the_metrics_of_their_rows(classified, regressed):
    frame = classified.groups_frame()
    assert list(frame.n.unique()) == [100, 300]
    one = frame[(frame.group == "a") & (frame.method == "good")].set_index("metric")
    alone = classifier()[SITE == "a"]
    assert one.value["negative_log_likelihood"] == pytest.approx(
        negative_log_likelihood(Y_CLASS[SITE == "a"], alone)
    )
    frame = regressed.groups_frame()
    one = frame[(frame.group == "b") & (frame.method == "wide")].set_index("metric")
    wide = regressor(1.5, n_draws=1)[SITE == "b"]
    assert one.value["crps"] == pytest.approx(crps(Y_REAL[SITE == "b"], wide))


def test_a_group_that_is_off_is_named_and_others_are_not():
    y = Y_REAL.copy()
    bad = SITE == "a"
    y[bad] = CENTRE[bad] + 3 * (Y_REAL - CENTRE)[bad]
    r = report(regressor(), y, groups=SITE)
    assert len(r.group_findings) == 1
    assert r.group_findings[0].startswith("group a: 90 % intervals hold")
    calm = report(regressor(), Y_REAL, groups=SITE)
    assert calm.group_findings == ["No group's calibration is off beyond chance (2 tests)."]


@pytest.mark.statistical
def test_groups_of_a_calibrated_method_are_rarely_accused():
    """Bonferroni: at most 5 % of the data sets may accuse any of 20 groups."""
    accused, trials, n = 0, 60, 400
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        p = rng.uniform(0.5, 1, n)
        y = (rng.random(n) < p).astype(int)
        rows = np.stack([1 - p, p], 1)
        tests = [
            confidence_p_value(ClassificationRows(y[i::20], rows[i::20], Names("t")))
            for i in range(20)
        ]
        accused += min(tests) * 20 <= 0.05
    # A binomial count with share 0.05: 60 trials, 5 standard errors.
    assert accused <= 60 * 0.05 + 5 * np.sqrt(60 * 0.05 * 0.95)


def test_the_exact_test_of_confidence_is_a_binomial_for_equal_confidences():
    from scipy.stats import binom

    rows = np.tile([0.3, 0.7], (50, 1))
    y = np.r_[np.ones(28), np.zeros(22)].astype(int)
    p = confidence_p_value(ClassificationRows(y, rows, Names("t")))
    assert p == pytest.approx(2 * binom.cdf(28, 50, 0.7))
    # With more rows than the exact test takes, the normal limit agrees with the binomial.
    y = np.r_[np.ones(1360), np.zeros(640)].astype(int)
    p = confidence_p_value(ClassificationRows(y, np.tile([0.3, 0.7], (2000, 1)), Names("t")))
    assert p == pytest.approx(2 * binom.cdf(1360, 2000, 0.7), rel=0.02)


def test_several_outputs_are_reported_one_by_one():
    loc = torch.as_tensor(np.stack([CENTRE, 100 * CENTRE], -1)[None])
    d = NormalMixture(loc, torch.tensor([0.5, 50.0]))
    y = np.stack([Y_REAL, 100 * Y_REAL], 1)
    r = report(d, y)
    frame = r.groups_frame().set_index(["group", "metric"]).value
    assert frame["0", "rmse"] == pytest.approx(np.sqrt(np.mean((Y_REAL - CENTRE) ** 2)))
    assert frame["1", "rmse"] == pytest.approx(100 * frame["0", "rmse"])


def test_groupings_come_as_frames_and_missing_labels_are_a_group():
    import pandas as pd

    frame = pd.DataFrame({"site": SITE, "year": np.arange(N) % 3})
    frame.loc[:9, "site"] = None
    r = report(regressor(), Y_REAL, groups=frame)
    assert [(g.grouping, g.label) for g in r.groups] == [
        ("site", "a"),
        ("site", "b"),
        ("site", "missing"),
        ("year", "0"),
        ("year", "1"),
        ("year", "2"),
    ]
    assert sum(g.n for g in r.groups if g.grouping == "site") == N


# -- output ------------------------------------------------------------------------------------


def test_text_fits_100_columns_for_four_methods():
    names = ["a rather long method name", "b", "c", "d"]
    ood = {m: regressor(n=30) for m in names}
    r = compare({m: regressor() for m in names}, Y_REAL, ood=ood, notes={"set": "word " * 60})
    text = str(r)
    assert max(map(len, text.splitlines())) <= 100
    assert "Log score (NLL) ↓" in text
    assert "a rather long m… " in text
    arrows = {"lower": " ↓ ", "higher": " ↑ ", "": "  "}
    assert all(f"\n  {d.label}{arrows[d.better]}" in text for d in r.definitions)
    assert {d.better for d in r.definitions} == {"lower", "higher", ""}
    assert "↓ lower is better, ↑ higher is better." in text


def test_no_line_of_text_begins_with_a_percent_sign():
    text = str(compare({f"m{'x' * i}": classifier() for i in range(12)}, Y_CLASS))
    assert not [line for line in text.splitlines() if line.lstrip().startswith("%")]


def test_names_of_metrics_of_classes_are_not_cut():
    text = str(report(classifier(), Y_CLASS))
    assert "Classwise calibration error ↓" in text
    assert "Accuracy ↑" in text


def test_the_ranking_shows_times_where_there_are_some():
    dists = {"a": regressor(), "b": regressor(scale=2.0)}
    assert "Fit, s" not in str(compare(dists, Y_REAL))
    text = str(compare(dists, Y_REAL, fit_seconds={"a": 2.5}))
    assert "Fit, s" in text
    assert [line.split()[-1] for line in text.splitlines() if "no fault" in line] == ["2.5"]


def test_a_prompt_shows_the_report():
    r = report(regressor(), Y_REAL)
    assert repr(r) == str(r)


def test_text_of_more_methods_comes_in_blocks():
    text = str(compare({f"method {i}": regressor() for i in range(5)}, Y_REAL))
    # Two blocks of the metrics, and two beside the constant prediction.
    assert text.count("Log score (NLL)") == 4
    assert max(map(len, text.splitlines())) <= 100


class _Checker(HTMLParser):
    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.tags, self.links = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("which", ["classified", "regressed"])
def test_page_is_well_formed_self_contained_and_without_scripts(which, request):
    r = request.getfixturevalue(which)
    html = r.to_html()
    page = _Checker()
    page.feed(html)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert "@import" not in html
    assert set(re.findall(r"url\((#?)", html)) <= {"#"}
    # reliability or PIT and OOD scores of each method; overlaid: risk–coverage, coverage or ROC
    n_figures = len(r.methods) * (2 if r.n_ood else 1) + 2
    assert page.tags.count("svg") == n_figures
    assert html.count('role="img" aria-label=') == n_figures
    for definition in r.definitions:
        assert definition.label in html


def test_what_users_write_is_escaped(regressed):
    assert "<title>Toy &lt;regression&gt;</title>" in regressed.to_html()
    evil = "<script>alert(1)</script>"
    r = report(regressor(), Y_REAL, name=evil, notes={evil: evil})
    assert "<script" not in r.to_html()
    assert "<script" not in r._repr_html_()


def test_notes_are_printed(classified):
    assert "seconds: good 1.235" in str(classified)
    assert "seconds: good 1.235" in classified.to_html()
    assert "- seconds: good 1.235" in classified.to_markdown()


def test_dict_is_json_with_definitions_versions_and_curves(classified):
    data = json.loads(json.dumps(classified.to_dict(), allow_nan=False))
    assert set(data["versions"]) >= {"uq", "python", "torch"}
    assert data["methods"]["sure"]["estimates"]["mean_epistemic"]["value"] is None
    assert len(data["methods"]["good"]["curves"]["reliability"]["count"]) == 15
    better = {d["name"]: d["better"] for d in data["sections"]["accuracy"]}
    assert better["brier_score"] == "lower"


def test_an_infinite_log_score_is_shown_and_kept():
    d = CategoricalMixture(torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]).log())
    with pytest.warns(RuntimeWarning, match="probability 0"):
        r = compare({"a": d, "b": CategoricalMixture(torch.zeros(1, 2, 2))}, [1, 0])
    nll = "negative_log_likelihood"
    assert r.to_dict()["methods"]["a"]["estimates"][nll]["value"] == "inf"
    assert "∞" in str(r)
    assert "∞" in r.to_html()
    assert r.methods["b"].estimates[nll].standing == "best"


def test_svg_ids_carry_their_prefix_and_colours_are_variables(classified):
    figure = reliability_figure(classified.methods["good"].curves["reliability"])
    svg = to_svg(figure, "label", "p7")
    assert re.findall(r'\bid="(?!p7-)', svg) == []
    assert "var(--accent" in svg
    assert "<metadata" not in svg


def test_figures_leave_matplotlib_as_it_was(classified):
    import matplotlib

    before = dict(matplotlib.rcParams)
    classified.to_html()
    assert dict(matplotlib.rcParams) == before
    code = (
        "import sys, torch, uq.calibration as c, uq.distributions as d\n"
        "assert not {'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "r = c.report(d.NormalMixture(torch.zeros(1, 9), torch.tensor(1.0)), torch.zeros(9))\n"
        "r.to_html()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- saving ------------------------------------------------------------------------------------


def test_save_writes_page_and_data(classified, tmp_path):
    page = classified.save(tmp_path / "a" / "b")
    assert page == tmp_path / "a" / "b" / "report.html"
    assert page.read_text(encoding="utf-8") == classified.to_html()
    assert json.loads((page.parent / "report.json").read_text("utf-8")) == classified.to_dict()
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "report.json"]


def test_a_full_disk_leaves_the_earlier_report(classified, regressed, tmp_path, monkeypatch):
    page = classified.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="No space left on device"):
        regressed.save(tmp_path)
    assert {p.name: p.read_bytes() for p in page.parent.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_named(classified, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveError, match=r"cannot make the folder .*file"):
        classified.save(tmp_path / "file")


@pytest.mark.parametrize("which", ["classified", "regressed"])
def test_a_saved_report_comes_back_whole(which, request, tmp_path):
    r = request.getfixturevalue(which)
    assert r.save(tmp_path / "r.json") == tmp_path / "r.json"
    again = Report.load(tmp_path / "r.json")
    assert again.to_dict() == r.to_dict()
    assert str(again) == str(r)
    assert again.to_frame(intervals=True).equals(r.to_frame(intervals=True))
    r.save(tmp_path / "folder")
    assert Report.load(tmp_path / "folder").to_dict() == r.to_dict()


def test_each_suffix_writes_its_kind(classified, tmp_path):
    assert classified.save(tmp_path / "new" / "a.html").read_text() == classified.to_html()
    assert classified.save(tmp_path / "a.md").read_text() == classified.to_markdown()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.md", "new"]
    with pytest.raises(ParameterError, match=r"must end in \.html, \.json or \.md, got 'a\.pdf'"):
        classified.save(tmp_path / "a.pdf")


def test_infinity_survives_a_file(tmp_path):
    d = CategoricalMixture(torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]).log())
    with pytest.warns(RuntimeWarning, match="probability 0"):
        r = report(d, [1, 0])
    r.save(tmp_path / "r.json")
    again = Report.load(tmp_path / "r.json")
    assert again.methods["model"].estimates["negative_log_likelihood"].value == np.inf


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "no report of format 2"),
        ('{"format": 1}', r"no report of format 2 \(got 1\)"),
        ('{"format": 2, "title": "x"}', r"the file is damaged \(KeyError"),
    ],
)
def test_files_that_are_no_reports_are_refused(content, message, tmp_path):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(LoadError, match=message):
        Report.load(tmp_path / "r.json")
    with pytest.raises(LoadError, match="No such file"):
        Report.load(tmp_path / "none.json")


@pytest.mark.parametrize("key", ["sections", "methods", "differences", "groups", "resampling"])
def test_damaged_reports_are_refused(classified, key):
    for damage in (None, [1], {"a": 1}, "x"):
        with pytest.raises(LoadError, match="damaged"):
            Report.from_dict({**classified.to_dict(), key: damage})


def test_markdown_has_every_metric_and_escapes_what_users_write(classified):
    text = classified.to_markdown()
    for d in classified.definitions:
        assert d.label in text
    widths = {
        line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("|")
    }
    assert widths <= {4, 5, 6, 7}  # two methods, with the constant, ranking, groups
    evil = report(regressor(), Y_REAL, name="a|b <c> *d*").to_markdown()
    assert "a\\|b &lt;c>" in evil


# -- plots -------------------------------------------------------------------------------------


def test_plots_draw_the_numbers_of_the_curves(classified, regressed):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    axes = classified.plot()
    assert [ax.get_title() for ax in axes] == ["good", "sure"]
    line = axes[0].lines[1].get_xydata()
    curve = classified.methods["good"].curves["reliability"]
    known = [i for i, count in enumerate(curve["count"]) if count]
    np.testing.assert_allclose(line[:, 0], [curve["confidence"][i] for i in known])
    np.testing.assert_allclose(line[:, 1], [curve["accuracy"][i] for i in known])
    _, mine = plt.subplots()
    assert classified.plot("roc", ax=mine) is mine
    assert [t.get_text() for t in mine.get_legend().get_texts()] == ["good", "sure"]
    assert regressed.plot("pit", methods=["wide"]).get_xlabel() == "PIT value F(y)"
    for kind in ("coverage", "risk_coverage"):
        assert len(regressed.plot(kind).get_legend().get_texts()) == 3
    dollars = report(regressor(), Y_REAL, name="$x_1")
    dollars.plot("coverage").figure.canvas.draw()
    compare({"$a": regressor(), "b$": regressor()}, Y_REAL).to_html()
    plt.close("all")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "roc"},
            r"kind must be one of \['coverage', 'pit', .* \(roc and scores need ood=\)",
        ),
        ({"methods": ["x"]}, "methods must be among .* got 'x'"),
        ({"methods": []}, "methods must be among"),
        ({"kind": "pit", "ax": [None]}, "ax must hold 3 axes, one a method, got 1"),
    ],
)
def test_plots_that_do_not_exist_are_refused(regressed, arguments, message):
    with pytest.raises(ParameterError, match=message):
        regressed.plot(**arguments)


def test_curves_by_hand():
    y, loc = torch.tensor([-2.0, -0.5, 0.1, 0.4]), torch.zeros(1, 4)
    rows = RegressionRows(y, NormalMixture(loc, torch.tensor(1.0)), Names("t"))
    curve = coverage_curve(rows)
    half = curve["nominal"].index(0.5)  # ±0.674 holds three of four
    assert curve["share"][half] == 0.75
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rows = RegressionRows(y, NormalMixture(loc, scale[None]), Names("t"))
    curve = risk_coverage(rows)
    assert curve["coverage"] == [0.25, 0.5, 0.75, 1.0]
    assert curve["risk"][0] == pytest.approx(2.0)
    assert curve["risk"][-1] == pytest.approx(np.sqrt(np.mean(y.numpy() ** 2)))


def test_a_difference_is_counted_for_both_sides(regressed):
    frame = regressed.differences_frame()
    nll = frame[frame.metric == "negative_log_likelihood"].set_index(["first", "second"])
    assert nll.winner["good", "narrow"] == "good"
    assert nll.value["good", "narrow"] == pytest.approx(
        negative_log_likelihood(Y_REAL, regressor())
        - negative_log_likelihood(Y_REAL, regressor(0.25))
    )
    assert "2–0–0" in regressed.to_html()


def test_labels_in_another_order_are_noticed():
    import pandas as pd

    d = regressor()
    d.index = pd.RangeIndex(N)
    y = pd.Series(Y_REAL)
    assert report(d, y).n == N
    with pytest.raises(DataError, match="report: y and prediction hold the same rows in different"):
        report(d, y[::-1])
    assert report(d, y[::-1].to_numpy()).n == N


def _every_kind():
    """A prediction of each class of distribution, and labels."""
    normal = torch.distributions.Normal
    two = NormalMixture(torch.as_tensor(np.stack([CENTRE, CENTRE], -1)[None]), torch.tensor(0.5))
    y2 = np.stack([Y_REAL, Y_REAL], 1)
    draws = torch.as_tensor(CENTRE + 0.5 * np.random.default_rng(2).standard_normal((50, N)))
    student = torch.distributions.StudentT(5.0, torch.as_tensor(CENTRE), 0.5)
    knots = [0, 0.1, 0.9, 1], [0, 0.2, 0.8, 1]
    evidence = DirichletCategorical(1 + torch.as_tensor(TRUTH).exp(), classes=LABELS)
    return {
        "two outputs": (two, y2),
        "joint": (two.joint(), y2),
        "draws": (Empirical(draws), Y_REAL),
        "joint draws": (Empirical(torch.stack([draws, draws], -1)), y2),
        "Normal": (Parametric(normal(torch.as_tensor(CENTRE), 0.5)), Y_REAL),
        "Student": (Parametric(student), Y_REAL),
        "recalibrated": (Recalibrated(regressor(), *knots), Y_REAL),
        "evidence": (evidence, Y_CLASS),
    }


@pytest.mark.parametrize("kind", _every_kind())
def test_every_kind_of_prediction_is_reported(kind):
    d, y = _every_kind()[kind]
    r = report(d, y, ood=d[:50], groups=SITE)
    assert Report.from_dict(r.to_dict()).to_dict() == r.to_dict()
    assert r.to_html().count("<svg") >= 3
    values = r.to_frame().iloc[0]
    allowed = {"negative_log_likelihood", "mean_epistemic"}  # of draws, of a single parameter
    assert set(values.index[values.isna()]) <= allowed
    assert all(e.note for e in r.methods["model"].estimates.values() if np.isnan(e.value))
    assert r.to_markdown().count("## ") == 6


@pytest.mark.parametrize("n", [1, 2, 5])
def test_degenerate_data_give_a_report(n):
    """One row, one class, constant targets, all the same prediction: values or a reason."""
    flat = NormalMixture(torch.zeros(1, n), torch.tensor(1.0))
    unsure = CategoricalMixture(torch.zeros(1, n, 2))
    sure = CategoricalMixture(torch.tensor([[[30.0, 0.0]] * n]))
    for d, y in ((flat, [0.0] * n), (unsure, [0] * n), (sure, [0] * n)):
        r = report(d, y, ood=d, groups=["a"] * n)
        assert "nan" not in str(r).lower()
        assert r.to_html().count("<svg") >= 3
        for e in r.methods["model"].estimates.values():
            assert e.note or not np.isnan(e.value)


def test_bare_probabilities_are_enough():
    import pandas as pd

    p = classifier().probs.numpy()
    frame = pd.DataFrame(p, columns=LABELS)
    r = report(frame, Y_CLASS, groups=SITE)
    expected = report(classifier(), Y_CLASS).to_frame()
    assert r.to_frame()["brier_score"].item() == pytest.approx(expected["brier_score"].item())
    assert len(r.groups) == 2
    with pytest.raises(DataError, match="ood needs predictive distributions"):
        report(frame, Y_CLASS, ood=frame)


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare({}, Y_REAL), "compare: predictions must be a dict .* got {}"),
        (lambda: compare([regressor()], Y_REAL), "compare: predictions must be a dict"),
        (
            lambda: compare({"a": regressor(), "b": regressor(n=7)}, Y_REAL),
            r"compare: y has shape \(400,\), expected \(7,\), the shape of predictions\['b'\]",
        ),
        (
            lambda: compare({"a": regressor(), "b": classifier()}, Y_REAL),
            r"compare: predictions mix tasks: {'a': 'NormalMixture', 'b': 'CategoricalMixture'}",
        ),
        (lambda: compare({"a": 3}, Y_REAL), r"compare: predictions\['a'\] must be a .* got a int"),
        (
            lambda: compare({"a": regressor()}, Y_REAL, ood={"b": regressor()}),
            r"compare: ood must be a dict with the names of predictions, \['a'\], got \['b'\]",
        ),
        (
            lambda: compare({"a": regressor()}, Y_REAL, ood=regressor()),
            "got NormalMixture",
        ),
        (
            lambda: report(regressor(), Y_REAL, ood=classifier()),
            "report: ood must be a NormalMixture .* got a CategoricalMixture",
        ),
        (
            lambda: compare(
                {"a": regressor(), "b": regressor()},
                Y_REAL,
                ood={"a": regressor(n=5), "b": regressor(n=6)},
            ),
            "ood needs the same rows for all methods, got {'a': 5, 'b': 6} rows",
        ),
        (lambda: report(regressor(), Y_REAL[:-1]), r"report: y has shape \(399,\)"),
        (lambda: report(regressor(), np.full(N, np.nan)), "report: y is NaN or infinite at row 0"),
        (lambda: report(classifier(), ["fly"] * N), "report: y holds 'fly' at row 0"),
        (lambda: report(classifier(), Y_CLASS, ood=classifier(n=0)), "needs shape"),
        (
            lambda: report(regressor(), Y_REAL, interval=1.0),
            r"report: interval must lie in \(0, 1\)",
        ),
        (lambda: report(regressor(), Y_REAL, n_resamples=10), "n_resamples must be an integer >="),
        (
            lambda: report(regressor(), Y_REAL, groups=Y_REAL),
            "groups 'group' have 400 distinct labels, at most 50 .* bin numbers with pandas.qcut",
        ),
        (
            lambda: report(regressor(), Y_REAL, groups={"a": SITE[:-1]}),
            r"need a label for each of the 400 rows, but 'a' has shape \(399,\)",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((DataError, ParameterError), match=message):
        call()


def test_shares_of_all_rows_have_an_exact_interval():
    """No resample of 50 right answers has a wrong one; the binomial end is 0.025 ** (1/50)."""
    d = CategoricalMixture(torch.tensor([[[0.99, 0.01]]]).log().expand(1, 50, 2))
    r = report(d, [0] * 50).methods["model"].estimates["accuracy"]
    assert (r.value, r.high) == (1.0, 1.0)
    assert r.low == pytest.approx(0.025 ** (1 / 50))
    r = report(d, [1] * 50).methods["model"].estimates["accuracy"]
    assert (r.value, r.low) == (0.0, 0.0)
    assert r.high == pytest.approx(1 - 0.025 ** (1 / 50))
