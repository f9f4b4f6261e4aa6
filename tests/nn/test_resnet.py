"""ResNet-18: torchvision's names, the paper's size, five blocks."""

import pytest
import torch
from safetensors.torch import save_file

from feature_files import hub_file
from harmonict.core import HarmonictError
from harmonict.nn import resnet
from harmonict.nn.resnet import ResNet18, resnet18
from harmonict.nn.vgg import prepare


def image(size=64):
    return prepare(-200 + 300 * torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(0)))


def test_parameters_have_torchvisions_names_shapes_and_number():
    state = ResNet18().state_dict()
    assert sum(p.numel() for p in ResNet18().parameters()) == 11_176_512  # 11,689,512 less the classifier's 513,000
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    assert state["layer4.1.conv2.weight"].shape == (512, 512, 3, 3)
    assert state["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert state["layer2.0.downsample.1.running_var"].shape == (128,)
    assert state["layer1.0.bn1.num_batches_tracked"] == 0
    assert not any(key.startswith(("fc", "layer1.0.downsample")) for key in state)
    assert len(state) == 120  # torchvision's 122 less fc


def test_the_five_blocks_are_the_network_and_halve_the_image_each():
    network = resnet18("random:64")
    x, sizes = image(), []
    for block in network.blocks():
        x = block(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(64, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    assert torch.equal(x, network(image()))


def test_a_block_adds_what_goes_around_it():
    block = ResNet18(4).layer1[0].eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(block(x), torch.relu(x))


@pytest.mark.parametrize("weights", ["random", "trial"])
def test_a_feature_network_is_frozen_and_a_slice_does_not_depend_on_its_batch(weights):
    network = resnet18(weights)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert torch.allclose(network(image())[1:], network(image()[1:]), atol=1e-5)
    assert network(image()).abs().max() > 0


def test_imagenet_weights_come_from_the_published_file_without_its_classifier(tmp_path, monkeypatch):
    trained = ResNet18(2)
    trained.bn1.running_mean.fill_(3.0)
    state = {**trained.state_dict(), "fc.weight": torch.zeros(5, 16), "fc.bias": torch.zeros(5)}
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}  # as in files of old
    file = hub_file(tmp_path / "cache", "resnet18", state)
    monkeypatch.setenv("HARMONICT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(resnet, "IMAGENET_URL", f"https://example.org/{file.name}")
    network = resnet18("imagenet")
    assert network.width == 2 and network.bn1.running_mean.eq(3).all()
    assert torch.equal(network(image()), trained.eval()(image()))


def test_the_address_and_digest_are_torchvisions():
    assert resnet.IMAGENET_URL == "https://download.pytorch.org/models/resnet18-f37072fd.pth"


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path):
    state = ResNet18(2).state_dict()
    del state["layer3.0.bn1.running_mean"]
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(HarmonictError, match=r"lacks layer3\.0\.bn1\.running_mean"):
        resnet18(tmp_path / "net.safetensors")
    save_file({"features.0.weight": torch.zeros(2, 3, 3, 3)}, tmp_path / "vgg.safetensors")
    with pytest.raises(HarmonictError, match=r"hold no ResNet-18: conv1\.weight is missing"):
        resnet18(tmp_path / "vgg.safetensors")
    with pytest.raises(HarmonictError, match="whole number of channels"):
        resnet18("random:wide")
