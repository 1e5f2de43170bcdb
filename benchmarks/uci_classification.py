"""UCI classification: ours and peers on stratified folds; categories are columns of 0 and 1."""

from __future__ import annotations

from benchmarks.data import class_split
from benchmarks.harness import Suite
from benchmarks.methods import CLASS_PEERS, ours, too_dear
from benchmarks.scores import score_classes

# Rows, classes, planned folds: fewer than 10 where one takes many minutes of all methods.
TABLES = {
    "ionosphere": (351, 2, 10),
    "pima": (768, 2, 10),
    "german_credit": (1000, 2, 10),
    "banknote": (1372, 2, 10),
    "segment": (2310, 7, 10),
    "spambase": (4601, 2, 10),
    "waveform5000": (5000, 3, 10),
    "phoneme": (5404, 2, 10),
    "optdigits": (5620, 10, 10),
    "pendigits": (10992, 10, 5),
    "mammography": (11183, 2, 5),
    "letter": (20000, 26, 2),
    "adult": (48842, 2, 2),
}

SUITE = Suite(
    name="uci-classification",
    sets={name: folds for name, (_, _, folds) in TABLES.items()},
    methods={**ours("classification"), **CLASS_PEERS},
    load=class_split,
    score=score_classes,
    left_out=lambda name, method, split: too_dear(method, split, *TABLES[name][:2]),
)
