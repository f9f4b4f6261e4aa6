"""Samples: the same scan gives the same bytes whatever is computed beside it, and their spread is a second series."""

from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import torch

from harmonict.core import Geometry, HarmonictError, ScanProtocol
from harmonict.data import About, pair_series
from harmonict.dicom.inventory import find_series
from harmonict.harmonize_cohort import harmonize_cohort
from harmonict.harmonizer import make_config
from harmonict.methods import METHODS, load_model
from harmonict.methods.choe import Choe
from harmonict.methods.ddpm import DDPM
from harmonict.nn.diffusion import Noise
from harmonict.sampling import SampledHarmonizer, noise_of, with_noise
from make_dicom import make_ct_series
from toy import toy_series

SOURCE = toy_series(blur_mm=0.8, slices=4, size=160, seed=1, padding=True)
PLAIN = toy_series(blur_mm=0.8, slices=4, size=160, seed=1)
ABOUT = About((1.0, 1.0))


@dataclass(frozen=True)
class Config:
    steps_noise: int = 10
    steps_sampled: int = 1
    sampler: str = "ddim"
    samples: int = 4


class AddsNoise(SampledHarmonizer):
    """The source and 10 HU of noise from its place."""

    name = "adds-noise"
    Config = Config

    def __init__(self, config=None, *, target=None):
        super().__init__(config, target=target)
        self.weight = torch.nn.Parameter(torch.tensor(10.0))

    def draw(self, x, target, about, noise):
        return x + self.weight * noise.field(0, x.shape[1:])


def added(model, series=SOURCE, **options):
    return model.harmonize(series, **options).hu - series.hu


def measured(hu):
    return hu[~SOURCE.padding] if hu.shape == SOURCE.hu.shape else hu


def test_each_voxel_gets_normal_noise_of_its_own():
    noise = measured(added(AddsNoise()))
    assert abs(noise.mean()) < 0.2 and abs(noise.std() - 10) < 0.2
    slices = added(AddsNoise(), PLAIN)
    assert abs(np.corrcoef(slices[0].ravel(), slices[1].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(slices[0][:, 1:].ravel(), slices[0][:, :-1].ravel())[0, 1]) < 0.03


def test_batches_change_nothing():
    whole = added(AddsNoise(), slices_at_once=4)
    assert np.array_equal(whole, added(AddsNoise(), slices_at_once=1))


def test_tiles_agree_with_whole_slices():
    class Tiled(AddsNoise):
        tile = 64

    assert np.allclose(added(Tiled()), added(AddsNoise()), atol=1e-3)


def test_another_scan_gets_other_noise_and_the_same_scan_elsewhere_the_same():
    moved = replace(SOURCE, name="elsewhere", patient="")
    assert np.array_equal(added(AddsNoise()), added(AddsNoise(), moved))
    other = SOURCE.with_hu(SOURCE.hu + 1)
    correlation = np.corrcoef(measured(added(AddsNoise())), measured(added(AddsNoise(), other)))[0, 1]
    assert abs(correlation) < 0.03


@pytest.mark.parametrize("apart_mm, shared", [(3.0, 0.0), (1.5, 2**-0.5), (0.75, np.cos(np.pi / 8))])
def test_slices_share_noise_as_far_as_they_overlap(apart_mm, shared):
    series = replace(
        PLAIN,
        geometry=Geometry((0.0, 0.0, 0.0), (apart_mm, 1.2, 1.2)),
        protocol=ScanProtocol(kernel="B30", slice_thickness_mm=3.0),
    )
    noise = added(AddsNoise(), series)
    assert np.allclose(noise.std((1, 2)), 10, atol=0.3)
    assert np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1] == pytest.approx(shared, abs=0.03)


def test_slices_without_a_position_have_noise_of_their_own():
    loose = replace(PLAIN, is_volume=False)
    planes = [noise_of(with_noise(ABOUT, loose, sample=0), z).planes for z in range(4)]
    assert planes == [((z, 1.0),) for z in range(4)]
    assert noise_of(ABOUT, 2) == Noise(planes=((2, 1.0),))


def test_the_spread_is_the_deviation_of_the_samples_and_nothing_where_the_source_stays():
    model = AddsNoise(Config(samples=16))
    spread = model.spread(SOURCE)
    inside = spread.hu[~SOURCE.padding]
    assert inside.mean() == pytest.approx(10, abs=0.3) and (inside >= 0).all()
    assert np.array_equal(spread.hu[SOURCE.padding], SOURCE.hu[SOURCE.padding])
    about = model.describe(SOURCE)
    samples = [
        super(SampledHarmonizer, model).harmonize(SOURCE, about=with_noise(about, SOURCE, sample=n)).hu
        for n in range(16)
    ]
    assert np.allclose(np.std(samples, axis=0, ddof=1)[~SOURCE.padding], inside, atol=1e-2)
    assert np.array_equal(samples[0], model.harmonize(SOURCE).hu)


