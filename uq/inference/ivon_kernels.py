"""State of IVON on a GPU: the steps of a parameter group are one kernel launch each.

The noise is counted rather than stored, so that a step draws again what the sample had: its seed
and the number of samples drawn are kept in the optimizer's group, and with it in its state_dict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from uq.inference.ivon_blocks import FlatGroup
from uq.kernels import ivon
from uq.kernels.dispatch import has_triton, use_triton
from uq.kernels.philox import Purpose, stream


def make_group(parameters: list[Tensor], hess_init: float, number: int) -> FlatGroup:
    """State of a group: in kernels where they run, otherwise in blocks of tensor operations.

    ``UQ_KERNELS=reference`` on a GPU takes the kernels' torch references, of the same noise.
    """
    like = parameters[0]
    fits = (
        like.dtype in (torch.float32, torch.float64)
        and all(p.is_contiguous() for p in parameters)
        and sum(p.numel() for p in parameters) < 1 << 32
    )
    if fits and (use_triton(like) or (like.is_cuda and has_triton())):
        return KernelGroup(parameters, hess_init, number)
    return FlatGroup(parameters, hess_init)


class KernelGroup(FlatGroup):
    """As :class:`FlatGroup`, which has the formulas in words.

    ``sampled`` is a single block here. Whether the parameters do hold a sample is also noted on the
    device, by the kernel that writes it: an interrupt may come between a launch and its note here.
    """

    def __init__(self, parameters: list[Tensor], hess_init: float, number: int) -> None:
        super().__init__(parameters, hess_init)
        self._segments = ivon.Segments(parameters)
        self._stream = stream(Purpose.IVON, number)
        self._holds = torch.zeros(1, dtype=torch.int32, device=self.hess.device)
        # Noise of the last sample, and the settings that it was scaled by.
        self._noise: ivon.Noise | None = None
        self._drawn: Tensor | None = None

    def _cut(self) -> None:
        pass  # a launch works on all of it

    def perturb(self, group: dict[str, Any], generator: torch.Generator | None) -> None:
        """Put a sample m + σz into the parameters, and the mean into ``kept``."""
        if "noise_seed" not in group:
            words = torch.randint(2**32, (2,), generator=generator, device=self.hess.device)
            low, high = words.tolist()
            group["noise_seed"], group["noise_draws"] = high << 32 | low, 0
        self._noise = ivon.Noise(group["noise_seed"], group["noise_draws"] % 2**32, self._stream)
        group["noise_draws"] += 1
        self._drawn = ivon.settings_table(_setting(group), self.hess.device)
        self.sampled = range(1)
        ivon.sample(self._segments, self.hess, self.kept, self._holds, self._drawn, self._noise)

    def restore(self) -> None:
        """Put the mean back where there is a sample."""
        if self.sampled:
            ivon.restore(self._segments, self.kept, self._holds)
            self.sampled = range(0)

    def noise_mark(self) -> float:
        """Tell the noise of the last sample from other noise."""
        assert self._noise is not None
        return float(self._noise.seed % (2**53 - 111)) + self._noise.step

    def accumulate(self, grads: Sequence[Tensor]) -> None:
        """Add the gradients at the last sample to the sums."""
        assert self._noise is not None
        assert self._drawn is not None
        ivon.accumulate(
            self._segments.with_tensors(grads),
            self.hess,
            *self.sum_views(),
            self._drawn,
            self._noise,
        )
        self.n_summed += 1

    def update(self, group: dict[str, Any], grads: Sequence[Tensor] | None) -> None:
        """Steps 5 to 8 of the algorithm; a sample that parameters still hold goes in the same pass.

        Parameters
        ----------
        group : dict
            Settings of the group; its step counter goes up.
        grads : sequence of Tensor or None
            Gradients of the one sample; None takes the sums.
        """
        assert self._noise is not None
        assert self._drawn is not None
        group["step"] += 1
        squares = ivon.update(
            self._segments,
            None if grads is None else self._segments.with_tensors(grads),
            self.hess,
            self.momentum,
            self.kept,
            self._holds,
            ivon.settings_table(_setting(group), self.hess.device),
            self._noise,
            drawn=self._drawn,
            sums=(*self.sum_views(), self.n_summed) if grads is None else None,
            sampled=bool(self.sampled),
        )
        self.sampled: range = range(0)
        gain = (1 - group["beta2"]) * group["ess"]
        share = squares.sum() * (gain**2 / max(1, self.n))
        self.squares.lerp_(share, max(0.01, 1 / group["step"]))


def _setting(group: dict[str, Any]) -> ivon.Setting:
    delta = group["weight_decay"]
    return ivon.Setting(
        ess=group["ess"],
        delta=delta,
        beta1=group["beta1"],
        beta2=group["beta2"],
        rate=group["lr"] * (group["hess_init"] + delta if group["rescale_lr"] else 1.0),
        clip=group["clip_radius"],
        bias=1 - group["beta1"] ** max(1, group["step"]) if group["debias"] else 1.0,
    )
