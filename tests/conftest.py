"""Shared fixtures: where the public data lie."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of public CT and reference values, `$HARMONICT_DATA`; the test skips where it is not set."""
    folder = os.environ.get("HARMONICT_DATA")
    if not folder:
        pytest.skip("HARMONICT_DATA is not set: the public data are not on this machine")
    return Path(folder)
