"""UCI classification: ours and peers on stratified folds; categories are columns of 0 and 1.

The first 3 of 10 folds, one of the largest two tables. A debiased ECE of 0 is one that is not told
from calibrated; means of it are of values that cannot be negative. MAP-norm is MAP on the network
with layer normalisation that ABNN takes.
"""

from __future__ import annotations

from benchmarks.data import class_split
from benchmarks.harness import Suite
from benchmarks.methods import CLASS_PEERS, ours, too_dear
from benchmarks.scores import score_classes

# Rows, classes.
TABLES = {
    "ionosphere": (351, 2),
    "pima": (768, 2),
    "german_credit": (1000, 2),
    "banknote": (1372, 2),
    "segment": (2310, 7),
    "spambase": (4601, 2),
    "waveform5000": (5000, 3),
    "phoneme": (5404, 2),
    "optdigits": (5620, 10),
    "pendigits": (10992, 10),
    "mammography": (11183, 2),
    "letter": (20000, 26),
    "adult": (48842, 2),
}

SUITE = Suite(
    name="uci-classification",
    sets={name: 3 if n_rows < 20_000 else 1 for name, (n_rows, _) in TABLES.items()},
    methods={**ours("classification"), **CLASS_PEERS},
    load=class_split,
    score=score_classes,
    left_out=lambda name, method, split: too_dear(method, split, *TABLES[name]),
)
