import numpy as np
import pytest

from harmonict.core import Geometry, HarmonictError, ScanProtocol, Series
from harmonict.data import pair_series


def series(n, *, z0=0.0, dz=3.0, name="", kernel="B30", value=0.0, pixel=0.7, **fields):
    hu = np.full((n, 8, 8), value, np.float32) + np.arange(n, dtype=np.float32)[:, None, None]
    return Series(hu, Geometry((0.0, 0.0, z0), (dz, pixel, pixel)), ScanProtocol(kernel=kernel), name=name, **fields)


def test_slices_pair_by_position_where_the_stacks_overlap():
    pairs = pair_series([series(4, z0=0)], [series(4, z0=6, value=100)])
    assert [(p.source[0, 0], p.target[0, 0]) for p in pairs] == [(2, 100), (3, 101)]


def test_a_thin_stack_pairs_with_a_thick_one_only_at_common_positions():
    pairs = pair_series([series(7, dz=1.0)], [series(3, dz=3.0, value=100)])
    assert [p.source[0, 0] for p in pairs] == [0, 3, 6]


def test_several_series_pair_by_name():
    pairs = pair_series([series(1, name="a"), series(1, name="b")], [series(1, name="b", value=9)])
    assert len(pairs) == 1 and pairs[0].target[0, 0] == 9


def test_padding_of_either_side_is_not_measured():
    padding = np.zeros((1, 8, 8), bool)
    padding[0, 0] = True
    pair = pair_series([series(1, padding=padding)], [series(1)])[0]
    assert not pair.measured[0].any() and pair.measured[1:].all()


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        (series(2), series(2, pixel=0.8), "spacing-mm"),
        (series(2, z0=0), series(3, z0=500), "no pairs"),
    ],
)
def test_what_is_no_pair_is_refused_in_words(source, target, words):
    with pytest.raises(HarmonictError, match=words):
        pair_series([source], [target])


def test_the_target_protocol_is_what_all_targets_share():
    targets = [series(1, name=n, kernel="B70") for n in "ab"]
    assert pair_series([series(1, name=n) for n in "ab"], targets).target_protocol.kernel == "B70"


def test_whole_series_are_cut_down_to_the_slices_that_pair():
    pairs = pair_series([series(4, z0=0)], [series(4, z0=6, value=100)])
    ((source, target),) = pairs.whole_series()
    assert source.hu[:, 0, 0].tolist() == [2, 3] and target.hu[:, 0, 0].tolist() == [100, 101]
    assert source.is_volume and np.allclose(source.slice_positions_mm, target.slice_positions_mm)
    ((thin, thick),) = pair_series([series(7, dz=1.0)], [series(3, dz=3.0)]).whole_series()
    assert not thin.is_volume and thin.slice_positions_mm.tolist() == [0, 3, 6] and thick.is_volume