def test_one_sample_has_no_spread():
    with pytest.raises(HarmonictError, match="at least 2 samples, got samples=1"):
        AddsNoise(Config(samples=1)).spread(SOURCE)
    with pytest.raises(HarmonictError, match="draws no samples"):
        Choe().spread(SOURCE)


def test_what_was_sampled_is_told():
    qc = {}
    AddsNoise().harmonize(SOURCE, qc=qc)
    assert qc["adds-noise"] == {"steps_noise": 10, "steps_sampled": 1, "sampler": "ddim", "samples": 4}


# -- with a trained model --------------------------------------------------------------------------------------------

QUICK = {"widths": (8, 8), "blocks": 1, "residual": True, "patch": 32, "batch": 2, "steps": 3, "samples": 2}
QUICK |= {"steps_noise": 100, "steps_sampled": 4, "sampler": "ddim"}


@pytest.fixture(scope="module")
def model():
    target = toy_series(blur_mm=1.2, slices=4, size=160, seed=1, kernel="B10")
    return DDPM(make_config(DDPM.Config, QUICK)).fit(pair_series([SOURCE], [target]))


def test_sampling_is_adjusted_after_training_and_nothing_else_is(model, tmp_path):
    model.save(tmp_path / "model")
    other = load_model(tmp_path / "model")
    other.adjust({"steps_sampled": "10", "sampler": "ddpm"})
    assert other.config == replace(model.config, steps_sampled=10, sampler="ddpm")
    assert other.digest != model.digest and not np.array_equal(other.harmonize(SOURCE).hu, model.harmonize(SOURCE).hu)
    for settings, words in (
        ({"steps_sampled": "0"}, "steps_sampled must be at least 1, got 0"),
        ({"steps_sampled": "-3"}, "steps_sampled must be at least 1, got -3"),
        ({"steps_sampled": "7"}, "of ddpm must divide the 100 steps that were trained, got 7; near it: 4, 5, 10"),
        ({"patch": "64"}, "keeps the patch that it was fitted with; free: steps_sampled"),
    ):
        with pytest.raises(HarmonictError, match=words):
            other.adjust(settings)
    with pytest.raises(HarmonictError, match="keeps the channels that it was fitted with; none is free"):
        Choe().adjust({"channels": "8"})


def test_every_sampled_method_has_the_settings_that_may_be_adjusted():
    sampled = [kind for kind in METHODS.values() if issubclass(kind, SampledHarmonizer)]
    assert {"ddpm", "diffusion-ct"} <= {kind.name for kind in sampled}
    for kind in sampled:
        assert set(kind.adjustable) <= set(asdict(kind.Config()))


def test_uncertainty_is_a_second_derived_series_of_the_same_study(model, tmp_path):
    make_ct_series(tmp_path / "ct", hu=SOURCE.hu, signed=True, intercept=0, spacing_mm=SOURCE.geometry.spacing_mm)
    table = harmonize_cohort(tmp_path / "ct", tmp_path / "out", model, uncertainty=True)
    (row,) = table.to_dict("records")
    assert row["state"] == "done", row["reason"]
    (result,) = find_series(row["path"]).found
    (second,) = find_series(row["uncertainty"]).found
    assert second.series_uid != result.series_uid and len(second.paths) == len(result.paths) == 4
    hu, image = second.read().hu, result.read()
    assert hu[~image.padding].min() >= 0
    expected = model.spread(find_series(tmp_path / "ct").found[0].read())
    assert np.allclose(hu, expected.hu, atol=0.5 + 1e-3)
    again = harmonize_cohort(tmp_path / "ct", tmp_path / "out", model, uncertainty=True)
    assert again["digest"].tolist() == table["digest"].tolist()


def test_uncertainty_of_a_method_without_samples_is_refused_before_anything_is_done(tmp_path):
    make_ct_series(tmp_path / "ct")
    with pytest.raises(HarmonictError, match="identity gives one result and draws no samples"):
        harmonize_cohort(tmp_path / "ct", tmp_path / "out", METHODS["identity"](), uncertainty=True)
    assert not (tmp_path / "out").exists()
