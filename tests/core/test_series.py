import numpy as np
import pytest

from harmonict.core import Geometry, HarmonictError, Series

HU = np.zeros((2, 3, 4), np.float32)


@pytest.mark.parametrize("hu", [HU[0], HU.astype(np.float64), HU[:0], np.full_like(HU, np.nan), HU + np.inf])
def test_hu_that_are_no_series_are_refused(hu):
    with pytest.raises(HarmonictError):
        Series(hu)


def test_padding_must_have_the_shape_of_the_hu():
    with pytest.raises(HarmonictError):
        Series(HU, padding=np.zeros((2, 3, 3), bool))


def test_with_hu_keeps_everything_else_and_refuses_another_shape():
    series = Series(HU, Geometry(spacing_mm=(3.0, 0.7, 0.8)), name="a", patient="P")
    changed = series.with_hu(HU + 1)
    assert changed.geometry is series.geometry and changed.name == "a" and changed.hu[0, 0, 0] == 1
    assert series.hu[0, 0, 0] == 0
    with pytest.raises(HarmonictError):
        series.with_hu(HU[:1])


def test_slice_positions_follow_from_the_grid_of_a_volume_only():
    grid = Geometry(origin_mm=(0.0, 0.0, -50.0), spacing_mm=(3.0, 0.7, 0.8))
    assert np.allclose(Series(HU, grid).slice_positions_mm, [-50, -47])
    assert Series(HU, grid, is_volume=False).slice_positions_mm is None
    assert np.allclose(Series(HU, grid, is_volume=False, positions_mm=(5.0, 344.0)).slice_positions_mm, [5, 344])
