import numpy as np
import pytest

from harmonict.radiomics.mesh import mesh_area_volume, mesh_diameters, mesh_points
from harmonict.radiomics.shape import shape_features


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 1, 2), (3, 4, 5), (1, 6, 2)])
def test_the_mesh_of_a_box_is_its_voxel_centres_widened_by_an_octahedron(size):
    # Minkowski sum of the box of centres (a x b x c) and an octahedron of half-width 0.5
    a, b, c = (n - 1 for n in size)
    volume = a * b * c + (a * b + b * c + c * a) + (a + b + c) / 2 + 1 / 6
    area = 2 * (a * b + b * c + c * a) + 2 * np.sqrt(2) * (a + b + c) + np.sqrt(3)
    found = mesh_area_volume(np.ones(size, bool), (1.0, 1.0, 1.0))
    assert found == pytest.approx((area, volume))


def test_area_and_volume_of_the_mesh_scale_with_the_spacing():
    mask = np.random.default_rng(0).random((6, 7, 8)) < 0.6
    area, volume = mesh_area_volume(mask, (1.0, 0.7, 0.8))
    assert mesh_area_volume(mask, (2.0, 1.4, 1.6)) == pytest.approx((4 * area, 8 * volume))


def test_a_ball_has_the_volume_and_diameter_of_a_ball():
    z, y, x = np.indices((41, 61, 61))
    mask = ((z - 20) * 1.5) ** 2 + (y - 30) ** 2 + (x - 30) ** 2 <= 25.0**2
    found = shape_features(mask, (1.5, 1.0, 1.0))
    assert found["shape_MeshVolume"] == pytest.approx(4 / 3 * np.pi * 25**3, rel=0.01)
    assert found["shape_Maximum3DDiameter"] == pytest.approx(50, abs=1.5)
    assert found["shape_MajorAxisLength"] == pytest.approx(4 * 25 / np.sqrt(5), rel=0.01)
    assert found["shape_Elongation"] == pytest.approx(1, abs=0.01) and found["shape_Flatness"] == pytest.approx(
        1, abs=0.01
    )
    assert 0.85 < found["shape_Sphericity"] < 1


def test_diameters_equal_the_largest_distance_over_all_pairs_of_mesh_vertices():
    mask = np.random.default_rng(4).random((5, 6, 7)) < 0.3
    spacing = np.array([2.0, 0.9, 1.1])
    points = mesh_points(mask)
    square = (((points[:, None] - points[None]) * spacing / 2) ** 2).sum(axis=2)
    wanted = [np.sqrt(square[points[:, None, a] == points[None, :, a]].max()) for a in range(3)] + [
        np.sqrt(square.max())
    ]
    assert mesh_diameters(mask, tuple(spacing)) == pytest.approx(tuple(wanted))


def test_the_place_of_a_roi_in_its_image_does_not_change_its_shape():
    mask = np.zeros((9, 12, 14), bool)
    mask[1:4, 2:7, 3:9] = np.random.default_rng(1).random((3, 5, 6)) < 0.7
    moved = np.roll(mask, (3, 4, 5), axis=(0, 1, 2))
    assert shape_features(mask, (3.0, 1.0, 1.0)) == pytest.approx(shape_features(moved, (3.0, 1.0, 1.0)))


def test_a_rectangle_in_one_slice_has_its_closed_form():
    mask = np.zeros((3, 9, 9), bool)
    mask[1, 2:5, 2:7] = True  # 3 x 5 pixels, centres 2 x 4 apart
    found = shape_features(mask, (5.0, 1.0, 1.0), "2D")
    assert found["shape2D_MeshSurface"] == pytest.approx(8 + 6 + 0.5)
    assert found["shape2D_Perimeter"] == pytest.approx(12 + 2 * np.sqrt(2))
    assert found["shape2D_PixelSurface"] == 15
    assert found["shape2D_MaximumDiameter"] == pytest.approx(np.hypot(2, 5))


def test_a_line_of_voxels_is_flat_but_has_a_shape():
    found = shape_features(np.ones((1, 1, 6), bool), (1.0, 1.0, 1.0))
    assert found["shape_LeastAxisLength"] == 0 and found["shape_Elongation"] == 0
    assert all(np.isfinite(v) for v in found.values())
