"""Noise with a place, the schedule, sampling, and the U-Net that predicts noise."""

import numpy as np
import pytest
import torch
from scipy import stats

from harmonict.nn.diffusion import (
    DenoisingUNet,
    Noise,
    check_steps,
    log_snr_times,
    noise_of_velocity,
    noised,
    posterior,
    sample,
    schedule,
    time_waves,
)

A = Noise(key=7)


def test_noise_is_standard_normal_and_independent_from_one_value_to_the_next():
    field = A.field(0, (2, 256, 256))[0].numpy()
    assert field.dtype == np.float32
    assert stats.kstest(field.ravel(), "norm").pvalue > 0.01
    for a, b in ((field[0], field[1]), (field[:, 1:], field[:, :-1]), (field[..., 1:], field[..., :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01


def test_noise_of_a_part_is_the_part_of_the_noise():
    whole = A.field(3, (1, 200, 300))
    part = A.at(70, 130).field(3, (1, 64, 50))
    assert torch.equal(part, whole[:, :, 70:134, 130:180])
    cells = A.field(0, (5, 16, 16), pixels=32)
    assert torch.equal(A.at(64, 32).field(0, (5, 4, 4), pixels=32), cells[:, :, 2:6, 1:5])


@pytest.mark.parametrize("other", [Noise(key=8), Noise(key=7, planes=((1, 1.0),))])
def test_another_key_plane_or_draw_gives_other_noise(other):
    field = A.field(0, (1, 128, 128)).ravel()
    for another in (other.field(0, (1, 128, 128)), A.field(1, (1, 128, 128))):
        assert abs(np.corrcoef(field, another.ravel())[0, 1]) < 0.03


def test_noise_is_the_same_on_every_machine():
    """Philox's raw bits are fixed for all versions of NumPy; what is made of them is ours."""
    values = A.field(0, (1, 1, 4)).ravel().tolist()
    bits = np.random.Philox(counter=[0, 0, 0, 0], key=7).random_raw(4)
    radius = [(-2 * np.log((int(b >> np.uint64(32)) + 1) / 2**32)) ** 0.5 for b in bits]
    angle = [2 * np.pi * int(b & np.uint64(2**32 - 1)) / 2**32 for b in bits]
    assert np.allclose(values, np.multiply(radius, np.cos(angle)), atol=1e-6)


# -- the schedule ------------------------------------------------------------------------------------------------------


def test_little_of_the_image_is_left_at_the_last_step_whatever_their_number():
    for steps in (50, 100, 1000):
        left = schedule(steps).alphas_cumprod
        assert 0.9 < float(left[0]) < 1 and float(left[-1]) < 1e-4
    assert float(schedule(1000).betas[0]) == pytest.approx(1e-4)
    assert float(schedule(1000).betas[-1]) == pytest.approx(2e-2)


@pytest.mark.parametrize("predicts", ["noise", "velocity"])
def test_what_the_network_should_say_gives_the_image_back(predicts):
    x_0 = torch.randn(4, 1, 8, 8)
    x_t, t, wanted = noised(x_0, 1000, predicts, torch.Generator().manual_seed(1))
    left = schedule(1000).alphas_cumprod[t].view(-1, 1, 1, 1)
    if predicts == "noise":
        back = (x_t - (1 - left).sqrt() * wanted) / left.sqrt()
    else:
        back = left.sqrt() * x_t - (1 - left).sqrt() * wanted
    assert torch.allclose(back, x_0, atol=2e-3)


def test_the_noise_follows_from_the_velocity():
    x_0 = torch.randn(4, 3, 8)
    x_t, t, eps = noised(x_0, 1000, "noise", torch.Generator().manual_seed(1))
    _, _, velocity = noised(x_0, 1000, "velocity", torch.Generator().manual_seed(1))
    assert torch.allclose(noise_of_velocity(x_t, velocity, t, 1000), eps, atol=1e-5)


def test_a_step_of_training_follows_from_its_generator():
    x_0 = torch.randn(4, 1, 8, 8)
    first, second, other = (noised(x_0, 100, "noise", torch.Generator().manual_seed(n)) for n in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[2], other[2])


@pytest.mark.parametrize("steps, words", [(0, "at least 1, got 0"), (-1, "at least 1"), (3, "must divide the 1000")])
def test_steps_that_cannot_be_taken_are_refused_in_words(steps, words):
    with pytest.raises(ValueError, match=words):
        check_steps(steps, 1000, "ddim")


def test_dpm_takes_any_number_of_steps_up_to_those_trained():
    check_steps(7, 1000, "dpm")
    with pytest.raises(ValueError, match="at most the 1000 steps"):
        check_steps(1001, 1000, "dpm")


# -- sampling ----------------------------------------------------------------------------------------------------------


def gaussian_oracle(mean, sd, steps_noise, predicts):
    """What an ideal network would say of data N(mean, sd^2): the mean noise or velocity given x, in closed form."""
    left = schedule(steps_noise).alphas_cumprod

    def predict(x, t):
        a = left[t].view(-1, 1, 1, 1)
        variance = a * sd**2 + 1 - a
        x_0 = mean + a.sqrt() * sd**2 / variance * (x - a.sqrt() * mean)
        eps = (x - a.sqrt() * x_0) / (1 - a).sqrt()
        return eps if predicts == "noise" else a.sqrt() * eps - (1 - a).sqrt() * x_0

    return predict


def draws(n, shape=(1, 128, 128)):
    return A.field(n, shape)


@pytest.mark.parametrize("predicts", ["noise", "velocity"])
@pytest.mark.parametrize("sampler, steps", [("ddpm", 100), ("ddim", 100), ("dpm", 8), ("dpm", 20)])
def test_samples_have_mean_and_deviation_of_what_was_learned(predicts, sampler, steps):
    predict = gaussian_oracle(0.7, 0.3, 100, predicts)
    x = sample(predict, draws, sampler=sampler, steps=steps, steps_noise=100, predicts=predicts)
    assert float(x.mean()) == pytest.approx(0.7, abs=0.03)
    assert float(x.std()) == pytest.approx(0.3, rel=0.12)


def test_few_even_steps_lose_texture_that_dpm_keeps():
    """Why `dpm` is there: with eight steps DDIM leaves half of the deviation."""
    deviations = []
    for sampler in ("ddim", "dpm"):
        predict = gaussian_oracle(0.0, 0.3, 1000, "velocity")
        x = sample(predict, draws, sampler=sampler, steps=8, steps_noise=1000, predicts="velocity")
        deviations.append(float(x.std()) / 0.3)
    assert deviations[0] < 0.6 and deviations[1] == pytest.approx(1, abs=0.05)


def test_times_of_dpm_fall_from_the_last_to_the_first():
    times = log_snr_times(1000, 10)
    assert len(times) == 10 and times[0] == 999 and times[-1] == 0 and times == sorted(times, reverse=True)
    assert len(log_snr_times(10, 10)) <= 10


def test_one_step_gives_the_mean_of_what_can_be():
    predict = gaussian_oracle(0.7, 0.3, 1000, "velocity")
    x = sample(predict, draws, sampler="ddim", steps=1, steps_noise=1000, predicts="velocity")
    assert float((x - 0.7).abs().max()) < 0.01


def test_steps_are_taken_at_the_times_that_the_sampler_believes():
    """MONAI's own spacing, told here to the network, leaves its stride: 999, 666, 333, 0 for four steps of 250."""
    seen = []

    def predict(x, t):
        seen.append(int(t))
        return torch.zeros_like(x)

    sample(predict, draws, sampler="ddim", steps=4, steps_noise=1000)
    assert seen == [999, 749, 499, 249]


def test_ddim_draws_noise_once_and_ddpm_at_every_step_but_the_last():
    for sampler, count in (("ddim", 1), ("dpm", 1), ("ddpm", 10)):
        seen = []

        def draw(n, seen=seen):
            seen.append(n)
            return draws(n, (1, 4, 4))

        sample(lambda x, t: torch.zeros_like(x), draw, sampler=sampler, steps=10, steps_noise=100)
        assert seen == list(range(count))


def test_a_step_of_ddpm_is_monais():
    from monai.networks.schedulers.ddpm import DDPMScheduler

    peer = DDPMScheduler(num_train_timesteps=1000, schedule="linear_beta", clip_sample=False)
    generator = torch.Generator().manual_seed(3)
    x, output = torch.randn(2, 1, 8, 8, generator=generator), torch.randn(2, 1, 8, 8, generator=generator)
    for t in (1, 10, 500, 999):
        wanted, x_0 = peer.step(output, t, x, generator=torch.Generator().manual_seed(4))
        eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
        assert torch.allclose(posterior(schedule(1000), x_0, x, t, t - 1, eps), wanted, rtol=1e-3, atol=1e-3)


def test_what_is_sampled_stays_within_the_clip():
    wild = lambda x, t: 50 * torch.ones_like(x)  # noqa: E731
    x = sample(wild, draws, sampler="ddpm", steps=10, steps_noise=100, clip=1.5)
    assert float(x.abs().max()) <= 1.5 + 1e-6
    free = sample(wild, draws, sampler="ddpm", steps=10, steps_noise=100)
    assert float(free.abs().max()) > 10


# -- the network -------------------------------------------------------------------------------------------------------


def random_unet(axes, **options):
    torch.manual_seed(0)
    network = DenoisingUNet(axes, 2, 1, (8, 12, 16), **options)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def test_a_new_network_says_nothing():
    assert not DenoisingUNet(2, 3, 1, (4, 8))(torch.randn(2, 3, 8, 8), torch.tensor([1, 5])).any()


@pytest.mark.parametrize("axes, size", [(1, (16,)), (1, (9,)), (2, (32, 24)), (2, (17, 13))])
def test_any_length_comes_back_as_it_was(axes, size):
    result = random_unet(axes, blocks=2)(torch.randn(2, 2, *size), torch.tensor([3, 4]))
    assert result.shape == (2, 1, *size) and result.dtype == torch.float32


def test_the_time_matters():
    x = torch.randn(1, 2, 16, 16)
    network = random_unet(2)
    early, late = (network(x, torch.tensor([t])) for t in (0, 900))
    assert float((early - late).detach().abs().max()) > 1e-3


def test_a_tile_is_denoised_as_the_image_around_it():
    """Away from the tile's edge, by more than the network sees: no layer takes statistics of the image."""
    x = torch.randn(1, 2, 160, 160)
    network = random_unet(2)
    with torch.inference_mode():
        whole = network(x, torch.tensor([10]))
        part = network(x[..., 32:128, 32:128], torch.tensor([10]))
    assert torch.allclose(part[..., 36:-36, 36:-36], whole[..., 68:92, 68:92], atol=1e-5)


def test_waves_tell_times_apart():
    waves = time_waves(torch.arange(1000), 33)
    assert waves.shape == (1000, 33)
    distance = torch.cdist(waves, waves) + torch.eye(1000)
    assert float(distance.min()) > 0.05
