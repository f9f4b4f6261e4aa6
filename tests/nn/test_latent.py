"""The encoder-decoder: its shapes, its weights' identity, and latents as vectors."""

import numpy as np
import pytest
import torch

from harmonict.core import HarmonictError
from harmonict.nn.latent import EncoderDecoder, as_maps, as_vectors
from harmonict.nn.resnet import resnet18


def network(**options):
    torch.manual_seed(0)
    return EncoderDecoder(4, 2, **options).eval()


def test_everything_that_is_drawn_comes_through_the_latent():
    """No skips: the same latent gives the same image, whatever the image was that it was made of."""
    model = network()
    with torch.inference_mode():
        z = model.encode(torch.randn(1, 1, 64, 96) * 100)
        assert z.shape == (1, 32, 2, 3)
        assert torch.equal(model.decode(z), model.decode(z.clone())) and model.decode(z).shape == (1, 1, 64, 96)
    calls = [module for module in model.decoder.modules() if isinstance(module, torch.nn.Upsample)]
    assert len(calls) == 5


def test_the_last_convolutions_are_along_one_axis():
    shapes = [line.kernel_size for line in network().lines]
    assert shapes == [(1, 5), (5, 1), (1, 5), (5, 1)]


def test_the_papers_size_has_resnet_18s_encoder():
    model = EncoderDecoder(64, 32)
    assert sum(p.numel() for p in model.encoder.parameters()) == 11_176_512  # torchvision's without its classifier
    assert model.channels == 512


@pytest.mark.parametrize("kept", [True, False], ids=["as many as Z has", "more than Z has"])
def test_with_components_a_network_begins_at_the_best_linear_code(kept):
    """Three waves, wherever they begin, are six directions and come back exactly from a Z of 32; of white noise 32 of
    1,024 directions can be kept."""
    rng = np.random.default_rng(0)
    z, y, x = np.mgrid[:6, :128, :128]
    waves = [np.sin(a * x / 9 + b * y / 9 + z * a) * (1 + z / 6) for a, b in ((1, 0.3), (2, 1.1), (0.5, 2.6))]
    hu = 100 * (sum(waves) if kept else rng.standard_normal((6, 128, 128))) - 300
    model = network(linear=True)
    x = torch.from_numpy(hu.astype(np.float32))[:, None]
    model.find_components(x[..., at : at + 64, 64 - at : 128 - at] for at in range(0, 64, 5))
    gram = model.components.flatten(1) @ model.components.flatten(1).T
    torch.testing.assert_close(gram, torch.eye(32), atol=1e-4, rtol=0)
    with torch.inference_mode():
        error = (model(x) - x).square().mean() / x.var()
    if kept:
        assert error < 1e-6
    else:
        assert 0.5 < error < 1 - 32 / 1024  # the share of 32 directions, more where few squares tell them


def test_the_network_works_on_what_its_components_leave():
    model = network(linear=True)
    x = torch.randn(2, 1, 64, 64) * 100
    with torch.no_grad():
        model.components.copy_(torch.linalg.qr(torch.randn(1024, 32))[0].T.reshape(32, 1, 32, 32))
        linear = model(x)
        model.share.fill_(1.0)
        assert not torch.equal(model.encode(x), network(linear=True).encode(x))
        model.lines[-1].bias.fill_(0.1)
        changed = model(x)
    assert (changed - linear).abs().mean() > 50  # 0.1 of 1,000 HU, and what the encoder adds to Z
    for one in (False, True):
        assert ("components" in network(linear=one).state_dict()) is one


def test_trained_weights_are_taken_and_those_of_another_width_refused():
    model = network()
    model.use_features("random:4")
    wanted = resnet18("random:4").state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.encoder.state_dict().items())
    with pytest.raises(HarmonictError, match="have 8 channels, feature_width is 4: --set feature_width=8"):
        model.use_features("random:8")


def test_the_digest_changes_with_any_weight_and_with_nothing_else():
    model, same = network(), network()
    assert model.digest == same.digest == same.to(memory_format=torch.channels_last).digest
    with torch.no_grad():
        same.lines[-1].bias += 1e-3
    assert model.digest != same.digest


@pytest.mark.parametrize("side", [1, 2, 4])
def test_vectors_are_maps_written_row_by_row(side):
    maps = torch.arange(2 * 3 * 4 * 8).reshape(2, 3, 4, 8).float()
    vectors = as_vectors(maps, side)
    assert vectors.shape == (2 * (4 // side) * (8 // side), 3, side * side)
    assert torch.equal(vectors[0], maps[0, :, :side, :side].reshape(3, -1))
    assert torch.equal(as_maps(vectors, maps.shape, side), maps)
