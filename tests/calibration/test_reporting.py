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
from uq.calibration.bootstrap import N_RESAMPLES, sample_metrics
from uq.calibration.curves import pit_curve, reliability_curve
from uq.calibration.definitions import ACCURACY, RMSE
from uq.calibration.plots import reliability_figure, to_svg
from uq.calibration.rows import ClassificationRows, Names, RegressionRows
from uq.distributions import CategoricalMixture, NormalMixture
from uq.errors import DataError, ParameterError, SaveError

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


@pytest.fixture(scope="module")
def classified() -> Report:
    methods = {"good": classifier(), "sure": classifier(4.0, n_draws=1)}
    ood = {"good": classifier(0.3, n=50), "sure": classifier(3.0, n_draws=1, n=50)}
    return compare(methods, Y_CLASS, ood=ood, notes={"data": "toy", "seconds": {"good": 1.23456}})


@pytest.fixture(scope="module")
def regressed() -> Report:
    methods = {"good": regressor(), "narrow": regressor(0.25), "wide": regressor(1.5, n_draws=1)}
    return compare(methods, Y_REAL, title="Toy <regression>")


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
        frame = r.metrics
        assert list(frame.columns) == ["method", "metric", "value", "low", "high"]
        assert len(frame) == len(r.methods) * len(r.definitions)
        known = frame.dropna()
        rounding = 1e-12 * known.value.abs()
        assert (known.low <= known.value + rounding).all()
        assert (known.high >= known.value - rounding).all()


def test_intervals_of_a_mean_have_the_width_of_the_central_limit_theorem():
    rows = ClassificationRows(Y_CLASS, classifier(), Names("test"))
    replicates = sample_metrics([rows], [ACCURACY]).replicates
    assert replicates.shape == (N_RESAMPLES, 1, 1)
    expected = rows.correct.std() / np.sqrt(N)
    # The standard error of a standard deviation from B replicates is 1/√(2B) of it; 5 of them.
    assert replicates.std() == pytest.approx(expected, rel=5 / np.sqrt(2 * N_RESAMPLES))


def test_intervals_of_an_error_that_is_zero_start_at_zero():
    # 7 of 10 right at .7: every resample has a larger error than the data.
    d = CategoricalMixture(torch.tensor([[[0.7, 0.2, 0.1]] * 10]).log())
    r = report(d, [0] * 7 + [1] * 3)
    estimate = r.methods["model"].estimates["expected_calibration_error"]
    assert estimate.value == pytest.approx(0.0, abs=1e-7)
    assert estimate.low == pytest.approx(0.0, abs=1e-7)
    assert 0.05 < estimate.high < 0.3


@pytest.mark.statistical
def test_intervals_of_rmse_hold_the_truth_nine_times_in_ten():
    hits, trials, n = 0, 200, 200
    for seed in range(trials):
        y = np.random.default_rng(seed).standard_normal(n)
        d = NormalMixture(torch.zeros(1, n), torch.tensor(1.0))
        replicates = sample_metrics([RegressionRows(y, d, Names("t"))], [RMSE]).replicates
        low, high = np.quantile(replicates, [0.05, 0.95])
        hits += low <= 1 <= high
    # 5 standard errors of a binomial share.
    assert abs(hits / trials - 0.9) < 5 * np.sqrt(0.9 * 0.1 / trials)


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


def test_verdicts_of_classifiers(classified):
    good, sure = (classified.methods[m].verdict for m in ("good", "sure"))
    assert good[0].startswith("Confidence matches accuracy on average: accuracy 0.")
    assert sure[0].startswith("Over-confident: accuracy 0.")
    assert good[1].startswith("More uncertain on OOD inputs")
    assert sure[1].startswith("Does not tell") or sure[1].startswith("More uncertain")
    (timid,) = report(classifier(0.3), Y_CLASS).methods["model"].verdict
    assert timid.startswith("Under-confident: accuracy 0.")


@pytest.mark.parametrize(
    ("right", "finding"),
    # At confidence .9 a calibrated method has 884 to 916 of 1000 right, 9 times in 10.
    [(860, "Over-"), (882, "Slightly over-"), (890, "Confidence m"), (920, "Slightly under-")],
)
def test_verdicts_know_the_noise(right, finding):
    d = CategoricalMixture(torch.tensor([[[0.9, 0.05, 0.05]]]).log().expand(1, 1000, 3))
    (sentence,) = report(d, [0] * right + [1] * (1000 - right)).methods["model"].verdict
    assert sentence.startswith(finding)


