import json
import math

import numpy as np
import pandas as pd
import pytest

from benchmarks import advice, page
from benchmarks.claims import CLAIMS, NotRun, Results, largest_difference
from benchmarks.markdown import markdown, with_error
from benchmarks.page import newest, render
from benchmarks.ranks import average_ranks, cliques, critical_difference, ranks_around
from benchmarks.run import TASKS
from benchmarks.toys import TOYS, exact_linear, load, same_model
from benchmarks.verdicts import Measured, Share, above, alike, every, mostly, near
from uq.models.registry import METHODS


def table(scores):
    """Rows of ``scores``: {set: {method: [value of each split]}}."""
    return pd.DataFrame(
        {"set": s, "split": i, "method": m, "nll": v}
        for s, methods in scores.items()
        for m, values in methods.items()
        for i, v in enumerate(values)
    )


# -- ranks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    # Demšar's table 5(a): q at 5 % of 2, 3, 5 and 10 methods.
    ("k", "q"),
    [(2, 1.960), (3, 2.343), (5, 2.728), (10, 3.164)],
)
def test_critical_difference_of_nemenyi(k, q):
    assert critical_difference(k, 14) == pytest.approx(q * math.sqrt(k * (k + 1) / 84), rel=5e-4)


def test_two_methods_differ_as_in_a_normal_test():
    # q of two groups is the Normal quantile: CD = 1.95996 / sqrt(N).
    assert critical_difference(2, 25) == pytest.approx(1.959964 / 5, rel=1e-5)


def test_average_ranks_share_ties_and_use_common_splits():
    rows = table(
        {
            "s": {"a": [1.0, 5.0], "b": [2.0], "c": [2.0]},  # on split 0: 1, 2.5, 2.5
            "t": {"a": [3.0], "b": [1.0], "c": [2.0]},
        }
    )
    found = average_ranks(rows, "nll", everywhere=True)
    assert found.ranks.to_dict() == {"b": 1.75, "a": 2.0, "c": 2.25}
    assert (found.n_sets, found.n_splits.to_dict()) == (2, {"s": 1, "t": 1})


def test_ranks_of_all_sets_or_of_all_methods():
    rows = table(
        {
            "s": {"a": [1.0], "b": [2.0], "few": [0.0]},
            "t": {"a": [1.0], "b": [2.0], "few": [0.0]},
            "u": {"a": [1.0], "b": [2.0]},
        }
    )
    every = average_ranks(rows, "nll", everywhere=True)
    common = average_ranks(rows, "nll", everywhere=False)
    assert (list(every.ranks.index), every.n_sets) == (["a", "b"], 3)
    assert (list(common.ranks.index), common.n_sets) == (["few", "a", "b"], 2)
    assert average_ranks(rows[rows["set"] == "s"], "nll", everywhere=True) is None


def test_an_infinite_score_is_the_worst():
    rows = table({"s": {"a": [math.inf], "b": [9.0]}, "t": {"a": [math.inf], "b": [9.0]}})
    assert average_ranks(rows, "nll", everywhere=True).ranks.to_dict() == {"b": 1.0, "a": 2.0}


def test_a_method_is_ranked_among_those_that_have_its_splits():
    rows = table(
        {
            "s": {"a": [1.0, 3.0], "b": [2.0, 1.0], "few": [3.0, 9.0], "one": [0.0]},
            "t": {"a": [1.0], "b": [2.0], "few": [0.0], "one": [0.0]},
            "u": {"a": [1.0], "b": [2.0]},
        }
    )
    few, a = (ranks_around(rows, "nll", m) for m in ("few", "a"))
    # Means of s: a 2, b 1.5, few 6; of t: 1, 2, 0.
    assert few.ranks.to_dict() == {"a": 2.0, "b": 2.0, "few": 2.0}
    assert (few.n_sets, a.n_sets, set(a.ranks.index)) == (2, 3, {"a", "b"})
    assert ranks_around(rows, "nll", "nobody") is None


