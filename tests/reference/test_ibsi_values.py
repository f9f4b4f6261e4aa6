"""The 1,804 IBSI-1 reference values: digital phantom and CT phantom configurations A to E."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ibsi_compliance.py"


@pytest.fixture(scope="module")
def compliance():
    spec = importlib.util.spec_from_file_location("ibsi_compliance", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_ibsi_1_reference_value_is_met(data, compliance):
    found = compliance.results(data)
    assert len(found) == 1804
    assert [row[:5] for row in found if not row[5]] == []


@pytest.mark.parametrize(
    "value, reference, tolerance, expected",
    [
        (1494.6, "1490.0", "0.0", True),
        (1495.1, "1490.0", "0.0", False),
        (0.3244, "0.324", "0.0", True),
        (0.3246, "0.324", "0.0", False),
        (-0.0341, "-0.0345", "0.0", False),
        (2.149, "2.15", "0.0", True),
        (9.24, "9.31", "0.06", False),
        (9.26, "9.31", "0.06", True),
        (float("nan"), "1.0", "0.1", False),
    ],
)
def test_a_value_is_met_within_tolerance_or_to_the_digits_printed(compliance, value, reference, tolerance, expected):
    assert compliance.met(value, reference, tolerance) is expected