def test_verdicts_of_regressors(regressed):
    good, narrow, wide = (m.verdict for m in regressed.methods.values())
    assert re.fullmatch(
        r"90 % intervals hold \d\d\.\d % of .* targets: within chance of right, .*levels\.", good[0]
    )
    assert narrow[0].endswith("too narrow.")
    assert wide[0].endswith("too wide.")
    low = report(regressor(shift=-0.5), Y_REAL).methods["model"].verdict
    assert low[1].startswith("Predictions run low: ")
    high = report(regressor(shift=0.5), Y_REAL).methods["model"].verdict
    assert high[1].startswith("Predictions run high: ")


def test_a_handful_of_rows_proves_nothing():
    r = report(regressor(n=3, n_draws=1), CENTRE[:3] + 1e-3)
    assert r.methods["model"].verdict == [
        "90 % intervals hold 100.0 % of the held-out targets: nothing against it, but "
        "3 rows are few."
    ]


def test_ood_verdicts_follow_the_interval_of_the_auroc():
    reverse = report(classifier(0.3), Y_CLASS, ood=classifier(4.0))
    assert reverse.methods["model"].verdict[1].startswith("Less uncertain on OOD inputs")
    same = report(classifier(), Y_CLASS, ood=classifier())
    assert same.methods["model"].verdict[1].startswith("Does not tell OOD inputs")
    assert same.to_frame()["auroc"].item() == pytest.approx(0.5)


# -- output ------------------------------------------------------------------------------------


def test_text_fits_100_columns_for_four_methods():
    names = ["a rather long method name", "b", "c", "d"]
    ood = {m: regressor(n=30) for m in names}
    r = compare({m: regressor() for m in names}, Y_REAL, ood=ood, notes={"set": "word " * 60})
    text = str(r)
    assert max(map(len, text.splitlines())) <= 100
    assert "Log score (NLL)" in text
    assert "a rather long m… " in text


def test_text_of_more_methods_comes_in_blocks():
    text = str(compare({f"method {i}": regressor() for i in range(5)}, Y_REAL))
    assert text.count("Log score (NLL)") == 2
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
    assert page.tags.count("svg") == len(r.methods)
    assert html.count('role="img" aria-label=') == len(r.methods)
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
    assert "<dd>good 1.235</dd>" in classified.to_html()


def test_dict_is_json_with_definitions_versions_and_curves(classified):
    data = json.loads(json.dumps(classified.to_dict(), allow_nan=False))
    assert set(data["versions"]) >= {"uq", "python", "torch"}
    assert data["methods"]["sure"]["estimates"]["mean_epistemic"]["value"] is None
    assert len(data["methods"]["good"]["curve"]["count"]) == 15
    assert data["definitions"]["brier_score"]["better"] == "lower"


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
    figure = reliability_figure(classified.methods["good"].curve)
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
        "assert not {'matplotlib', 'jinja2', 'pandas', 'scipy.stats'} & set(sys.modules)\n"
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
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((DataError, ParameterError), match=message):
        call()


def test_verdict_looks_at_every_coverage():
    """Right at 90 %, but 50 % intervals that hold a quarter: not "right"."""
    pit = np.concatenate([np.linspace(0.06, 0.24, 130), np.linspace(0.76, 0.94, 130)])
    pit = np.concatenate([pit, np.linspace(0.3, 0.7, 100), np.full(20, 0.01), np.full(20, 0.99)])
    y = torch.special.ndtri(torch.tensor(pit))
    d = NormalMixture(torch.zeros(1, 400).double(), torch.tensor(1.0).double())
    (sentence, *_) = report(d, y.numpy()).methods["model"].verdict
    assert sentence == "50 % intervals hold 25.0 % of the held-out targets: too narrow."


def test_shares_of_all_rows_have_an_exact_interval():
    """No resample of 50 right answers has a wrong one; the binomial end is 0.05 ** (1/50)."""
    d = CategoricalMixture(torch.tensor([[[0.99, 0.01]]]).log().expand(1, 50, 2))
    r = report(d, [0] * 50).methods["model"].estimates["accuracy"]
    assert (r.value, r.high) == (1.0, 1.0)
    assert r.low == pytest.approx(0.05 ** (1 / 50))
    r = report(d, [1] * 50).methods["model"].estimates["accuracy"]
    assert (r.value, r.low) == (0.0, 0.0)
    assert r.high == pytest.approx(1 - 0.05 ** (1 / 50))
