"""Gaussian processes: the baseline for small tables, with a network below as deep kernel learning.

A. G. Wilson, Z. Hu, R. Salakhutdinov, E. P. Xing, "Deep Kernel Learning", AISTATS 2016,
arXiv 1511.02222, for ``hidden`` and ``module``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import field, replace
from typing import Any

import torch
from torch import Tensor

from uq.errors import ParameterError
from uq.inference.data import ArrayBatches
from uq.inference.gp import GPPosterior
from uq.inference.training import TrainingResult, cosine_schedule
from uq.models.base import Estimator, estimator
from uq.models.checks import check_choice, check_number
from uq.models.documentation import documented
from uq.models.objectives import Objective, TrainingData
from uq.models.tasks import Classifier, Regressor
from uq.nn.gp import (
    KERNELS,
    ExactGP,
    GaussianProcess,
    VariationalClassification,
    VariationalRegression,
)
from uq.nn.network import probe_outputs

_HELD_OUT_DRAWS = 64
_EXACT_EPOCHS = 200
# Of the variational process: a table of one batch has settled by then.
_MOST_EPOCHS = 500


class _Objective(Objective):
    def __init__(self, posterior: GPPosterior, data: TrainingData) -> None:
        super().__init__()
        self.body, self.process = posterior.body, posterior.process
        self._posterior = [posterior]  # in a list: its parameters are here already
        self.n_effective = data.n_effective
        self._rows: list[Any] = []

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """−log marginal likelihood or −ELBO, over N."""
        process: Any = self.process
        if not isinstance(process, ExactGP):
            loss: Tensor = process.loss(self.body(x), y, self.n_effective, weight)
            return loss
        # Weights come with mean 1; their sum is to be N.
        counts = None if weight is None else weight * (self.n_effective / len(x))
        self._rows = [x, y, counts]
        return process.loss(self.body(x), y, counts) / self.n_effective

    def condition(self) -> None:
        """Give an exact process its training rows."""
        if isinstance(self.process, ExactGP):
            x, y, counts = self._rows
            self.body.eval()
            with torch.no_grad():
                self.process.condition(self.body(x), y, counts)

    def held_out_nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative log predictive density of each row."""
        self.condition()
        dist: Any = self._posterior[0](x, _HELD_OUT_DRAWS)
        return -(dist.joint() if y.ndim == 2 else dist).log_prob(y.cpu()).to(y.device)


@estimator
class _GP(Estimator):
    hidden: Sequence[int] = ()
    lr: float = 0.1
    batch_size: int | None = 256
    kernel: str = "matern52"
    n_inducing: int = 128

    n_anchors_: int = field(init=False)
    exact_: bool = field(init=False)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_choice(self, "kernel", KERNELS)
        check_number(self, "n_inducing", at_least=1, integer=True)
        if self.precision == "bf16-mixed":
            raise ParameterError(
                f"{type(self).__name__}: precision 'bf16-mixed' cannot factorise a covariance; "
                "leave it at its default."
            )

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64  # covariances of near rows are singular in less

    @abstractmethod
    def _process(self, n_features: int) -> GaussianProcess:
        """Process with ``n_anchors_`` anchors."""

    def _build_posterior(self, seed: int = 0) -> GPPosterior:
        body = self._body(None)
        if self.module is None and not self.hidden:
            n_features = self.input_shape_[0]
        else:
            n_features = probe_outputs(body, self._example()).shape[1]
        return GPPosterior(body, self._process(n_features), seed)

    def _infer(self, data: TrainingData) -> tuple[GPPosterior, TrainingResult]:
        data, rows = self._plan(data)
        posterior = self._build_posterior(data.seeds.predict).to(data.fabric.device)
        process: Any = posterior.process
        if not isinstance(process, ExactGP):
            posterior.body.eval()
            with torch.no_grad():
                process.anchors.copy_(posterior.body(rows))
        objective = _Objective(posterior, data)
        optimizer = torch.optim.Adam(
            [p for p in objective.parameters() if p.requires_grad], self.lr, fused=True
        )
        schedule = cosine_schedule(self._n_epochs(data) * len(data.batches))
        result = self._train(objective, optimizer, data, schedule=schedule)
        if result.best_epoch > 0:
            objective.condition()
        return posterior, result

    def _plan(self, data: TrainingData) -> tuple[TrainingData, Tensor]:
        """Decide how many anchors there are; return data in their batches, and first anchors."""
        batches = data.batches
        parts = [batches.tensors] if isinstance(batches, ArrayBatches) else list(batches)
        tensors = [torch.cat(ts) for ts in zip(*parts, strict=True)]
        n = len(tensors[0])
        generator = data.generator(data.seeds.noise)
        self.exact_ = self._is_exact_for(n)
        if self.exact_:
            self.n_anchors_ = n
            whole = ArrayBatches(*tensors, batch_size=None, generator=generator)
            return replace(data, batches=whole), tensors[0]
        # Rows that are there twice would make the covariance of the inducing points singular.
        distinct = tensors[0].flatten(1).unique(dim=0).view(-1, *tensors[0].shape[1:])
        order = torch.randperm(len(distinct), generator=generator, device=distinct.device)
        self.n_anchors_ = min(self.n_inducing, len(distinct))
        return data, distinct[order[: self.n_anchors_]]

    def _is_exact_for(self, n: int) -> bool:
        """Whether n rows are few enough for the exact process."""
        return False

    def _n_epochs(self, data: TrainingData) -> int:
        if self.max_epochs is not None:
            return self.max_epochs
        if self.exact_:
            return _EXACT_EPOCHS
        return min(_MOST_EPOCHS, max(20, math.ceil(2000 / len(data.batches))))


