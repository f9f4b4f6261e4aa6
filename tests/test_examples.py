"""The examples that need nothing but the program run as a user would run them."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_demo_runs_from_an_empty_folder_and_improves_every_patient(tmp_path):
    run = subprocess.run([sys.executable, EXAMPLES / "demo.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 20_000
    body = [float(line.split()[2]) for line in run.stdout.splitlines() if " body " in line and "±" in line]
    assert len(body) == 4
    for before, after in zip(body[::2], body[1::2], strict=True):
        assert after > before + 10


WITH_ARGUMENTS = [path for path in sorted(EXAMPLES.glob("*.py")) if "argparse" in path.read_text()]


@pytest.mark.parametrize("script", WITH_ARGUMENTS, ids=lambda path: path.stem)
def test_every_example_says_how_to_run_it(script, tmp_path):
    """Its imports hold, and what it prints for --help names the script."""
    run = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert script.name in run.stdout
