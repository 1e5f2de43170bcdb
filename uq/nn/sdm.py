"""SDM: similarity-distance-magnitude activations, a softmax that knows its training data.

A. Schmaltz, "Similarity-Distance-Magnitude Activations", Findings of ACL 2026, arXiv 2509.12760.
With logits z (magnitude), the number q ≥ 0 of consecutive nearest training rows that the model gets
right and that share the predicted class (similarity), and the quantile d in [0, 1] of the distance
to the nearest training row (distance; 1 is nearest),

    SDM(z)_i = (2 + q)^(d z_i) / Σ_c (2 + q)^(d z_c) = softmax(d ln(2 + q) z)_i           (eq. 5)
    ℓ = −log_{2+q} SDM(z)_y,     ∂ℓ/∂z = d (SDM(z) − onehot(y))

q = e − 2 and d = 1 give back the softmax and the cross-entropy. How q and d are found is in
:mod:`uq.inference.sdm`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uq.errors import DataError, ParameterError
from uq.nn.abnn import without_noise

Q_SOFTMAX = math.e - 2
"""The q at which the activation is the softmax (with d = 1)."""
_OFFSET = 2.0


def log_base(q: Tensor) -> Tensor:
    """ln(2 + q)."""
    return torch.log(_OFFSET + q)


def sdm_logits(logits: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """d ln(2 + q) z: the logits whose softmax is the SDM activation.

    Parameters
    ----------
    logits : Tensor of shape (…, n_classes)
        Logits z.
    q, d : Tensor of shape (…)
        Similarity, >= 0, and distance quantile, in [0, 1], of each row.
    """
    if logits.shape[:-1] != q.shape or q.shape != d.shape:
        raise DataError(
            f"SDM: q and d need one number a row of logits, {tuple(logits.shape[:-1])}, got shapes "
            f"{tuple(q.shape)} and {tuple(d.shape)}."
        )
    return (d * log_base(q)).to(logits.dtype)[..., None] * logits


class SDMActivation(nn.Module):
    """SDM activation, in place of a softmax: softmax(d ln(2 + q) z).

    Parameters
    ----------
    log : bool, default=False
        Whether to give log probabilities.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import SDMActivation
    >>> z = torch.tensor([[1.0, -1.0]])
    >>> SDMActivation()(z, q=torch.tensor([14.0]), d=torch.tensor([1.0]))
    tensor([[0.9961, 0.0039]])
    >>> SDMActivation()(z, q=torch.tensor([14.0]), d=torch.tensor([0.0]))
    tensor([[0.5000, 0.5000]])
    """

    def __init__(self, *, log: bool = False) -> None:
        super().__init__()
        self.log = log

    def forward(self, logits: Tensor, q: Tensor, d: Tensor) -> Tensor:
        """Map logits (…, n_classes), q (…) and d (…) to probabilities (…, n_classes)."""
        scaled = sdm_logits(logits, q, d)
        return F.log_softmax(scaled, -1) if self.log else F.softmax(scaled, -1)


class SDMLoss(nn.Module):
    """Negative logarithm to base 2 + q of the SDM probability of the label.

    The base makes the gradient with respect to the logits d (SDM(z) − onehot(y)), whatever q. With
    d = 0 the loss is ln(n_classes) / ln(2 + q) and has no gradient. q and d are constants.

    Parameters
    ----------
    reduction : {"mean", "none"}, default="mean"
        Mean over rows, or the loss of each.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import SDMLoss
    >>> z, y = torch.tensor([[1.0, -1.0]]), torch.tensor([0])
    >>> SDMLoss()(z, y, q=torch.tensor([2.0]), d=torch.tensor([0.5]))
    tensor(0.1610)
    """

    def __init__(self, reduction: Literal["mean", "none"] = "mean") -> None:
        super().__init__()
        if reduction not in ("mean", "none"):
            raise ParameterError(f"SDMLoss: reduction must be 'mean' or 'none', got {reduction!r}.")
        self.reduction = reduction

    def forward(self, logits: Tensor, y: Tensor, q: Tensor, d: Tensor) -> Tensor:
        """Loss of logits (n, n_classes) at class positions ``y`` (n,)."""
        q, d = q.detach(), d.detach()
        rows = F.cross_entropy(sdm_logits(logits, q, d), y, reduction="none")
        rows = rows / log_base(q).to(rows.dtype)
        return rows.mean() if self.reduction == "mean" else rows


class ExemplarAdaptor(nn.Module):
    """Linear map from features to exemplars, and from exemplars to logits.

    Distances between rows are distances between exemplars. There is no non-linearity in between:
    the exemplar is the last layer's input, and no more than that.

    Parameters
    ----------
    n_features : int
        Width of the features.
    exemplar_dim : int
        Width of the exemplars.
    n_classes : int
        Number of logits.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import ExemplarAdaptor
    >>> adaptor = ExemplarAdaptor(n_features=32, exemplar_dim=8, n_classes=3)
    >>> features = torch.randn(10, 32)
    >>> adaptor.normalise(features)  # once, with those of the training rows
    >>> exemplars, logits = adaptor(features)
    >>> exemplars.shape, logits.shape
    (torch.Size([10, 8]), torch.Size([10, 3]))
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, n_features: int, exemplar_dim: int, n_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.exemplar: nn.Linear = nn.Linear(n_features, exemplar_dim)
        self.classify: nn.Linear = nn.Linear(exemplar_dim, n_classes)

    @torch.no_grad()
    def normalise(self, features: Tensor) -> None:
        """Learn the one mean and the one scale of all entries of ``features``."""
        self.mean.copy_(features.mean())
        spread = features.std() if features.numel() > 1 else torch.zeros(())
        # Features that are all alike carry nothing; they must not become NaN.
        self.scale.copy_(spread if spread > 0 else torch.ones(()))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map features (n, n_features) to exemplars (n, exemplar_dim) and logits (n, n_classes)."""
        exemplars: Tensor = self.exemplar((features - self.mean) / self.scale)
        return exemplars, self.classify(exemplars)


class FeatureNetwork(nn.Module):
    """Features inside a trained network: what one of its layers gives, one vector a row.

    Parameters
    ----------
    network : Module
        Maps inputs to anything; not trained.
    layer : str, optional
        Name of the submodule whose output is taken (as in ``network.get_submodule``), or
        "penultimate" for what enters the last linear layer that runs. None takes the output of
        the network itself.

    Raises
    ------
    ParameterError
        If there is no such submodule.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import MLP, FeatureNetwork
    >>> net = MLP(4, (16, 8), 3)
    >>> FeatureNetwork(net, "penultimate")(torch.randn(5, 4)).shape
    torch.Size([5, 8])
    >>> FeatureNetwork(net)(torch.randn(5, 4)).shape  # outputs
    torch.Size([5, 3])
    """

    def __init__(self, network: nn.Module, layer: str | None = None) -> None:
        super().__init__()
        self.network: nn.Module = network.requires_grad_(False)
        self.layer = layer
        if layer is None:
            self._watched: list[str] = []
        elif layer == "penultimate":
            self._watched = [n for n, m in network.named_modules() if isinstance(m, nn.Linear)]
        else:
            self._watched = [n for n, _ in network.named_modules() if n == layer]
        if layer is not None and not self._watched:
            names = ", ".join(repr(n) for n, _ in network.named_modules() if n)
            raise ParameterError(
                f"layer {layer!r} is not in the network; it has {names or 'no submodules'}."
                if layer != "penultimate"
                else "layer 'penultimate' needs a linear layer in the network, which has none."
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (n, …) to features (n, D)."""
        seen: list[Tensor] = []

        def watch(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append(inputs[0] if self.layer == "penultimate" else output)

        modules = dict(self.network.named_modules())
        handles = [modules[name].register_forward_hook(watch) for name in self._watched]
        try:
            with without_noise(self.network):  # a row must have the same features every time
                out = self.network(x)
        finally:
            for handle in handles:
                handle.remove()
        return (seen[-1] if self._watched else out).flatten(1)

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stay in eval mode: statistics of norm layers are part of what was trained."""
        return super().train(False)
