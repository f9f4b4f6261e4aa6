from dataclasses import replace

import numpy as np
import pytest
import torch

from harmonict.core import HarmonictError
from harmonict.data import SlicePairs
from harmonict.evaluate.image import body_mask
from harmonict.harmonizer import About
from harmonict.methods.mtf_ratio import (
    FREQUENCIES_PER_MM,
    PAIR_FREQUENCIES_PER_MM,
    Config,
    MTFRatio,
    clean_tail,
    limit_noise,
    mtf_ratio,
    pair_gain,
)
from harmonict.physics import Kernel, skin_air_mtf, uniform_noise_sd
from phantoms_physics import gaussian_mtf, patient_slice, ramp_noise, real_pairs, series_of, sharp_mtf

FITS = ("ratio", "wiener", "fir")


def kernel(f50):
    return Kernel(f"g{f50}", FREQUENCIES_PER_MM, gaussian_mtf(FREQUENCIES_PER_MM, f50))


def scene(mtf, *, pixel_mm, size=256, seed=0):
    """A phantom with a wide-band texture, the same for every kernel of one seed."""
    texture = 300 * ramp_noise((size, size), lambda f: gaussian_mtf(f, 0.6), 0.7, np.random.default_rng(seed))
    f = np.hypot(np.fft.fftfreq(size, pixel_mm)[:, None], np.fft.rfftfreq(size, pixel_mm)[None])
    hu = np.fft.irfft2(np.fft.rfft2(texture) * mtf(f), texture.shape)
    return series_of([hu + 20], pixel_mm)


def pair(source_f50, target_f50, **more):
    source, target = (scene(lambda f, f50=f50: gaussian_mtf(f, f50), **more) for f50 in (source_f50, target_f50))
    return source, target


def difference(a, b):
    """RMS in HU away from the border: the scenes are periodic, patients are not."""
    return np.sqrt(np.mean((a.hu - b.hu)[:, 40:-40, 40:-40] ** 2))


@pytest.mark.parametrize("fit", FITS)
def test_fitted_on_pairs_it_makes_the_target(fit):
    source, target = pair(0.5, 0.3, pixel_mm=0.7)
    result = MTFRatio(Config(fit=fit)).fit(SlicePairs([(source, 0, target, 0)])).harmonize(source)
    assert difference(result, target) < 0.03 * difference(source, target)


@pytest.mark.parametrize("fit", FITS)
def test_a_filter_fitted_at_one_pixel_size_is_right_at_another(fit):
    source, target = pair(0.5, 0.3, pixel_mm=0.69)
    model = MTFRatio(Config(fit=fit)).fit(SlicePairs([(source, 0, target, 0)]))
    source, target = pair(0.5, 0.3, pixel_mm=0.78, seed=1)
    assert difference(model.harmonize(source), target) < 0.03 * difference(source, target)


def test_the_gain_of_a_pair_is_the_ratio_of_its_mtfs():
    source, target = pair(0.5, 0.3, pixel_mm=0.7)
    f = PAIR_FREQUENCIES_PER_MM
    passed = (f > 0.03) & (f < 0.6)
    for fit in ("ratio", "wiener"):
        gain = pair_gain(SlicePairs([(source, 0, target, 0)]), fit)
        assert np.allclose(gain[passed], (gaussian_mtf(f, 0.3) / gaussian_mtf(f, 0.5))[passed], rtol=0.06, atol=0.003)


def test_ratio_keeps_the_noise_that_wiener_gives_up():
    rng = np.random.default_rng(4)
    source, target = pair(0.3, 0.5, pixel_mm=0.7)
    noisy = source.with_hu(source.hu + rng.normal(0, 30, source.hu.shape).astype(np.float32))
    pairs = SlicePairs([(noisy, 0, target, 0)])
    results = {fit: MTFRatio(Config(fit=fit)).fit(pairs).harmonize(noisy).hu for fit in ("ratio", "wiener")}
    assert results["ratio"].std() == pytest.approx(target.hu.std(), rel=0.03)
    assert results["wiener"].std() < 0.97 * target.hu.std()
    error = {fit: np.mean((hu - target.hu) ** 2) for fit, hu in results.items()}
    assert error["wiener"] < error["ratio"]


def test_two_mtfs_make_their_ratio_and_equal_ones_change_nothing():
    f = FREQUENCIES_PER_MM
    gain = mtf_ratio(gaussian_mtf(f, 0.6), gaussian_mtf(f, 0.3), witness=None, gain_cap=6)
    passed = f < 0.5
    assert np.allclose(gain[passed], (gaussian_mtf(f, 0.3) / gaussian_mtf(f, 0.6))[passed], rtol=0.02, atol=0.003)
    noisy = gaussian_mtf(f, 0.3) + np.append(0, np.random.default_rng(0).normal(0, 0.01, 63))
    assert np.allclose(mtf_ratio(noisy, noisy, witness=None, gain_cap=6), 1)