_OWN = """\
kernel : {"rbf", "matern12", "matern32", "matern52"}, default="matern52"
        Covariance function, with a scale and a length scale for each feature. Matérn 5/2 assumes
        two derivatives where "rbf" assumes all, which real targets rarely have.
    n_inducing : int, default=128
        Inducing points of the variational process; its cost per row grows with their square."""


@documented(lr="0.1", outputs="features (n, D), on which the kernel works (deep kernel learning)")
@estimator
class GPClassifier(_GP, Classifier):
    """Classify by variational Gaussian processes, one for each class, and a softmax.

    Parameters
    ----------
    {shared}
    {own_gp}
    n_samples : int, default=64
        Draws of the logits that a prediction mixes.
    {tail}

    Attributes
    ----------
    {fitted}
    exact_ : bool
        False: the classifier is variational.
    n_anchors_ : int
        Inducing points.
    classes_ : ndarray of shape (n_classes,)
        Labels.

    Notes
    -----
    Here ``hidden=()`` is the default: the kernel works on the inputs. Other widths put an MLP below
    it, trained with it. All is computed in float64, whatever ``precision``; by default training
    takes about 2,000 steps, within 20 to 500 epochs.

    References
    ----------
    J. Hensman, A. Matthews, Z. Ghahramani, AISTATS 2015, arXiv 1411.2005; deep kernels:
    A. G. Wilson et al., AISTATS 2016, arXiv 1511.02222.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from uq import GPClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> model = GPClassifier(n_inducing=20, max_epochs=20, random_state=0).fit(X, y)
    >>> model.predict_proba(X[:2]).shape
    (2, 3)
    """

    n_samples: int = 64

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number(self, "n_samples", at_least=1, integer=True)

    def _process(self, n_features: int) -> GaussianProcess:
        return VariationalClassification(
            self.kernel, n_features, len(self.classes_), self.n_anchors_
        )


@documented(lr="0.1", outputs="features (n, D), on which the kernel works (deep kernel learning)")
@estimator
class GPRegressor(_GP, Regressor):
    """Predict by a Gaussian process: exact up to ``max_exact`` rows, variational beyond.

    Parameters
    ----------
    {shared}
    {own_gp}
    max_exact : int, default=2000
        Rows up to which the process is exact: memory grows with their square, time with their cube.
    {tail}

    Attributes
    ----------
    {fitted}
    exact_ : bool
        Whether the process is exact.
    n_anchors_ : int
        Training rows that the exact process keeps, or inducing points.

    Notes
    -----
    Scales, length scales and noise maximise the marginal likelihood (its bound, where variational)
    by Adam; the exact process takes all rows at each of its 200 steps, whatever ``batch_size``.
    Several targets are independent processes. See :class:`GPClassifier` on ``hidden``,
    ``precision`` and the variational process's steps.

    References
    ----------
    C. E. Rasmussen, C. K. I. Williams, MIT Press 2006, eqs. 2.23-2.30; J. Hensman, N. Fusi,
    N. Lawrence, UAI 2013, arXiv 1309.6835.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from uq import GPRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = GPRegressor(max_epochs=30, random_state=0).fit(X[:100], y[:100])
    >>> bool((model.predict_distribution(X).epistemic > 0).all())
    True
    """

    max_exact: int = 2000

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number(self, "max_exact", at_least=0, integer=True)

    def _is_exact_for(self, n: int) -> bool:
        return n <= self.max_exact

    def _process(self, n_features: int) -> GaussianProcess:
        kind = ExactGP if self.exact_ else VariationalRegression
        return kind(self.kernel, n_features, len(self.y_mean_), self.n_anchors_)


for _cls in (GPClassifier, GPRegressor):
    _cls.__doc__ = (_cls.__doc__ or "").replace("{own_gp}", _OWN)
