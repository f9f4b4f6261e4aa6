"""What may be added to an image: texture, not another mean."""

import numpy as np
import pytest
import torch

from harmonict.nn.residual import texture_only


@pytest.mark.parametrize("sd_px", [3, 8])
def test_a_constant_is_taken_out_whole(sd_px):
    assert texture_only(torch.full((2, 1, 64, 48), 40.0), sd_px).abs().max() < 1e-4


@pytest.mark.parametrize("period_px", [4, 16, 64])
def test_a_wave_keeps_what_the_gaussian_does_not_pass(period_px):
    x = torch.arange(512.0)
    wave = torch.sin(2 * torch.pi * x / period_px).expand(1, 1, 512, 512)
    kept = texture_only(wave, 8)[0, 0, 256, 128:384].numpy()
    expected = 1 - np.exp(-2 * (np.pi * 8 / period_px) ** 2)  # the Gaussian's transfer at this frequency
    assert np.abs(kept - expected * wave[0, 0, 256, 128:384].numpy()).max() < 0.01


def test_gradients_reach_what_it_is_given():
    change = torch.randn(1, 1, 40, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    texture_only(change, 3).square().sum().backward()
    assert change.grad is not None and change.grad.abs().max() > 0.1
