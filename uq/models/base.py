"""The template that every estimator fills in.

``fit`` reads the data, standardises it, seeds every source of randomness and hands tensors to the
method's ``_infer``, which returns a posterior; ``predict_distribution`` calls that posterior and
puts the answer back on the user's scale. A method writes ``_infer`` and ``_build_posterior``.
"""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, dataclass_transform

import numpy as np
import torch
from sklearn.base import BaseEstimator, is_classifier
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import (
    _check_sample_weight,
    check_is_fitted,
    validate_data,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from uq.data import suggest
from uq.distributions import Predictive
from uq.errors import DataError, ParameterError
from uq.inference.checkpoints import Checkpoints, describe_run
from uq.inference.data import ArrayBatches, ChunkBatches, LoaderBatches
from uq.inference.posterior import Posterior
from uq.inference.training import (
    PRECISIONS,
    TrainingResult,
    TrainingState,
    isolated_rng,
    make_fabric,
    train,
)
from uq.models.checks import (
    advice,
    check_choice,
    check_finite,
    check_hidden,
    check_is_data,
    check_number,
    seed_of,
)
from uq.models.objectives import Objective, Seeds, TrainingData
from uq.nn.bodies import MLP
from uq.nn.likelihoods import Likelihood
from uq.nn.network import Network, check_width
from uq.streams import RowChunks, array_chunks, row_batches
from uq.threads import turns

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from numpy.typing import ArrayLike

_HELD_OUT_ROWS = 8192
# Steps of a fit and rows of each, where epochs are not given.
_STEPS, _ROWS = 5000, 64


def _auto_patience(n_epochs: int) -> int:
    """Epochs without a better held-out score after which ``patience="auto"`` stops."""
    # Beyond 1000 epochs there are few rows: an epoch is few steps, and the score is noisy.
    return max(20, n_epochs // (5 if n_epochs > 1000 else 10))


# Parameters that do not change the result: a fit may be resumed with others.
_ASIDE = (
    "callbacks",
    "checkpoint_dir",
    "checkpoint_every",
    "device",
    "n_jobs",
    "strategy",
    "verbose",
)
# A memory-mapped array of this size is read in chunks; a smaller one is like any other array.
_LARGE_BYTES = 1 << 28

Callback = Callable[[TrainingState], Any]
T = TypeVar("T")


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
def estimator(cls: type[T]) -> type[T]:
    """Make a class an estimator: its fields are the arguments of its constructor.

    They are stored exactly as given, which is what scikit-learn asks for. In a class's bases the
    method goes before the task, so that the method's defaults win.
    """
    made = dataclass(kw_only=True, eq=False, repr=False)(cls)
    store = made.__init__
    known = list(inspect.signature(store).parameters)[1:]

    @wraps(store)  # scikit-learn reads the signature through it
    def __init__(self: Any, *args: Any, **parameters: Any) -> None:
        for name in parameters:
            if name not in known:
                owner = type(self).__name__
                raise TypeError(f"{owner} has no parameter {name!r}{suggest(name, known)}")
        store(self, *args, **parameters)

    made.__init__ = __init__  # type: ignore[method-assign]
    return made


@estimator
class Estimator(BaseEstimator, ABC):
    """Shared by all estimators: data, seeds, training and prediction."""

    module: Any = None
    hidden: Sequence[int] = (64, 64)
    max_epochs: int | None = None
    batch_size: int | None = 64
    lr: float = 3e-3
    patience: int | Literal["auto"] | None = None
    device: str = "auto"
    precision: str = "32-true"
    strategy: str = "auto"
    random_state: Any = None
    callbacks: Sequence[Callback] = ()
    checkpoint_dir: str | Path | None = None
    checkpoint_every: int | str = "30s"
    verbose: int = 0

    posterior_: Posterior = field(init=False)
    params_: dict[str, Any] = field(init=False)
    input_shape_: tuple[int, ...] = field(init=False)
    x_mean_: np.ndarray | None = field(init=False)
    x_scale_: np.ndarray | None = field(init=False)
    history_: dict[str, list[float]] = field(init=False)
    stop_reason_: str = field(init=False)
    n_epochs_: int = field(init=False)

    # -- what a method writes --------------------------------------------------------------

    @abstractmethod
    def _infer(self, data: TrainingData) -> tuple[Posterior, TrainingResult]:
        """Find the posterior."""

    @abstractmethod
    def _build_posterior(self) -> Posterior:
        """Return a posterior of the right shapes, to load saved weights into."""

    def _forget_paths(self) -> None:
        """Drop arguments, read from a model's file, that would have a fit open other files."""

    def _check_parameters(self) -> None:
        """Check the constructor's arguments; methods extend it by their own."""
        check_hidden(self)
        check_number(self, "max_epochs", at_least=1, integer=True, optional=True)
        check_number(self, "batch_size", at_least=1, integer=True, optional=True)
        check_number(self, "lr", above=0, below=math.inf)
        if self.patience != "auto":
            check_number(self, "patience", at_least=1, integer=True, optional=True)
        check_number(self, "verbose", at_least=0, integer=True)
        check_choice(self, "precision", PRECISIONS)
        if not isinstance(self.device, str):
            raise ParameterError(
                f"{type(self).__name__}: device must be a string such as 'auto', 'cpu' or "
                f"'cuda:1', got {self.device!r}."
            )
        if not isinstance(self.checkpoint_dir, str | Path | None):
            raise ParameterError(
                f"{type(self).__name__}: checkpoint_dir must be a folder or None, got "
                f"{self.checkpoint_dir!r}."
            )
        if not isinstance(self.callbacks, Sequence) or not all(map(callable, self.callbacks)):
            raise ParameterError(
                f"{type(self).__name__}: callbacks must be a sequence of functions, got "
                f"{self.callbacks!r}."
            )
        if self.module is not None and not callable(self.module):
            raise ParameterError(
                f"{type(self).__name__}: module must be a torch.nn.Module, a function "
                f"f(d_in, d_out) that makes one, or None, got {self.module!r}."
            )

    # -- what classifier and regressor write -----------------------------------------------

    @abstractmethod
    def _likelihood(self) -> Likelihood:
        """Likelihood for the targets that were fitted."""

    @abstractmethod
    def _check_targets(self, y: np.ndarray) -> np.ndarray:
        """Check ``y`` and learn its classes or shape; return positions (n,) or reals (n, m)."""

    @abstractmethod
    def _learn_target_scale(self, y: np.ndarray, weight: np.ndarray | None) -> None:
        """Learn the scale of the rows to train on; nothing for classes."""

    @abstractmethod
    def _scale_targets(self, y: np.ndarray) -> np.ndarray:
        """What the network is trained on, from what ``_check_targets`` returned."""

    @abstractmethod
    def _encode_targets(self, y: np.ndarray) -> np.ndarray:
        """What the network is trained on, from the user's targets."""

    @abstractmethod
    def _user_scale(self, dist: Any) -> Predictive:
        """Put a predictive distribution on the user's scale."""

    # -- fit -------------------------------------------------------------------------------

    def fit(
        self,
        X: Any,
        y: Any = None,
        sample_weight: ArrayLike | None = None,
        *,
        resume: bool = False,
    ) -> Self:
        """Fit the model.

        Parameters
        ----------
        X : array-like, DataFrame or Tensor of shape (n, d), or torch Dataset or DataLoader
            Training inputs. More axes are allowed with ``module``. A Dataset or DataLoader yields
            (x, y) and leaves ``y`` at None. A DataLoader keeps its own batches, an
            IterableDataset its order, and a ``numpy.memmap`` above 256 MB stays on the disk; these
            hold no rows out for ``patience``.
        y : array-like of shape (n,) or (n, m)
            Labels (numbers, strings or booleans), or real targets in any unit.
        sample_weight : array-like of shape (n,), optional
            Weight of each row, as if the row were there that many times: their sum is the N of the
            likelihood, so weights that sum to 1 leave little but the prior. Not for a Dataset.
        resume : bool, default=False
            Go on from what is in ``checkpoint_dir``, if there is anything, to the same bits that
            an undisturbed fit gives. The data and the parameters must be the same.

        Returns
        -------
        self

        Raises
        ------
        DataError, ValueError
            If the data has NaN or infinity, a wrong shape, fewer than two rows or one class only.
        ParameterError
            If a constructor argument is out of its range, or ``module`` does not fit the data.
        NonFiniteLossError
            If the loss ran off. The last good weights are kept: the estimator can predict.

        Notes
        -----
        Fits in several threads run one after another: PyTorch's random generator belongs to the
        whole process. Use processes (joblib) for fits side by side.
        """
        self._check_parameters()
        if self.strategy != "auto" and not self._trains_in_processes:
            raise ParameterError(
                f"{type(self).__name__}: strategy must be 'auto': this method trains in one "
                f"process, got {self.strategy!r}."
            )
        fabric = make_fabric(self.device, self.precision, self.strategy)
        root = seed_of(self)
        check_is_data(f"{type(self).__name__}.fit", X=X, y=y, sample_weight=sample_weight)
        checkpoints = self._open_checkpoints(root, resume, fabric)
        if checkpoints is not None:
            root = checkpoints.run["seed"]
        words = np.random.SeedSequence(root).generate_state(5)
        seeds = Seeds(*(int(w) for w in words))
        with isolated_rng(seeds.init, fabric.device):
            if _is_larger_than_memory(X) and sample_weight is None:
                X, y = array_chunks(X, y), None
            if isinstance(X, Dataset | DataLoader):
                data = self._read_dataset(X, y, sample_weight, fabric, seeds)
            elif isinstance(X, RowChunks):
                data = self._read_chunks(X, y, sample_weight, fabric, seeds)
            else:
                data = self._read_arrays(X, y, sample_weight, fabric, seeds)
            if checkpoints is not None:
                checkpoints.check_data(data.fingerprint())
                data = replace(data, checkpoints=checkpoints)
            posterior, result = self._infer(data)
        if result.error is not None and result.best_epoch == 0:
            raise result.error  # nothing was learned that could be kept
        self.params_ = self.get_params(deep=False)
        self.posterior_ = posterior.eval()
        self.history_ = result.history
        self.stop_reason_ = result.stop_reason
        self.n_epochs_ = len(result.history["train_loss"])
        if result.error is not None:
            raise result.error
        return self

    def _open_checkpoints(self, root: int, resume: bool, fabric: Fabric) -> Checkpoints | None:
        if self.checkpoint_dir is None:
            if resume:
                raise ParameterError(
                    f"{type(self).__name__}.fit: resume=True needs checkpoint_dir, the folder that "
                    "the fit before wrote to."
                )
            return None
        params = {k: v for k, v in self.get_params(deep=False).items() if k not in _ASIDE}
        run = describe_run(type(self).__name__, params, root)
        folder = Path(self.checkpoint_dir)
        if fabric.world_size > 1:
            folder /= f"process-{fabric.global_rank}"
        return Checkpoints(folder, self.checkpoint_every, resume=resume, run=run)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "64-true" else torch.float32

    @property
    def _takes_any_rows(self) -> bool:
        """Whether rows may be images or other than vectors: a network of the user's reads them."""
        return self.module is not None

    @property
    def _takes_missing(self) -> bool:
        """Whether inputs may be NaN, for missing."""
        return False

    def _check_inputs(self, X: np.ndarray, where: str) -> None:
        """Raise a DataError that points at the first value that cannot be used."""
        values = np.where(np.isnan(X), 0, X) if self._takes_missing else X
        check_finite(values, where, getattr(self, "feature_names_in_", None))

    @property
    def _trains_in_processes(self) -> bool:
        """Whether averaging the gradients of several processes is all that the method needs."""
        return False

    def _n_held_out(self, n: int) -> int:
        """How many of n rows early stopping watches."""
        # A score on a handful of rows would choose the epoch by chance.
        return max(1, round(0.1 * n), min(20, round(0.3 * n)))

    @property
    def _standardizes(self) -> bool:
        return len(self.input_shape_) == 1 and not isinstance(self.module, nn.Module)

    def _read_arrays(
        self, X: Any, y: Any, sample_weight: Any, fabric: Fabric, seeds: Seeds
    ) -> TrainingData:
        name = type(self).__name__
        X = as_numpy(X)
        with advice(f"{name}.fit"):
            X, y = validate_data(
                self,
                X,
                as_numpy(y),
                dtype=self._input_dtype(X),
                allow_nd=self._takes_any_rows,
                ensure_all_finite=False,
                multi_output=not is_classifier(self),
            )
        self._check_inputs(X, f"{name}.fit")
        self.input_shape_ = tuple(int(side) for side in X.shape[1:])
        weight = None
        if sample_weight is not None:
            weight = _check_sample_weight(sample_weight, X, dtype=np.float64)
            if (weight < 0).any() or not weight.any():
                raise DataError(f"{name}.fit: sample_weight must be >= 0 and not all zero.")
            # A row of weight 0 is a row that is not there.
            X, y, weight = X[weight > 0], y[weight > 0], weight[weight > 0]
        self._need_two_rows(len(X))
        y = self._check_targets(y)
        # The held-out rows are set aside first: no scale is learned from them.
        kept, held = self._split(y, seeds.split)
        kept_weight = None if weight is None else weight[kept]
        scaler = (
            StandardScaler().fit(X[kept], sample_weight=kept_weight) if self._standardizes else None
        )
        self._set_input_scale(scaler)
        self._learn_target_scale(y[kept], kept_weight)

        arrays = [self._input_tensor(X), torch.as_tensor(self._scale_targets(y))]
        if weight is not None and kept_weight is not None:
            arrays.append(torch.as_tensor(weight / kept_weight.mean()))
        tensors = [self._place(a, fabric.device) for a in arrays]
        n_effective = float(len(kept) if kept_weight is None else kept_weight.sum())
        shuffle = torch.Generator(fabric.device).manual_seed(seeds.shuffle)
        train_on = [t[torch.as_tensor(kept)] for t in tensors] if len(held) else tensors
        batches = ArrayBatches(*train_on, batch_size=self.batch_size, generator=shuffle)
        held_out = tuple(t[torch.as_tensor(held)] for t in tensors) if len(held) else None
        return TrainingData(batches, n_effective, held_out, fabric, seeds)

    def _read_dataset(
        self, source: Any, y: Any, sample_weight: Any, fabric: Fabric, seeds: Seeds
    ) -> TrainingData:
        name = type(self).__name__
        if y is not None or sample_weight is not None:
            raise DataError(
                f"{name}.fit: a Dataset or DataLoader yields (x, y) itself; leave y and "
                "sample_weight at None."
            )
        if isinstance(source, IterableDataset):
            source = DataLoader(source, self.batch_size or 64)  # as it comes; no row is held out
        is_loader = isinstance(source, DataLoader)
        survey = source if is_loader else DataLoader(source, self.batch_size or len(source))
        targets = self._survey(survey)
        y = self._check_targets(np.concatenate(targets))
        kept, held = np.arange(len(y)), np.arange(0)
        if not is_loader:
            kept, held = self._split(y, seeds.split)
        loader, held_out = source, None
        if not is_loader:
            size = min(self.batch_size or len(kept), len(kept))
            shuffle = torch.Generator().manual_seed(seeds.shuffle)
            rows = Subset(source, kept.tolist())
            # A last batch of one row would stop BatchNorm.
            loader = DataLoader(
                rows, size, shuffle=True, generator=shuffle, drop_last=len(kept) % size == 1 < size
            )
        scaler = StandardScaler()
        if self._standardizes:
            for x, _ in loader:
                scaler.partial_fit(as_numpy(x))
        self._set_input_scale(scaler if self._standardizes else None)
        self._learn_target_scale(y[kept], None)

        def prepare(x: Any, target: Any) -> tuple[Tensor, ...]:
            encoded = self._encode_targets(as_numpy(target))
            both = self._input_tensor(as_numpy(x)), torch.as_tensor(encoded)
            return tuple(self._place(t, fabric.device) for t in both)

        if len(held):
            rest = DataLoader(Subset(source, held.tolist()), len(held))
            held_out = prepare(*next(iter(rest)))
        n_batches = len(targets) if is_loader else len(loader)
        batches = LoaderBatches(loader, prepare, n_batches)
        return TrainingData(batches, float(len(kept)), held_out, fabric, seeds)

    def _read_chunks(
        self, source: RowChunks, y: Any, sample_weight: Any, fabric: Fabric, seeds: Seeds
    ) -> TrainingData:
        """Read rows that do not fit in memory: one pass to learn scales, then one per epoch."""
        name = type(self).__name__
        if y is not None or sample_weight is not None:
            raise DataError(f"{name}.fit: a stream yields X and y itself; leave y and weights out.")
        scaler = StandardScaler()
        targets: list[np.ndarray] = []
        for X, target in source:
            if not targets:
                self.input_shape_ = tuple(int(side) for side in X.shape[1:])
                self.n_features_in_: int = self.input_shape_[0]
                self.__dict__.pop("feature_names_in_", None)  # of an earlier fit on a DataFrame
            check_finite(X, f"{name}.fit", None)
            targets.append(np.asarray(target))
            if self._standardizes:
                scaler.partial_fit(X)
        n_rows = sum(map(len, targets))
        self._need_two_rows(n_rows)
        encoded = self._check_targets(np.concatenate(targets))
        self._set_input_scale(scaler if self._standardizes else None)
        self._learn_target_scale(encoded, None)

        def prepare(X: np.ndarray, target: np.ndarray) -> tuple[Tensor, ...]:
            both = self._input_tensor(X), torch.as_tensor(self._encode_targets(target))
            return tuple(self._place(t, fabric.device) for t in both)

        batches = ChunkBatches(source, prepare, n_rows, self.batch_size or n_rows, seeds.shuffle)
        return TrainingData(batches, float(n_rows), None, fabric, seeds)

    def _survey(self, loader: DataLoader[Any]) -> list[np.ndarray]:
        """Go through a loader once: check its batches, learn the row shape, collect targets."""
        name = type(self).__name__
        targets: list[np.ndarray] = []
        for batch in loader:
            pair = isinstance(batch, list | tuple) and len(batch) == 2
            if not pair or not all(isinstance(t, Tensor) for t in batch):
                raise DataError(
                    f"{name}.fit: a Dataset or DataLoader must yield pairs (x, y) of tensors or "
                    f"numbers, got {type(batch).__name__} "
                    f"of {[type(t).__name__ for t in batch][:3]}."
                )
            x, target = (as_numpy(t) for t in batch)
            if not targets:
                self.input_shape_ = tuple(x.shape[1:])
                if len(self.input_shape_) != 1 and not self._takes_any_rows:
                    raise ParameterError(
                        f"{name}: rows of shape {self.input_shape_} need a network; pass module=."
                    )
                self.n_features_in_ = int(self.input_shape_[0])
                self.__dict__.pop("feature_names_in_", None)  # of an earlier fit on a DataFrame
            self._check_inputs(x, f"{name}.fit")
            targets.append(target)
        self._need_two_rows(sum(map(len, targets)))
        return targets

    def _need_two_rows(self, n: int) -> None:
        if n < 2:
            raise DataError(f"{type(self).__name__}.fit needs n_samples >= 2, got n_samples = {n}.")

    def _split(self, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the rows to train on, and of the share that early stopping watches.

        Classes are split evenly; one that has a single row is trained on.
        """
        rows = np.arange(len(y))
        n_held = self._n_held_out(len(y))
        if self.patience is None:
            return rows, rows[:0]
        strata, single = None, rows[:0]
        if y.ndim == 1:
            counts = np.bincount(y)
            single = rows[counts[y] == 1]
            rows = rows[counts[y] > 1]
            strata = y[rows] if n_held >= (counts > 1).sum() > 0 else None
        if len(rows) < 2:
            return np.arange(len(y)), rows[:0]
        kept, held = train_test_split(rows, test_size=n_held, random_state=seed, stratify=strata)
        return np.sort(np.concatenate([kept, single])), np.sort(held)

    def _input_dtype(self, X: Any) -> Any:
        # Images stay in float32; a table may hold year stamps that float32 would blur
        # before they are standardised.
        if self._takes_any_rows and getattr(X, "ndim", 2) > 2:
            return np.float32
        return [np.float64, np.float32]

    def _set_input_scale(self, scaler: StandardScaler | None) -> None:
        self.x_mean_ = None if scaler is None else scaler.mean_
        self.x_scale_ = None if scaler is None else scaler.scale_

    def _input_tensor(self, X: np.ndarray, *, predicting: bool = False) -> Tensor:
        if self.x_mean_ is not None:
            X = (X - self.x_mean_) / self.x_scale_
        dtype = self.posterior_.dtype if predicting else self._dtype
        # A frame's values lie by columns, of which products round differently.
        x = torch.tensor(X, dtype=dtype).contiguous()
        if not bool((x.isfinite() | (x.isnan() & self._takes_missing)).all()):
            raise DataError(
                f"{type(self).__name__}: X holds values beyond the range of {dtype} (after "
                "standardising); rescale them or look for outliers."
            )
        return x

    def _place(self, tensor: Tensor, device: torch.device) -> Tensor:
        return tensor.to(device, self._dtype if tensor.is_floating_point() else None)

    # -- pieces for methods ----------------------------------------------------------------

    def _example(self) -> Tensor:
        return torch.zeros(2, *self.input_shape_, dtype=self._dtype)

    def _body(self, d_out: int | None, why: str = "") -> nn.Module:
        """Make a body with ``d_out`` outputs (any number for None), in the right precision."""
        shape = self.input_shape_
        if self.module is None:
            return MLP(shape[0], self.hidden, d_out).to(self._dtype)
        if isinstance(self.module, nn.Module):
            body = copy.deepcopy(self.module)
        else:
            d_in = shape[0] if len(shape) == 1 else shape
            width = d_out if d_out is not None else (self.hidden[-1] if self.hidden else 64)
            body = self.module(d_in, width)
            if not isinstance(body, nn.Module):
                raise ParameterError(
                    f"{type(self).__name__}: module(d_in, d_out) must return a torch.nn.Module, "
                    f"got {type(body).__name__}."
                )
        example = self._example()
        body = body.to(example.device, self._dtype)
        # While a file is loaded, modules are on the meta device, where not every one can run.
        if d_out is not None and example.device.type != "meta":
            check_width(body, example, d_out, why)
        return body

    def _network(self) -> Network:
        likelihood = self._likelihood()
        return Network(
            self._body(likelihood.n_outputs, self._width_reason()), likelihood.to(self._dtype)
        )

    @abstractmethod
    def _width_reason(self) -> str:
        """Why the network must have the width that it must have."""

    def _n_epochs(self, data: TrainingData) -> int:
        if self.max_epochs is not None:
            return self.max_epochs
        # More than 1000 for few rows alone: large batches of many rows are dear steps.
        most = max(1000, math.ceil(_STEPS * _ROWS / data.n_effective))
        return min(most, max(20, math.ceil(_STEPS / len(data.batches))))

    def _train(
        self,
        objective: Objective,
        optimizer: Optimizer,
        data: TrainingData,
        *,
        schedule: Callable[[int], float] | None,
        clip_norm: float | None = None,
        extra_state: Sequence[Tensor] = (),
    ) -> TrainingResult:
        """Run the training loop with this estimator's settings."""
        held_out = data.held_out
        n_epochs = self._n_epochs(data)
        patience = _auto_patience(n_epochs) if self.patience == "auto" else self.patience

        def held_out_loss() -> float:
            assert held_out is not None
            x, y, *w = held_out
            rows = torch.cat(
                [
                    objective.held_out_nll(*part).double()
                    for part in zip(x.split(_HELD_OUT_ROWS), y.split(_HELD_OUT_ROWS), strict=True)
                ]
            )
            return float((rows * w[0]).sum() / w[0].sum() if w else rows.mean())

        return train(
            objective,
            data.batches,
            optimizer,
            fabric=data.fabric,
            max_epochs=n_epochs,
            schedule=schedule,
            held_out_loss=None if held_out is None else held_out_loss,
            patience=None if held_out is None else patience,
            clip_norm=clip_norm,
            extra_state=extra_state,
            callbacks=self.callbacks,
            checkpoint=data.stage(),
            verbose=self.verbose,
            description=type(self).__name__,
        )

    # -- predict ---------------------------------------------------------------------------

    def _posterior_at(self, X: Any) -> tuple[Tensor, Any]:
        """Check ``X``; return it as the posterior takes it, and its index."""
        check_is_fitted(self)
        if isinstance(X, Dataset | DataLoader):
            raise DataError(
                f"{type(self).__name__}: predictions take the inputs alone, as an array or tensor, "
                f"not a {type(X).__name__}."
            )
        index = getattr(X, "index", None) if hasattr(X, "iloc") else None
        check_is_data(type(self).__name__, X=X)
        X = as_numpy(X)
        with advice(type(self).__name__):
            X = validate_data(
                self,
                X,
                reset=False,
                dtype=self._input_dtype(X),
                allow_nd=self._takes_any_rows,
                ensure_all_finite=False,
            )
        if tuple(X.shape[1:]) != tuple(self.input_shape_):
            raise DataError(
                f"{type(self).__name__}: X has rows of shape {tuple(X.shape[1:])}, but was fitted "
                f"on rows of shape {tuple(self.input_shape_)}."
            )
        self._check_inputs(X, type(self).__name__)
        return self._input_tensor(X, predicting=True).to(self.posterior_.seed.device), index

    def predict_distribution(self, X: Any) -> Predictive:
        """Predict a distribution for each row.

        Parameters
        ----------
        X : array-like, DataFrame or Tensor of shape (n, d)
            Inputs.

        Returns
        -------
        Predictive
            Batch shape (n,), or (n, m) for 2-D targets, on the CPU, in target units; a Pyro
            distribution. Posterior draws are shared by all rows and by all calls.
        """
        x, index = self._posterior_at(X)
        if hasattr(self, "n_samples"):
            check_number(self, "n_samples", at_least=1, integer=True)
        dist = self._user_scale(self.posterior_(x, getattr(self, "n_samples", 1)))
        dist.index = index
        return dist

    def predict_batches(self, X: Any, batch_rows: int = 8192) -> Iterator[Predictive]:
        """Predict in batches, for more rows than predictions have room in memory.

        Parameters
        ----------
        X : array-like, DataFrame or Tensor of shape (n, d), or a DataLoader of inputs
            Inputs. A ``numpy.memmap`` stays on the disk.
        batch_rows : int, default=8192
            Rows predicted at once; the batches of a DataLoader are taken as they are.

        Yields
        ------
        Predictive
            What :meth:`predict_distribution` gives for the next rows: the same draws at all rows.

        Examples
        --------
        >>> import numpy as np
        >>> from uq import MAPRegressor
        >>> X = np.linspace(-1, 1, 50)[:, None]
        >>> model = MAPRegressor(max_epochs=5, random_state=0).fit(X, X[:, 0])
        >>> [len(dist.mean) for dist in model.predict_batches(X, 20)]
        [20, 20, 10]
        """
        for rows in row_batches(X, batch_rows):
            yield self.predict_distribution(rows)

    def sample_functions(self, X: Any, n: int = 10) -> np.ndarray:
        """Draw functions from the posterior and evaluate them at ``X``.

        Parameters
        ----------
        X : array-like of shape (rows, d)
            Inputs.
        n : int, default=10
            Number of functions; at most the number of draws that the posterior holds.

        Returns
        -------
        ndarray of shape (n, rows), (n, rows, m) or (n, rows, n_classes)
            Noise-free means in target units, or class probabilities. One draw is one function:
            its values at different rows belong together.
        """
        x, _ = self._posterior_at(X)
        if not isinstance(n, int | np.integer) or n < 1:
            raise ParameterError(f"sample_functions: n must be an integer >= 1, got {n!r}.")
        with turns(self.posterior_):
            values = self.posterior_.functions(x, n).double().numpy()
        return self._function_scale(values)

    @abstractmethod
    def _function_scale(self, values: np.ndarray) -> np.ndarray:
        """Put function values on the user's scale."""

    def log_score(self, X: Any, y: Any) -> float:
        """Mean log predictive density or probability of ``y``, in nats, joint over outputs."""
        return float(self._log_prob(self.predict_distribution(X), as_numpy(y)).mean())

    @abstractmethod
    def _log_prob(self, dist: Any, y: Any) -> Tensor:
        """Log predictive density of the user's targets."""

    # -- save ------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the fitted estimator to one safetensors file; read it by :func:`uq.load`.

        The file holds the parameters that were fitted, without ``callbacks``, a ``random_state``
        that is not an integer, and the code of ``module``.

        Raises
        ------
        SaveError
            If the file cannot be written; whatever was at ``path`` before is unchanged.
        """
        from uq.io import save

        check_is_fitted(self)
        save(self, path)


def _is_larger_than_memory(X: Any) -> bool:
    """Whether ``X`` is to stay on the disk."""
    return isinstance(X, np.memmap) and X.nbytes >= _LARGE_BYTES


def as_numpy(data: Any) -> Any:
    """A tensor as an array, anything else as it is."""
    if isinstance(data, Tensor):
        data = data.detach().cpu()
        return (data.float() if data.dtype == torch.bfloat16 else data).numpy()
    return data
