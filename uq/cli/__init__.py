"""The ``uq`` command: compare methods, fit one, predict with it, and report how calibrated it is.

Exit codes: 0 done, 1 the data, a file or the fit failed, or Ctrl-C or SIGTERM ended it, 2 the
command line is wrong. An error is one line on stderr. With ``--json`` stdout holds exactly one JSON
document; with ``--json-progress`` stderr holds one JSON object a line while a model is fitted.
"""

from __future__ import annotations

# torch, pandas and the estimators are imported by the handlers: `uq --help` answers at once.
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from uq.cli.inputs import UsageError
from uq.cli.outputs import show_warning
from uq.cli.parser import parser
from uq.errors import FitInterruptedWarning, UQError
from uq.texts import visible

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``uq`` command and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; by default those of the process.

    Examples
    --------
    >>> from uq.cli import main
    >>> main(["--version"])
    uq ...
    0
    """
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings(), _terminable():
            # An estimator that is interrupted keeps what it has; a command stops instead.
            warnings.simplefilter("error", FitInterruptedWarning)
            warnings.showwarning = show_warning
            args = parser().parse_args(argv)
            args.handler(args)
        sys.stdout.flush()
        return 0
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader has seen enough, as in `uq predict … | head`
        _drop_stdout()
        return 0
    except (KeyboardInterrupt, FitInterruptedWarning) as stop:
        going_on = str(stop) if "--resume" in str(stop) else ""
        return _fail(going_on or "interrupted", 1)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _fail(_describe(error), 2 if isinstance(error, UsageError) else 1)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, so that no file is left half-written."""

    def note_stop(number: int, frame: Any) -> None:  # known by this name to a fit, which may wait
        raise KeyboardInterrupt

    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.getsignal(signal.SIGTERM)
        if before is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, note_stop)
    try:
        yield
    finally:
        if before is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return where + error.strerror
    if isinstance(error, UQError | ValueError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error} (unexpected; --debug shows where)"


def _fail(message: str, code: int) -> int:
    print("uq: error:", visible(" ".join(message.split())), file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        _drop_stdout()
    return code


def _drop_stdout() -> None:
    """Send what is still buffered nowhere, so that the interpreter's last flush cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
