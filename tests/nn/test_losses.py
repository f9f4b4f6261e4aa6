"""Losses: closed forms."""

import pytest
import torch

from harmonict.nn.losses import gradient_penalty, gram, huber, texture_loss, total_loss


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_gram_matrix_of_constant_maps_is_their_product_over_the_number_of_channels():
    maps = torch.tensor([2.0, -3.0]).view(1, 2, 1, 1).expand(1, 2, 5, 7)
    assert torch.allclose(gram(maps)[0], torch.tensor([[4.0, -6.0], [-6.0, 9.0]]) / 2)


def test_a_gram_matrix_does_not_know_where_the_pixels_are_nor_how_many():
    maps = noise(2, 3, 8, 8)
    shuffled = maps.flatten(2)[:, :, torch.randperm(64)].view_as(maps)
    assert torch.allclose(gram(shuffled), gram(maps), atol=1e-6)
    assert torch.allclose(gram(maps.repeat(1, 1, 2, 1)), gram(maps), atol=1e-6)


def test_a_mask_counts_only_what_it_covers_on_the_grid_of_the_features():
    maps = noise(1, 3, 4, 4)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1  # the left half of an image four times as large
    assert torch.allclose(gram(maps, mask=mask), gram(maps[..., :2]), atol=1e-6)
    changed = maps.clone()
    changed[..., 2:] = 1e6
    assert torch.equal(gram(changed, mask=mask), gram(maps, mask=mask))
    assert torch.allclose(gram(maps, mask=torch.full((1, 1, 16, 16), 0.3)), gram(maps), atol=1e-6)


def test_an_empty_mask_gives_zero_and_no_nan_in_value_or_gradient():
    maps = noise(2, 3, 4, 4).requires_grad_()
    nothing = torch.zeros(2, 1, 8, 8)
    assert torch.equal(gram(maps, mask=nothing), torch.zeros(2, 3, 3))
    for normalised in (False, True):
        loss = texture_loss([maps], [noise(2, 3, 4, 4, seed=1)], mask=nothing, normalised=normalised)
        (gradient,) = torch.autograd.grad(loss, maps)
        assert loss == 0 and torch.equal(gradient, torch.zeros_like(maps))


def test_gram_sums_stay_float32_where_the_network_computes_in_bf16():
    maps = noise(1, 4, 64, 64).abs().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = gram(maps)
    exact = torch.einsum("bchw,bdhw->bcd", maps.double(), maps.double()) / (4 * 64 * 64)
    assert inside.dtype == torch.float32
    assert (inside - exact).abs().max() / exact.abs().max() < 1e-5


def test_texture_loss_is_the_mean_square_of_gram_differences_summed_over_layers():
    ones, twos = torch.ones(1, 2, 3, 3), torch.full((1, 2, 3, 3), 2.0)
    assert texture_loss([twos], [ones]).item() == pytest.approx((4 / 2 - 1 / 2) ** 2)
    assert texture_loss([twos, ones], [ones, ones]).item() == pytest.approx(2.25)
    assert texture_loss([twos, twos], [ones, ones]).item() == pytest.approx(4.5)


def test_a_normalised_texture_loss_sees_no_change_of_strength_and_compares_unit_matrices():
    a, b = noise(2, 3, 6, 6), noise(2, 3, 6, 6, seed=1)
    assert texture_loss([5 * a], [a], normalised=True).item() == pytest.approx(0, abs=1e-12)
    assert texture_loss([5 * a], [a]).item() > 1
    first, second = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    first[:, 0], second[:, 1] = 3.0, 0.1  # unit matrices with the 1 in another corner: two differences of 1 among four
    assert texture_loss([first], [second], normalised=True).item() == pytest.approx(0.5)
    assert texture_loss([a], [b], normalised=True) == pytest.approx(texture_loss([b], [a], normalised=True).item())


def test_texture_loss_refuses_another_number_of_layers():
    with pytest.raises(ValueError):
        texture_loss([noise(1, 2, 3, 3)], [])


def test_huber_is_half_the_square_inside_and_straight_outside():
    a = torch.tensor([0.0, 0.3, -2.0])
    expected = (0 + 0.5 * 0.3**2 + 0.5 * (2.0 - 0.5 * 0.5)) / 3
    assert huber(a, torch.zeros(3), delta=0.5).item() == pytest.approx(expected)


def test_the_gradient_penalty_of_a_linear_critic_is_known():
    weight = noise(1, 1, 4, 4)
    weight = 3 * weight / weight.norm()  # a gradient of length 3 everywhere

    def critic(x):
        return (weight * x).sum(dim=(1, 2, 3))

    real, fake = noise(5, 1, 4, 4), noise(5, 1, 4, 4, seed=1)
    penalty = gradient_penalty(critic, real, fake, generator=torch.Generator().manual_seed(0))
    assert penalty.item() == pytest.approx((3 - 1) ** 2, rel=1e-5)


def test_the_gradient_penalty_looks_between_real_and_fake_and_trains_the_critic_alone():
    seen = []
    scale = torch.ones((), requires_grad=True)

    def critic(x):
        seen.append(x.detach())
        return scale * x

    real, fake = torch.zeros(64, 1, 2, 2), torch.ones(64, 1, 2, 2, requires_grad=True)
    penalty = gradient_penalty(critic, real, fake, generator=torch.Generator().manual_seed(0))
    (between,) = seen
    shares = between[:, 0, 0, 0]
    assert torch.equal(between, shares.view(-1, 1, 1, 1).expand_as(between))  # one share an image
    assert 0 <= shares.min() < 0.1 and 0.9 < shares.max() <= 1
    # the mean of 4 pixels has the gradient (1, 1, 1, 1) / 4: length scale / 2
    assert penalty.item() == pytest.approx((0.5 - 1) ** 2)
    penalty.backward()
    assert scale.grad.item() == pytest.approx(2 * (0.5 - 1) * 0.5)
    assert fake.grad is None


def test_total_loss_weighs_each_loss_once():
    assert total_loss({"a": (2.0, torch.tensor(3.0)), "b": (0.5, torch.tensor(4.0))}).item() == 8.0
