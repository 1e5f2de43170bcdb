"""The weights that come with the package: whole, described, and calibrated on their own prior."""

from __future__ import annotations

import math
import socket
from importlib.resources import files

import pytest
import torch

from uq.distributions import BarDistribution
from uq.inference.pfn_card import model_card
from uq.inference.pfn_losses import dense_labels, query_loss
from uq.inference.pfn_priors import pfn_prior
from uq.nn import load_pfn, preprocess

NAMES = ("tabular-regression", "tabular-classification")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def test_they_load_without_the_internet(name, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    model, meta = load_pfn(name)
    assert model.config.max_features == 10
    assert model.config.task == name.removeprefix("tabular-")
    assert meta["prior"] == name
    assert all(run["command"].startswith("uq pretrain") for run in meta["runs"])
    assert all(
        {"random_state", "seconds", "cpu_seconds", "log"} <= set(run) for run in meta["runs"]
    )


def test_they_are_small():
    folder = files("uq").joinpath("weights")
    sizes = [len(folder.joinpath(f"{n}.safetensors").read_bytes()) for n in NAMES]
    assert sum(sizes) <= 8e6


def test_the_card_is_what_the_file_says(name):
    model, meta = load_pfn(name)
    card = files("uq").joinpath("weights", f"{name}.md").read_text(encoding="utf-8")
    assert card == model_card(model, meta, name=name)


def on_fresh_data(name, n, *, m=20, n_sets=400):
    """Per data set of the prior: loss − entropy of q, a calibration error, loss − trivial loss."""
    (model, _), prior = load_pfn(name), pfn_prior(name)
    columns = []
    for d in range(1, 9):
        g = torch.Generator().manual_seed(1_000_003 + d)
        X, y = prior(n_sets // 8, n + m, d, g)
        with torch.no_grad():
            loss, counts = query_loss(model, X, y, n)
        if model.config.task == "classification":
            y, present = dense_labels(y, n, 10)
        Xc, yc, Xq, scaling = preprocess(X[:, :n], y[:, :n], X[:, n:], model.config)
        logits = model(Xc, yc, Xq)
        if model.config.task == "classification":
            log_p = torch.log_softmax(logits.masked_fill(~present[:, None], -1e9), -1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            codes = y[:, n:].clamp_min(0)
            # Accuracy less confidence.
            error = (log_p.argmax(-1) == codes).float() - log_p.exp().amax(-1)
            share = torch.nn.functional.one_hot(yc, 10).sum(1) + present
            trivial = -(share / share.sum(1, keepdim=True)).log().gather(1, codes)
        else:
            bars = BarDistribution(logits, model.borders)
            z = scaling.targets(y[:, n:])
            u, entropy = bars.cdf(z), bars.entropy()
            error = ((u > 0.05) & (u < 0.95)).float() - 0.9
            trivial = 0.5 * z.square() + 0.5 * math.log(2 * math.pi)
        each = torch.stack([loss - entropy, error, loss - trivial]) * counts
        columns.append(each.sum(-1) / counts.sum(-1).clamp_min(1))
    return torch.cat(columns, 1).double()


@pytest.mark.statistical
@pytest.mark.parametrize("n", [20, 200])
def test_on_their_own_prior_they_are_calibrated_and_better_than_a_trivial_rule(name, n):
    found = on_fresh_data(name, n)
    mean, se = found.mean(1), found.std(1) / found.shape[1] ** 0.5
    # An exact posterior has 0 in both; 0.04 nats and 0.03 are what a trained network may differ
    # by, here with three standard errors of the mean over data sets.
    assert abs(float(mean[0])) < 0.04 + 3 * float(se[0])
    assert abs(float(mean[1])) < 0.03 + 3 * float(se[1])
    assert float(mean[2]) < -3 * float(se[2])
