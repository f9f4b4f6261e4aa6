"""Compile a kernel once and keep it, wherever the package lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled by Numba without fast-math, its machine code kept on disk.

    Numba keeps the code beside the source, else in the user's cache folder (`NUMBA_CACHE_DIR` overrides both). Where
    neither can be written, as in a read-only container, the kernel compiles anew in each process instead of failing.
    """
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # no place to keep the code
        return numba.njit(function)
