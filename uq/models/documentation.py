"""What the docstrings of all estimators share: one text for a parameter that all of them have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_PARAMETERS = """\
module : torch.nn.Module or callable, optional
        Network to use in place of an MLP: a module, which is copied and never changed, or a
        factory ``f(d_in, d_out)`` (``d_in`` is the shape of a row where rows are not vectors).
        It maps a batch to {outputs}.
        With a module, inputs are taken as they are; otherwise they are standardised.
    hidden : tuple of int, default={hidden}
        Widths of the MLP's hidden layers, where no ``module`` is given.
    max_epochs : int, optional
        Passes over the data. By default as many as give about {steps}.
    batch_size : int or None, default=64
        Rows per step; None takes all rows at once.
    lr : float, default={lr}
        Learning rate at its peak; 5 % warm-up, then cosine to 0."""

_NOISE = """\
noise : {"homoscedastic", "heteroscedastic"}, default="homoscedastic"
        One learned noise level per target, or one that the network predicts at each input."""

_HELD_OUT = """\
Stop after this many epochs without a better negative log likelihood on a tenth of the rows
        (at least 20, or 30 % of fewer than 67), held out for it, and keep the best weights; "auto"
        takes a tenth of the epochs, at least 20, and a fifth of more than 1,000: few rows make
        short epochs and a noisy score.
        None trains on all rows to the end. A DataLoader holds nothing out."""

_TAIL = """\
patience : int, "auto" or None, default={patience}
        {held_out}
    device : str, default="auto"
        "cpu", "cuda", "cuda:1"; "auto" takes CUDA where there is one.
    precision : {{"32-true", "64-true", "bf16-mixed"}}, default="32-true"
        Arithmetic of training, in Lightning's names.
    strategy : {{"auto", "ddp"}}, default="auto"
        "ddp" trains in the processes that ``torchrun`` started, each on its share of every batch;
        MAP, ensembles, IVON, VBLL and evidential learning can.
    random_state : int, RandomState or None, default=None
        Seed of everything random; the same seed gives the same bits on the same device. None
        draws one from NumPy's global generator, as scikit-learn does.
    callbacks : sequence of callable, default=()
        Called with a :class:`uq.inference.TrainingState` after each epoch; True stops.
        :class:`uq.inference.TensorBoardCallback` is one.
    checkpoint_dir : str or Path, optional
        Folder for checkpoints, from which ``fit(..., resume=True)`` goes on after a kill.
    checkpoint_every : int or str, default="30s"
        Epochs between checkpoints, or seconds as in "30s".
    verbose : int, default=0
        1 shows a progress bar."""

_ATTRIBUTES = """\
posterior_ : uq.inference.Posterior
        What was inferred; callable on a tensor of (standardised) inputs.
    history_ : dict of list
        "train_loss" and, where rows are held out, "held_out_loss" of each epoch, in nats per row
        (standardised targets); ``pandas.DataFrame(history_)`` is a table of them.
    stop_reason_ : str
        "max_epochs", "patience", "callback", "interrupted" or "non_finite".
    n_epochs_ : int
        Epochs run.
    n_features_in_ : int
        Number of features, and ``feature_names_in_`` where X had string column names."""


def documented(
    *,
    lr: str,
    patience: str = "None",
    outputs: str = "logits (n, n_classes), or means (n, m) (2m with heteroscedastic noise)",
    own: str = "",
    held_out: str = _HELD_OUT,
    hidden: str = "(64, 64)",
    steps: str = "5,000 steps, at least 20, and at most 1,000 beyond 320 rows",
) -> Callable[[type[T]], type[T]]:
    """Fill the shared parts into a class docstring: ``{shared}``, ``{tail}``, ``{fitted}``."""

    def fill(cls: type[T]) -> type[T]:
        doc = cls.__doc__ or ""
        shared = _PARAMETERS.format(lr=lr, outputs=outputs, hidden=hidden, steps=steps)
        doc = doc.replace("{shared}", shared)
        doc = doc.replace("{own}", own)
        doc = doc.replace("{noise}", _NOISE)
        doc = doc.replace("{tail}", _TAIL.format(patience=patience, held_out=held_out))
        cls.__doc__ = doc.replace("{fitted}", _ATTRIBUTES)
        return cls

    return fill
