"""Losses, schedule and augmentation of the MTF-conditioned harmonizer and its ablation."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from harmonict.core import HarmonictError
from harmonict.nn.physics_losses import (
    Critic,
    Training,
    adam_cyclic,
    augmented,
    critic_losses,
    features_of,
    generator_losses,
    lung_like,
    scaled,
)
from harmonict.nn.vgg import vgg19
from toy import toy_series


class Brightness(nn.Module):
    """A critic whose value is known: the mean of the judged image."""

    def forward(self, x):
        return x[:, 1:].mean((1, 2, 3), keepdim=True)


def still(**changes):
    return Training(**({"affine": 0.0, "noise_hu": 0.0, "jitter": 0.0} | changes))


def seeded(n=0):
    return torch.Generator().manual_seed(n)


def test_the_unit_is_the_papers_with_the_sign_that_makes_air_0():
    assert scaled(torch.tensor([-1024.0, 1024.0])).tolist() == [0.0, 1.0]


def test_the_critic_goes_down_on_targets_and_the_generator_down_where_the_critic_is_low():
    """Equations 5 and 6 with one sign: both are minimised."""
    i_nh, i_h, i_r = torch.zeros(2, 1, 8, 8), torch.full((2, 1, 8, 8), 0.7), torch.full((2, 1, 8, 8), 0.2)
    losses = critic_losses(Training(), Brightness(), i_nh, i_h, i_r, generator=seeded())
    assert losses["WGAN"][0] == 1 and losses["WGAN"][1].item() == pytest.approx(0.2 - 0.7)
    # the gradient of a mean over 64 pixels has the length 1/8
    assert losses["gradient penalty"][0] == 10
    assert losses["gradient penalty"][1].item() == pytest.approx((1 / 8 - 1) ** 2, rel=1e-4)
    seen = torch.ones_like(i_h, dtype=bool)
    made = generator_losses(Training(texture=0), i_nh, i_h, i_r, seen, critic=Brightness(), features=None)
    assert made["L_a"][0] == 1 and made["L_a"][1].item() == pytest.approx(0.7)


def test_a_trained_critic_ranks_targets_below_what_is_made():
    torch.manual_seed(0)
    critic, c = Critic(4), still(rate=1e-3)
    adam, _ = adam_cyclic(c, critic)
    i_nh = torch.rand(4, 1, 32, 32)
    i_r, i_h = torch.rand(4, 1, 32, 32) * 0.1 + 0.6, torch.rand(4, 1, 32, 32) * 0.1 + 0.2
    for n in range(30):
        adam.zero_grad()
        sum(w * v for w, v in critic_losses(c, critic, i_nh, i_h, i_r, generator=seeded(n)).values()).backward()
        adam.step()
    assert critic(torch.cat([i_nh, i_r], 1)).mean() < critic(torch.cat([i_nh, i_h], 1)).mean()


def test_the_critic_is_five_convolutions_on_two_images():
    kinds = [m for m in Critic(64) if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in kinds] == [64, 128, 256, 512, 1] and kinds[0].in_channels == 2


def test_pixels_that_were_not_measured_do_not_count_and_the_weights_are_the_papers():
    i_r = torch.zeros(1, 1, 16, 16)
    i_h = i_r.clone()
    i_h[..., :8] = 100.0
    seen = torch.ones_like(i_r, dtype=bool)
    seen[..., :8] = False
    losses = generator_losses(Training(), i_r, i_h, i_r, seen, critic=Brightness(), features=vgg19("random:2"))
    assert {name: weight for name, (weight, _) in losses.items()} == {"L_d": 1000, "L_a": 1, "L_t": 50}
    assert losses["L_d"][1] == 0


def test_the_texture_outside_the_lung_does_not_count():
    truth = torch.from_numpy(toy_series(blur_mm=0.3, noise_hu=1e-3, slices=1, size=128, pixel_mm=2.4).hu[:, None])
    lung = lung_like(truth).bool()
    noise = 50 * torch.randn(truth.shape, generator=seeded())
    texture = {}
    for name, place in (("lung", lung), ("body", (truth > -200) & ~lung)):
        i_h, i_r = scaled(truth + noise * place), scaled(truth)
        seen = torch.ones_like(lung)
        losses = generator_losses(
            Training(adversarial=0), i_r, i_h, i_r, seen, critic=Brightness(), features=vgg19("random:4")
        )
        texture[name] = losses["L_t"][1].item()
    assert texture["body"] == 0 and texture["lung"] > 0


def test_lung_is_told_from_the_air_outside_and_keeps_its_vessels():
    hu = torch.full((1, 1, 64, 64), -1000.0)
    hu[..., 8:56, 8:56] = 40
    hu[..., 16:48, 16:48] = -850
    hu[..., 30:33, 16:48] = 30  # a vessel
    mask = lung_like(hu)[0, 0]
    assert mask[18:46, 18:46].all() and not mask[:7].any() and not mask[10:14, 10:14].any()


def test_gradients_are_brought_to_length_one_before_a_step():
    layer = nn.Linear(3, 1, bias=False)
    adam, _ = adam_cyclic(Training(), layer)
    for size in (1e-3, 1e4):
        layer.weight.grad = torch.full((1, 3), size)
        adam.step()
        assert layer.weight.grad.norm().item() == pytest.approx(1)


def test_the_rate_goes_up_and_back_in_a_cycle_and_half_as_high_in_the_next():
    adam, rate = adam_cyclic(Training(rate=1e-4, rate_peak=1.1e-3, cycle=10), nn.Linear(1, 1))
    seen = []
    for _ in range(21):
        seen.append(adam.param_groups[0]["lr"])
        adam.step()
        rate.step()
    assert np.allclose([seen[n] for n in (0, 5, 10, 15, 20)], [1e-4, 1.1e-3, 1e-4, 6e-4, 1e-4])


def test_both_images_are_moved_alike_and_only_the_source_gets_noise():
    hu = torch.from_numpy(toy_series(slices=4, size=64, pixel_mm=4.8).hu[:, None])
    seen = torch.ones_like(hu, dtype=bool)
    moved = augmented(still(affine=1.0), hu, hu.clone(), seen, generator=seeded())
    assert torch.equal(moved.source, moved.target) and not torch.equal(moved.source, hu)
    assert not moved.seen.all()  # what came in over the edge was not measured
    noisy = augmented(still(noise_hu=20.0, jitter=0.01), hu, hu, seen, generator=seeded())
    assert torch.equal(noisy.target, hu) and 0 < (noisy.source - hu).std() < 30
    same = augmented(still(), hu, hu, seen, generator=seeded())
    assert torch.equal(same.source, hu) and torch.all(same.zoom == 1)


def test_half_of_the_pairs_stay_untouched_to_the_last_bit():
    hu = torch.randn(64, 1, 16, 16)
    moved = augmented(still(affine=0.5), hu, hu, torch.ones_like(hu, dtype=bool), generator=seeded())
    untouched = (moved.source == hu).all(dim=(1, 2, 3))
    assert 16 < untouched.sum() < 48 and torch.all(moved.zoom[untouched] == 1)


def test_zoom_is_how_much_larger_things_are_shown():
    y, x = np.mgrid[:128, :128] - 63.5
    disc = torch.from_numpy(np.where(np.hypot(y, x) < 30, 0.0, -1000.0).astype(np.float32))[None, None]
    many = disc.expand(8, 1, 128, 128).contiguous()
    moved = augmented(still(affine=1.0), many, many, torch.ones_like(many, dtype=bool), generator=seeded(3))
    area = ((moved.target + 1000) / 1000).sum((1, 2, 3)) / ((disc + 1000) / 1000).sum()
    assert torch.allclose(area, moved.zoom**2, rtol=0.02) and moved.zoom.std() > 0.01


def test_feature_weights_of_another_width_than_the_encoders_are_refused():
    c = SimpleNamespace(feature_weights="random:4", feature_width=8)
    with pytest.raises(HarmonictError, match="4 channels wide, feature_width is 8"):
        features_of(c)


def test_settings_that_make_no_schedule_are_refused():
    for wrong in ({"rate": 2e-3}, {"cycle": 1}, {"affine": 2.0}):
        with pytest.raises(ValueError):
            Training(**wrong)