def test_beyond_what_the_source_passes_there_is_no_further_gain_and_never_more_than_the_cap():
    f = FREQUENCIES_PER_MM
    gain = mtf_ratio(gaussian_mtf(f, 0.2), gaussian_mtf(f, 0.5), witness=None, gain_cap=6)
    assert gain.max() == 6 and gain[0] == pytest.approx(1)
    # A sharp source with a steep fall and a soft target with a long tail must not end in a gain.
    steep = mtf_ratio(sharp_mtf(f, 0.6), np.exp(-f / 0.2), witness=None, gain_cap=6)
    assert steep[f > 0.7].max() < 1


def test_a_noise_spectrum_of_the_same_shape_corrects_the_ratio_and_another_is_ignored():
    f = FREQUENCIES_PER_MM
    source, target = gaussian_mtf(f, 0.5), gaussian_mtf(f, 0.3)
    true = target / source
    biased = target * np.exp(-0.3 * np.clip(f - 0.2, 0, 0.3))  # a tail measured too low
    witness = 2.5 * true  # another dose
    alone = mtf_ratio(source, biased, witness=None, gain_cap=6)
    helped = mtf_ratio(source, biased, witness=witness, gain_cap=6)
    at = (f > 0.3) & (f < 0.5)
    assert np.abs(helped / true - 1)[at].max() < np.abs(alone / true - 1)[at].max()
    odd = mtf_ratio(source, biased, witness=2.5 * true * np.exp(3 * f), gain_cap=6)
    assert np.array_equal(odd, alone)


def test_a_noisy_tail_is_continued_smoothly_above_zero():
    f = FREQUENCIES_PER_MM
    noisy = gaussian_mtf(f, 0.25) + np.append(0, np.random.default_rng(0).normal(0, 0.01, 63))
    tail = clean_tail(noisy)
    assert (tail > 0).all() and np.all(np.diff(tail[f > 0.55]) <= 0)
    assert np.allclose(tail, gaussian_mtf(f, 0.25), atol=0.03)


def test_sharpening_stops_where_the_noise_would_pass_its_limit():
    f = np.linspace(0.02, 0.7, 50)
    nps = np.stack([f, np.full_like(f, 100.0), np.full_like(f, 0.01)])
    gain = np.minimum(1 + 5 * FREQUENCIES_PER_MM, 5)
    assert np.array_equal(limit_noise(gain, nps, nps, 10.0), gain)
    capped = limit_noise(gain, nps, nps, 1.5)
    assert capped.max() < gain.max() and capped[1] == gain[1]
    growth = np.sqrt(np.trapezoid(f * np.interp(f, FREQUENCIES_PER_MM, capped) ** 2, f) / np.trapezoid(f, f))
    assert growth < 1.52


def test_without_pairs_another_patient_is_taken_to_the_mtf_of_the_example():
    rng = np.random.default_rng(5)

    def patient(f50, n):
        mtf = lambda f: gaussian_mtf(f, f50)  # noqa: E731
        return series_of([np.rint(patient_slice(mtf, noise_hu=n, rng=rng, pixel_mm=0.9)) for _ in range(2)], 0.9)

    for source_f50, target_f50 in ((0.45, 0.3), (0.25, 0.3)):
        model = MTFRatio.like([patient(target_f50, 12)])
        result = model.harmonize(patient(source_f50, 12))
        assert skin_air_mtf(result).f50_per_mm == pytest.approx(target_f50, rel=0.05)


def test_the_example_itself_passes_untouched():
    series = series_of(
        [np.rint(patient_slice(lambda f: gaussian_mtf(f, 0.3), noise_hu=10, rng=np.random.default_rng(6)))], 0.9
    )
    assert np.abs(MTFRatio.like([series]).harmonize(series).hu - series.hu).max() < 0.5


def test_mtf_files_alone_make_a_model_and_the_users_source_mtf_wins():
    source, target = pair(0.5, 0.3, pixel_mm=0.7)
    model = MTFRatio.from_mtfs(kernel(0.3), kernel(0.5))
    assert difference(model.harmonize(source), target) < 0.01 * difference(source, target)
    about = model.describe(source, source_mtf=kernel(0.3))
    assert np.abs(model.harmonize(source, about=about).hu - source.hu).max() < 0.01


def test_a_target_that_the_source_cannot_reach_is_noted():
    source = scene(lambda f: gaussian_mtf(f, 0.15), pixel_mm=0.7)
    about = MTFRatio.from_mtfs(kernel(0.7), kernel(0.15)).describe(source)
    assert "target f50 0.70/mm not reached" in about.note
    for target, given in ((0.3, 0.5), (0.35, 0.3)):
        assert MTFRatio.from_mtfs(kernel(target), kernel(given)).describe(source).note == ""