def test_friedman_sees_methods_that_differ():
    # The largest statistic, N (k - 1) = 20: chi² with 2 degrees of freedom, p = exp(-10).
    rows = table({f"{i}": {"a": [0.0], "b": [1.0], "c": [2.0]} for i in range(10)})
    assert average_ranks(rows, "nll", everywhere=True).p_value == pytest.approx(math.exp(-10))


def test_bars_join_what_chance_may_order():
    ranks = pd.Series({"a": 1.0, "b": 1.8, "c": 2.6, "d": 4.9})
    assert cliques(ranks, 1.0) == [(1.0, 1.8), (1.8, 2.6)]
    assert cliques(ranks, 0.5) == []
    assert cliques(ranks, 9.0) == [(1.0, 4.9)]


# -- tables ----------------------------------------------------------------------------------------


def test_a_mean_has_the_digits_of_its_error():
    assert with_error(2.45678, 0.123) == "2.46 ± 0.12"
    assert with_error(12.3456, 0.0451) == "12.346 ± 0.045"
    assert with_error(123.4, 23.0) == "123 ± 23"
    assert with_error(2.45678, math.nan) == "2.46"
    assert with_error(math.inf, math.nan) == "∞"


def test_the_newest_arguments_of_a_method_count():
    rows = [
        {"set": "s", "split": 0, "method": "a", "key": "old", "nll": 1.0},
        {"set": "s", "split": 1, "method": "a", "key": "old", "nll": 1.0},
        {"set": "t", "split": 0, "method": "a", "key": "old", "nll": 1.0},
        {"set": "s", "split": 0, "method": "a", "key": "new", "nll": 2.0},
    ]
    found = newest(rows)
    assert list(zip(found["set"], found["split"], found["nll"], strict=True)) == [
        ("t", 0, 1.0),
        ("s", 0, 2.0),
    ]


def test_best_is_bold_and_fewer_splits_are_said():
    suite = page.suite_of("uci-regression")
    rows = table({"yacht": {"MAP": [1.0, 2.0, 3.0], "GP": [9.0, 9.0, 9.0], "ridge": [0.5, 0.7]}})
    lines = page.metric_table(rows, suite, "nll")
    assert lines[0] == "|  | yacht (3) |"
    # An error of two values says nothing; a better mean of fewer splits is not the best.
    assert lines[2:5] == ["| GP | 9 ± 0 |", "| MAP | **2.00 ± 0.58** |", "| *ridge* | 0.6 (2) |"]
    values = [0.85, 0.88, 0.91, 0.7, 0.7, 0.7, 0.9, 0.9]
    coverage = rows.rename(columns={"nll": "coverage_90"}).assign(coverage_90=values)
    assert "**0.880" in page.metric_table(coverage, suite, "coverage_90")[3]


def test_better_than_map_is_a_clear_majority_and_the_mean():
    rows = table(
        {s: {"a": [a, 9.0], "MAP": [2.0]} for s, a in (("s", 1.0), ("t", 1.0), ("u", 3.0))}
    )
    pairs = advice.beside_map(rows, ["nll", "not there"], "a")
    assert pairs["a"].to_list() == [1.0, 1.0, 3.0]  # split 1 is not MAP's
    assert advice.mostly_better(pairs, "a")
    assert not advice.mostly_better(pairs, "a", least=4)
    assert not advice.mostly_better(pairs, "a", high=True)
    assert not advice.mostly_better(pairs[1:], "a")  # one of two
    assert not advice.mostly_better(pairs.replace(3.0, 9.0), "a")  # the mean is worse
    assert advice.ratio_to_map(pairs, "a") == pytest.approx((0.5 * 0.5 * 1.5) ** (1 / 3))


def test_a_majority_within_the_band_is_asked_of_intervals():
    def verdict(*coverages):
        rows = pd.DataFrame({"set": range(len(coverages)), "coverage_90": coverages, "method": "a"})
        return advice._coverage_sentence(rows, "a")[0]

    assert "calibrated enough" in verdict(0.9, 0.86, 0.97)
    assert "right on average alone" in verdict(0.9, 0.8, 1.0)
    assert "conformalise them" in verdict(0.9, 0.7, 0.9)
    assert "wider than they need be" in verdict(0.96, 0.97, 0.99)


