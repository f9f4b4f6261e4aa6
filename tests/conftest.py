"""Shared fixtures: where the public data lie."""

import os
from pathlib import Path

import pytest

from harmonict import cli


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of public CT and reference values, `$HARMONICT_DATA`; the test skips where it is not set."""
    folder = os.environ.get("HARMONICT_DATA")
    if not folder:
        pytest.skip("HARMONICT_DATA is not set: the public data are not on this machine")
    return Path(folder)


@pytest.fixture
def run(capsys):
    """Call the command line: run("inspect", path) -> exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(end.value.code or 0), out, err

    return call
