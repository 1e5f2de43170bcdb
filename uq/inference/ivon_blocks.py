"""Memory of IVON: the flat state of a parameter group, and the blocks in which a step visits it.

A step is a dozen elementwise operations. Over a whole network each is a trip through main memory;
over a block whose vectors stay in the cache, only the first is. Persistent memory is three vectors
beside the parameters: curvature h, momentum g, and one that holds the mean while the parameters
hold a sample, and afterwards the noise that the sample had.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Elements of a block. Seven vectors of it fit the 2 MB of a CPU core's second-level cache; a GPU
# has to be kept busy, and a launch costs as much as moving a million elements.
_BLOCK_ELEMENTS = {"cpu": 2**16}
_BLOCK_ELEMENTS_ELSEWHERE = 2**24


class Block:
    """A range of the flat state: several parameters, or a part of a large one.

    Parameters keep their own storage. A part is worked on where it lies; several parameters are
    gathered into scratch memory and scattered back, which makes a small network one block.
    """

    def __init__(
        self, group: FlatGroup, members: Sequence[int], part: slice | None, start: int
    ) -> None:
        self._members = members
        self._part = part
        sizes = [group.parameters[i].numel() for i in members]
        n = sum(sizes) if part is None else part.stop - part.start
        here = slice(start, start + n)
        self.hess: Tensor
        self.momentum: Tensor
        self.kept: Tensor
        self.hess, self.momentum, self.kept = (
            group.hess[here],
            group.momentum[here],
            group.kept[here],
        )
        self.here = here
        self.scratch: list[Tensor] = [vector[:n] for vector in group.scratch]
        self._gathered: list[tuple[Tensor, list[Tensor]]] = []
        if part is None:
            for vector in group.gathered:
                flat = vector[:n]
                shapes = [group.parameters[i].shape for i in members]
                views = [v.view(s) for v, s in zip(flat.split(sizes), shapes, strict=True)]
                self._gathered.append((flat, views))

    def read(self, tensors: Sequence[Tensor], slot: int) -> Tensor:
        """Elements of ``tensors`` (one for each parameter of the group), as a flat vector."""
        if self._part is not None:
            return tensors[self._members[0]].view(-1)[self._part]
        flat, views = self._gathered[slot]
        torch._foreach_copy_(views, [tensors[i] for i in self._members])
        return flat

    def write(self, tensors: Sequence[Tensor], slot: int) -> None:
        """Put a vector that :meth:`read` gave back where it came from."""
        if self._part is None:
            torch._foreach_copy_([tensors[i] for i in self._members], self._gathered[slot][1])


class FlatGroup:
    """State of one parameter group, and the arithmetic of a step over it.

    Parameters
    ----------
    parameters : list of Tensor
        Of one dtype and one device.
    hess_init : float
        Initial curvature.
    """

    def __init__(self, parameters: list[Tensor], hess_init: float) -> None:
        self.parameters = parameters
        like = parameters[0]
        self.n: int = sum(p.numel() for p in parameters)

        def vector(n: int, fill: float = 0.0) -> Tensor:
            return torch.full((n,), fill, dtype=like.dtype, device=like.device)

        self.hess: Tensor
        self.momentum: Tensor
        self.kept: Tensor
        self.hess, self.momentum, self.kept = (
            vector(self.n, hess_init),
            vector(self.n),
            vector(self.n),
        )
        self.scratch: list[Tensor] = []
        self.gathered: list[Tensor] = []
        self.blocks: list[Block] = []
        self._cut()
        self.hess_views: list[Tensor] = self._views(self.hess)
        self.momentum_views: list[Tensor] = self._views(self.momentum)
        # Sums over the samples of a step of gradient and of noise × gradient, and their number;
        # only where a step has several samples, or several processes.
        self.sums: Tensor | None = None
        self.n_summed = 0
        # Blocks whose parameters hold a sample, kept up to date at every block: an interrupt may
        # come anywhere, and the mean has to be found again.
        self.sampled = range(0)
        # Running mean of x² (see update), for the diagnostics.
        self.squares: Tensor = vector(1)[0]

    def _cut(self) -> None:
        """Lay out the blocks and their scratch memory."""
        device = self.hess.device.type
        layout = list(
            _layout(self.parameters, _BLOCK_ELEMENTS.get(device, _BLOCK_ELEMENTS_ELSEWHERE))
        )
        longest = max(n for _, _, n in layout)
        longest_gathered = max((n for _, part, n in layout if part is None), default=0)
        self.scratch = [self.hess.new_zeros(longest) for _ in range(2)]
        self.gathered = [self.hess.new_zeros(longest_gathered) for _ in range(2)]
        start = 0
        for members, part, n in layout:
            self.blocks.append(Block(self, members, part, start))
            start += n

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([p.numel() for p in self.parameters])
        return [v.view(p.shape) for v, p in zip(parts, self.parameters, strict=True)]

    def perturb(self, group: dict[str, Any], generator: torch.Generator | None) -> None:
        """Put a sample m + σz into the parameters, and the mean into ``kept``."""
        ess, delta = group["ess"], group["weight_decay"]
        # As a tensor: a Python number is converted anew by each operation with out=.
        decay = self.hess.new_tensor(delta)
        self.sampled = range(0)
        for i, b in enumerate(self.blocks):
            mean = b.read(self.parameters, 0)
            b.kept.copy_(mean)
            self.sampled = range(i + 1)
            noise, std = b.scratch
            noise.normal_(generator=generator)
            torch.add(b.hess, decay, out=std).rsqrt_()
            mean.addcmul_(noise, std, value=1 / math.sqrt(ess))
            b.write(self.parameters, 0)

    def restore(self) -> None:
        """Put the mean back where there is a sample, and the noise that was applied into ``kept``.

        In floating point that is the difference of sample and mean, not quite the σz drawn.
        """
        for i in self.sampled:
            b = self.blocks[i]
            sample = b.read(self.parameters, 0)
            noise = torch.sub(sample, b.kept, out=b.scratch[0])
            sample.copy_(b.kept)
            b.write(self.parameters, 0)
            self.sampled = range(i + 1, self.sampled.stop)
            b.kept.copy_(noise)

    def noise_mark(self) -> float:
        """Tell the noise of the last sample from other noise."""
        return float(self.kept.double().sum())

    def accumulate(self, grads: Sequence[Tensor]) -> None:
        """Add the gradients at the noise in ``kept`` to the sums."""
        grad_sum, price_sum = self.sum_views()
        for b in self.blocks:
            grad = b.read(grads, 1)
            grad_sum[b.here].add_(grad)
            price_sum[b.here].addcmul_(b.kept, grad)
        self.n_summed += 1

    def sum_views(self) -> tuple[Tensor, Tensor]:
        """Sums of gradient and of noise × gradient."""
        if self.sums is None:
            self.sums = self.hess.new_zeros(2 * self.n + 1)
        return self.sums[: self.n], self.sums[self.n : -1]

    def clear(self) -> None:
        """Forget the sums."""
        if self.n_summed and self.sums is not None:
            self.sums.zero_()
        self.n_summed = 0

    def reduce(self) -> None:
        """Add up the sums over the processes of ``torch.distributed``."""
        assert self.sums is not None
        self.sums[-1] = self.n_summed
        torch.distributed.all_reduce(self.sums)
        self.n_summed = int(self.sums[-1])

    def update(self, group: dict[str, Any], grads: Sequence[Tensor] | None) -> None:
        """Steps 5 to 8 of the algorithm; a sample that parameters still hold goes in the same pass.

        Parameters
        ----------
        group : dict
            Settings of the group; its step counter goes up.
        grads : sequence of Tensor or None
            Gradients of the one sample; None takes the sums.
        """
        ess, delta, beta1 = group["ess"], group["weight_decay"], group["beta1"]
        gain = (1 - group["beta2"]) * ess  # ρλ
        group["step"] += 1
        bias = 1 - beta1 ** group["step"] if group["debias"] else 1.0
        rate = group["lr"] * (group["hess_init"] + delta if group["rescale_lr"] else 1.0) / bias
        radius = group["clip_radius"] * bias
        decay = self.hess.new_tensor(delta)
        squares = torch.zeros_like(self.squares)
        for i, b in enumerate(self.blocks):
            target = mean = b.read(self.parameters, 0)
            c, a = b.scratch
            if grads is None:
                assert self.sums is not None
                grad = torch.div(self.sums[: self.n][b.here], self.n_summed, out=b.kept)
                torch.div(self.sums[self.n : -1][b.here], self.n_summed, out=c)
            else:
                grad, noise = b.read(grads, 1), b.kept
                if self.sampled:
                    noise = torch.sub(target, b.kept, out=c)
                    mean = b.kept
                torch.mul(noise, grad, out=c)
            b.momentum.lerp_(grad, 1 - beta1)
            # With a = h + δ and x = ρ(ĥ − h)/a, the new h is h + a(x + x²/2). It is formed from
            # c = x/ρλ = n⊙ĝ − h/λa, without adding 1 to x: ρ near 1e-5 would drown in float32.
            torch.add(b.hess, decay, out=a)
            c.addcdiv_(b.hess, a, value=-1 / ess)
            squares += torch.dot(c, c)
            c.addcmul_(c, c, value=0.5 * gain)
            b.hess.addcmul_(a, c, value=gain)
            torch.add(b.hess, decay, out=a)
            direction = torch.add(b.momentum, mean, alpha=delta * bias, out=c)
            if math.isinf(radius):
                torch.addcdiv(mean, direction, a, value=-rate, out=target)
            else:
                torch.add(mean, direction.div_(a).clamp_(-radius, radius), alpha=-rate, out=target)
            b.write(self.parameters, 0)
            if self.sampled:
                self.sampled = range(i + 1, self.sampled.stop)
        self.squares.lerp_(squares * (gain**2 / max(1, self.n)), max(0.01, 1 / group["step"]))


def _layout(
    parameters: Sequence[Tensor], block: int
) -> Iterator[tuple[list[int], slice | None, int]]:
    """Cut parameters into blocks: (members, part of the one member or None, elements)."""
    members: list[int] = []
    size = 0
    for i, p in enumerate(parameters):
        n = p.numel()
        # A parameter that is not contiguous cannot be cut through a flat view; it stays whole.
        if n > block and p.is_contiguous():
            if members:
                yield members, None, size
                members, size = [], 0
            for start in range(0, n, block):
                stop = min(start + block, n)
                yield [i], slice(start, stop), stop - start
            continue
        if members and size + n > block:
            yield members, None, size
            members, size = [], 0
        members.append(i)
        size += n
    if members:
        yield members, None, size
