"""VGG-19: torchvision's names, the paper's size, weights that say where they come from."""

import pytest
import torch
from safetensors.torch import save_file

from feature_files import Server, hub_file
from harmonict.core import HarmonictError
from harmonict.nn import vgg
from harmonict.nn.losses import texture_loss
from harmonict.nn.vgg import VGG19, prepare, vgg19

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34)  # indices in torchvision's `features`


def image(size=32, seed=0):
    return -200 + 300 * torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(seed))


def test_parameters_have_torchvisions_names_shapes_and_number():
    network = VGG19()
    assert [name for name, _ in network.named_parameters()] == [
        f"features.{n}.{kind}" for n in CONVOLUTIONS for kind in ("weight", "bias")
    ]
    assert network.features[0].weight.shape == (64, 3, 3, 3)
    assert network.features[34].weight.shape == (512, 512, 3, 3)
    assert sum(p.numel() for p in network.parameters()) == 20_024_384  # VGG-19 without its classifier


def test_the_paper_sized_network_looks_at_a_slice():
    maps = vgg19("random:64")(prepare(image(64)), ["relu1_1", "relu3_4", "relu5_4"])
    assert [tuple(m.shape) for m in maps] == [(2, 64, 64, 64), (2, 256, 16, 16), (2, 512, 4, 4)]


def test_layers_come_in_the_order_asked_and_are_outputs_of_a_relu():
    network = vgg19("random:4")
    deep, first, second = network(prepare(image()), ["relu4_1", "relu1_1", "relu1_2"])
    assert (deep.shape[-1], first.shape[-1], second.shape[-1]) == (4, 32, 32)
    for maps in (deep, first, second):
        assert maps.min() == 0 and maps.max() > 0
    by_hand = torch.relu(network.features[0](prepare(image())))
    assert torch.equal(first, by_hand)


def test_the_five_groups_are_the_network():
    network = vgg19("random:4")
    layers = ["relu1_2", "relu2_2", "relu3_4", "relu4_4", "relu5_4"]
    x = prepare(image())
    for group, expected in zip(network.groups(), network(x, layers), strict=True):
        x = group(x)
        assert torch.equal(x, expected)
    trainable = VGG19(4)
    trainable.groups()[2][1].weight.data.zero_()
    assert trainable.features[10].weight.abs().max() == 0  # they share the weights


def test_an_unknown_layer_is_refused_with_the_known_ones():
    with pytest.raises(HarmonictError, match=r"no layer relu1_3; known: relu1_1, relu1_2, relu2_1"):
        vgg19("random:2")(prepare(image()), ["relu1_3"])


def test_prepare_makes_black_air_and_white_bone_in_three_channels():
    hu = torch.tensor([-1024.0, 1000.0, -12.0]).view(1, 1, 1, 3)
    x = prepare(hu)[0, :, 0]
    mean, std = torch.tensor([[0.485], [0.456], [0.406]]), torch.tensor([[0.229], [0.224], [0.225]])
    assert torch.allclose(x, (torch.tensor([0.0, 1.0, 0.5]) - mean) / std, atol=1e-6)
    with pytest.raises(HarmonictError, match=r"\(b, 1, h, w\)"):
        prepare(torch.zeros(1, 3, 4, 4))


def test_prepare_passes_a_gradient_far_outside_its_range():
    hu = torch.full((1, 1, 2, 2), 3000.0, requires_grad=True)
    prepare(hu).sum().backward()
    assert hu.grad.min() > 0


@pytest.mark.parametrize("weights", ["random", "random:8", "trial"])
def test_a_feature_network_is_frozen_and_still_passes_a_gradient_to_the_image(weights):
    network = vgg19(weights)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    hu = image().requires_grad_()
    layers = ["relu1_1", "relu5_1"]
    target = network(prepare(image(seed=1)), layers)
    loss = texture_loss(network(prepare(hu), layers), target)
    loss.backward()
    assert loss > 0 and hu.grad.abs().max() > 0


def test_random_weights_are_always_the_same_draw_and_leave_the_users_randomness_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = vgg19("random")
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.features[0].weight, vgg19("random").features[0].weight)
    assert first.width == 16


@pytest.mark.parametrize("weights", ["random:", "random:x", "random:0", "random:-3", "random:1.5"])
def test_a_random_width_is_a_number_of_channels(weights):
    if weights == "random:":
        assert vgg19(weights).width == 16
        return
    with pytest.raises(HarmonictError, match="whole number of channels"):
        vgg19(weights)


def test_imagenet_weights_come_from_the_published_file_without_its_classifier(tmp_path, monkeypatch):
    trained = VGG19(2)
    state = {**trained.state_dict(), "classifier.0.weight": torch.zeros(4, 4)}
    file = hub_file(tmp_path / "cache", "vgg19", state)
    monkeypatch.setenv("HARMONICT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vgg, "IMAGENET_URL", f"https://example.org/{file.name}")
    monkeypatch.setattr("urllib.request.urlopen", Server(None))  # cached: no network needed
    network = vgg19("imagenet")
    assert network.width == 2
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[key])
    assert torch.equal(vgg19(file).features[0].weight, trained.features[0].weight)  # by its path


def test_the_address_and_digest_are_torchvisions():
    assert vgg.IMAGENET_URL == "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("features.34.bias"), "lacks features.34.bias"),
        (lambda s: s.update({"features.99.bias": torch.zeros(2)}), "unknown features.99.bias"),
        (lambda s: s.update({"features.5.weight": torch.zeros(4, 2, 5, 5)}), "another shape of features.5.weight"),
        (lambda s: [s.pop(k) for k in list(s)] and s.update(a=torch.zeros(1)), "features.0.weight is missing"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_first_key(change, words, tmp_path):
    state = VGG19(2).state_dict()
    change(state)
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(HarmonictError) as refusal:
        vgg19(tmp_path / "net.safetensors")
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_word_that_is_no_weights_is_refused_as_a_file():
    with pytest.raises(HarmonictError, match=r"imagenett: expected \.safetensors"):
        vgg19("imagenett")


def test_the_trial_network_is_narrow_and_float32():
    network = vgg19("trial")
    assert network.width == 16
    assert {p.dtype for p in network.parameters()} == {torch.float32}
