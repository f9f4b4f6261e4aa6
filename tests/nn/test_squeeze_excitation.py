"""scSE, attention gates and the U-Nets on a VGG encoder."""

import pytest
import torch
from torch import nn

from harmonict.nn.squeeze_excitation import AttentionGate, ConcurrentSE, VGGUNet
from harmonict.nn.vgg import vgg19


def test_excitation_is_the_sum_of_the_channel_and_the_place_branch():
    block, x = ConcurrentSE(6), torch.randn(2, 6, 5, 7)
    channel = torch.sigmoid(block.channel(x.mean((2, 3), keepdim=True)))
    place = torch.sigmoid(block.space(x))
    assert torch.allclose(block(x), x * (channel + place), atol=1e-6)


def test_with_a_window_what_lies_far_away_changes_nothing_here():
    x = torch.randn(1, 4, 16, 64)
    far = x.clone()
    far[..., 48:] += 5
    for window, same in ((16, True), (None, False)):
        block = ConcurrentSE(4, window=window)
        assert torch.allclose(block(x)[..., :16], block(far)[..., :16], atol=1e-6) is same


def test_a_window_as_large_as_the_image_is_no_window():
    block, x = ConcurrentSE(4, window=16), torch.randn(1, 4, 16, 16)
    with_window = block(x)
    block.window = None
    assert torch.equal(with_window, block(x))


def test_a_flat_image_is_scaled_alike_everywhere_whatever_the_windows_cut_off():
    block, x = ConcurrentSE(4, window=16), torch.full((1, 4, 40, 23), 2.0)
    result = block(x)
    assert torch.allclose(result, result[..., :1, :1].expand_as(result), atol=1e-6)


def test_the_gate_only_weighs_the_skip_down():
    gate, skip = torch.randn(2, 3, 6, 6), torch.randn(2, 8, 6, 6)
    share = AttentionGate(3, 8)(gate, skip) / skip
    assert torch.all((share > 0) & (share < 1))
    assert torch.allclose(share, share[:, :1].expand_as(share), rtol=1e-3, atol=1e-4)  # one weight a pixel


@pytest.mark.parametrize(("attention", "centre", "decoder"), [(True, False, (8, 6)), (False, True, (8, 6, 4))])
def test_sides_of_any_length_come_back_as_they_went_in(attention, centre, decoder):
    net = VGGUNet(4, decoder, depth=3, attention=attention, centre=centre, window=16)
    assert net(torch.randn(1, 3, 37, 50)).shape == (1, decoder[-1], 37, 50)


def test_the_encoder_starts_as_the_trained_network_that_it_was_given():
    trained = vgg19("random:4")
    net = VGGUNet(4, (8, 8), depth=3)
    net.copy_encoder(trained)
    x = torch.randn(1, 3, 32, 32)
    deepest = nn.Sequential(*net.encoder)(x)
    assert torch.equal(deepest, trained(x, ["relu3_4"])[0])


def test_a_number_of_widths_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="2 steps"):
        VGGUNet(4, (8, 8, 8), depth=3)
