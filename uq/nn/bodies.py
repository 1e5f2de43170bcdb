"""Network bodies that estimators build by themselves, usable as ordinary modules.

None of them uses batch normalisation or dropout: both add noise of their own, which the methods
here would mistake for information about the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from uq.errors import ParameterError


class MLP(nn.Sequential):
    """Fully connected network with ELU between layers.

    ELU rather than ReLU: its smooth mean function suits regression and Price's curvature
    estimate (IVON), and its features do not vanish far from the data (VBLL).

    Parameters
    ----------
    d_in : int
        Number of inputs.
    hidden : sequence of int
        Width of each hidden layer; empty for a linear map.
    d_out : int or None
        Number of outputs; None ends after the last hidden layer (a feature extractor).
    norm : bool, default=False
        Layer normalisation before each ELU (ABNN puts its noise there).

    Raises
    ------
    ParameterError
        If ``hidden`` is no sequence.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import MLP
    >>> MLP(4, (16, 16), 2)(torch.zeros(3, 4)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self, d_in: int, hidden: Sequence[int], d_out: int | None, *, norm: bool = False
    ) -> None:
        if not isinstance(hidden, Sequence) or isinstance(hidden, str):
            raise ParameterError(
                f"MLP: hidden must be a sequence of widths, such as (64, 64), got {hidden!r}."
            )
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise((d_in, *hidden)):
            layers.append(nn.Linear(width_in, width_out))
            if norm:
                layers.append(nn.LayerNorm(width_out))
            layers.append(nn.ELU())
        if d_out is not None:
            layers.append(nn.Linear(hidden[-1] if hidden else d_in, d_out))
        super().__init__(*layers)


class ConvNet(nn.Module):
    """Small convolutional network for images, with group normalisation.

    Parameters
    ----------
    in_shape : tuple (channels, height, width) or (height, width)
        Shape of one image; two numbers mean one channel without an axis of its own.
    d_out : int
        Number of outputs.
    channels : sequence of int, default=(16, 32)
        Channels of each block (3×3 convolution, group norm, ELU, 2×2 average pooling).

    Examples
    --------
    >>> import torch
    >>> from uq.nn import ConvNet
    >>> ConvNet((8, 8), 10)(torch.zeros(3, 8, 8)).shape
    torch.Size([3, 10])
    """

    def __init__(
        self, in_shape: Sequence[int], d_out: int, channels: Sequence[int] = (16, 32)
    ) -> None:
        super().__init__()
        if len(in_shape) not in (2, 3) or min(in_shape[-2:]) < 2 ** len(channels):
            raise ParameterError(
                "ConvNet: in_shape must be (channels, height, width) or (height, width) with "
                f"sides >= {2 ** len(channels)}, got {tuple(in_shape)}."
            )
        self._add_channel = len(in_shape) == 2
        blocks: list[nn.Module] = []
        first = 1 if self._add_channel else in_shape[0]
        for c_in, c_out in pairwise((first, *channels)):
            groups = 4 if c_out % 4 == 0 else 1
            blocks += [
                nn.Conv2d(c_in, c_out, 3, padding=1),
                nn.GroupNorm(groups, c_out),
                nn.ELU(),
                nn.AvgPool2d(2),
            ]
        self.features: nn.Sequential = nn.Sequential(*blocks, nn.Flatten())
        height, width = (side >> len(channels) for side in in_shape[-2:])
        self.head: nn.Linear = nn.Linear(channels[-1] * height * width, d_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(n, *in_shape)`` to outputs (n, d_out)."""
        if self._add_channel:
            x = x.unsqueeze(1)
        out: Tensor = self.head(self.features(x))
        return out
