"""The one training loop: every gradient-trained method brings its loss and optimizer to it.

Epochs over mini-batches on Lightning Fabric (device and precision), a learning-rate schedule, early
stopping on held-out loss with the best weights restored, a guard against a loss that is not finite,
and an interrupt that keeps what was learned.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from uq.errors import FitInterruptedWarning, NonFiniteLossError, ParameterError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Floating-point operations of a step below which a second CPU thread costs more than it brings:
# about 2 ms of one core. On a busy machine waiting for it costs a hundred times the step.
_ONE_THREAD_FLOPS = 1e8

PRECISIONS = ("32-true", "64-true", "bf16-mixed")


class Batches(Protocol):
    """A pass over the data, again and again."""

    def __len__(self) -> int:
        """Return the number of batches of one pass."""
        ...

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield the tensors that the objective takes."""
        ...


@dataclass(frozen=True)
class TrainingState:
    """What a callback sees after each epoch; returning True from it stops training."""

    epoch: int
    """Epochs done, from 1."""
    train_loss: float
    """Mean objective of the epoch's batches, in nats per row."""
    held_out_loss: float | None
    """Held-out loss after the epoch, in nats per row; None without held-out rows."""
    module: nn.Module
    """The objective being trained."""


@dataclass
class TrainingResult:
    """How training went."""

    history: dict[str, list[float]] = field(
        default_factory=lambda: {"train_loss": [], "held_out_loss": []}
    )
    stop_reason: str = "max_epochs"
    """"max_epochs", "patience", "callback", "interrupted" or "non_finite"."""
    best_epoch: int = 0
    error: NonFiniteLossError | None = None
    """Set when the loss ran off; the module holds the last good weights."""


