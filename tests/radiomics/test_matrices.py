import numba
import numpy as np
import pytest

from harmonict.radiomics import jit
from harmonict.radiomics.matrices import (
    all_offsets,
    border_distance,
    directions,
    glcm_matrices,
    glrlm_matrices,
    neighbourhood_matrices,
    prepare,
    zone_matrix,
    zones,
)


def noise(shape=(5, 6, 7), levels=4, filled=0.8, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.integers(1, levels + 1, shape) * (rng.random(shape) < filled)).astype(np.int32)


def checkerboard(n=6):
    return ((np.indices((1, n, n)).sum(axis=0) % 2) + 1).astype(np.int32)


@pytest.mark.parametrize("dimension, distance, count", [("2D", 1, 4), ("3D", 1, 13), ("2D", 2, 8), ("3D", 2, 49)])
def test_directions_are_one_of_each_pair_of_opposites(dimension, distance, count):
    offsets = directions(dimension, distance)
    assert len(offsets) == count and len(all_offsets(dimension, distance)) == 2 * count
    both = {tuple(o) for o in offsets} | {tuple(-o) for o in offsets}
    assert both == {tuple(o) for o in all_offsets(dimension, distance)} and len(both) == 2 * count
    assert np.abs(offsets).max() == distance
    assert dimension == "3D" or not offsets[:, 0].any()


def test_a_checkerboard_changes_along_rows_and_repeats_along_diagonals():
    counts = glcm_matrices(prepare(checkerboard(6)), directions("2D"))
    for offset, matrix in zip(directions("2D"), counts, strict=True):
        if np.abs(offset).sum() == 1:
            assert matrix.tolist() == [[0, 30], [30, 0]]
        else:
            assert matrix[0, 1] == 0 and matrix.sum() == 2 * 25


@pytest.mark.parametrize("distance", [1, 2])
def test_cooccurrences_equal_a_count_by_hand(distance):
    image = noise()
    levels = prepare(image, distance)
    for offset, matrix in zip(
        directions("3D", distance), glcm_matrices(levels, directions("3D", distance)), strict=True
    ):
        wanted = np.zeros((4, 4))
        for place in np.argwhere(image > 0):
            other = place + offset
            if np.all(other >= 0) and np.all(other < image.shape) and image[tuple(other)]:
                a, b = image[tuple(place)] - 1, image[tuple(other)] - 1
                wanted[a, b] += 1
                wanted[b, a] += 1
        np.testing.assert_array_equal(matrix, wanted)


def test_levels_that_do_not_occur_cost_no_row():
    image = np.array([[[9000, 3, 9000]]], np.int32)
    levels = prepare(image)
    assert levels.values.tolist() == [3, 9000]
    assert glcm_matrices(levels, directions("3D")).shape == (13, 2, 2)


def test_a_constant_box_has_runs_as_long_as_its_sides():
    counts, met = glrlm_matrices(prepare(np.full((2, 3, 4), 7, np.int32)), directions("3D"))
    for offset, matrix in zip(directions("3D"), counts, strict=True):
        if np.abs(offset).sum() == 1:
            side = (2, 3, 4)[int(np.flatnonzero(offset)[0])]
            assert matrix[0, side - 1] == 24 / side and matrix.sum() == 24 / side
    assert met.all()


def test_every_voxel_lies_in_one_run_of_each_direction_and_in_one_zone():
    image = noise(levels=2)
    levels = prepare(image)
    voxels = np.bincount(image[image > 0])[1:]
    counts, _ = glrlm_matrices(levels, directions("3D"))
    for matrix in counts:
        np.testing.assert_array_equal(matrix @ np.arange(1, matrix.shape[1] + 1), voxels)
    rows, sizes, _ = zones(levels, all_offsets("3D"))
    np.testing.assert_array_equal(np.bincount(rows, weights=sizes), voxels)


def test_a_direction_counts_as_met_when_its_line_meets_two_voxels_across_a_gap():
    image = np.zeros((1, 1, 5), np.int32)
    image[0, 0, [0, 4]] = 1
    _, met = glrlm_matrices(prepare(image), directions("3D"))
    assert [tuple(o) for o in directions("3D")[met]] == [(0, 0, 1)]


def test_diagonal_neighbours_join_a_zone():
    rows, sizes, _ = zones(prepare(checkerboard(4)), all_offsets("2D"))
    assert sorted(zip(rows.tolist(), sizes.tolist(), strict=True)) == [(0, 8), (1, 8)]


def test_a_zone_is_as_far_from_the_border_as_its_nearest_voxel():
    image = np.ones((5, 5, 5), np.int32)
    image[2, 2, 2] = 2
    rows, sizes, distance = zones(prepare(image), all_offsets("3D"), border_distance(image > 0, in_plane=False))
    assert sorted(zip(rows.tolist(), sizes.tolist(), distance.tolist(), strict=True)) == [(0, 124, 1), (1, 1, 3)]
    flat = border_distance(np.ones((1, 5, 5), bool), in_plane=True)
    assert flat[0].tolist() == [[1, 1, 1, 1, 1], [1, 2, 2, 2, 1], [1, 2, 3, 2, 1], [1, 2, 2, 2, 1], [1, 1, 1, 1, 1]]


def test_a_zone_matrix_keeps_only_the_sizes_that_occur():
    counts, values = zone_matrix(np.array([0, 0, 1]), np.array([5, 5, 90]), 3)
    assert values.tolist() == [5, 90] and counts.tolist() == [[2, 0], [0, 1], [0, 0]]


def test_dependences_in_a_constant_cube_count_corners_edges_faces_and_the_centre():
    dependence, difference, counted = neighbourhood_matrices(prepare(np.ones((3, 3, 3), np.int32)), all_offsets("3D"))
    found = {k: int(v) for k, v in enumerate(dependence[0]) if v}
    assert found == {7: 8, 11: 12, 17: 6, 26: 1}
    assert difference.tolist() == [0.0] and counted.tolist() == [27.0]


def test_a_wider_alpha_counts_nearer_levels_as_dependent():
    image = np.array([[[1, 3, 4]]], np.int32)
    narrow, *_ = neighbourhood_matrices(prepare(image), all_offsets("3D"), 0)
    wide, *_ = neighbourhood_matrices(prepare(image), all_offsets("3D"), 1)
    assert narrow[:, 0].tolist() == [1, 1, 1]
    assert wide[:, 0].tolist() == [1, 0, 0] and wide[:, 1].tolist() == [0, 1, 1]


def test_the_neighbourhood_difference_is_the_distance_to_the_mean_of_the_neighbours():
    image = np.array([[[1, 5, 3, 0, 9]]], np.int32)
    _, difference, counted = neighbourhood_matrices(prepare(image), all_offsets("2D"))
    assert difference.tolist() == [4.0, 2.0, 3.0, 0.0]  # levels 1, 3, 5, 9
    assert counted.tolist() == [1.0, 1.0, 1.0, 0.0]  # the lone 9 has no neighbour


def test_kernels_compile_without_a_place_to_keep_them(monkeypatch):
    real = numba.njit

    def no_place(*arguments, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(*arguments, **options)

    monkeypatch.setattr(jit.numba, "njit", no_place)
    assert jit.compiled(lambda a: a + 1)(41) == 42
