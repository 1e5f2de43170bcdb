"""Losses of a fit in TensorBoard."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from uq.errors import ParameterError
from uq.inference.training import TrainingState


class TensorBoardCallback:
    """Write the losses of each epoch, in nats per row, for TensorBoard.

    Every training is a run of its own, in a numbered folder: members of an ensemble, starting
    points of chains, a fit that is resumed.

    Parameters
    ----------
    folder : str or Path
        What ``tensorboard --logdir`` is to show.

    Raises
    ------
    ParameterError
        At the first epoch, if the package ``tensorboard`` is not installed.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> from uq import MAPClassifier
    >>> from uq.inference import TensorBoardCallback
    >>> model = MAPClassifier(callbacks=[TensorBoardCallback("logs")])
    >>> model.fit(*load_wine(return_X_y=True))  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder
        self._writer: Any = None
        self._epoch = 0

    def __call__(self, state: TrainingState) -> None:
        """Write the losses of an epoch."""
        if self._writer is None or state.epoch <= self._epoch:
            self._writer = self._new_run()
        self._epoch = state.epoch
        self._writer.add_scalar("train_loss", state.train_loss, state.epoch)
        if state.held_out_loss is not None:
            self._writer.add_scalar("held_out_loss", state.held_out_loss, state.epoch)
        self._writer.flush()

    def _new_run(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ParameterError(
                "TensorBoardCallback needs the package tensorboard (pip install tensorboard)."
            ) from error
        for i in itertools.count():
            folder = Path(self.folder) / str(i)
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue  # of an earlier fit, or of another process
            return SummaryWriter(str(folder))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file behind: copies, and other processes, write runs of their own."""
        return vars(self) | {"_writer": None}
