"""Prior-data fitted networks: the posterior predictive of a prior over tables, in one pass.

The network is in :mod:`uq.nn.pfn`, its priors in :mod:`uq.inference.pfn_priors`, pre-training in
:mod:`uq.inference.pfn`, views of the context in :mod:`uq.inference.pfn_posterior`. Here: what
``fit`` does with a table, and fine-tuning.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from pandas.api import types
from torch import Tensor, nn

from uq.distributions.bar import bar_loss
from uq.errors import DataError, ParameterError
from uq.inference.data import ArrayBatches
from uq.inference.pfn_posterior import PFNPosterior, choose_neighbours
from uq.inference.training import TrainingResult, cosine_schedule
from uq.models.base import Estimator, estimator
from uq.models.checks import check_number
from uq.models.documentation import documented
from uq.models.objectives import Objective, TrainingData
from uq.models.tasks import Classifier, Regressor
from uq.nn.network import probe_outputs
from uq.nn.pfn import PFN, SHIPPED, load_pfn
from uq.nn.pfn_tables import LIMITS, PFNConfig, PFNScaling

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_CLIP_NORM = 1.0
_QUERY_SHARE = 0.2
# Rows of one step of fine-tuning: as long as the contexts that networks learn from.
_STEP_ROWS = 1280
_EPOCHS = 50
_MAX_CONTEXT = 10_000
# A constant target has no scale; its predictions spread over this share of its size.
_CONSTANT_SCALE = 1e-9


class _FineTuning(Objective):
    """−log q of a random fifth of the rows given the others."""

    def __init__(
        self, network: PFN, inputs: Any, rows: tuple[Tensor, ...], n_classes: int | None, seed: int
    ) -> None:
        super().__init__()
        self.network, self.inputs, self.rows = network, inputs, rows
        self.n_classes, self.seed, self.step = n_classes, seed, 0

    _not_in_checkpoints = ("rows", "inputs")

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean over the query rows, in nats."""
        generator = torch.Generator().manual_seed(self.seed + self.step)
        self.step += 1
        order = torch.randperm(len(x), generator=generator)[:_STEP_ROWS].to(x.device)
        m = min(len(x) - 1, max(1, round(_QUERY_SHARE * len(order))))
        new, old = order[:m], order[m:]
        w = None if weight is None else weight[old]
        loss = self._nll(x[old], y[old], w, x[new], y[new])
        return loss.mean() if weight is None else (loss * weight[new]).sum() / weight[new].sum()

    def held_out_nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative log density of each row given the training rows."""
        known, target, *weight = self.rows
        return self._nll(known, target, weight[0] if weight else None, x, y)

    def _nll(
        self, x: Tensor, y: Tensor, weight: Tensor | None, queries: Tensor, answers: Tensor
    ) -> Tensor:
        config = self.network.config
        tasks = y[None] if self.n_classes is not None else y.T
        b = len(tasks)
        x, queries = (self.inputs(t).expand(b, -1, -1) for t in (x, queries))
        w = None if weight is None else weight.expand(b, -1)
        scaling = PFNScaling.fit(x, tasks, config, w)
        rows = scaling.features(x), scaling.targets(tasks), scaling.features(queries)
        logits = self.network(*rows, w)
        if self.n_classes is not None:
            logits = logits[0, :, : self.n_classes].float()
            return nn.functional.cross_entropy(logits, answers, reduction="none")
        borders: Any = self.network.borders
        loss = bar_loss(logits.float(), borders.float(), scaling.targets(answers.T).float())
        return (loss + scaling.y_scale.log()).sum(0)


@estimator
class _PFN(Estimator):
    hidden: Sequence[int] = (64,)
    prior: str | Path = ""
    n_views: int = 4
    localize: int | Literal["auto"] | None = None
    max_context: int | None = _MAX_CONTEXT
    fine_tune: bool = False
    batch_size: int | None = None
    lr: float = 1e-4
    patience: int | Literal["auto"] | None = "auto"

    prior_: dict[str, str] = field(init=False)
    config_: dict[str, Any] = field(init=False)
    n_context_: int = field(init=False)
    n_inputs_: int = field(init=False)
    n_near_: int | None = field(init=False)
    categories_: dict[str, list[str]] = field(init=False)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        name = type(self).__name__
        check_number(self, "n_views", at_least=1, integer=True)
        if self.localize != "auto":
            check_number(self, "localize", at_least=1, integer=True, optional=True)
        check_number(self, "max_context", at_least=2, integer=True, optional=True)
        if not isinstance(self.fine_tune, bool | np.bool_):
            raise ParameterError(
                f"{name}: fine_tune must be True or False, got {self.fine_tune!r}."
            )
        if not isinstance(self.prior, str | Path):
            raise ParameterError(
                f"{name}: prior must be a name or a path, such as 'tabular-regression' or "
                f"'mine.safetensors', got {self.prior!r}."
            )

    # -- the prior -----------------------------------------------------------------------------

    def _forget_paths(self) -> None:
        if str(self.prior) not in SHIPPED:
            self.prior = ""

    @property
    def _task(self) -> str:
        return "classification" if isinstance(self, Classifier) else "regression"

    @property
    def _config(self) -> PFNConfig:
        return PFNConfig(**self.config_)

    def _load_prior(self) -> PFN:
        name = type(self).__name__
        if not str(self.prior):
            raise ParameterError(
                f"{name}: prior is empty. A model that is loaded from a file forgets the path of "
                "its prior: the next fit would open what the file names. Say which network it is "
                "to be: model.set_params(prior='mine.safetensors')."
            )
        try:
            network, _ = load_pfn(self.prior)
        except FileNotFoundError as error:
            raise ParameterError(f"{name}: prior: {error}") from error
        if network.config.task != self._task:
            raise ParameterError(
                f"{name}: prior={str(self.prior)!r} is a network for {network.config.task}, this "
                f"estimator is for {self._task}."
            )
        digest = hashlib.sha256()
        for tensor in network.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        self.prior_ = {"name": str(self.prior), "sha256": digest.hexdigest()}
        self.config_ = asdict(network.config)
        return network

    # -- data ----------------------------------------------------------------------------------

    @property
    def _takes_missing(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that NaN is fine, for missing."""
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    @property
    def _standardizes(self) -> bool:
        return super()._standardizes and self._config.scaled

    def _check_inputs(self, X: np.ndarray, where: str) -> None:
        super()._check_inputs(X, where)
        # A module below may take any rows to fewer features.
        most = LIMITS["max_features"]
        if self.module is None and X.shape[1] > most:
            raise DataError(
                f"{where}: X has {X.shape[1]:,} columns, a prior-data fitted network takes at most "
                f"{most:,}, in views of some at a time; choose or project columns first."
            )
        if self._config.scaled:
            return
        low, high = np.nanmin(X, initial=0.0), np.nanmax(X, initial=1.0)
        if low < 0 or high > 1:
            raise DataError(
                f"{where}: the prior {self.prior_['name']!r} has inputs in [0, 1], X goes from "
                f"{low:.4g} to {high:.4g}; rescale its columns to where the prior is to hold."
            )

    def _set_input_scale(self, scaler: Any) -> None:
        super()._set_input_scale(scaler)
        if self.x_mean_ is not None and self.x_scale_ is not None:
            # A column without a value stays what it is.
            self.x_mean_: np.ndarray | None = np.nan_to_num(self.x_mean_, nan=0.0)
            self.x_scale_: np.ndarray | None = np.nan_to_num(self.x_scale_, nan=1.0)

    def _coded(self, X: Any, *, learn: bool) -> Any:
        """Replace the text columns of a frame by codes of their categories; unseen ones are NaN."""
        if learn:
            self.categories_ = {}
        if not (hasattr(X, "columns") and hasattr(X, "iloc")):
            return X
        found = {}
        for column in X.columns:
            values = X[column]
            if not hasattr(values, "dtype"):  # two columns of one name: scikit-learn says so
                return X
            if types.is_bool_dtype(values.dtype) or types.is_numeric_dtype(values.dtype):
                continue
            known = values.notna()
            text = values.astype(object).where(known).map(str, na_action="ignore")
            if learn:
                if types.is_datetime64_any_dtype(values.dtype):
                    raise DataError(
                        f"{type(self).__name__}.fit: column {column!r} holds dates; say what of "
                        "them matters (year, month, days since …) in a column of numbers."
                    )
                ordered = isinstance(values.dtype, types.CategoricalDtype)
                labels = values.cat.categories if ordered else sorted(set(text[known]))
                self.categories_[str(column)] = [str(label) for label in labels]
            codes = {label: i for i, label in enumerate(self.categories_.get(str(column), []))}
            found[column] = text.map(codes).astype(float)
        return X.assign(**found) if found else X

    def _split(self, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Hold rows out for fine-tuning alone; afterwards they join the context."""
        if not self.fine_tune:
            return np.arange(len(y)), np.arange(0)
        return super()._split(y, seed)

    # -- fit -----------------------------------------------------------------------------------

    def fit(
        self,
        X: Any,
        y: Any = None,
        sample_weight: ArrayLike | None = None,
        *,
        resume: bool = False,
    ) -> Self:
        """Store and encode the context; no gradient, unless ``fine_tune``.

        Parameters
        ----------
        X : array-like, DataFrame or Tensor of shape (n, d), or torch Dataset or DataLoader
            Context rows; NaN is a missing value, text columns of a frame are categories.
        y : array-like of shape (n,) or (n, m)
            Labels, or real targets in any unit.
        sample_weight : array-like of shape (n,), optional
            Weight of each row, exactly as if the row were there that many times.
        resume : bool, default=False
            Go on with fine-tuning from what is in ``checkpoint_dir``.

        Returns
        -------
        self

        Raises
        ------
        DataError, ValueError
            If the data has infinite values, a wrong shape, fewer than two rows or one class only.
        ParameterError
            If an argument is out of its range, there is no such prior, or it is for another task.
        LoadError
            If the file of the prior is damaged or something else.
        """
        self._check_parameters()
        self._loaded = self._load_prior()
        try:
            with np.errstate(invalid="ignore"):  # the mean of a column without a value
                return super().fit(self._coded(X, learn=True), y, sample_weight, resume=resume)
        finally:
            del self._loaded

    def _posterior_at(self, X: Any) -> tuple[Tensor, Any]:
        if hasattr(self, "categories_"):
            X = self._coded(X, learn=False)
        return super()._posterior_at(X)

    def _frozen_body(self) -> nn.Module:
        if self.module is None:
            return nn.Identity()
        body = self._body(None).eval().requires_grad_(False)
        if self._example().device.type != "meta":
            probe_outputs(body, self._example())
        return body

    @property
    def _n_classes(self) -> int | None:
        return len(self.classes_) if isinstance(self, Classifier) else None

    def _make(
        self, network: PFN, body: nn.Module, rows: tuple[Tensor, ...], seed: int
    ) -> PFNPosterior:
        return PFNPosterior(
            network,
            *rows,
            n_classes=self._n_classes,
            n_views=self.n_views,
            n_near=self.n_near_,
            max_context=self.max_context,
            body=body,
            seed=seed,
        )

    def _build_posterior(self) -> PFNPosterior:
        config = self._config
        borders = torch.zeros(config.n_outputs + 1) if config.task == "regression" else None
        targets = () if self._n_classes is not None else (len(self.y_mean_),)
        n, dtype = self.n_context_, self._dtype
        labels = torch.long if self._n_classes is not None else dtype
        x = torch.zeros(n, self.n_inputs_, dtype=dtype)
        y, weight = torch.zeros(n, *targets, dtype=labels), torch.zeros(n, dtype=dtype)
        return self._make(PFN(config, borders).to(dtype), self._frozen_body(), (x, y, weight), 0)

    def _infer(self, data: TrainingData) -> tuple[PFNPosterior, TrainingResult]:
        device = data.fabric.device
        network = self._loaded.to(device, self._dtype)
        body = self._frozen_body().to(device)
        kept, held = self._rows(data, body)
        self.n_near_ = None
        result = TrainingResult(stop_reason="untuned", best_epoch=1)
        if self.fine_tune:
            network, result = self._tune(network, kept, held, data)
        rows = tuple(torch.cat(ts) for ts in zip(kept, held, strict=True)) if held else kept
        self.n_context_, self.n_inputs_ = rows[0].shape
        if self.max_context == _MAX_CONTEXT < self.n_context_:  # nobody chose it
            warnings.warn(
                f"{type(self).__name__}: each view takes a random {_MAX_CONTEXT:,} of the "
                f"{self.n_context_:,} rows, as the cost grows with their square; max_context says "
                "how many, None takes all.",
                stacklevel=4,
            )
        if self.localize is not None and not isinstance(self.localize, str):
            self.n_near_ = int(self.localize)
        posterior = self._make(network, body, rows, data.seeds.predict)
        if self.localize == "auto":
            posterior.n_near = self.n_near_ = choose_neighbours(posterior)
        posterior.views()
        return posterior, result

    def _rows(
        self, data: TrainingData, body: nn.Module
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        """Features, targets and weights of the rows to learn from, and of those held out."""
        batches = data.batches
        parts = [batches.tensors] if isinstance(batches, ArrayBatches) else list(batches)
        tensors = [torch.cat(ts) for ts in zip(*parts, strict=True)]
        factor = data.n_effective / len(tensors[0])  # weights come with mean 1
        with torch.no_grad():

            def ready(x: Tensor, y: Tensor, weight: Tensor | None = None) -> tuple[Tensor, ...]:
                features = torch.cat([body(rows).flatten(1) for rows in x.split(4096)])
                w = torch.ones_like(features[:, 0]) if weight is None else weight * factor
                return features, y, w

            return ready(*tensors), None if data.held_out is None else ready(*data.held_out)

    def _tune(
        self,
        loaded: PFN,
        kept: tuple[Tensor, ...],
        held: tuple[Tensor, ...] | None,
        data: TrainingData,
    ) -> tuple[PFN, TrainingResult]:
        """Fine-tune a copy of the network; keep the one given where held-out rows prefer it."""
        n_classes = self._n_classes
        if n_classes is not None and n_classes > loaded.config.n_outputs:
            raise ParameterError(
                f"{type(self).__name__}: fine_tune=True is for as many classes as the network has "
                f"({loaded.config.n_outputs}), y has {n_classes}; leave it at False."
            )
        if not bool((kept[2] != 1).any()):
            kept, held = kept[:2], None if held is None else held[:2]
        view = PFNPosterior(
            loaded, kept[0], kept[1], torch.ones_like(kept[0][:, 0]), n_classes=n_classes
        ).views()[0]
        network = copy.deepcopy(loaded).requires_grad_(True)
        objective = _FineTuning(network, view.inputs, kept, n_classes, data.seeds.noise)
        whole = ArrayBatches(
            *kept, batch_size=self.batch_size, generator=data.generator(data.seeds.shuffle)
        )
        tuning = TrainingData(
            whole, data.n_effective, held, data.fabric, data.seeds, data.checkpoints
        )
        before = None if held is None else self._mean_nll(objective, held)
        optimizer = torch.optim.Adam(network.parameters(), self.lr, fused=True)
        result = self._train(
            objective,
            optimizer,
            tuning,
            schedule=cosine_schedule(self._n_epochs(tuning) * len(whole)),
            clip_norm=_CLIP_NORM,
        )
        network = network.requires_grad_(False).eval()
        if before is not None and held is not None and self._mean_nll(objective, held) > before:
            network = loaded
        return network, result

    @staticmethod
    def _mean_nll(objective: _FineTuning, held: tuple[Tensor, ...]) -> float:
        x, y, *weight = held
        with torch.no_grad():
            nll = objective.held_out_nll(x, y)
        return float((nll * weight[0]).sum() / weight[0].sum() if weight else nll.mean())

    def _n_epochs(self, data: TrainingData) -> int:
        return self.max_epochs or _EPOCHS


_OWN = """\
prior : str or Path, default="tabular-{task}"
        Name of weights that come with the package, or path of a file that ``uq pretrain`` or
        :func:`uq.inference.pretrain_pfn` wrote. The network's prior is the prior of the analysis:
        see its model card.
    n_views : int, default=4
        Views of the context that are averaged: columns as they are, and each after a Yeo-Johnson
        transform in half of them{views}. 1 takes all as it is.
    localize : int, "auto" or None, default=None
        Answer each query from its so many nearest context rows. It helps where the prior fits badly
        and rows are many, and costs where it fits; "auto" decides by the log score of a fifth of
        the rows.
    max_context : int or None, default=10_000
        Each view takes a random subset of so many rows of a longer context: networks extrapolate to
        contexts longer than they were trained on, but the cost grows with the square of the rows.
        None takes all. A fit that is cut by the default warns.
    fine_tune : bool, default=False
        Train the network on the rows: random fifths given the rest, by ``max_epochs`` (50), ``lr``,
        ``batch_size`` (None: all rows, up to 1,280 a step), ``patience`` and ``callbacks``, which
        mean nothing otherwise. Where the tenth held out prefers the network as it was, it is kept.
    module : torch.nn.Module or callable, optional
        Network to put below: a trained module, copied and not trained further, or a factory
        ``f(d_in, d_out)``. Its outputs (n, D) are the columns. With a module, inputs are taken as
        they are."""

_FITTED = """\
prior_ : dict
        "name" and "sha256" of the weights.
    n_context_ : int
        Rows of the context.
    n_near_ : int or None
        Nearest rows that answer a query; None for all.
    categories_ : dict of str to list of str
        Categories of each text column of a frame, in the order of their codes."""

_NOTES = """\
What happens beyond what a network was trained on (``config_`` says on what):

    - More columns: views take the leading principal components (gaps as means); up to twice as
      many, every other view takes a random subset of the columns.{more}
    - A column that is missing or constant in all rows is left out.
    - Two rows are the least; infinite values are refused.
    - A text column of a frame is coded by its sorted (or categorical) labels, unseen ones count as
      missing. Other encodings are for :class:`uq.TableModel`.
    - A prior without scaling ("gp") takes inputs in [0, 1] and targets as they are.

    A file that :meth:`save` writes holds the context and the weights: loading needs no other.

    There is no split into aleatoric and epistemic uncertainty: the network gives the predictive
    distribution alone, and the views are no draws from a posterior."""


@documented(lr="1e-4", patience='"auto"')
@estimator
class PFNClassifier(_PFN, Classifier):
    """Classify by a pre-trained network in one pass: the posterior predictive of a prior on tables.

    Parameters
    ----------
    {own_pfn}
    hidden : tuple of int, default=(64,)
        The last number is d_out for a ``module`` that is a factory.
    max_epochs, batch_size, lr
        Of fine-tuning.
    {tail}

    Attributes
    ----------
    {own_fitted}
    {fitted}
    classes_ : ndarray of shape (n_classes,)
        Labels.

    Notes
    -----
    {notes}

    References
    ----------
    S. Müller et al., "Transformers Can Do Bayesian Inference", ICLR 2022, arXiv 2112.10510;
    N. Hollmann et al., "TabPFN", ICLR 2023, arXiv 2207.01848; T. Nagler, "Statistical Foundations
    of Prior-Data Fitted Networks", ICML 2023, arXiv 2305.11097, for ``localize``.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> from uq import PFNClassifier
    >>> X, y = load_wine(return_X_y=True)
    >>> model = PFNClassifier(random_state=0).fit(X[::2], y[::2])
    >>> bool(model.score(X[1::2], y[1::2]) > 0.9)
    True
    """

    prior: str | Path = "tabular-classification"


@documented(lr="1e-4", patience='"auto"')
@estimator
class PFNRegressor(_PFN, Regressor):
    """Predict by a pre-trained network in one pass: the posterior predictive of a prior on tables.

    Parameters
    ----------
    {own_pfn}
    hidden : tuple of int, default=(64,)
        The last number is d_out for a ``module`` that is a factory.
    max_epochs, batch_size, lr
        Of fine-tuning.
    {tail}

    Attributes
    ----------
    {own_fitted}
    {fitted}

    Notes
    -----
    {notes}

    Read intervals and quantiles of a prediction rather than ``stddev`` and ``variance``: its outer
    bars reach far out, and little probability there makes a large variance.

    References
    ----------
    S. Müller et al., "Transformers Can Do Bayesian Inference", ICLR 2022, arXiv 2112.10510, for the
    network and its bars; N. Hollmann et al., Nature 637, 2025, for views; T. Nagler, "Statistical
    Foundations of Prior-Data Fitted Networks", ICML 2023, arXiv 2305.11097, for ``localize``.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from uq import PFNRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = PFNRegressor(random_state=0).fit(X[:300], y[:300])
    >>> lower, upper = model.predict_interval(X[300:], 0.9)
    >>> bool(0.8 < ((lower < y[300:]) & (y[300:] < upper)).mean() < 1)
    True
    """

    prior: str | Path = "tabular-regression"

    def _learn_target_scale(self, y: np.ndarray, weight: np.ndarray | None) -> None:
        if not self._config.scaled:
            self.y_mean_, self.y_scale_ = np.zeros(y.shape[1]), np.ones(y.shape[1])
            return
        super()._learn_target_scale(y, weight)
        constant = (y == y[:1]).all(0)
        size = _CONSTANT_SCALE * np.maximum(1.0, np.abs(self.y_mean_))
        self.y_scale_: np.ndarray = np.where(constant, size, self.y_scale_)


_CLASSES = """
    - More classes: a tree of groups in random order, whose probabilities multiply."""
_CONSTANT = """
    - A constant target is predicted within about a millionth of its size."""
for _cls, _task, _more, _views in (
    (PFNClassifier, "classification", _CLASSES, "; codes of classes in random order"),
    (PFNRegressor, "regression", _CONSTANT, "; targets likewise"),
):
    _doc = (_cls.__doc__ or "").replace("{own_pfn}", _OWN).replace("{own_fitted}", _FITTED)
    _doc = _doc.replace("{notes}", _NOTES).replace("{more}", _more).replace("{task}", _task)
    _cls.__doc__ = _doc.replace("{views}", _views)
