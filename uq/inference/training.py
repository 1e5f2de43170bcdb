"""The one training loop: every gradient-trained method brings its loss and optimizer to it.

Epochs over mini-batches on Lightning Fabric (device and precision), a learning-rate schedule, early
stopping on held-out loss with the best weights restored, a guard against a loss that is not finite,
and an interrupt that keeps what was learned.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from uq.errors import FitInterruptedWarning, NonFiniteLossError, ParameterError
from uq.inference.checkpoints import (
    Stage,
    StopRequest,
    put_back,
    random_state,
    set_random_state,
    stop_signals,
    take,
)
from uq.threads import process_state

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_log = logging.getLogger("uq")

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
class TrainingStep:
    """What ``callback.on_step_end(step)`` sees after each step of the optimizer.

    What it returns is ignored.

    See Also
    --------
    TrainingState : what a callback sees after each epoch; has an example.
    """

    epoch: int
    """The running one, from 1."""
    step: int
    """Steps done, from 1."""
    loss: Tensor
    """Objective of the batch before the step, in nats per row, 0-d; on a GPU ``float(loss)`` waits
    for it."""
    module: nn.Module
    """The objective being trained."""


@dataclass(frozen=True)
class TrainingState:
    """What a callback sees after each epoch; returning True from it stops training.

    A callback that has a method ``on_step_end`` is told of each :class:`TrainingStep`, too. Fits
    without epochs (a closed form, no fine-tuning, the sampling that follows training) call none.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> from uq import MAPClassifier
    >>> def stop_at_three(state):
    ...     print(state.epoch, state.train_loss < 2)
    ...     return state.epoch == 3
    >>> X, y = load_wine(return_X_y=True)
    >>> _ = MAPClassifier(callbacks=[stop_at_three], random_state=0).fit(X, y)
    1 True
    2 True
    3 True
    """

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

    history: dict[str, list[float]] = field(default_factory=lambda: {"train_loss": []})
    """One value an epoch; "held_out_loss", too, where rows are held out."""
    stop_reason: str = "max_epochs"
    """"max_epochs", "patience", "callback", "interrupted" or "non_finite"."""
    best_epoch: int = 0
    error: NonFiniteLossError | None = None
    """Set when the loss ran off; the module holds the last good weights."""


STRATEGIES = ("auto", "ddp")


def make_fabric(device: str, precision: str, strategy: str = "auto") -> Fabric:
    """Build the Lightning Fabric that places modules and tensors.

    Parameters
    ----------
    device : str
        "auto" (CUDA where there is one, otherwise the CPU), "cpu", "cuda" or "cuda:1".
    precision : {"32-true", "64-true", "bf16-mixed"}
        Lightning's names.
    strategy : {"auto", "ddp"}, default="auto"
        One process, or those that ``torchrun`` started.

    Raises
    ------
    ParameterError
        For a value that is none of these, a device that is not there, or "ddp" outside of
        ``torchrun``.
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
        raise ParameterError(
            f"device must be 'auto' or a torch device such as 'cpu' or 'cuda:0', got {device!r}."
        ) from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ParameterError(
            f"device {device!r} is not there ({torch.cuda.device_count()} CUDA devices are); "
            "use device='cpu' or 'auto'."
        )
    if place.type not in ("cpu", "cuda"):
        raise ParameterError(f"device must be on 'cpu' or 'cuda', got {device!r}.")
    if strategy not in STRATEGIES:
        raise ParameterError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}.")
    devices: Any = [place.index or 0] if place.type == "cuda" else 1
    several: dict[str, Any] = {}
    if strategy == "ddp":
        try:
            world, local = (int(os.environ[k]) for k in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        except (KeyError, ValueError):
            raise ParameterError(
                "strategy='ddp' trains in the processes that torchrun starts: run the script by "
                "`torchrun --nproc-per-node 2 script.py`."
            ) from None
        devices, several = local, {"strategy": "ddp", "num_nodes": world // local}
    # Lightning announces mixed precision at info level on every start.
    logger = logging.getLogger("lightning_fabric.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        fabric = Fabric(
            accelerator=place.type,
            devices=devices,
            precision=precision,  # type: ignore[arg-type]
            **several,
        )
        if several:
            fabric.launch()
        return fabric
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
    """Seed torch's global generators inside, and put them back after; one thread at a time."""
    devices = [device] if device.type == "cuda" else []
    with process_state(), torch.random.fork_rng(devices=devices):
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


class _Best:
    """The tensors of the best epoch, copied into the same memory each time."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.loss = math.inf
        self.live = list(tensors)
        self.kept = [t.detach().clone() for t in self.live]

    @torch.no_grad()
    def take(self) -> None:
        for kept, live in zip(self.kept, self.live, strict=True):
            kept.copy_(live)

    def load(self, loss: float, kept: list[Tensor]) -> None:
        self.loss = loss
        for mine, other in zip(self.kept, kept, strict=True):
            mine.copy_(other)

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
    checkpoint: Stage | None = None,
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
        From ``make_fabric``.
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
        Called with a :class:`TrainingState` after each epoch; True stops. Their ``on_step_end``,
        where there is one, is called with a :class:`TrainingStep` after each step.
    checkpoint : Stage, optional
        Where to write the state now and then, and to go on from. Training that resumes ends with
        the bits that it would have had; callbacks see only the epochs that are run.
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

    shards = None
    # An optimizer that averages over the processes itself wants gradients that are not.
    averages = not getattr(optimizer, "sync", False)
    if fabric.world_size > 1:
        batches = shards = _Shards(batches, fabric.global_rank, fabric.world_size)
    wraps = _is_mixed(fabric) or (shards is not None and averages)
    run = fabric.setup_module(objective, move_to_device=False) if wraps else objective
    best = _Best([*objective.parameters(), *objective.buffers(), *extra_state])
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    result = TrainingResult()
    if held_out_loss is not None:
        result.history["held_out_loss"] = []
    on_step_end = [c.on_step_end for c in callbacks if hasattr(c, "on_step_end")]
    at = _Position()
    saved = None
    if checkpoint is not None:
        saved = _Saved(checkpoint, fabric.device, objective, optimizer, batches, extra_state)
        if saved.load(at, best, result):
            objective.eval()
            return result
    batch: tuple[Tensor, ...] = ()
    take_step: Callable[[Any], Tensor] = optimizer.step  # type: ignore[assignment]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = run(*batch)
        if shards is not None:
            loss = loss * shards.factor
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

    progress = tqdm(
        range(at.epoch, max_epochs),
        desc=description,
        unit="epoch",
        initial=at.epoch,
        total=max_epochs,
        disable=verbose < 1,
    )
    objective.train()
    if shards is not None:  # dropout is to differ between processes
        torch.manual_seed(torch.initial_seed() + fabric.global_rank)
    started = False
    try:
        with _own_threads() as use_threads, stops(checkpoint) as stop:
            for epoch in progress:
                for tensors in _batches_from(batches, at, saved):
                    batch = tensors
                    if schedule is not None:
                        factor = schedule(at.step)
                        for group, lr in zip(optimizer.param_groups, base_lrs, strict=True):
                            group["lr"] = lr * factor
                    if started:
                        at.losses.append(take_step(closure))
                    else:
                        at.losses.append(first_step(use_threads))
                        started = True
                    at.step += 1
                    for tell in on_step_end:
                        tell(TrainingStep(epoch + 1, at.step, at.losses[-1], objective))
                    if saved is not None and (stop.asked or saved.stage.due()):
                        saved.save(at, best, result)
                    obey(stop, description)
                train_loss = float(torch.stack(at.losses).mean())
                if shards is not None:
                    mean: Any = fabric.all_reduce(torch.tensor(train_loss).double())
                    train_loss = float(mean)
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
                _log.debug("%s: epoch %d, loss %.6g", description, epoch + 1, current)
                if held_out is None or held_out < best.loss:
                    best.loss, result.best_epoch = current, epoch + 1
                    best.take()
                told = TrainingState(epoch + 1, train_loss, held_out, objective)
                asked = [callback(told) is True for callback in callbacks]  # every one is told
                if any(asked):
                    result.stop_reason = "callback"
                    break
                if patience is not None and epoch + 1 - result.best_epoch >= patience:
                    result.stop_reason = "patience"
                    progress.set_description(f"{description}, stopped early")  # not broken off
                    break
                at.epoch, at.losses = epoch + 1, []
                if saved is not None and saved.stage.due(at.epoch):
                    saved.save(at, best, result)
    except KeyboardInterrupt:
        if not result.history["train_loss"]:
            raise  # nothing was learned yet, so there is nothing to keep
        result.stop_reason = "interrupted"
        epochs = len(result.history["train_loss"])
        kept = f"the weights of epoch {result.best_epoch} are kept"
        warn_interrupted(f"{description}, after {epochs} epochs", kept)
    finally:
        progress.close()
        best.restore()
        objective.eval()
        optimizer.zero_grad()
    if saved is not None and result.error is None and result.stop_reason != "interrupted":
        saved.finish(result)
    return result


def stops(checkpoint: Stage | None) -> AbstractContextManager[StopRequest]:
    """Where nothing is written, a signal does what it always does."""
    return nullcontext(StopRequest()) if checkpoint is None else stop_signals()


def obey(stop: StopRequest, description: str) -> None:
    """End the process or the fit where that was asked for, the state having been written."""
    if stop.terminate:
        warn_interrupted(f"{description}, by SIGTERM", "fit(..., resume=True) goes on from here")
        raise SystemExit(128 + signal.SIGTERM)
    if stop.asked:
        raise KeyboardInterrupt


@dataclass
class _Position:
    """Where training stands."""

    epoch: int = 0
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)
    """Of the steps of the running epoch."""


class _Saved:
    """Writes a running training to its checkpoints, and reads it back."""

    def __init__(
        self,
        stage: Stage,
        device: torch.device,
        objective: nn.Module,
        optimizer: Optimizer,
        batches: Batches,
        extra_state: Sequence[Tensor],
    ) -> None:
        self.stage, self.device = stage, device
        self.roots = {"objective": objective, "optimizer": optimizer, "extra": list(extra_state)}
        self.batches = {"batches": batches}
        self.epoch_start: dict[str, Any] = {}
        self._now: dict[str, Tensor] | None = None

    def load(self, at: _Position, best: _Best, result: TrainingResult) -> bool:
        """Take up what is there; whether training was done."""
        state, done = self.stage.load()
        if state is None:
            return False
        result.history = state["history"]
        result.best_epoch = state["best_epoch"]
        put_back(self.roots, state["objects"])
        put_back(self.batches, state["epoch_start"]["batches"])
        if done:
            result.stop_reason = state["stop_reason"]
            set_random_state(state["random"], self.device)
            return True
        at.epoch, at.step = state["epoch"], state["step"]
        at.losses = list(state["losses"].to(self.device)) if len(state["losses"]) else []
        best.load(state["best_loss"], state["best"])
        self.epoch_start = state["epoch_start"]
        self._now = state["random"]
        return False

    def iterate(self, batches: Batches, at: _Position) -> Iterator[tuple[Tensor, ...]]:
        """Go through the batches of an epoch, from the one where it was left."""
        n_done = len(at.losses)
        if n_done:
            set_random_state(self.epoch_start["random"], self.device)
        else:
            if self._now is not None:
                set_random_state(self._now, self.device)
            self.epoch_start = self._start()
        iterator = iter(batches)
        for _ in range(n_done):
            next(iterator)
        if self._now is not None:
            set_random_state(self._now, self.device)
            self._now = None
        yield from iterator

    def _start(self) -> dict[str, Any]:
        return {"random": random_state(self.device), "batches": take(self.batches)}

    def save(self, at: _Position, best: _Best, result: TrainingResult) -> None:
        between = not at.losses
        state = {
            "epoch": at.epoch,
            "step": at.step,
            "losses": torch.zeros(0) if between else torch.stack(at.losses),
            "best_loss": best.loss,
            "best": best.kept,
            "best_epoch": result.best_epoch,
            "history": result.history,
            "objects": take(self.roots),
            "epoch_start": self._start() if between else self.epoch_start,
            "random": random_state(self.device),
        }
        self.stage.save(at.step, state)

    def finish(self, result: TrainingResult) -> None:
        state = {
            "best_epoch": result.best_epoch,
            "history": result.history,
            "stop_reason": result.stop_reason,
            "objects": take(self.roots),
            "epoch_start": self._start(),
            "random": random_state(self.device),
        }
        self.stage.finish(state)


def _batches_from(
    batches: Batches, at: _Position, saved: _Saved | None
) -> Iterator[tuple[Tensor, ...]]:
    return iter(batches) if saved is None else saved.iterate(batches, at)


def warn_interrupted(what: str, kept: str) -> None:
    """Tell that training was interrupted and what is left of it."""
    warnings.warn(f"{what}: interrupted; {kept}.", FitInterruptedWarning, stacklevel=3)


def _is_mixed(fabric: Fabric) -> bool:
    return "mixed" in str(fabric._precision.precision)


class _Shards:
    """The rows of each batch that are this process's: every process goes through all batches."""

    def __init__(self, batches: Batches, rank: int, world: int) -> None:
        self.batches, self.rank, self.world = batches, rank, world
        self.factor = 1.0
        """Makes the mean over processes of mean losses the mean over the batch."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for tensors in self.batches:
            mine = tuple(t[self.rank :: self.world] for t in tensors)
            n, own = len(tensors[0]), len(mine[0])
            if own == 0:  # a batch of fewer rows than processes: a row that counts nothing
                mine = tuple(t[:1] for t in tensors)
            self.factor = own * self.world / n
            yield mine


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
