"""State of a pre-training run: what a step draws, the network and its average, log, checkpoints."""

from __future__ import annotations

import copy
import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from uq.errors import LoadError, ParameterError
from uq.files import write_atomically
from uq.inference.pfn_losses import dense_labels, exact_gp_loss, query_loss
from uq.inference.pfn_priors import GPPrior, prior_task, sample_prior
from uq.inference.training import cosine_schedule
from uq.nn.pfn import PFN

# First number of the seeds of each kind of draw, so that no two kinds share a stream.
TRAIN, HELD_OUT, BORDERS, INIT = range(4)


@dataclass(frozen=True)
class PretrainingState:
    """What a callback sees at each log entry; returning True from it ends the run early."""

    step: int
    """Steps done, of ``steps``."""
    steps: int
    loss: float
    """Mean training loss since the last entry, in nats per query row."""
    held_out: dict[str, float]
    """Held-out loss by context size, and "mean"."""
    model: PFN
    """Network with the averaged weights."""


class Contexts:
    """Draws the data sets of steps: sizes and values are functions of the seed and the step."""

    def __init__(
        self,
        prior: Any,
        low: int,
        high: int,
        sampling: str,
        n_queries: int,
        rows: int,
        seed: int,
    ) -> None:
        self.prior: Any = prior
        self.task = prior_task(prior)
        self.low: int = low
        self.high: int = high
        self.sampling: str = sampling
        self.n_queries: int = n_queries
        self.rows: int = rows
        self.seed: int = seed
        self.max_features: int = int(getattr(prior, "max_features", 10))
        self.min_features: int = int(getattr(prior, "min_features", min(1, self.max_features)))
        self.max_classes: int = int(getattr(prior, "max_classes", 10))
        self.scaled: bool = bool(getattr(prior, "scaled", True))

    def rng(self, kind: int, number: int) -> np.random.Generator:
        """Random numbers for draw ``number`` of a kind: nothing else decides them."""
        return np.random.default_rng([self.seed, kind, number])

    def queries(self, n: int) -> int:
        """Query rows that go with a context of ``n``."""
        if self.sampling == "uniform":
            return self.high + self.n_queries - n
        return self.n_queries + n // 4

    def size(self, rng: np.random.Generator) -> int:
        """Rows of a context."""
        if self.sampling == "uniform":
            return int(rng.integers(self.low, self.high + 1))
        low, high = math.log(self.low), math.log(self.high + 1)
        return min(self.high, int(math.exp(rng.uniform(low, high))))

    def draw(
        self,
        kind: int,
        number: int,
        device: torch.device,
        n: int | None = None,
        rows: int | None = None,
    ) -> tuple[Tensor, Tensor, int]:
        """Data sets (B, n + m, d), their targets, and the context size n."""
        rng = self.rng(kind, number)
        size = self.size(rng) if n is None else n
        total = size + self.queries(size)
        batch = max(1, (rows or self.rows) // total)
        d = int(rng.integers(self.min_features, self.max_features + 1))
        generator = torch.Generator(device).manual_seed(int(rng.integers(2**63)))
        X, y = sample_prior(self.prior, batch, total, d, generator)
        return X, y, size

    def held_out_sizes(self) -> list[int]:
        """Up to six context sizes over the range."""
        if self.sampling == "uniform":
            raw = np.linspace(self.low, self.high, 6)
        else:
            raw = np.geomspace(self.low, self.high, 6)
        return sorted({round(float(n)) for n in raw})


class Run:
    """State of a run: network, its average, optimiser, step and log."""

    def __init__(
        self,
        model: PFN,
        contexts: Contexts,
        settings: dict[str, Any],
        steps: int,
        lr: float,
        warmup: float,
        average: float,
        fabric: Any,
    ) -> None:
        self.fabric: Any = fabric
        self.contexts: Contexts = contexts
        self.settings: dict[str, Any] = settings
        self.dtype: torch.dtype = torch.float64 if "64" in settings["precision"] else torch.float32
        self.model: PFN = model.to(fabric.device, self.dtype).train()
        self.averaged: PFN = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.parameters: list[nn.Parameter] = list(self.model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, fused=True)
        self.lr: float
        self.decay: float
        self.steps: int
        self.factor, self.lr, self.decay, self.steps = (
            cosine_schedule(steps, warmup),
            lr,
            average,
            steps,
        )
        self.step, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self.log: list[dict[str, Any]] = []
        self.recent: list[float] = []
        self._held_out: list[tuple[Tensor, Tensor, int]] | None = None
        self._reference: dict[str, Any] = {}
        self._start()

    def _start(self) -> None:
        self._clock = time.monotonic(), time.process_time()

    def _spend(self) -> None:
        wall, cpu = time.monotonic(), time.process_time()
        self.seconds += wall - self._clock[0]
        self.cpu_seconds += cpu - self._clock[1]
        self._clock = wall, cpu

    def advance(self) -> float:
        """Take one step; returns its loss."""
        device = self.fabric.device
        X, y, n = self.contexts.draw(TRAIN, self.step, device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.factor(self.step)
        each, counts = query_loss(
            self.model, X.to(self.dtype), y, n, autocast=self.fabric.autocast()
        )
        loss = each.sum() / counts.sum().clamp_min(1)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        value = float(loss.detach())
        if math.isfinite(value):
            self.optimizer.step()
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                pairs = zip(self.averaged.parameters(), self.parameters, strict=True)
                for mean, p in pairs:
                    mean.lerp_(p, 1 - decay)
        self.step += 1
        self.recent.append(value)
        return value

    def log_entry(self) -> PretrainingState:
        """Evaluate on held-out data sets and note it."""
        held_out = self.evaluate()
        loss = float(np.mean(self.recent))
        self.recent = []
        self._spend()
        self.log.append(
            {
                "step": self.step,
                "loss": round(loss, 5),
                "held_out": {k: round(v, 5) for k, v in held_out.items()},
                "seconds": round(self.seconds, 1),
            }
        )
        return PretrainingState(self.step, self.steps, loss, held_out, self.averaged)

    def held_out(self) -> list[tuple[Tensor, Tensor, int]]:
        """The same data sets in every evaluation: about 16 steps' worth."""
        if self._held_out is None:
            sizes = self.contexts.held_out_sizes()
            self._held_out = [
                self.contexts.draw(HELD_OUT, 10 * j + i, self.fabric.device, n)
                for j, n in enumerate(sizes)
                for i in range(4)
            ]
        return self._held_out

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out loss by context size, of the averaged weights, and its mean."""
        totals: dict[int, list[float]] = {}
        for X, y, n in self.held_out():
            each, counts = query_loss(
                self.averaged, X.to(self.dtype), y, n, autocast=self.fabric.autocast()
            )
            totals.setdefault(n, []).append(float(each.sum() / counts.sum().clamp_min(1)))
        by_size = {str(n): float(np.mean(v)) for n, v in totals.items()}
        return {**by_size, "mean": float(np.mean(list(by_size.values())))}

    def reference(self) -> dict[str, dict[str, float]]:
        """What the held-out losses compare with: a trivial rule, and the exact posterior if known.

        Trivial is a normal with the mean and standard deviation of the context, or the class
        frequencies of the context with one row more of each class.
        """
        if self._reference:
            return self._reference
        trivial: dict[str, list[float]] = {}
        exact: dict[str, list[float]] = {}
        for X, y, n in self.held_out():
            trivial.setdefault(str(n), []).append(self._trivial(y, n))
            if isinstance(self.contexts.prior, GPPrior):
                exact.setdefault(str(n), []).append(
                    float(exact_gp_loss(self.contexts.prior, X, y, n).mean())
                )
        for name, totals in (("trivial", trivial), ("exact", exact)):
            if totals:
                by_size = {k: round(float(np.mean(v)), 5) for k, v in totals.items()}
                by_size["mean"] = round(float(np.mean(list(by_size.values()))), 5)
                self._reference[name] = by_size
        return self._reference

    def _trivial(self, y: Tensor, n: int) -> float:
        if self.contexts.task == "classification":
            n_classes = self.contexts.max_classes
            codes, present = dense_labels(y, n if self.contexts.scaled else 0, n_classes)
            counts = F.one_hot(codes[:, :n], n_classes).sum(1) + 1.0
            share = torch.where(present, counts, 0.0)
            log_p = (share / share.sum(1, keepdim=True)).log()
            target = codes[:, n:]
            each = -log_p.gather(1, target.clamp_min(0))
            counted = target >= 0
            return float(each[counted].sum() / counted.sum().clamp_min(1))
        if self.contexts.scaled and n:  # no context: nothing to scale by
            mean, scale = (
                y[:, :n].mean(1, keepdim=True),
                y[:, :n].std(1, keepdim=True, correction=0),
            )
            z = (y[:, n:] - mean) / torch.where(scale > 0, scale, 1.0)
        else:
            z = y[:, n:]
        return float((0.5 * z.square() + 0.5 * math.log(2 * math.pi)).mean())

    def facts(self) -> dict[str, Any]:
        """Compute, log and references, for the model card."""
        from uq import __version__

        self._spend()
        return {
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
            "threads": torch.get_num_threads(),
            "device": self.fabric.device.type,
            "machine": platform.machine(),
            "torch": str(torch.__version__),
            "uq": __version__,
            "log": self.log,
            "reference": self.reference(),
        }

    # -- checkpoints -------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{k}": t for k, t in self.model.state_dict().items()}
        tensors |= {f"averaged.{k}": t for k, t in self.averaged.state_dict().items()}
        for i, p in enumerate(self.parameters):
            state = self.optimizer.state[p]
            for key in ("exp_avg", "exp_avg_sq"):
                moment = state[key] if state else torch.zeros_like(p)
                tensors[f"optimizer.{i}.{key}"] = moment
        return tensors

    def save(self, path: Path) -> None:
        """Write all that the run needs to go on."""
        self._spend()
        header = {
            "format": "uq-pfn-training",
            "version": 1,
            "settings": self.settings,
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "log": self.log,
            "recent": self.recent,
        }
        tensors = {k: t.detach().cpu().contiguous().clone() for k, t in self._tensors().items()}
        write_atomically({path: to_bytes(tensors, {"uq": json.dumps(header)})})

    def load(self, path: Path) -> None:
        """Go on from a file of :meth:`save`."""
        where = f"the checkpoint {str(path)!r}"
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("uq", "null"))
                tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError, RecursionError, OSError) as error:
            raise LoadError(f"{where} is damaged or something else: {error}") from error
        if not isinstance(header, dict) or header.get("format") != "uq-pfn-training":
            raise LoadError(f"{where} is not the state of a pre-training run.")
        kept = header.get("settings", {})
        if kept != self.settings:
            names = {k for k in kept | self.settings if kept.get(k) != self.settings.get(k)}
            differ = ", ".join(
                f"{k} ({kept.get(k)!r} there, {self.settings.get(k)!r} here)" for k in sorted(names)
            )
            raise ParameterError(
                f"pretrain_pfn: {where} has other settings: {differ}. Resume with its settings, or "
                "start anew with init= and the network that it wrote."
            )
        mine = self._tensors()
        if {k: t.shape for k, t in mine.items()} != {k: t.shape for k, t in tensors.items()}:
            raise LoadError(f"{where} holds tensors of other shapes than this run has.")
        device = self.fabric.device
        for prefix, module in (("model.", self.model), ("averaged.", self.averaged)):
            module.load_state_dict(
                {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            )
        self.step = int(header["step"])
        for i, p in enumerate(self.parameters):
            self.optimizer.state[p] = {
                "step": torch.tensor(float(self.step), device=device),
                **{
                    key: tensors[f"optimizer.{i}.{key}"].to(device)
                    for key in ("exp_avg", "exp_avg_sq")
                },
            }
        self.seconds = header["seconds"]
        self.cpu_seconds = header["cpu_seconds"]
        self.log, self.recent = header["log"], header["recent"]
        self._start()