def test_a_small_budget_asks_for_the_nll_too():
    rng = np.random.default_rng(0)
    made = made_up_rows("uci-regression", ["MAP"], ["yacht", "boston"], rng, nll=1.0)
    for nll, picked in ((0.9, True), (1.1, False)):
        more = made_up_rows("uci-regression", ["IVON"], ["yacht", "boston"], rng, nll=nll)
        rows = {"uci-regression": pd.DataFrame(made + more), "uci-classification": pd.DataFrame()}
        picks = []
        advice._cost_sentence(rows, "IVON", picks)
        assert picks == ["a small budget (regression)"] * picked


# -- the page --------------------------------------------------------------------------------------


def made_up_rows(suite, methods, sets, rng, **fixed):
    metrics = dict.fromkeys(page.METRICS[suite], 0.0)
    return [
        {
            **{"suite": suite, "set": s, "split": 0, "method": m, "key": "k", "settings": ""},
            **{k: float(rng.uniform(0.5, 1)) for k in metrics},
            **{"n_train": 10, "n_test": 5, "fit_seconds": 2.0, "fit_cpu_seconds": 1.0},
            **{"predict_seconds": 0.1, "peak_mb": 3.0, "task_seconds": 36.0},
            **{"cpu": "a processor", "cores": 2, "threads": 1, "code": "0 abc", "date": "d"},
            **fixed,
        }
        for s in sets
        for m in methods
    ]


def written(tmp_path, suite, rows):
    out = tmp_path / "results"
    out.mkdir(exist_ok=True)
    path = out / f"{suite}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return out


def test_a_page_without_rows(tmp_path):
    out = tmp_path / "results"
    text = render(out).read_text()
    assert text.count("No rows yet.") >= len(TASKS)
    assert all(f"**{m.name}**" in text for m in METHODS.values())
    assert all(f"### {c.method}" in text for c in CLAIMS)
    assert "| not run |" in text


def test_a_page_of_few_rows_shows_errors_and_gaps(tmp_path):
    rng = np.random.default_rng(0)
    rows = made_up_rows("uci-regression", ["MAP", "IVON", "ridge"], ["yacht", "boston"], rng)
    rows[1] = {k: rows[1][k] for k in ("suite", "set", "split", "method", "key", "task_seconds")}
    rows[1]["error"] = "ValueError: a | b"
    rows += made_up_rows("uci-regression", ["GP"], ["yacht"], rng, nll=0.1)
    text = render(written(tmp_path, "uci-regression", rows)).read_text()
    assert "| IVON | yacht 0 | ValueError: a \\| b |" in text
    assert "7 of " in text  # rows of those planned
    assert "thousands of gradients" in text  # why NUTS is not everywhere
    assert "![NLL (nats), methods that ran on every set]" in text
    assert (tmp_path / "results/plots/ranks_uci-regression_nll_every.png").exists()
    assert "| uci-regression | 7 | 0.07 |" in text  # 7 tasks of 36 s
    assert "cpu: a processor" in text


def test_defaults_are_judged_by_the_rule(tmp_path):
    rng = np.random.default_rng(0)
    sets = ["yacht", "boston", "energy"]
    rows = made_up_rows("uci-regression", ["MAP"], sets, rng, nll=1.0)
    rows += made_up_rows("uci-regression", ["IVON"], sets, rng, nll=0.9, coverage_90=0.9)
    rows += made_up_rows("uci-regression", ["VBLL"], sets, rng, nll=1.1, coverage_90=0.99)
    text = render(written(tmp_path, "uci-regression", rows)).read_text()
    assert "| uci-regression | IVON | 3/3 | yes | -0.100 | 0 | 0 | 90.0% | yes |" in text
    assert "| uci-regression | VBLL | 0/3 | **no** | +0.100 | 0 | 0 | 99.0% | **no** |" in text