def test_what_it_cannot_do_it_says():
    source, target = pair(0.5, 0.3, pixel_mm=0.7, size=128)
    with pytest.raises(HarmonictError, match="fir needs pairs"):
        MTFRatio.from_mtfs(kernel(0.3), config=Config(fit="fir"))
    with pytest.raises(HarmonictError, match="no filter yet"):
        MTFRatio().harmonize(source)
    with pytest.raises(HarmonictError, match="no clean border"):
        MTFRatio.from_mtfs(kernel(0.3)).harmonize(source)
    fitted = MTFRatio().fit(SlicePairs([(source, 0, target, 0)]))
    with pytest.raises(HarmonictError, match="source-mtf"):
        fitted.describe(source, source_mtf=kernel(0.3))
    two = [replace(source, protocol=source.protocol.with_(kernel=k)) for k in ("B10", "B70")]
    with pytest.raises(HarmonictError, match="one source kernel, the pairs have B10, B70"):
        MTFRatio().fit(SlicePairs([(one, 0, target, 0) for one in two]))
    for bad in ({"taps": 4}, {"gain_cap": 0.5}, {"noise_limit": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Config(**bad)


def test_a_constant_stays_and_borders_do_not_wrap():
    model = MTFRatio.from_mtfs(kernel(0.2), kernel(0.6))
    about = About((0.8, 0.8), measured={"source_mtf": kernel(0.6).mtf})
    x = torch.full((1, 1, 100, 120), -700.0)
    assert torch.allclose(model.translate(x, model.target, about), x, atol=0.01)
    x[..., :8] = 900.0
    # A wrapped border would leave hundreds of HU here.
    assert abs(float(model.translate(x, model.target, about)[0, 0, 50, -1]) + 700) < 0.5


def test_a_thin_image_is_translated_too():
    model = MTFRatio.from_mtfs(kernel(0.2), kernel(0.6))
    about = About((0.8, 0.8), measured={"source_mtf": kernel(0.6).mtf})
    assert torch.isfinite(model.translate(torch.randn(1, 1, 1, 40), model.target, about)).all()


def half(series, side):
    """One half of a single slice, left or right."""
    w = series.hu.shape[2] // 2
    part = np.s_[:, :, :w] if side == "left" else np.s_[:, :, w:]
    return replace(series, hu=np.ascontiguousarray(series.hu[part]), padding=None)


def psnr(result, reference, where):
    a, b = (np.clip(np.rint(s.hu[0]), -1024, 1000)[where] for s in (result, reference))
    return 10 * np.log10(2024**2 / np.mean((a - b) ** 2))


@pytest.mark.parametrize(
    ("source", "target", "fit", "whole_db", "body_db"),
    [
        ("B10", "B70", "fir", 28.5, 27.2),
        ("B10", "B70", "wiener", 28.3, 27.5),
        ("B30", "B50", "fir", 42.4, 42.3),
        ("B30", "B50", "ratio", 41.3, 42.5),
        ("B50", "B30", "fir", 48.0, 51.0),
        ("B50", "B30", "wiener", 48.0, 51.0),
    ],
)
def test_fitted_on_one_half_of_a_real_slice_it_predicts_the_other(data, source, target, fit, whole_db, body_db):
    s, t = (real_pairs(data)[k] for k in (source, target))
    body = body_mask(t.hu[0])
    scores = []
    for fitted in ("left", "right"):
        model = MTFRatio(Config(fit=fit)).fit(SlicePairs([(half(s, fitted), 0, half(t, fitted), 0)]))
        scored = np.zeros(body.shape, bool)
        scored[:, 256:] = fitted == "left"
        scored[:, :256] = fitted == "right"
        result = model.harmonize(s)
        scores.append((psnr(result, t, scored), psnr(result, t, scored & body)))
    whole, inside = np.mean(scores, axis=0)
    assert whole > whole_db and inside > body_db


def test_fitted_on_one_lungman_slice_it_predicts_the_other(data):
    pairs = real_pairs(data)
    s, t = pairs["FC51-00000016"], pairs["FC13-00000016"]
    model = MTFRatio(Config(fit="fir")).fit(SlicePairs([(s, 0, t, 0)]))
    s, t = pairs["FC51-00000355"], pairs["FC13-00000355"]
    assert psnr(model.harmonize(s), t, ~t.padding[0]) > 50


@pytest.mark.parametrize(
    ("source", "target", "body_db"),
    [("B70", "B30", 43), ("B50", "B30", 44), ("B30", "B50", 39.5), ("B10", "B30", 45), ("B10", "B70", 25.5)],
)
def test_without_pairs_one_half_measures_the_source_and_the_other_the_target(data, source, target, body_db):
    s, t = (real_pairs(data)[k] for k in (source, target))
    hidden = np.zeros(s.hu.shape, bool)
    hidden[:, :, 256:] = True
    model = MTFRatio.like([replace(t, padding=~hidden)])
    about = model.describe(replace(s, padding=hidden))
    assert psnr(model.harmonize(s, about=about), t, body_mask(t.hu[0])) > body_db


def test_sharper_noise_grows_only_so_far(data):
    pairs = real_pairs(data)
    soft, sharp = pairs["FC13-00000355"], pairs["FC51-00000355"]
    result = MTFRatio.like([sharp]).harmonize(soft)
    assert uniform_noise_sd(result) < 1.6 * uniform_noise_sd(sharp)