def make_fabric(device: str, precision: str) -> Fabric:
    """Build the Lightning Fabric that places modules and tensors.

    Parameters
    ----------
    device : str
        "auto" (CUDA where there is one, otherwise the CPU), "cpu", "cuda" or "cuda:1".
    precision : {"32-true", "64-true", "bf16-mixed"}
        Lightning's names.
    """
    from lightning_fabric import Fabric

    if precision not in PRECISIONS:
        raise ParameterError(
            f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}."
        )
    try:
        place = (
            torch.device("cuda" if torch.cuda.is_available() else "cpu")
            if (device == "auto")
            else torch.device(device)
        )
    except RuntimeError as error:
        raise ParameterError(f"device {device!r} is not a torch device.") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ParameterError(
            f"device {device!r} is not there ({torch.cuda.device_count()} CUDA devices are); "
            "use device='cpu' or 'auto'."
        )
    if place.type not in ("cpu", "cuda"):
        raise ParameterError(f"device must be on 'cpu' or 'cuda', got {device!r}.")
    devices: Any = [place.index or 0] if place.type == "cuda" else 1
    # Lightning announces mixed precision at info level on every start.
    logger = logging.getLogger("lightning_fabric.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        return Fabric(accelerator=place.type, devices=devices, precision=precision)  # type: ignore[arg-type]
    finally:
        logger.setLevel(level)


@contextmanager
def _own_threads() -> Iterator[Callable[[int], None]]:
    """Give a function that sets torch's CPU threads; put the number back after."""
    before = torch.get_num_threads()
    try:
        yield torch.set_num_threads
    finally:
        torch.set_num_threads(before)


@contextmanager
def isolated_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators inside, and put them back after."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def cosine_schedule(n_steps: int, warmup: float = 0.05) -> Callable[[int], float]:
    """Learning-rate factor: linear warm-up over a share of the steps, then cosine to 0."""
    n_warmup = max(1, round(warmup * n_steps))

    def factor(step: int) -> float:
        if step < n_warmup:
            return (step + 1) / n_warmup
        done = (step - n_warmup) / max(1, n_steps - n_warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return factor


class _Snapshot:
    """Copy of a list of tensors, taken into the same memory each time."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.live = list(tensors)
        self.kept = [t.detach().clone() for t in self.live]

    @torch.no_grad()
    def take(self) -> None:
        for kept, live in zip(self.kept, self.live, strict=True):
            kept.copy_(live)

    @torch.no_grad()
    def restore(self) -> None:
        for kept, live in zip(self.kept, self.live, strict=True):
            live.copy_(kept)


def train(
    objective: nn.Module,
    batches: Batches,
    optimizer: Optimizer,
    *,
    fabric: Fabric,
    max_epochs: int,
    schedule: Callable[[int], float] | None = None,
    held_out_loss: Callable[[], float] | None = None,
    patience: int | None = None,
    clip_norm: float | None = None,
    extra_state: Sequence[Tensor] = (),
    callbacks: Sequence[Callable[[TrainingState], Any]] = (),
    verbose: int = 0,
    description: str = "training",
) -> TrainingResult:
    """Minimise ``objective(*batch)`` over epochs of ``batches``.

    The optimizer is called as ``optimizer.step(closure)``, so that one which evaluates the loss at
    several points (IVON) needs no loop of its own.

    Parameters
    ----------
    objective : Module
        Maps the tensors of a batch to a scalar loss, in nats per row. Changed in place; on return
        it holds the weights of the best epoch where there is held-out loss, else of the last.
    batches : Batches
        Iterable over batches, with ``len``.
    optimizer : Optimizer
        Over the parameters of ``objective``.
    fabric : Fabric
        From :func:`make_fabric`.
    max_epochs : int
        Passes over the data.
    schedule : callable, optional
        Maps the step, from 0, to a factor on each group's learning rate.
    held_out_loss : callable, optional
        Loss on held-out rows, evaluated after each epoch in eval mode.
    patience : int, optional
        Epochs without a better held-out loss before stopping.
    clip_norm : float, optional
        Bound on the norm of the gradient.
    extra_state : sequence of Tensor
        Tensors beside the objective's that belong to the best epoch (IVON's curvature).
    callbacks : sequence of callable
        Called with a :class:`TrainingState` after each epoch; True stops.
    verbose : int
        Above 0 shows a progress bar.
    description : str
        Name on the progress bar and in messages.

    Returns
    -------
    TrainingResult
        A loss that is not finite ends training with ``result.error`` set, not raised, so that
        the caller can keep the last good weights before it raises.
    """
    from tqdm.auto import tqdm

    run = fabric.setup_module(objective, move_to_device=False) if _wraps(fabric) else objective
    state = _Snapshot([*objective.parameters(), *objective.buffers(), *extra_state])
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    result = TrainingResult()
    best, step = math.inf, 0
    batch: tuple[Tensor, ...] = ()
    take_step: Callable[[Any], Tensor] = optimizer.step  # type: ignore[assignment]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = run(*batch)
        fabric.backward(loss)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm, foreach=True)
        return loss.detach()

    def first_step(use_threads: Callable[[int], None]) -> Tensor:
        """Take a step, and train on one thread from then on if it was a small one."""
        with FlopCounterMode(display=False) as counter:
            loss = take_step(closure)
        if fabric.device.type == "cpu" and counter.get_total_flops() < _ONE_THREAD_FLOPS:
            use_threads(1)
        return loss

    progress = tqdm(range(max_epochs), desc=description, unit="epoch", disable=verbose < 1)
    objective.train()
    try:
        with _own_threads() as use_threads:
            for epoch in progress:
                losses = []
                for tensors in batches:
                    batch = tensors
                    if schedule is not None:
                        factor = schedule(step)
                        for group, lr in zip(optimizer.param_groups, base_lrs, strict=True):
                            group["lr"] = lr * factor
                    if step == 0:
                        losses.append(first_step(use_threads))
                    else:
                        losses.append(take_step(closure))
                    step += 1
                train_loss = float(torch.stack(losses).mean())
                held_out = None
                if held_out_loss is not None and math.isfinite(train_loss):
                    held_out = _evaluate(objective, held_out_loss)
                current = train_loss if held_out is None else held_out
                if not math.isfinite(current):
                    result.error = _non_finite(description, epoch, result.history)
                    result.stop_reason = "non_finite"
                    break
                result.history["train_loss"].append(train_loss)
                if held_out is not None:
                    result.history["held_out_loss"].append(held_out)
                    progress.set_postfix(loss=f"{train_loss:.3f}", held_out=f"{held_out:.3f}")
                else:
                    progress.set_postfix(loss=f"{train_loss:.3f}")
                if held_out is None or held_out < best:
                    best, result.best_epoch = current, epoch + 1
                    state.take()
                told = TrainingState(epoch + 1, train_loss, held_out, objective)
                asked = [callback(told) is True for callback in callbacks]  # every one is told
                if any(asked):
                    result.stop_reason = "callback"
                    break
                if patience is not None and epoch + 1 - result.best_epoch >= patience:
                    result.stop_reason = "patience"
                    break
    except KeyboardInterrupt:
        if not result.history["train_loss"]:
            raise  # nothing was learned yet, so there is nothing to keep
        result.stop_reason = "interrupted"
        epochs = len(result.history["train_loss"])
        kept = f"the weights of epoch {result.best_epoch} are kept"
        warn_interrupted(f"{description}, after {epochs} epochs", kept)
    finally:
        progress.close()
        state.restore()
        objective.eval()
        optimizer.zero_grad()
    return result


def warn_interrupted(what: str, kept: str) -> None:
    """Tell that training was interrupted and what is left of it."""
    warnings.warn(f"{what}: interrupted; {kept}.", FitInterruptedWarning, stacklevel=3)


def _wraps(fabric: Fabric) -> bool:
    """Whether Fabric's wrapper does anything: it costs more than a small network's forward."""
    return fabric.world_size > 1 or "mixed" in str(fabric._precision.precision)


def _evaluate(objective: nn.Module, held_out_loss: Callable[[], float]) -> float:
    objective.eval()
    with torch.no_grad():
        loss = held_out_loss()
    objective.train()
    return loss


def _non_finite(
    description: str, epoch: int, history: dict[str, list[float]]
) -> NonFiniteLossError:
    losses = history["train_loss"]
    last = f"; the last finite loss was {losses[-1]:.4g}" if losses else ""
    return NonFiniteLossError(
        f"{description}: the loss became NaN or infinite in epoch {epoch + 1}{last}. Lower lr "
        "(a tenth is a good next try), and look for extreme values in X or y."
    )