def test_sets_are_told_apart_by_errors_of_the_difference():
    ours = {"s": [0.9, 1.9, 2.88], "t": [1.1, 2.1, 3.12], "u": [0.0, 3.0, 3.1], "v": [0.0, 0.0]}
    rows = table(
        {s: {"a": v, "MAP": [1.0, 2.0, 3.0][: len(v)]} for s, v in ours.items()}
    )  # differences of s and t agree, of u do not, of v are two
    assert advice.told_apart(rows, "a") == (1, 1)


def test_claims_look_up_numbers_and_say_where_there_are_none():
    results = Results({"x": [{"a": 1.0, "k": "u"}, {"a": 2.0, "k": "v"}]}, {})
    assert results("x", "a", k="v") == 2.0
    with pytest.raises(NotRun):
        results("x", "a")  # two rows
    with pytest.raises(NotRun):
        results("y", "a")


def test_numbers_come_with_their_errors():
    rows = [{"a": 1.0, "a_se": 0.1, "a_each": [0.9, 1.1], "mean": 2.0, "standard_error": 0.2}]
    results = Results({"x": rows}, {})
    a, mean = results("x", "a"), results("x", "mean")
    assert (a, a.error, a.each) == (1.0, 0.1, (0.9, 1.1))
    assert (mean, mean.error, mean.each) == (2.0, 0.2, ())


def test_above_asks_for_two_standard_errors():
    assert above(Measured(2.0, 0.3), Measured(1.0, 0.3)) is True  # 1 > 2 √0.18 = 0.85
    assert above(Measured(2.0, 0.3), Measured(1.0, 0.5)) is None  # 2 √0.34 = 1.17
    assert above(Measured(1.0, 0.3), Measured(2.0, 0.3)) is False
    assert above(Measured(1.0), 0.5) is True  # measured once
    assert above(1.0, 1.0) is None
    assert above(Measured(1.0, 0.1), Measured(1.1, 0.1), by=-0.5) is True
    assert above(Measured(1.0, 0.1), Measured(0.2, 0.1), times=4) is None  # error 0.41
    # Seeds are far apart, their differences are not: 0.1, 0.2, 0.15 with error 0.029, times 4.30.
    a, b = (1.1, 2.2, 3.15), (1.0, 2.0, 3.0)
    assert above(Measured(2.15, 0.6, a), Measured(2.0, 0.6, b)) is True
    assert above(Measured(2.15, 0.6), Measured(2.0, 0.6)) is None
    # 0.1, 0.2, 0.3 with error 0.058: 3.5 of them are too few of three seeds.
    assert above(Measured(2.2, 0.6, (1.1, 2.2, 3.3)), Measured(2.0, 0.6, b)) is None


def test_most_sets_by_a_sign_test():
    # P(at least k of n): 5 of 5 is 1/32, 8 of 10 is 56/1024, 9 of 10 is 11/1024.
    assert [mostly(Share(k, n)) for k, n in ((5, 5), (4, 4), (8, 10), (9, 10), (1, 10))] == [
        True,
        None,
        None,
        True,
        False,
    ]


def test_alike_is_small_or_not_told():
    assert alike(-0.04, 0.001, within=0.05) is True
    assert alike(-0.06, 0.3, within=0.05) is None
    assert alike(-0.06, 0.03, within=0.05) is False


def test_near_has_an_interval():
    # Half of the interval of three seeds with error 0.02: 4.30 * 0.02 = 0.086.
    three = (0.0, 0.0, 0.0)
    assert near(Measured(0.35), 0.3, within=0.06) is True
    assert near(Measured(0.44, 0.02, three), 0.3, within=0.06) is None
    assert near(Measured(0.45, 0.02, three), 0.3, within=0.06) is False


def test_every_is_three_valued():
    assert every(True, True) is True
    assert every(True, None) is None
    assert every(None, np.False_) is False


