"""SDM: classify, and say which answers rest on training rows that the model gets right.

The activation and its loss are in :mod:`uq.nn.sdm`, the search for neighbours in
:mod:`uq.inference.sdm`, quantiles and the high-reliability region in
:mod:`uq.inference.sdm_calibration`. Here: splits, training with q and d found again after each
epoch, and the frame of :meth:`SDMClassifier.verify`.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted, column_or_1d
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from uq.errors import ParameterError
from uq.inference.data import ArrayBatches, LoaderBatches
from uq.inference.sdm import nearest_rows
from uq.inference.sdm_calibration import (
    SDMPosterior,
    Verdicts,
    check_alpha,
    rescaled_similarity,
)
from uq.inference.sdm_training import Round, Rows, SDMObjective, distinct, halves
from uq.inference.training import TrainingResult, cosine_schedule, train
from uq.models.base import as_numpy, estimator
from uq.models.checks import check_number
from uq.models.documentation import documented
from uq.models.objectives import TrainingData
from uq.models.sdm_bases import embeddings
from uq.models.tasks import Classifier
from uq.nn.bodies import MLP
from uq.nn.network import probe_outputs
from uq.nn.sdm import ExemplarAdaptor, FeatureNetwork

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike


@documented(
    lr="3e-3",
    patience='"auto"',
    outputs="features (n, D), and is trained with the rest",
    held_out="""\
