import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonict.core import Geometry, HarmonictError

OBLIQUE = Geometry((10.0, -20.0, 30.0), (3.0, 0.7, 0.8), ((0.0, -0.6, 0.8), (0.0, 0.8, 0.6), (1.0, 0.0, 0.0)))


@given(st.tuples(*[st.floats(-500, 500)] * 3))
def test_index_and_patient_position_are_inverse(index):
    assert np.allclose(OBLIQUE.to_index(OBLIQUE.to_patient(np.array(index))), index, atol=1e-6)


def test_a_step_along_each_axis_moves_by_its_spacing_in_its_direction():
    start = OBLIQUE.to_patient(np.zeros(3))
    assert np.allclose(start, OBLIQUE.origin_mm)
    for axis in range(3):
        step = OBLIQUE.to_patient(np.eye(3)[axis]) - start
        assert np.allclose(step, np.array(OBLIQUE.direction[axis]) * OBLIQUE.spacing_mm[axis])


def test_affine_agrees_with_to_patient():
    index = np.array([2.0, 3.0, 4.0])
    assert np.allclose((OBLIQUE.affine @ [*index, 1])[:3], OBLIQUE.to_patient(index))


@pytest.mark.parametrize(
    "values",
    [
        {"spacing_mm": (0.0, 1.0, 1.0)},
        {"spacing_mm": (1.0, -1.0, 1.0)},
        {"spacing_mm": (1.0, float("nan"), 1.0)},
        {"origin_mm": (float("inf"), 0.0, 0.0)},
        {"direction": ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (0.9, 0.5, 0.0))},
    ],
)
def test_numbers_that_are_no_grid_are_refused(values):
    with pytest.raises(HarmonictError):
        Geometry(**values)


def test_same_grid_sees_a_shift_and_a_spacing_change():
    grid = Geometry(spacing_mm=(3.0, 0.9, 0.9))
    assert grid.same_grid(Geometry((0.0, 0.0, 0.001), (3.0, 0.9, 0.9)))
    assert not grid.same_grid(Geometry((0.0, 0.0, 0.5), (3.0, 0.9, 0.9)))
    assert not grid.same_grid(Geometry(spacing_mm=(3.0, 0.91, 0.9)))
