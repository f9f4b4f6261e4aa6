"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from harmonict.core.errors import HarmonictError


def write_whole(path: str | Path, write: Callable[[str], object]) -> None:
    """Let `write` fill a temporary file beside `path`, which then takes its name.

    Raises HarmonictError where the disk refuses; nothing half written is left.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.resolve().parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            write(name)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise HarmonictError(f"cannot write {path}: {error.strerror or error}") from None