Stop after this many epochs without a better SDM loss on the calibration rows; "auto" takes a
        tenth of the epochs, at least 20, and a fifth of more than 1,000. The best epoch is
        kept in any case.""",
)
@estimator
class SDMClassifier(Classifier):
    """Classify by similarity, distance and magnitude; know which answers are reliable.

    The rows are split into a support and a calibration half. A prediction rests on the logits, on
    how many of the nearest support rows in a row the model gets right (q), and on how usual the
    distance to the nearest is (d). :meth:`verify` says for each row whether it lies in the region
    where the accuracy, given any class, was at least ``alpha`` on the calibration half.

    Parameters
    ----------
    base : Module, classifier or None, default=None
        What gives the embeddings; it is trained already and never changed.

        - None: the inputs are the embeddings (or ``module`` or ``hidden`` make them).
        - torch.nn.Module: its outputs, or those of ``layer``.
        - fitted classifier of uq: the features of its network (of the first, for an ensemble; of
          one draw, for implicit or sampled weights); "penultimate" unless ``layer`` says otherwise.
        - any other fitted classifier: its log probabilities. Wrap it in scikit-learn's
          FrozenEstimator where the SDMClassifier itself is cloned (cross-validation).
    layer : str, optional
        Name of the submodule of ``base`` whose output is the embedding, or "penultimate" for what
        enters its last linear layer.
    alpha : float, default=0.95
        Accuracy of the high-reliability region given each class, in (0.5, 1].
    exemplar_dim : int, default=64
        Width of the exemplars, in which distances are taken. The paper takes 1,000, for embeddings
        of thousands of features.
    n_rounds : int, default=1
        Splits and trainings, of which the one with the lowest calibration loss is kept. Each costs
        as much as the first; the paper takes 10.
    {shared}
    {tail}

    Attributes
    ----------
    {fitted}
    classes_ : ndarray of shape (n_classes,)
        Labels.
    q_min_ : float
        Smallest rescaled similarity q' in the region; infinite where ``alpha`` is out of reach
        with this model and data: then no row is in the region. A lower alpha may do
        (``verify(X, alpha=0.9)``), or more rows of each class.
    psi_ : ndarray of shape (n_classes,)
        Smallest probability, by predicted class, in the region.
    n_support_, n_calibration_ : int
        Distinct rows in each half.

    Notes
    -----
    ``hidden`` is () here: the adaptor from embeddings to exemplars is linear. ``history_`` has
    "held_out_loss", the SDM loss on the calibration rows, mean over classes, and "mean_q" of the
    same rows: training works where the first falls and the second rises. Losses are to base 2 + q.

    Rows that are equal in inputs and label are one row of the support, with their joint weight
    elsewhere: copies would else stand on both sides of the split. d is the smallest quantile over
    the classes: one whose rows lie much closer together than those of others rejects the others.

    The predictive is one categorical distribution: SDM is not Bayesian, and says what it does not
    know by q and d instead of ``epistemic``. Where d = 0 probabilities are equal up to 1e-7, which
    keeps the predicted class the most probable.

    The region holds what it promises on the calibration rows by construction, given each true
    class, and not quite on new rows: t is chosen on the same rows. ``in_region_lower`` allows for
    sampling error by the DKW band.

    References
    ----------
    A. Schmaltz, "Similarity-Distance-Magnitude Activations", Findings of ACL 2026,
    arXiv 2509.12760: eq. 5 (activation), Algorithm 1 (region), appendix A.5 (band).

    Examples
    --------
    >>> from sklearn.datasets import load_breast_cancer
    >>> from sklearn.model_selection import train_test_split
    >>> from uq import SDMClassifier
    >>> from uq.calibration import report
    >>> X, X_new, y, y_new = train_test_split(*load_breast_cancer(return_X_y=True), random_state=0)
    >>> model = SDMClassifier(alpha=0.9, max_epochs=20, lr=0.01, random_state=0).fit(X, y)
    >>> checked = model.verify(X_new)
    >>> bool(0.2 < checked["in_region"].mean() < 1)
    True
    >>> r = report(model.predict_distribution(X_new), y_new, groups=checked["in_region"])
    >>> r.groups_frame().query("metric == 'accuracy'")[["grouping", "group"]].values.tolist()
    [['in_region', 'False'], ['in_region', 'True']]
    """

    base: Any = field(default=None, kw_only=False)
    layer: str | None = None
    alpha: float = 0.95
    exemplar_dim: int = 64
    n_rounds: int = 1
    hidden: Any = ()
    lr: float = 3e-3
    patience: int | Literal["auto"] | None = "auto"

    q_min_: float = field(init=False)
    psi_: np.ndarray = field(init=False)
    n_support_: int = field(init=False)
    n_calibration_: int = field(init=False)
    widths_: tuple[int, int] = field(init=False)

    # -- parameters ------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        super()._check_parameters()
        name = type(self).__name__
        check_alpha(name, self.alpha)
        check_number(self, "exemplar_dim", at_least=1, integer=True)
        check_number(self, "n_rounds", at_least=1, integer=True)
        if self.layer is not None and not isinstance(self.layer, str):
            raise ParameterError(f"{name}: layer must be a name or None, got {self.layer!r}.")
        known = self.base is None or isinstance(self.base, nn.Module) or self._wraps_estimator
        if not known:
            raise ParameterError(
                f"{name}: base must be a torch.nn.Module, a fitted classifier or None, got "
                f"{self.base!r}."
            )
        if isinstance(self.base, nn.Module) and self.module is not None:
            raise ParameterError(
                f"{name}: base is a network, so module must be None; widths of layers between "
                "them are hidden."
            )
        if self.base is None and self.layer is not None:
            raise ParameterError(f"{name}: layer is a part of base, which is None.")

    @property
    def _wraps_estimator(self) -> bool:
        return hasattr(self.base, "predict") and not isinstance(self.base, type)

    @property
    def _takes_any_rows(self) -> bool:
        return super()._takes_any_rows or isinstance(self.base, nn.Module)

    @property
    def _standardizes(self) -> bool:
        return super()._standardizes and not isinstance(self.base, nn.Module)

    def _split(self, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """All rows: the calibration half does what held-out rows would do."""
        return np.arange(len(y)), np.arange(0)

    # -- fit -------------------------------------------------------------------------------

    def fit(
        self,
        X: Any,
        y: Any = None,
        sample_weight: ArrayLike | None = None,
        *,
        resume: bool = False,
    ) -> Self:
        """Fit the adaptor, hold the support, and calibrate; see :meth:`uq.MAPClassifier.fit`.

        Raises
        ------
        DataError
            Beside the usual: if no class has two distinct rows, one of which is for calibration.
        NotFittedError
            If ``base`` is a classifier that is not fitted.

        Warns
        -----
        UserWarning
            If a class has no calibration row like its neighbours, so that nothing is answered.
        """
        self._check_parameters()
        super().fit(self._embed(X), y, sample_weight, resume=resume)
        posterior: Any = self.posterior_
        if sample_weight is not None:  # rows of weight 0 were taken out
            kept = torch.from_numpy(np.flatnonzero(np.asarray(sample_weight) > 0))
            rows = posterior.support_rows
            posterior.support_rows = kept.to(rows.device)[rows]
        return self

    def _infer(self, data: TrainingData) -> tuple[SDMPosterior, TrainingResult]:
        x, y, weight = _all_rows(data)
        frozen = self._frozen()
        first, weight = distinct(x, y, weight, len(self.classes_))
        self.widths_ = self._probe(frozen)
        device = data.fabric.device
        frozen.to(device)
        embedded = torch.cat([frozen(rows) for rows in x[first].split(1024)]).detach()
        rows = Rows(embedded, y[first], weight, first)
        splits, shuffle = data.generator(data.seeds.split), data.generator(data.seeds.shuffle)
        best: tuple[float, Round, TrainingResult] | None = None
        for _ in range(self.n_rounds):
            support, calibration = halves(rows.y, len(self.classes_), splits)
            self.n_support_, self.n_calibration_ = len(support), len(calibration)
            posterior = self._make_posterior(frozen, data.seeds.predict).to(device)
            this = Round(posterior, rows[support], rows[calibration])
            result = self._train_round(this, data, shuffle)
            if result.best_epoch > 0:
                loss = this.refresh()  # of the best epoch, whose weights are back
                result.history["mean_q"] = this.mean_q[: len(result.history["train_loss"])]
                if best is None or loss < best[0]:
                    best = loss, this, result
            if result.error is not None or result.stop_reason == "interrupted":
                break
        if best is None:
            return posterior, result
        _, chosen, kept = best
        kept.error = result.error
        if result.stop_reason in ("interrupted", "non_finite"):
            kept.stop_reason = result.stop_reason
        self.n_support_, self.n_calibration_ = len(chosen.support.y), len(chosen.calibration.y)
        self._warn_if_hopeless(chosen.posterior)
        region = chosen.posterior.region(self.alpha)
        self.q_min_, self.psi_ = region.q_min, region.psi.cpu().numpy()
        return chosen.posterior, kept

    def _train_round(
        self, this: Round, data: TrainingData, shuffle: torch.Generator
    ) -> TrainingResult:
        posterior, support = this.posterior, this.support
        with torch.no_grad():
            posterior.body.eval()
            posterior.head.normalise(posterior.body(support.embedded))
        # The loop reads q and d from here, where ``refresh`` writes them.
        tensors = [support.embedded, support.y, this.q, this.d]
        if bool((support.weight != 1).any()):
            weight = support.weight / support.weight.mean()
            tensors.append(weight.to(support.embedded.dtype))
        batches = ArrayBatches(*tensors, batch_size=self.batch_size, generator=shuffle)
        objective = SDMObjective(posterior.body, posterior.head)
        record: Any = objective
        record.mean_q = this.mean_q  # so that checkpoints hold it
        parameters = [p for p in objective.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, self.lr, fused=True)
        n_epochs = self._n_epochs(replace(data, batches=batches))
        patience = max(20, n_epochs // 10) if self.patience == "auto" else self.patience
        return train(
            objective,
            batches,
            optimizer,
            fabric=data.fabric,
            max_epochs=n_epochs,
            schedule=cosine_schedule(n_epochs * len(batches)),
            held_out_loss=this.refresh,
            patience=patience,
            extra_state=(this.q, this.d),
            callbacks=self.callbacks,
            checkpoint=data.stage(),
            verbose=self.verbose,
            description=type(self).__name__,
        )

    def _warn_if_hopeless(self, posterior: SDMPosterior) -> None:
        """Say where a class rules out every answer."""
        empty = [
            str(label)
            for label, cdf in zip(self.classes_, posterior.cdfs, strict=True)
            if not len(cdf.values)
        ]
        if empty:
            warnings.warn(
                f"{type(self).__name__}: no calibration row of class {', '.join(empty)} has a "
                "nearest support row that the model gets right and that agrees with its "
                "prediction. Every distance then counts as unusual: probabilities are equal, and "
                "no row is in the region. Add rows of the class, train for longer (max_epochs, "
                "lr), or leave the class out.",
                UserWarning,
                stacklevel=5,
            )

    # -- networks --------------------------------------------------------------------------

    def _frozen(self) -> nn.Module:
        """The part that is not trained."""
        if not isinstance(self.base, nn.Module):
            return nn.Identity()
        network = copy.deepcopy(self.base).to(self._example().device, self._dtype)
        return FeatureNetwork(network, self.layer).eval()

    def _own_body(self) -> nn.Module:
        """The part in front of the adaptor that is trained, if any."""
        if isinstance(self.base, nn.Module):
            return MLP(self.widths_[0], self.hidden, None).to(self._dtype)
        return self._body(None)

    def _probe(self, frozen: nn.Module) -> tuple[int, int]:
        """Widths of the embeddings and of the features."""
        width = 0
        if isinstance(self.base, nn.Module):
            width = probe_outputs(frozen, self._example(), "base").shape[1]
            return width, self.hidden[-1] if self.hidden else width
        return width, probe_outputs(self._body(None), self._example()).shape[1]

    def _make_posterior(self, frozen: nn.Module, seed: int = 0) -> SDMPosterior:
        head = ExemplarAdaptor(self.widths_[1], self.exemplar_dim, len(self.classes_))
        body, head = self._own_body(), head.to(self._dtype)
        return SDMPosterior(frozen, body, head, self.n_support_, self.n_calibration_, seed)

    def _build_posterior(self) -> SDMPosterior:
        return self._make_posterior(self._frozen())

    # -- embeddings of a fitted classifier ---------------------------------------------------

    def _embed(self, X: Any) -> Any:
        """What the adaptor takes of ``X``: itself, unless ``base`` is a classifier."""
        if self.base is None or isinstance(self.base, nn.Module):
            return X
        return embeddings(self.base, X, self.layer)

    def _posterior_at(self, X: Any) -> tuple[Tensor, Any]:
        check_is_fitted(self)
        index = getattr(X, "index", None) if hasattr(X, "iloc") else None
        x, _ = super()._posterior_at(self._embed(X))
        return x, index

    # -- verify ------------------------------------------------------------------------------

    def verify(
        self,
        X: Any,
        *,
        alpha: float | None = None,
        n_exemplars: int = 1,
        backend: Literal["torch", "faiss"] = "torch",
    ) -> pd.DataFrame:
        """Say of each row what is predicted, on which training rows, and whether to believe it.

        Parameters
        ----------
        X : array-like, DataFrame or Tensor of shape (n, d)
            Inputs.
        alpha : float, optional
            Accuracy of the region, in (0.5, 1]; by default the one of the constructor. The region
            is found again from the calibration rows; nothing is trained.
        n_exemplars : int, default=1
            How many of the nearest support rows to show.
        backend : {"torch", "faiss"}, default="torch"
            What finds them beyond the first; "faiss" needs that package.

        Returns
        -------
        pandas.DataFrame
            A row for each of ``X``, with its index, and the columns

            - prediction: label; probability: its probability; lower, upper: the same at the ends
              of the DKW band of d at level ``alpha``
            - q, d, q_prime: similarity, distance quantile, and both in one number, q'
            - distance: L2 distance to the nearest support row, in exemplar units
            - n_effective: calibration rows of the scarcest class whose q' is no larger
            - in_region: whether the row is in the high-reliability region; in_region_lower:
              whether it is at the lower end of the band, too (for decisions)
            - abstain: whether not in the region; out_of_distribution: whether q is 0
            - exemplar_index, exemplar_label, exemplar_distance: position in the data that was
              fitted, label and distance of the nearest support row; with suffixes _2, _3, … for
              the next

        Raises
        ------
        ParameterError
            If ``alpha``, ``n_exemplars`` or ``backend`` cannot be used.

        Examples
        --------
        >>> from sklearn.datasets import load_wine
        >>> from uq import SDMClassifier
        >>> X, y = load_wine(return_X_y=True)
        >>> model = SDMClassifier(max_epochs=40, random_state=0).fit(X, y)
        >>> far = model.verify(X[:1] + 1e4)
        >>> bool(far["d"].item() == 0), bool(far["abstain"].item())
        (True, True)
        """
        import pandas as pd

        alpha = self.params_["alpha"] if alpha is None else alpha
        check_alpha(f"{type(self).__name__}.verify", alpha)
        v, posterior, index = self._verdicts(X)
        region = posterior.region(alpha)
        sizes, d_low, d_high = posterior.band(v, alpha)
        lower = v.at(d_low)
        inside = region.admits(v.q_prime, v.p, v.predictions)
        inside_lower = region.admits(rescaled_similarity(v.q, lower), lower, v.predictions)
        frame = pd.DataFrame(
            {
                "prediction": self.classes_[as_numpy(v.predictions)],
                **{
                    name: as_numpy(values)
                    for name, values in {
                        "probability": v.p,
                        "lower": lower,
                        "upper": v.at(d_high),
                        "q": v.q,
                        "d": v.d,
                        "q_prime": v.q_prime,
                        "distance": v.d0,
                        "n_effective": sizes.amin(1),
                        "in_region": inside,
                        "in_region_lower": inside_lower,
                        "abstain": ~inside,
                        "out_of_distribution": v.q == 0,
                    }.items()
                },
            },
            index=index,
        )
        at, distance = v.nearest[:, None], v.d0[:, None]
        if n_exemplars != 1:
            at, distance = nearest_rows(
                v.exemplars, posterior.support, n_exemplars, backend=backend
            )
        for k in range(at.shape[1]):
            suffix = f"_{k + 1}" if k else ""
            labels = self.classes_[as_numpy(posterior.support_labels[at[:, k]])]
            frame[f"exemplar_index{suffix}"] = as_numpy(posterior.support_rows[at[:, k]])
            frame[f"exemplar_label{suffix}"] = labels
            frame[f"exemplar_distance{suffix}"] = as_numpy(distance[:, k])
        return frame

    def region_accuracy(self, X: Any, y: ArrayLike, *, alpha: float | None = None) -> pd.DataFrame:
        """Accuracy in the region, over all rows, by true class and by predicted class.

        Parameters
        ----------
        X : array-like, DataFrame or Tensor of shape (n, d)
            Inputs of held-out rows.
        y : array-like of shape (n,)
            Their labels.
        alpha : float, optional
            As for :meth:`verify`.

        Returns
        -------
        pandas.DataFrame
            Index (given, class): ("all", ""), then ("true", c) and ("predicted", c); columns n,
            n_in_region, share and accuracy. The accuracy of no row is NaN, not 0.
        """
        import pandas as pd

        labels = column_or_1d(y, warn=True)
        self._encode_targets(labels)
        checked = self.verify(X, alpha=alpha)
        predicted = checked["prediction"].to_numpy()
        inside = checked["in_region"].to_numpy()
        groups = {("all", ""): np.ones(len(labels), dtype=bool)}
        for name, of in (("true", labels), ("predicted", predicted)):
            groups |= {(name, c): of == c for c in self.classes_.tolist()}
        rows = []
        for among in groups.values():
            answered = among & inside
            right = (predicted == labels)[answered]
            share = answered.sum() / among.sum() if among.any() else np.nan
            accuracy = right.mean() if len(right) else np.nan
            rows.append((int(among.sum()), int(answered.sum()), share, accuracy))
        where = pd.MultiIndex.from_tuples(list(groups), names=["given", "class"])
        return pd.DataFrame(rows, where, columns=["n", "n_in_region", "share", "accuracy"])

    def _verdicts(self, X: Any) -> tuple[Verdicts, SDMPosterior, Any]:
        x, index = self._posterior_at(X)
        posterior: Any = self.posterior_
        return posterior.judge(x), posterior, index


def _all_rows(data: TrainingData) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, classes and the user's weights of all rows, in the order of the data."""
    batches = data.batches
    if isinstance(batches, LoaderBatches):
        ordered = _in_order(batches.loader)
        batches = LoaderBatches(ordered, batches.prepare, len(ordered))
    columns = (
        batches.tensors
        if isinstance(batches, ArrayBatches)
        else [torch.cat(ts) for ts in zip(*batches, strict=True)]
    )
    x, y, *weight = columns
    if not weight:
        return x, y, torch.ones(len(y), dtype=torch.float64, device=y.device)
    # They were divided by their mean, in the precision of training.
    w = weight[0].double() * (data.n_effective / len(y))
    return x, y, torch.where((w - w.round()).abs() < 1e-5 * w, w.round(), w)


def _in_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Loader of all rows by position, in the place of one that shuffles them."""
    sampler, rows = loader.sampler, loader.dataset
    shuffles = isinstance(sampler, RandomSampler) and not sampler.replacement
    if not shuffles or loader.batch_size is None or sampler.num_samples != len(rows):  # type: ignore[arg-type,attr-defined]
        return loader  # rows of the user's choice, as they come
    return DataLoader(rows, loader.batch_size, collate_fn=loader.collate_fn)
