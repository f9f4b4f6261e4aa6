"""What every method inherits beside its contract: pixels of another size, and what is said of them."""

from dataclasses import replace

import numpy as np
import torch

from harmonict.core import ScanProtocol
from harmonict.harmonizer import NetworkHarmonizer, in_trained_pixels, on_own_grid
from harmonict.methods.identity import Config, Identity
from toy import toy_series

FINE = toy_series(blur_mm=0.8, noise_hu=20, seed=5, size=240, pixel_mm=1.0, padding=True)
TISSUE = np.s_[:, 40:70, 105:135]


class Blur(NetworkHarmonizer):
    """Learned on pixels of 1.5 mm: adds 40 HU in the soft tissue, and blurs by a pixel."""

    name, Config = "blur", Config
    window_hu = (-500.0, 3000.0)

    def __init__(self, pixel=(1.5, 1.5)):
        super().__init__(target=ScanProtocol(kernel="B10"))
        self.pixel_mm = torch.tensor(pixel)

    def translate(self, x, target, about):
        kernel = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))[None, None]
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
        return torch.nn.functional.conv2d(padded, kernel) + 40 * (x > -500)


def spectrum(hu):
    """Mean power in soft tissue, by frequency along x in steps of 1/30 per mm."""
    patch = hu[TISSUE] * np.blackman(30)
    return (np.abs(np.fft.rfft(patch, axis=2)) ** 2).mean((0, 1))


def test_in_the_trained_pixels_the_change_is_made_and_detail_finer_than_them_stays():
    work = in_trained_pixels(model := Blur(), FINE)
    assert work.pixel_mm == (1.5, 1.5) and work.hu.shape == (3, 160, 160)
    result = on_own_grid(model, FINE, work, model.harmonize(work))
    assert result.geometry == FINE.geometry and result.protocol.kernel == "B10" and result.hu.dtype == np.float32
    assert abs((result.hu - FINE.hu)[TISSUE].mean() - 40) < 1
    before, after = spectrum(FINE.hu), spectrum(result.hu)  # pixels of 1.5 mm show up to 10/30 per mm
    assert after[5:8].sum() < 0.7 * before[5:8].sum()
    assert abs(after[13:].sum() / before[13:].sum() - 1) < 0.02
    assert np.array_equal(result.hu[FINE.padding], FINE.hu[FINE.padding])
    lungs = FINE.hu < -500
    assert np.array_equal(result.hu[lungs], FINE.hu[lungs])


def test_a_model_that_changes_nothing_changes_nothing_in_other_pixels():
    work = in_trained_pixels(Blur(), FINE)
    assert np.array_equal(on_own_grid(Identity(), FINE, work, work).hu, FINE.hu)


def test_a_file_that_clips_air_clips_it_again_on_its_own_grid():
    clipped = FINE.with_hu(np.maximum(FINE.hu, -1005), padding=None)
    work = in_trained_pixels(Blur(), clipped)
    lower = work.with_hu(work.hu - 30)
    assert on_own_grid(Identity(), clipped, work, lower).hu.min() == -1005


def test_pixels_within_5_percent_are_those_of_the_training():
    assert in_trained_pixels(Blur((1.04, 1.04)), FINE) is FINE and Blur((1.04, 1.04)).describe(FINE).outside == ()
    assert "these are of 1 mm" in Blur((1.06, 1.06)).describe(FINE).outside[0]
    assert Blur((1.0, 1.3)).describe(FINE).outside  # oblong pixels are other pixels too


def test_a_method_to_which_pixels_do_not_matter_takes_all():
    wide = replace(FINE, geometry=replace(FINE.geometry, spacing_mm=(3.0, 9.0, 9.0)))
    assert in_trained_pixels(Identity(), wide) is wide and Identity().describe(wide).outside == ()
