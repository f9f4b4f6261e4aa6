"""Slices that are too large, or of a size that a network does not take, come out as if they were not."""

import numpy as np
import pytest
import torch
from torch import nn

from harmonict import tiles
from harmonict.core import HarmonictError
from harmonict.harmonizer import Harmonizer
from harmonict.methods.identity import Config
from harmonict.tiles import MemoryWatch, free_bytes, in_tiles, is_out_of_memory, smaller_tile, to_multiple
from toy import toy_series

SERIES = toy_series(slices=3, size=256, seed=2)


def network(layers=4):
    """Random convolutions that see 2 x layers pixels around each one."""
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 8, 5, padding=2), nn.ReLU()]
    for _ in range(layers - 2):
        body += [nn.Conv2d(8, 8, 5, padding=2), nn.ReLU()]
    body = nn.Sequential(*body, nn.Conv2d(8, 1, 5, padding=2))
    for layer in body[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return body.eval()


class Tiled(Harmonizer):
    """A residual network that may be given tiles, and a device that is too small for more than `most` pixels."""

    name, paired, changes, Config = "tiled", "none", (), Config
    most = 10**9

    def __init__(self):
        super().__init__()
        self.network = network()
        self.shapes = []

    def translate(self, x, target, about):
        self.shapes.append(tuple(x.shape))
        if x.numel() > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return torch.cat([one + 300 * self.network(one / 1000) for one in x[:, None]])


def test_tiles_show_no_seams():
    model = Tiled()
    whole = model.harmonize(SERIES).hu
    model.tile = 96
    tiled = model.harmonize(SERIES).hu
    change, apart = np.abs(whole - SERIES.hu), np.abs(tiled - whole)
    print(f"change {change.max():.0f} HU, tiles off by {apart.max():.3f} HU at most")
    assert set(model.shapes[-9:]) == {(1, 1, 96, 96)} and change.max() > 50
    assert apart.max() < 0.5 and apart.mean() < 0.01


def test_without_blending_there_would_be_seams():
    """What the test above measures is there to be seen."""
    convert, x = network(), torch.from_numpy(SERIES.hu[:1, None]) / 1000
    with torch.inference_mode():
        whole = convert(x)
        rows = [torch.cat([convert(part) for part in row.split(64, 3)], 3) for row in x.split(64, 2)]
    assert 300 * (torch.cat(rows, 2) - whole).abs().max() > 5


def test_tiles_give_the_same_numbers_whatever_the_batch_and_twice():
    x = torch.from_numpy(SERIES.hu[:, None])
    convert = network()
    with torch.inference_mode():
        together, again = in_tiles(x, 100, convert), in_tiles(x, 100, convert)
        alone = torch.cat([in_tiles(one, 100, convert) for one in x.split(1)])
    assert torch.equal(together, alone) and torch.equal(together, again)


def test_a_slice_no_larger_than_a_tile_is_taken_whole():
    seen = []
    in_tiles(torch.zeros(2, 1, 40, 64), 64, lambda x: seen.append(x.shape) or x)
    assert seen == [(2, 1, 40, 64)]


@pytest.mark.parametrize("shape", [(100, 97), (512, 511), (96, 96), (5, 3)])
def test_sizes_that_the_stride_does_not_divide_are_mirrored_and_cropped_again(shape):
    x = torch.rand(2, 1, *shape)
    seen = []
    result = to_multiple(x, 16, lambda image: seen.append(image) or 2 * image)
    (image,) = seen
    assert torch.equal(result, 2 * x) and image.shape[2] % 16 == image.shape[3] % 16 == 0
    if shape == (100, 97):
        assert torch.equal(image[..., 100, :97], x[..., 98, :]) and torch.equal(image[..., :100, 97], x[..., :, 95])


def test_too_little_memory_for_a_batch_takes_smaller_ones_and_changes_nothing():
    model = Tiled()
    whole = model.harmonize(SERIES).hu
    model.most, qc = 256 * 256, {}
    assert np.array_equal(model.harmonize(SERIES, qc=qc).hu, whole) and qc == {}
    assert model.shapes[-1] == (1, 1, 256, 256)


def test_too_little_memory_for_a_slice_takes_tiles_and_says_so():
    model = Tiled()
    whole = model.harmonize(SERIES).hu
    model.most, qc = 130 * 130, {}
    tiled = model.harmonize(SERIES, qc=qc).hu
    assert np.abs(tiled - whole).max() < 0.5
    assert qc["notes"] == ["not enough memory for whole slices: translated in blended tiles of 128 pixels"]


def test_too_little_memory_for_anything_is_said_in_words():
    model = Tiled()
    model.most = 100
    with pytest.raises(HarmonictError, match="not enough memory on cpu for tiled of one slice"):
        model.harmonize(SERIES)


def test_another_error_of_a_network_is_not_taken_for_want_of_memory():
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError("mat1 and mat2 cannot be multiplied"))


def test_batches_grow_with_the_free_memory(monkeypatch):
    with MemoryWatch(torch.device("cpu")) as watch:
        np.ones(10**7)  # 80 MB
    assert watch.need_bytes > 0
    watch.need_bytes = 10**9
    for free, slices in ((None, 8), (10**8, 1), (6 * 10**9, 3), (10**12, 8)):
        monkeypatch.setattr(tiles, "free_bytes", lambda device, free=free: free)
        assert watch.slices(8) == slices


def test_the_free_memory_is_a_number_of_bytes_that_this_process_fits_into():
    assert free_bytes(torch.device("cpu")) > 10**8


def test_tiles_are_halved_down_to_64_pixels():
    assert smaller_tile(None, (512, 500)) == 256 and smaller_tile(256, (512, 512)) == 128
    assert smaller_tile(64, (512, 512)) is None
