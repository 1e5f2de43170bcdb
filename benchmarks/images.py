"""Images: a small ConvNet on Fashion-MNIST and on a subset of CIFAR-10, over seeds.

All train the same network for the same epochs (PartialBNN one with a narrow layer before its last,
which is the one with particles). Strange images are told by the entropy of the
prediction (of ``ood_score``); rotated test images are the shift. SDM, ABNN and temperature scaling
start from, or hold out rows for, a network that they train first; its seconds are in theirs. A
split is a seed, which draws the training rows of Fashion-MNIST and orders those of CIFAR-10; the
test images are the same, so that their chance is not in a standard error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.data import image_split
from benchmarks.harness import Method, Suite
from benchmarks.peers import LaplaceClassifier, MCDropoutClassifier
from benchmarks.scores import score_classes
from uq import (
    ABNNClassifier,
    Calibrated,
    EnsembleClassifier,
    ETPClassifier,
    EvidentialClassifier,
    ImplicitVIClassifier,
    IVONClassifier,
    MAPClassifier,
    PartialBNNClassifier,
    SDMClassifier,
    SSVIClassifier,
    VBLLClassifier,
)
from uq.nn import ConvNet

EPOCHS = {"cifar10_2k": 30, "fashion_10k": 10, "fashion_full": 5}
SPLITS = {"cifar10_2k": 2, "fashion_10k": 2, "fashion_full": 1}


def conv(shape: Any, d_out: int) -> nn.Module:
    return ConvNet(shape, d_out)


def conv_dropout(shape: Any, d_out: int) -> nn.Module:
    network = ConvNet(shape, d_out)
    network.head = nn.Sequential(nn.Dropout(0.5), network.head)  # type: ignore[assignment]
    return network


def conv_narrow(shape: Any, d_out: int) -> nn.Module:
    """The last layer has 210 weights, few enough for particles; what is before it runs once."""
    network = ConvNet(shape, d_out)
    width = network.head.in_features
    network.head = nn.Identity()  # type: ignore[assignment]
    return nn.Sequential(network, nn.Linear(width, 20), nn.ELU(), nn.Linear(20, d_out))


class OnNetwork:
    """SDM on what enters the last layer of a network that is trained first."""

    def __init__(self, base: MAPClassifier, sdm: SDMClassifier) -> None:
        self.base, self.sdm = base, sdm

    def fit(self, X: Any, y: Any) -> OnNetwork:
        self.sdm.base = self.base.fit(X, y)
        self.sdm.fit(X, y)
        return self

    def predict_distribution(self, X: Any) -> Any:
        return self.sdm.predict_distribution(X)


def network(cls: type[Any], **arguments: Any) -> Callable[[str, int], Any]:
    """An estimator on the ConvNet."""

    def make(name: str, seed: int) -> Any:
        shared = {"module": conv, "max_epochs": EPOCHS[name], "device": "cpu"}
        return cls(**shared | {"random_state": seed} | arguments)

    return make


def point(name: str, seed: int) -> MAPClassifier:
    model: MAPClassifier = network(MAPClassifier)(name, seed)
    return model


def abnn(name: str, seed: int) -> ABNNClassifier:
    """Its network is trained as long as the others; then its own few epochs."""
    return ABNNClassifier(
        module=conv, base_max_epochs=EPOCHS[name], device="cpu", random_state=seed
    )


METHODS = {
    "MAP": Method(point),
    "Ensemble": Method(network(EnsembleClassifier)),
    "MC-dropout": Method(
        lambda name, seed: MCDropoutClassifier(
            network(MAPClassifier, module=conv_dropout)(name, seed)
        )
    ),
    "temperature": Method(lambda name, seed: Calibrated(point(name, seed), "temperature")),
    "IVON": Method(network(IVONClassifier)),
    "VBLL": Method(network(VBLLClassifier)),
    "SSVI": Method(network(SSVIClassifier)),
    "ABNN": Method(abnn),
    "Evidential": Method(network(EvidentialClassifier)),
    "ETP": Method(network(ETPClassifier)),
    "SDM": Method(
        lambda name, seed: OnNetwork(
            point(name, seed), SDMClassifier(device="cpu", random_state=seed)
        )
    ),
    "ImplicitVI": Method(network(ImplicitVIClassifier)),
    # Particles on the first layer, as in the paper's MNIST run, take seconds a step.
    "PartialBNN": Method(network(PartialBNNClassifier, module=conv_narrow, stochastic="3")),
    "laplace-torch": Method(
        lambda name, seed: LaplaceClassifier(point(name, seed)), "laplace-torch"
    ),
}

SUITE = Suite(
    name="images",
    sets=SPLITS,
    methods=METHODS,
    load=image_split,
    score=score_classes,
)
