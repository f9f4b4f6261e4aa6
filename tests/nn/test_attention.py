"""CBAM: the published formula, gates of 0 to 1, and large images judged as the patches of the training were."""

import pytest
import torch

from harmonict.nn.attention import CBAM, ChannelAttention, SpatialAttention, tile_shares


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_channel_gates_are_the_sigmoid_of_the_sum_of_the_mlp_of_mean_and_greatest_value():
    gate = ChannelAttention(8, 4)
    x = torch.randn(2, 8, 10, 12)
    (a, b), (c, d) = ((layer.weight[:, :, 0, 0], layer.bias) for layer in (gate.mlp[0], gate.mlp[2]))
    both = sum(torch.relu(v @ a.T + b) @ c.T + d for v in (x.mean((2, 3)), x.amax((2, 3))))
    assert a.shape == (2, 8)
    torch.testing.assert_close(gate(x)[:, :, 0, 0], torch.sigmoid(both))


def test_spatial_gates_see_the_mean_and_the_greatest_channel_within_seven_pixels():
    gate = SpatialAttention()
    x = torch.zeros(1, 4, 21, 21, requires_grad=True)
    gate(x + torch.randn(1, 4, 21, 21))[0, 0, 10, 10].backward()
    touched = x.grad[0].abs().amax(0) > 0
    assert touched[7:14, 7:14].all() and touched.sum() == 49
    assert gate.conv.weight.shape == (1, 2, 7, 7)


def test_a_module_multiplies_by_channel_gates_first_and_then_by_gates_of_the_places():
    block = CBAM(8, 2)
    x = torch.randn(1, 8, 9, 9)
    after_channels = x * block.channel(x)
    torch.testing.assert_close(block(x), after_channels * block.spatial(after_channels))
    for gates in (block.channel(x), block.spatial(x)):
        assert 0 < gates.min() and gates.max() < 1


def test_the_scale_of_the_spatial_gates_does_not_depend_on_the_size_of_the_image():
    """A softmax over the places, as the paper's text has it, would divide by their number: 41 times from 80 to 512."""
    gate = SpatialAttention()
    small, large = (gate(torch.ones(1, 4, size, size))[0, 0, 40, 40] for size in (80, 160))
    torch.testing.assert_close(small, large)


def test_gates_by_tiles_are_those_of_a_tile_where_all_tiles_are_alike():
    gate = ChannelAttention(6, 2)
    patch = torch.randn(1, 6, 16, 16)
    whole = patch.tile(1, 1, 3, 2)
    torch.testing.assert_close(gate(whole, tile=16), gate(patch))
    torch.testing.assert_close(gate(patch, tile=16), gate(patch))


def test_tiles_without_weight_do_not_count():
    gate = ChannelAttention(6, 2)
    tissue, air = torch.randn(1, 6, 16, 16), torch.full((1, 6, 16, 16), -9.0)
    image = torch.cat([tissue, air, air], dim=3)
    weight = torch.tensor([[[[1.0, 0.0, 0.0]]]])
    torch.testing.assert_close(gate(image, tile=16, weight=weight), gate(tissue))
    assert (gate(image) - gate(tissue)).abs().max() > 0.01  # pooled over the whole image, air would count


def test_shares_lie_on_the_grid_of_the_tiles_also_where_the_last_is_smaller():
    where = torch.zeros(1, 1, 20, 40, dtype=torch.bool)
    where[..., :16, :8] = True
    where[..., 16:, 32:] = True
    shares = tile_shares(where, 16)
    assert shares.shape == (1, 1, 2, 3)
    torch.testing.assert_close(shares[0, 0], torch.tensor([[0.5, 0, 0], [0, 0, 1.0]]))
    x = torch.randn(1, 6, 20, 40)
    assert torch.isfinite(ChannelAttention(6, 2)(x, tile=16, weight=shares)).all()
