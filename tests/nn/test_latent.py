"""The encoder-decoder: its shapes, its weights' identity, and latents as vectors."""

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
