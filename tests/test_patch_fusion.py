"""STAN-CT's reconstruction from patches: what each quality unit finds, repairs and tells."""

import time

import numpy as np
import pytest
import torch

from harmonict.core import HarmonictError
from harmonict.patch_fusion import MODES, FusionSettings, draw_patches, fuse_slice, reachable, slice_seed
from toy import toy_series

SERIES = toy_series(blur_mm=0.8, size=320, pixel_mm=0.8, slices=1, padding=True)
HU, PADDING = SERIES.hu[0], SERIES.padding[0]


def identity(x):
    return x


def standard(x):
    return torch.ones(len(x))


def fuse(translate=identity, d=standard, *, hu=HU, padding=PADDING, seed=None, **settings):
    seed = slice_seed(hu) if seed is None else seed
    return fuse_slice(
        hu, padding=padding, translate_patch=translate, realness=d, settings=FusionSettings(**settings), seed=seed
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blend", [False, True])
def test_what_changes_nothing_changes_no_hu_in_any_mode(mode, blend):
    out, record = fuse(mode=mode, blend=blend)
    assert out.dtype == np.float32 and np.array_equal(out, HU)
    assert record["box_artifacts_found"] == 0 and record["tissue_pixels_empty"] == 0
