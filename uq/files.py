"""Writing files so that an error leaves whatever was there before."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from uq.errors import SaveError, UQError


def write_atomically(files: Mapping[str | Path, bytes]) -> None:
    """Write all ``files`` whole, or none: temporary files first, which then take their places.

    Parameters
    ----------
    files : dict of path to bytes
        What to write where; the folders must exist.

    Raises
    ------
    SaveError
        With the reason; the temporary files are removed.

    Examples
    --------
    >>> import tempfile
    >>> from uq.files import write_atomically
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically({folder + "/a.txt": b"1", folder + "/b.txt": b"2"})
    """
    written: list[tuple[str, Path]] = []
    path = Path()
    try:
        for path, data in ((Path(p), d) for p, d in files.items()):
            with _temporary(path.parent) as file:
                written.append((file.name, path))
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # a full disk may only show here
        for temporary, path in written:
            os.replace(temporary, path)
    except OSError as error:
        raise SaveError(
            error.errno, f"cannot write {str(path)!r}: {error.strerror or error}"
        ) from error
    finally:  # after an interrupt, too
        for temporary, _ in written:
            Path(temporary).unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file to be written bit by bit: it takes its place only when all went well.

    Raises
    ------
    SaveError
        With the reason; whatever was at ``path`` before is unchanged.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        with _temporary(path.parent) as file:
            temporary = file.name
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if isinstance(error, UQError):
            raise
        raise SaveError(
            error.errno, f"cannot write {str(path)!r}: {error.strerror or error}"
        ) from error
    finally:  # after an interrupt, too
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _temporary(folder: Path) -> BinaryIO:
    """Open a new file in ``folder`` that has the usual permissions.

    ``tempfile`` makes private ones, and what is usual cannot be asked of a process without changing
    it for the other threads.
    """
    path = folder / f".uq-{secrets.token_hex(8)}"
    return open(path, "xb")
