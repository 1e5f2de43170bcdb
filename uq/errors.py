"""Errors and warnings of uq. Each refines a built-in, so ``except ValueError`` keeps working."""


class UQError(Exception):
    """Base class of every error that uq raises itself.

    Messages name the argument, what came, what was expected and what to do. Each class is also the
    built-in error that it refines, so that ``except ValueError`` keeps working.

    Examples
    --------
    >>> import uq
    >>> try:
    ...     uq.data.load_dataset("digit")
    ... except uq.UQError as error:
    ...     print(error)
    data set 'digit' is unknown; did you mean 'digits'?
    """


class ParameterError(UQError, ValueError):
    """A constructor or call argument has a value that cannot be used."""


class DataError(UQError, ValueError):
    """Data has a shape, type or content that cannot be used."""


class NoEpistemicError(UQError, NotImplementedError):
    """The distribution carries no epistemic uncertainty: it comes from a single parameter value."""


class NonFiniteLossError(UQError, ArithmeticError):
    """Training reached a loss that is NaN or infinite."""


class LoadError(UQError, ValueError):
    """A file is not one of uq's, is damaged, or does not match the installed version."""


class SaveError(UQError, OSError):
    """A file could not be written; whatever was at its place before is unchanged."""


class FitInterruptedWarning(UserWarning):
    """Training was interrupted; the estimator keeps what it had learned by then."""
