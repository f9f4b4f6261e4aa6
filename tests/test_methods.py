"""One contract for all METHODS: what a harmonizer promises whatever it is."""

import numpy as np
import pytest

from harmonict.core import HarmonictError
from harmonict.data import pair_series
from harmonict.harmonizer import CONFIG_FILE, WEIGHTS_FILE, make_config
from harmonict.methods import METHODS, get_method, load_model
from toy import toy_series

SOURCE = toy_series(blur_mm=0.8, seed=1, padding=True)
TARGET = toy_series(blur_mm=1.2, seed=1, kernel="B10")
# A contract holds for a network that is hardly trained too.
GAN = {"layers": 3, "width": 4, "discriminator_width": 4, "residual": True, "patch": 48, "batch": 2, "steps": 6}
ZAREI = {
    "feature_weights": "random:4",
    "feature_width": 4,
    "depth": 3,
    "critic_width": 4,
    "patch": 32,
    "batch": 2,
    "steps": 3,
}
LATENT = {"feature_weights": "random:4", "feature_width": 4, "width": 4, "patch": 64, "batch": 2, "steps": 3}
QUICK = {
    "bridge": {"channels": 8, "blocks": 1, "patch": 32, "batch": 2, "steps": 3, "rate": 1e-2, "steps_sampled": 2},
    "encoder-decoder": LATENT,
    "diffusion-ct": {
        **LATENT,
        "widths": (16, 16),
        "blocks": 1,
        "batch_diffusion": 2,
        "steps_diffusion": 3,
        "steps_sampled": 4,
        "sampler": "ddim",
    },
    "ddpm": {
        "widths": (8, 8),
        "blocks": 1,
        "residual": True,
        "patch": 32,
        "batch": 2,
        "steps": 3,
        "steps_noise": 100,
        "steps_sampled": 4,
    },
    "physics": {**ZAREI, "decoder": "8,8", "omega": 2, "filters": 4},
    "vgg-unet": {**ZAREI, "decoder": "8,8,8"},
    "choe": {"layers": 3, "channels": 8, "patch": 32, "steps": 3, "rate": 1e-2},
    "cvh-ct": {
        "channels": 4,
        "reduction": 2,
        "discriminator_channels": 4,
        "patch": 64,
        "batch": 1,
        "steps": 2,
        "residual": True,
        "feature_weights": "random:2",
    },
    "cyclegan": {"channels": 4, "blocks": 1, "discriminator_channels": 4, "patch": 32, "steps": 3, "residual": True},
    "ganai": {**GAN, "t_max": 2, "rate": 1e-3},
    "stan-ct": {**GAN, "t_max": 2, "rate": 1e-3, "units": "overlap"},
    "radiomic-gan": {
        "feature_weights": "random",
        "feature_width": 16,
        "width": 4,
        "critic_width": 4,
        "patch": 48,
        "batch": 2,
        "steps": 3,
        "window": "none",
    },
}


@pytest.fixture(scope="module", params=sorted(METHODS))
def model(request):
    kind = METHODS[request.param]
    return kind(make_config(kind.Config, QUICK.get(request.param, {}))).fit(pair_series([SOURCE], [TARGET]))


def test_the_result_has_the_grid_and_the_target_protocol_and_the_source_is_untouched(model):
    before = SOURCE.hu.copy()
    result = model.harmonize(SOURCE)
    assert result.hu.dtype == np.float32 and result.hu.shape == before.shape and np.isfinite(result.hu).all()
    assert result.geometry == SOURCE.geometry and result.patient == SOURCE.patient
    assert np.array_equal(SOURCE.hu, before)
    draws_no_target = model.name in ("identity", "encoder-decoder")
    assert result.protocol.kernel == ("B30" if draws_no_target else "B10") and SOURCE.protocol.kernel == "B30"


def test_padding_comes_back_exactly(model):
    assert np.array_equal(model.harmonize(SOURCE).hu[SOURCE.padding], SOURCE.hu[SOURCE.padding])


def test_batch_size_and_order_change_nothing(model):
    about = model.describe(SOURCE)
    whole = model.harmonize(SOURCE, about=about, slices_at_once=3).hu
    single = model.harmonize(SOURCE, about=about, slices_at_once=1).hu
    assert np.array_equal(whole, single)


def test_the_same_scan_gives_the_same_hu_twice(model):
    assert np.array_equal(model.harmonize(SOURCE).hu, model.harmonize(SOURCE).hu)


def test_save_and_load_is_identity(model, tmp_path):
    model.save(tmp_path / "model")
    back = load_model(tmp_path / "model")
    assert type(back) is type(model) and back.digest == model.digest
    assert np.array_equal(back.harmonize(SOURCE).hu, model.harmonize(SOURCE).hu)


def test_a_model_whose_files_do_not_match_is_refused(model, tmp_path):
    model.save(tmp_path / "model")
    weights = tmp_path / "model" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(HarmonictError, match="SHA-256"):
        load_model(tmp_path / "model")
    weights.unlink()
    with pytest.raises(HarmonictError, match="not a whole model"):
        load_model(tmp_path / "model")
    (tmp_path / "model" / CONFIG_FILE).write_text("{")
    with pytest.raises(HarmonictError, match="is no model"):
        load_model(tmp_path / "model")


def test_saving_never_replaces_what_is_no_model(model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(HarmonictError, match="is no model"):
        model.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_a_model_of_another_method_is_refused(model, tmp_path):
    model.save(tmp_path / "model")
    other = next(kind for name, kind in METHODS.items() if name != model.name)
    with pytest.raises(HarmonictError, match="holds a model of"):
        other.load(tmp_path / "model")


def test_an_unknown_method_or_setting_lists_the_known_ones():
    with pytest.raises(HarmonictError, match="histogram"):
        get_method("histgram")
    with pytest.raises(HarmonictError, match="levels"):
        make_config(METHODS["histogram"].Config, {"level": "3"})
    with pytest.raises(HarmonictError, match="must be int"):
        make_config(METHODS["histogram"].Config, {"levels": "many"})


def test_settings_are_read_as_their_type():
    assert make_config(METHODS["histogram"].Config, {"levels": "64"}).levels == 64


def test_a_file_that_clips_air_clips_it_again_and_no_other_does(model):
    clipped = SOURCE.with_hu(np.maximum(SOURCE.hu, -1010), padding=None)
    assert model.harmonize(clipped).hu.min() >= -1010
    free = toy_series(blur_mm=0.8, noise_hu=20, seed=3)
    if model.name != "histogram":  # whose output has the reference's range
        assert model.harmonize(free).hu.min() < -1024
