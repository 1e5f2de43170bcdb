"""Checkpoints of a fit: what a killed process needs to go on to the same final bits.

A fit is a pure function of its data, its parameters and its seed. Resuming therefore runs the fit
again from the start, which rebuilds every object in the same places, and puts the saved numbers
into them where training begins. Nothing in the files is code.
"""

from __future__ import annotations

import json
import math
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from uq.errors import LoadError, ParameterError
from uq.files import write_atomically
from uq.plain import load_json, read_state, state_bytes

_KEPT = 2  # the newest checkpoint, and one more for the case that the newest cannot be read
_RUN = "run.json"
_MAX_RUN_BYTES = 2**20
_FORMAT = 1
_TORCH_INTERNALS = frozenset(vars(nn.Module()))


# -- the numbers of a running fit ----------------------------------------------------------------


class _Leaf:
    """One value inside a running fit, and how to put another in its place."""

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], None]) -> None:
        self.get, self.put = get, put


def _leaves(roots: dict[str, Any]) -> dict[str, _Leaf]:
    """Every tensor, generator, optimizer and plain number that ``roots`` hold, by path.

    Objects of uq, modules, lists and dictionaries are gone through; an attribute that its class
    names in ``_not_in_checkpoints`` (the data itself) is left out.
    """
    found: dict[str, _Leaf] = {}
    seen: set[int] = set()

    def visit(value: Any, path: str, put: Callable[[Any], None] | None) -> None:
        if value is None or isinstance(value, bool | int | float | str):
            if put is not None:
                found[path] = _Leaf(lambda: value, put)
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            found[path] = _Leaf(lambda: value.detach(), lambda new: _put_tensor(value, new, put))
        elif isinstance(value, torch.Generator):
            found[path] = _Leaf(value.get_state, partial(_put_generator, value))
        elif isinstance(value, Optimizer) and "state" in vars(value):
            found[path] = _Leaf(value.state_dict, value.load_state_dict)
        elif isinstance(value, nn.Module):
            for part in (value._parameters, value._buffers, value._modules):
                for name, item in part.items():
                    weight = isinstance(item, nn.Parameter)  # of a shape that does not change
                    visit(item, f"{path}.{name}", None if weight else _setter(part, name))
            own = {k: v for k, v in vars(value).items() if k not in _TORCH_INTERNALS}
            attributes(value, own, path)
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(item, f"{path}.{key}", _setter(value, key))
        elif isinstance(value, list) and all(isinstance(v, bool | int | float) for v in value):
            # A record that grows is one value; it may be empty in the objects built anew.
            found[path] = _Leaf(lambda: list(value), lambda new: _put_record(value, new))
        elif put is not None and isinstance(value, list | tuple) and _are_tensors(value):
            found[path] = _Leaf(lambda: value, lambda new: _put_tensors(value, new, put))
        elif isinstance(value, list):
            for i, item in enumerate(value):
                visit(item, f"{path}.{i}", _setter(value, i))
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                visit(item, f"{path}.{i}", None)
        elif isinstance(value, DataLoader):
            for name, owner in (("", value), (".sampler", value.sampler)):
                visit(getattr(owner, "generator", None), f"{path}{name}.generator", None)
        elif type(value).__module__.startswith("uq."):
            attributes(value, getattr(value, "__dict__", {}), path)

    def attributes(owner: Any, own: dict[str, Any], path: str) -> None:
        left_out = getattr(owner, "_not_in_checkpoints", ())
        settings = getattr(owner, "__dataclass_params__", None)
        frozen = settings is not None and settings.frozen
        for name, item in list(own.items()):
            if name not in left_out:
                put = None if frozen else partial(setattr, owner, name)
                visit(item, f"{path}.{name}", put)

    for name, root in roots.items():
        visit(root, name, None)
    return found


def _setter(container: Any, key: Any) -> Callable[[Any], None]:
    def put(new: Any) -> None:
        container[key] = new

    return put


def _put_generator(generator: torch.Generator, state: Any) -> None:
    generator.set_state(state)


def _put_record(old: list[Any], new: Any) -> None:
    old[:] = new


def _are_tensors(values: list[Any] | tuple[Any, ...]) -> bool:
    known = all(v is None or isinstance(v, Tensor) for v in values)
    return known and not any(isinstance(v, nn.Parameter) for v in values)


