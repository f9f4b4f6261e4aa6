"""The U-Net and the discriminator: the papers' layers, nothing moves, no checkerboard where it is promised."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from harmonict.nn.unet import Discriminator, UNet, widths
from harmonict.tiles import to_multiple


def smoothing(network):
    """Every kernel a symmetric, positive one without bias: the whole network is then a blur."""
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            taps = torch.tensor([1.0, 3, 3, 1] if layer.kernel_size[0] == 4 else [1.0, 2, 1])
            with torch.no_grad():
                layer.weight.copy_(torch.outer(taps, taps) / layer.weight[0].numel())
                layer.bias.zero_()
    return network


@pytest.mark.parametrize("upsampling", ["transposed", "resize"])
@pytest.mark.parametrize("at", [(128, 128), (127, 130), (129, 125)])
@pytest.mark.parametrize("size", [256, 257])
def test_nothing_moves_the_image(upsampling, at, size):
    network = smoothing(UNet(2, 2, upsampling))
    x = torch.zeros(1, 1, size, size)
    x[0, 0, at[0], at[1]] = 1000
    with torch.no_grad():
        y = to_multiple(x, network.multiple, network)[0, 0].double().numpy()
    assert y.shape == (size, size) and y.max() > 0
    places = [float((y.sum(axis=1 - axis) * np.arange(size)).sum() / y.sum()) for axis in (0, 1)]
    assert places == pytest.approx(at, abs=0.05)


def test_the_papers_unet_has_fifteen_hidden_layers_skips_and_a_latent_at_one_pixel():
    network = UNet(64, 7, "transposed")
    assert len(network.down) == len(network.up) == 8  # seven and the bottleneck; seven and the output layer
    assert all(layer.kernel_size == (4, 4) and layer.stride == (2, 2) for layer in network.down)
    c = [64, 128, 256, 512, 512, 512, 512, 512]
    assert widths(64, 8) == c
    down = sum(16 * a * b + b for a, b in zip([1, *c[:-1]], c, strict=True))
    up = sum(16 * a * b + b for a, b in [(512, 512), *[(1024, 512)] * 3, (1024, 256), (512, 128), (256, 64), (128, 1)])
    assert sum(p.numel() for p in network.parameters()) == down + up == 54_403_457


@pytest.mark.parametrize("upsampling", ["transposed", "resize"])
def test_seven_layers_take_a_patch_and_a_whole_slice(upsampling):
    network = UNet(2, 7, upsampling)
    with torch.no_grad():
        assert network.encode(torch.zeros(2, 1, 256, 256))[-1].shape == (2, 16, 1, 1)
        assert network(torch.zeros(1, 1, 512, 512)).shape == (1, 1, 512, 512)


def test_each_layer_up_sees_its_counterpart_down():
    """With the bottleneck cut off, what is left comes through the skips."""
    network = UNet(4, 3, "transposed")
    x = torch.randn(1, 1, 32, 32)
    for n in range(3):
        changed = UNet(4, 3, "transposed")
        changed.load_state_dict(network.state_dict())
        with torch.no_grad():
            changed.down[n + 1].weight.zero_()  # below layer n only biases are left, and those are 0
            assert changed.encode(x)[-1].abs().max() == 0
            assert changed(x).std() > 0


def test_doubled_pixels_draw_no_checkerboard_and_transposed_convolutions_do():
    rough = {}
    for upsampling in ("transposed", "resize"):
        torch.manual_seed(0)
        with torch.no_grad():
            y = UNet(8, 2, upsampling)(torch.ones(1, 1, 128, 128))[0, 0, 48:80, 48:80]
        rough[upsampling] = float(y.std() / y.abs().mean())
    assert rough["resize"] < 1e-5 and rough["transposed"] > 0.05


def test_the_output_is_float32_also_inside_bf16():
    network, critic = UNet(4, 3, "resize"), Discriminator(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert network.encode(torch.randn(1, 1, 32, 32))[-1].dtype == torch.bfloat16
        logits, features = critic(torch.randn(1, 1, 32, 32))
        assert network(torch.randn(1, 1, 32, 32)).dtype == logits.dtype == features.dtype == torch.float32


def test_a_residual_starts_near_nothing():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        assert UNet(8, 3, "resize", last_scale=0.01)(x).std() < 0.05 * x.std()


def test_the_discriminator_has_five_layers_and_judges_patches_of_70_pixels():
    critic = Discriminator(64)
    c = [1, 64, 128, 256, 512, 1]
    layers = [*critic.layers, critic.last]
    assert len(layers) == 5 and all(layer.kernel_size == (4, 4) for layer in layers)
    count = sum(16 * a * b + b for a, b in pairwise(c))
    assert sum(p.numel() for p in critic.parameters()) == count
    x = torch.randn(1, 1, 128, 128, requires_grad=True)
    logits, features = Discriminator(4)(x)
    assert features.shape[1] == 32
    logits[0, 0, 7, 7].backward()
    rows = torch.nonzero(x.grad[0, 0].abs().sum(dim=1))
    assert int(rows.max() - rows.min()) + 1 == 70
