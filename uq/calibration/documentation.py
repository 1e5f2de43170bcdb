"""What the docstrings of all metrics share: one text for an argument that all of them have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_SHARED = {
    "classes": """\
y_true : array-like of shape (n,)
        Labels, as in ``prediction.classes``.
    prediction : ClassPredictive, or probabilities of shape (n, n_classes)
        Predictive distribution of the same rows. The columns of an array are the labels 0, 1, …,
        those of a DataFrame are named by them; rows sum to 1.""",
    "targets": """\
y_true : array-like of shape (n,) or (n, m)
        Targets.
    prediction : RealPredictive
        Predictive distribution of the same rows.""",
    "sample_weight": """\
sample_weight : array-like of shape (n,), optional
        Row weights.""",
    "n_bins": """\
n_bins : int, default=15
        Number of bins B.""",
    "kind": """\
kind : {"top_label", "positive"}, optional
        What is compared: the probability of the most probable class with being right, or the
        probability of ``classes[1]`` with being that class. Two classes need a choice, because
        the two differ; with more classes only ``"top_label"`` exists.""",
    "coverage": """\
coverage : float, default=0.9
        Predictive mass of the interval, in (0, 1).""",
}


def documented(function: F) -> F:
    """Fill the shared parts into a docstring: ``{classes}``, ``{targets}``, ``{kind}``, …."""
    doc = function.__doc__ or ""
    for key, text in _SHARED.items():
        doc = doc.replace(f"{{{key}}}", text)
    function.__doc__ = doc
    return function