@torch.no_grad()
def _put_tensors(old: Any, new: Any, put: Callable[[Any], None]) -> None:
    """Copy in place where that goes, since others may hold the same tensors."""
    old = old or ()
    fit = [
        isinstance(o, Tensor) and isinstance(n, Tensor) and o.shape == n.shape
        for o, n in zip(old, new, strict=False)
    ]
    if len(old) == len(new) and all(fit):
        for o, n in zip(old, new, strict=True):
            o.copy_(n)
    else:
        put(new)


@torch.no_grad()
def _put_tensor(old: Tensor, new: Tensor, put: Callable[[Any], None] | None) -> None:
    if isinstance(new, Tensor) and old.shape == new.shape and old.dtype == new.dtype:
        old.copy_(new)
    elif put is None:
        raise ValueError(f"it has shape {tuple(new.shape)}, not {tuple(old.shape)}")
    else:
        put(new.to(old.device) if isinstance(new, Tensor) else new)


def take(roots: dict[str, Any]) -> dict[str, Any]:
    """Everything that changes while the objects in ``roots`` are trained."""
    return {path: leaf.get() for path, leaf in _leaves(roots).items()}


def put_back(roots: dict[str, Any], state: dict[str, Any]) -> None:
    """Put what :func:`take` gave into objects that were built the same way.

    Raises
    ------
    LoadError
        If the objects are others.
    """
    leaves = _leaves(roots)
    if unknown := state.keys() - leaves.keys():
        raise LoadError(f"the checkpoint holds {min(unknown)}, which this fit does not have.")
    for path, value in state.items():
        try:
            leaves[path].put(value)
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            raise LoadError(f"the checkpoint does not fit {path} of this fit: {error}") from error


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's global generators."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put back what :func:`random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# -- the folder ----------------------------------------------------------------------------------


class Checkpoints:
    """The folder of one fit.

    Parameters
    ----------
    folder : str or Path
        Made where it is not there.
    every : int or str
        Epochs between checkpoints (of samplers: transitions of the chains, or targets of SMC), or
        seconds as "30s".
    resume : bool
        Whether to go on with what is there; otherwise the folder must hold no run.
    run : dict
        What tells this fit from another: estimator, parameters, seed, as JSON.

    Raises
    ------
    ParameterError
        If the folder holds a run that is not resumed, or another fit's.
    """

    def __init__(
        self, folder: str | Path, every: int | str, *, resume: bool, run: dict[str, Any]
    ) -> None:
        self.folder: Path = Path(folder)
        self.epochs: int | None
        self.seconds: float | None
        self.epochs, self.seconds = _interval(every)
        self._n_stages = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        there = read_run(self.folder)
        if there is None:
            self.run: dict[str, Any] = run
            write_atomically(
                {self.folder / _RUN: json.dumps(run, indent=1, allow_nan=False).encode()}
            )
            return
        if not resume:
            raise ParameterError(
                f"checkpoint_dir {str(folder)!r} holds a fit already; go on with it by "
                "fit(..., resume=True) (--resume in the shell), or name another folder."
            )
        self.run = there
        for name in dict.fromkeys([*run, *there]):
            if name not in ("seed", "data") and run.get(name) != there.get(name):
                raise ParameterError(
                    f"checkpoint_dir {str(folder)!r} holds a fit with {name} = "
                    f"{there.get(name)!r}, not {run.get(name)!r}; put it back, or name another "
                    "folder for the new fit."
                )

    def check_data(self, fingerprint: str) -> None:
        """Refuse other data than the run began with."""
        known = self.run.setdefault("data", fingerprint)
        if known != fingerprint:
            raise ParameterError(
                f"checkpoint_dir {str(self.folder)!r} holds a fit to other data; give the same "
                "X, y and sample_weight, or name another folder."
            )
        text = json.dumps(self.run, indent=1, allow_nan=False)
        if read_run(self.folder) != self.run:
            write_atomically({self.folder / _RUN: text.encode()})

    def stage(self) -> Stage:
        """Next piece of the fit: the same one at each run of the same fit."""
        self._n_stages += 1
        return Stage(self, self._n_stages - 1)

    def go_to(self, number: int) -> None:
        """Make ``number`` the next stage, where pieces are not done one after another."""
        self._n_stages = number