def test_the_largest_difference_is_judged_among_all_sets():
    values = {"s": ([1.0, 1.2, 1.1], [1.0, 1.0, 1.3]), "t": ([3.0, 3.1, 2.9], [1.0, 1.0, 1.0])}
    rows = table({s: {"a": a, "b": b} for s, (a, b) in values.items()})
    found = largest_difference("x", "nll", "a", "b")(Results({}, {"x": rows}))
    assert found["largest difference (t)"] == pytest.approx(2.0)
    assert found["largest difference (t)"].error == pytest.approx(0.1 / math.sqrt(3))
    alone = largest_difference("x", "nll", "a", "b")(Results({}, {"x": rows[rows["split"] == 0]}))
    assert alone["p, least of 2 sets"] == 1.0  # one split tells nothing
    # t = 2 √3 / 0.1 = 34.6 with 2 degrees of freedom: p = 1 - t / √(t² + 2), of two sets.
    assert found["p, least of 2 sets"] == pytest.approx(2 * (1 - 1200**0.5 / 1202**0.5), rel=1e-6)


def test_every_claim_of_a_measured_suite_finds_its_numbers():
    files = {p.stem: json.loads(p.read_text()) for p in page.harness.RESULTS.glob("*.json")}
    results = Results({name: f["results"] for name, f in files.items()}, {})
    missing = []
    for claim in CLAIMS:
        try:
            ours = claim.ours(results)
            claim.holds(ours, claim.reference(results) if claim.reference else {})
        except NotRun as error:
            missing.append(str(error))
    # What is left belongs to suites of tasks, or to a file that is not there.
    assert [m for m in missing if m.strip("\"'").split(":")[0] in files] == []
    assert len({c.method for c in CLAIMS}) == 10


def test_markdown():
    assert markdown(["a", "b"], [[1, "x"]]) == ["| a | b |", "| --- | --- |", "| 1 | x |", ""]


# -- truths of the toys ----------------------------------------------------------------------------


def test_the_reference_is_no_distance_of_another_model():
    for toy, method in (("gap", "IVON"), ("linear", "MAP"), ("linear", "NUTS")):
        assert same_model(toy, method)
    # Hidden layers, the reference itself, another model, another prior.
    for toy, method in (("linear", "SSVI"), ("gap", "NUTS"), ("gap", "GP"), ("gap", "ABNN")):
        assert not same_model(toy, method)


@pytest.mark.parametrize("name", [n for n, t in TOYS.items() if t.classes])
def test_class_densities_of_toys_are_calibrated(name):
    # Given x, labels have the stated probabilities: mean residual 0 within 5 standard errors,
    # also where the first class is probable.
    data = load(name, 0)
    p = np.exp(TOYS[name].log_density(data.X_test, np.ones(len(data.X_test), int)))
    for rows in (p >= 0, p < 0.5, p >= 0.5):
        error = math.sqrt((p * (1 - p))[rows].sum()) / rows.sum()
        assert abs((data.y_test - p)[rows].mean()) < 5 * error


def test_the_exact_linear_posterior():
    # Against Bayesian linear regression by the joint Normal of targets.
    data = load("linear", 0)
    A = np.c_[np.ones(len(data.X)), data.X]
    g = np.array([[1.0, 0.3, -2.0, 1.0]])
    K = 100 * A @ A.T + 0.25 * np.eye(len(A))
    mean = 100 * g @ A.T @ np.linalg.solve(K, data.y)
    variance = 100 * g @ g.T - 100 * g @ A.T @ np.linalg.solve(K, 100 * A @ g.T)
    dist, epistemic, _ = exact_linear(data.X, data.y, g[:, 1:])
    np.testing.assert_allclose(dist.mean.numpy(), mean, rtol=1e-6)
    np.testing.assert_allclose(epistemic, variance[0], rtol=1e-5)
    np.testing.assert_allclose(dist.stddev.numpy() ** 2, variance[0] + 0.25, rtol=1e-6)