def read_run(folder: Path) -> dict[str, Any] | None:
    """What the folder says of its fit; None where there is none.

    Raises
    ------
    LoadError
        If it is damaged, or of another version.
    """
    path = folder / _RUN
    if not path.exists():
        return None
    try:
        if not path.is_file() or path.stat().st_size > _MAX_RUN_BYTES:
            raise ValueError("it is no file, or too large")
        run = load_json(path.read_bytes())
        if not isinstance(run, dict) or run.get("format") != _FORMAT:
            raise ValueError("it is not one of this version")
        seed = run.get("seed")
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise ValueError("it has no seed")
        if not isinstance(run.get("data", ""), str):
            raise ValueError("it does not tell its data")
    except (ValueError, OSError, RecursionError) as error:
        raise LoadError(f"{str(path)!r} cannot be read: {error}; name another folder.") from error
    return run


def describe_run(estimator: str, params: dict[str, Any], seed: int) -> dict[str, Any]:
    """What tells a fit from another, as JSON; objects that are code are left out."""
    plain = {k: v for k, v in ((k, _plain(v)) for k, v in params.items()) if v is not _CODE}
    return {"format": _FORMAT, "estimator": estimator, "seed": seed} | {
        k: plain[k] for k in sorted(plain)
    }


_CODE = object()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
    if isinstance(value, list | tuple):
        items = [_plain(v) for v in value]
        return _CODE if _CODE in items else items
    return _CODE


def _interval(every: int | str) -> tuple[int | None, float | None]:
    if isinstance(every, str):
        if found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*s", every):
            return None, float(found[1])
    elif isinstance(every, int) and not isinstance(every, bool) and every >= 1:
        return every, None
    raise ParameterError(
        f'checkpoint_every must be a number of epochs >= 1, or seconds as in "30s"; got {every!r}.'
    )


class Stage:
    """Checkpoints of one piece of a fit: one training run, or one run of chains."""

    def __init__(self, checkpoints: Checkpoints, number: int) -> None:
        self._of = checkpoints
        self._name = f"stage-{number:04d}"
        self._written = time.monotonic()

    @property
    def _done(self) -> Path:
        return self._of.folder / f"{self._name}.done.safetensors"

    def _steps(self) -> list[Path]:
        return sorted(self._of.folder.glob(f"{self._name}.step-*.safetensors"))

    def load(self) -> tuple[dict[str, Any] | None, bool]:
        """Newest state that can be read, and whether the stage was finished."""
        for path in [self._done, *reversed(self._steps())]:
            if not path.exists():
                continue
            try:
                return read_state(path), path == self._done
            except LoadError as error:
                warnings.warn(f"{error}; the one before is taken.", UserWarning, stacklevel=2)
        return None, False

    def due(self, epoch: int | None = None, n: int = 1) -> bool:
        """Whether it is time: asked after each step, and with the count after ``n`` epochs."""
        if self._of.epochs is not None:
            return epoch is not None and epoch // self._of.epochs > (epoch - n) // self._of.epochs
        assert self._of.seconds is not None
        return time.monotonic() - self._written >= self._of.seconds

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after ``step``, and remove those that are not needed any more."""
        self._write(self._of.folder / f"{self._name}.step-{step:012d}.safetensors", state)
        for path in self._steps()[:-_KEPT]:
            path.unlink(missing_ok=True)

    def finish(self, state: dict[str, Any]) -> None:
        """Write the final state of the stage."""
        self._write(self._done, state)
        for path in self._steps():
            path.unlink(missing_ok=True)

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        write_atomically({path: state_bytes(state)})
        self._written = time.monotonic()


# -- signals -------------------------------------------------------------------------------------


class StopRequest:
    """Whether the process was asked to end, and whether it then has to."""

    asked = False
    terminate = False


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT in what is yielded, so that the running step is finished first.

    A second signal interrupts at once. SIGTERM asks the process to end, unless the program handles
    it itself; SIGINT asks the fit to.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signals are the main thread's business
        return

    def note_stop(number: int, frame: Any) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True
        request.terminate = before.get(signal.Signals(number)) == signal.SIG_DFL

    before: dict[signal.Signals, Any] = {}
    try:
        for which in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(which)
            # Another's handler stays; that of our command line is replaced for the time being.
            ours = getattr(handler, "__name__", "") == "note_stop"
            if ours or handler in (signal.SIG_DFL, signal.default_int_handler):
                before[which] = signal.signal(which, note_stop)
        yield request
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
