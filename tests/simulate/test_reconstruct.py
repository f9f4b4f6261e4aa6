"""Reconstruction: water, noise, NPS, MTF, exact kernel pairs, iterative strengths, bad input."""

import numpy as np
import pytest

from harmonict.core import HarmonictError, ScanProtocol
from harmonict.physics import Kernel, nps_radial
from harmonict.simulate.kernels import get_kernel, kernel_names
from harmonict.simulate.materials import mu_water_per_mm
from harmonict.simulate.phantom import water_cylinder
from harmonict.simulate.reconstruct import (
    filter_response,
    fold,
    ramp_image,
    reconstruct,
    render_slice,
    scan_and_reconstruct,
    system_mtf,
)
from harmonict.simulate.scanner import Projections, Scanner, expose, line_integrals, noise_rng, scan

SCANNER = Scanner(electronic_quanta=0.0)
CHEST = ScanProtocol(kernel="Br40", kvp=120, ctdivol_mgy=6.5, slice_thickness_mm=1.0, fov_mm=500.0)
OBJECT_MM = 500 / 1024


def disc_hu(radius_mm, hu=0.0, background=None, centre_mm=(0.0, 0.0)):
    x = (np.arange(1024) - 511.5) * OBJECT_MM
    cover = np.clip((radius_mm - np.hypot(x[:, None] - centre_mm[0], x - centre_mm[1])) / OBJECT_MM + 0.5, 0, 1)
    under = np.float32(-1000.0) if background is None else background
    return (under + (hu - under) * cover).astype(np.float32)


def radius_mm(matrix, fov_mm, centre_mm=(0.0, 0.0)):
    x = (np.arange(matrix) - (matrix - 1) / 2) * fov_mm / matrix
    return np.hypot(x[:, None] - centre_mm[0], x - centre_mm[1])


@pytest.fixture(scope="module")
def water():
    """Noise-free line integrals of a 260 mm water cylinder."""
    return line_integrals(disc_hu(130), pixel_mm=OBJECT_MM, kvp=120, scanner=SCANNER)


@pytest.fixture(scope="module")
def ring():
    """Noise-free line integrals of water around a central hole of air."""
    return line_integrals(disc_hu(40, -1000.0, disc_hu(130)), pixel_mm=OBJECT_MM, kvp=120, scanner=SCANNER)


def test_noise_free_water_is_0_hu_and_uniform_with_every_kernel(water):
    ramp = ramp_image(expose(water, protocol=CHEST, scanner=SCANNER, rng=None), fov_mm=500.0)
    r = radius_mm(512, 500)
    for name in kernel_names():
        hu = reconstruct(ramp, get_kernel(name))
        assert abs(hu[r < 20].mean()) < 0.5, name
        rings = [hu[(r >= a) & (r < a + 5)].mean() for a in range(0, 121, 5)]
        assert np.ptp(rings) < 2, name
        assert abs(hu[(r > 160) & (r < 240)].mean() + 1000) < 1, name


def test_noise_free_air_at_the_centre_is_minus_1000_hu(ring):
    hu = reconstruct(expose(ring, protocol=CHEST, scanner=SCANNER, rng=None), get_kernel("Br40"), fov_mm=500.0)
    assert abs(hu[radius_mm(512, 500) < 20].mean() + 1000) < 1


def test_hu_do_not_depend_on_kvp_or_field_of_view():
    hu = disc_hu(30, 100.0, disc_hu(130))
    for kvp in (70.0, 140.0):
        raw = scan(hu, pixel_mm=OBJECT_MM, protocol=CHEST.with_(kvp=kvp), scanner=SCANNER, rng=None)
        image = reconstruct(raw, get_kernel("Br40"), fov_mm=350.0, matrix=256)
        assert image[radius_mm(256, 350) < 20].mean() == pytest.approx(100, abs=1)


def test_a_shifted_field_shows_the_same_place(water):
    hu = disc_hu(10, 500.0, disc_hu(130), (31.0, -42.0))
    raw = scan(hu, pixel_mm=OBJECT_MM, protocol=CHEST, scanner=SCANNER, rng=None)
    image = reconstruct(raw, get_kernel("Br40"), fov_mm=100.0, matrix=128, centre_mm=(31.0, -42.0))
    assert image[radius_mm(128, 100) < 6].mean() == pytest.approx(500, abs=5)
    weight = np.where(radius_mm(128, 100) < 20, image, 0)
    place = (np.arange(128) - 63.5) * 100 / 128
    assert abs((weight.sum(1) @ place) / weight.sum()) < 0.1
    assert abs((weight.sum(0) @ place) / weight.sum()) < 0.1


def noise_sd(integrals, protocol, seeds=range(2)):
    """SD of the difference of two scans over sqrt 2 within 60 mm."""
    kernel = get_kernel(protocol.kernel)
    a, b = (
        reconstruct(
            expose(integrals, protocol=protocol, scanner=SCANNER, rng=noise_rng(s, 0, protocol)), kernel, fov_mm=250.0
        )
        for s in seeds
    )
    return ((a - b) / np.sqrt(2))[radius_mm(512, 250) < 60].std()


def test_noise_falls_with_the_root_of_dose_and_of_thickness(water):
    sd = noise_sd(water, CHEST)
    for factor in (0.2, 4.0):
        assert noise_sd(water, CHEST.with_(ctdivol_mgy=6.5 * factor)) * np.sqrt(factor) == pytest.approx(sd, rel=0.05)
    assert noise_sd(water, CHEST.with_(slice_thickness_mm=3.0)) * np.sqrt(3) == pytest.approx(sd, rel=0.05)


def test_two_doses_have_independent_noise(water):
    low = CHEST.with_(ctdivol_mgy=1.3)
    a, b = (
        reconstruct(
            expose(water, protocol=p, scanner=SCANNER, rng=noise_rng(1, 0, p)), get_kernel("Br40"), fov_mm=500.0
        )
        for p in (CHEST, low)
    )
    inside = radius_mm(512, 500) < 100
    assert abs(np.corrcoef(a[inside], b[inside])[0, 1]) < 0.05


@pytest.mark.parametrize("kernel", ["Br40", "B70"])
def test_the_nps_of_white_projection_noise_is_f_times_mtf_squared(kernel):
    kernel = get_kernel(kernel)
    scanner = Scanner(aperture_mm=0.0, focal_spot_mm=0.0)  # the filter is the MTF itself
    rng = np.random.default_rng(0)
    sd, patches = 0.01, []
    for _ in range(4):
        white = rng.normal(0, sd, (scanner.views, scanner.detectors)).astype(np.float32)
        image = reconstruct(Projections(white, np.ones(scanner.detectors), scanner, 120.0), kernel, fov_mm=200.0)
        patches += [image[y : y + 128, x : x + 128] for y in range(64, 384, 64) for x in range(64, 384, 64)]
    pixel = 200 / 512
    spectrum = nps_radial(np.array(patches), pixel_mm=(pixel, pixel), detrend=0, window=True)
    f = spectrum.frequency_per_mm
    scale = np.pi / scanner.views * scanner.pitch_mm * sd**2 * (1000 / mu_water_per_mm(120)) ** 2
    closed = scale * f * kernel.at(f) ** 2
    held = (f > 0.05) & (closed > 0.1 * closed.max())
    assert held.sum() >= 20
    assert np.abs(spectrum.nps_hu2_mm2[held] / closed[held] - 1).max() < 0.1


WIRE_MM = (5.13, 7.71)
WIRE_SD_MM = 0.45  # a Gaussian wire, whose own transform is known


@pytest.fixture(scope="module")
def wire():
    """Noise-free raw data of a wire in air."""
    x = (np.arange(1024) - 511.5) * OBJECT_MM
    hu = 2000 * np.exp(-(((x[:, None] - WIRE_MM[0]) ** 2 + (x - WIRE_MM[1]) ** 2) / (2 * WIRE_SD_MM**2))) - 1000
    return scan(hu, pixel_mm=OBJECT_MM, protocol=CHEST, scanner=SCANNER, rng=None, area_averaged=False)


# A fine field shows the kernel's whole band as it is; on a preset's grid sharp kernels are aliased, which is no part of
# the chain, so there the switch takes it out.
@pytest.mark.parametrize(("fov_mm", "aliasing"), [(130.0, True), (350.0, False), (500.0, False)])
@pytest.mark.parametrize("name", ["Br32", "Br40", "Br69", "Bl64", "B70", "FC13", "LUNG"])
def test_a_wire_measures_the_requested_mtf(wire, name, fov_mm, aliasing):
    kernel = get_kernel(name)
    pixel = fov_mm / 512
    image = reconstruct(wire, kernel, fov_mm=fov_mm, aliasing=aliasing) + 1000.0
    y0, x0 = (round(v / pixel + 255.5) for v in WIRE_MM)
    n = round(25 / pixel)
    patch = image[y0 - n : y0 + n + 1, x0 - n : x0 + n + 1].astype(float)
    place = np.arange(-n, n + 1) * pixel
    f = np.linspace(0, min(kernel.f10_per_mm, 0.9 * 0.5 / pixel), 30)
    for axis in (0, 1):  # the transform along an axis is that of the patch summed over the other
        measured = np.abs(np.exp(-2j * np.pi * np.outer(f, place)) @ patch.sum(axis))
        measured /= measured[0] * np.exp(-2 * (np.pi * WIRE_SD_MM * f) ** 2)
        assert np.abs(measured - system_mtf(kernel, SCANNER).at(f)).max() < 0.03


def test_the_systems_mtf_is_the_named_curve():
    for name in kernel_names():
        kernel = get_kernel(name)
        f = np.linspace(0, 1, 50)
        assert np.allclose(system_mtf(kernel, Scanner()).at(f), kernel.at(f), atol=1e-6)
        assert np.allclose(filter_response(kernel, Scanner(), f) * Scanner().blur_mtf(f), kernel.at(f))


def test_a_blur_too_wide_to_undo_lowers_the_systems_mtf():
    scanner = Scanner(aperture_mm=1.2)
    kernel = get_kernel("B70")
    assert system_mtf(kernel, scanner).at(0.3) == pytest.approx(float(kernel.at(0.3)), rel=1e-3)
    assert system_mtf(kernel, scanner).at(0.8) < 0.5 * kernel.at(0.8)


@pytest.mark.parametrize(("sharp", "soft"), [("B70", "B30"), ("Bl64", "Br40"), ("FC51", "FC13"), ("Br59", "Br32")])
def test_two_kernels_of_one_acquisition_differ_by_their_mtf_ratio(ring, sharp, soft):
    ramp = ramp_image(
        expose(ring, protocol=CHEST, scanner=SCANNER, rng=noise_rng(0, 0, CHEST)), fov_mm=500.0, band_per_mm=1.0
    )
    a, b = (reconstruct(ramp, get_kernel(k), aliasing=False).astype(float) for k in (sharp, soft))
    f = np.hypot(np.fft.fftfreq(512, 500 / 512)[:, None], np.fft.rfftfreq(512, 500 / 512))
    mtf_a, mtf_b = get_kernel(sharp).at(f), get_kernel(soft).at(f)
    defined = mtf_a > 0.02
    ratio = np.where(defined, mtf_b / np.where(defined, mtf_a, 1), 0)
    spectrum_a, spectrum_b = np.fft.rfft2(a), np.fft.rfft2(b)
    filtered = np.fft.irfft2(spectrum_a * ratio, a.shape)
    wanted = np.fft.irfft2(spectrum_b * defined, a.shape)
    body = radius_mm(512, 500) < 200
    assert np.linalg.norm((filtered - wanted)[body]) < 0.01 * np.linalg.norm((wanted - wanted[body].mean())[body])


@pytest.mark.parametrize("size", [36, 24, 60])
def test_the_folded_spectrum_is_that_of_every_nth_pixel_of_the_filtered_image(size):
    rng = np.random.default_rng(0)
    image = rng.standard_normal((size, size)).astype(np.float32)
    radius = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    index = np.rint(radius * 100).astype(np.int16)
    table = rng.random(72).astype(np.float32)
    spectrum = np.fft.rfft2(image).astype(np.complex64)
    filtered = np.fft.irfft2(spectrum * table[index], image.shape)
    for factor in (1, 2, 3, 4):
        small = np.fft.irfft2(fold(spectrum, index, table, factor), (size // factor,) * 2)
        assert np.allclose(small, filtered[::factor, ::factor], atol=1e-5)


def test_a_sharp_kernel_on_a_coarse_grid_is_aliased_and_the_switch_removes_it(water):
    raw = expose(water, protocol=CHEST, scanner=SCANNER, rng=noise_rng(0, 0, CHEST))
    ramp = ramp_image(raw, fov_mm=500.0)
    inside = radius_mm(512, 500) < 60
    sharp = get_kernel("Br69")
    fine = reconstruct(ramp_image(raw, fov_mm=250.0), sharp)[radius_mm(512, 250) < 60].std()
    # samples of the filtered image have its whole noise; without what is above Nyquist there is far less
    assert reconstruct(ramp, sharp)[inside].std() == pytest.approx(fine, rel=0.05)
    assert reconstruct(ramp, sharp, aliasing=False)[inside].std() < 0.8 * fine


def edge_f50(images, radius, pixel_mm):
    depth = radius_mm(images[0].shape[0], images[0].shape[0] * pixel_mm) - radius
    bins = np.arange(-8, 8.01, 0.2)
    index = np.digitize(depth, bins)
    mean = np.mean(images, 0)
    spread = np.array([mean[index == n].mean() for n in range(1, len(bins))])
    line = np.diff(spread) * np.hanning(len(spread) - 1)
    mtf = np.abs(np.fft.rfft(line, 4000))
    f = np.fft.rfftfreq(4000, 0.2)
    mtf /= mtf[0] * np.sinc(f * 0.2) ** 2
    return f[np.argmax(mtf < 0.5)]


def test_iterative_strength_lowers_noise_keeps_the_edge_and_coarsens_the_texture(ring):
    kernel = get_kernel("Br40")
    images = {s: [] for s in range(6)}
    for seed in range(2):
        raw = expose(ring, protocol=CHEST, scanner=SCANNER, rng=noise_rng(seed, 0, CHEST))
        ramp = ramp_image(raw, fov_mm=350.0)
        for strength in images:
            images[strength].append(reconstruct(ramp, kernel, iterative_strength=strength))
    pixel = 350 / 512
    sd, centroid, f50, mean = [], [], [], []
    body = (radius_mm(512, 350) > 60) & (radius_mm(512, 350) < 110)
    for pair in images.values():
        noise = (pair[0] - pair[1]) / np.sqrt(2)
        sd.append(noise[body].std())
        mean.append(pair[0][body].mean())
        spectrum = nps_radial(noise[None, 350:414, 224:288], pixel_mm=(pixel, pixel), detrend=0)
        f, power = spectrum.frequency_per_mm, spectrum.nps_hu2_mm2
        centroid.append((f * f * power).sum() / (f * power).sum())
        f50.append(edge_f50(pair, 40.0, pixel))
    left = np.array(sd) / sd[0]
    assert np.all(np.diff(left) < -0.05)
    assert 0.8 > left[3] > 0.6
    assert 0.6 > left[5] > 0.35
    assert np.all(np.diff(centroid) < 0)
    assert np.abs(np.array(f50) / f50[0] - 1).max() < 0.05
    assert np.ptp(mean) < 0.5


def test_the_predicted_noise_map_is_the_noise(water):
    from harmonict.simulate.reconstruct import _filter_noise

    kernel = get_kernel("Br59")
    raws = [expose(water, protocol=CHEST, scanner=SCANNER, rng=noise_rng(s, 0, CHEST)) for s in range(2)]
    ramps = [ramp_image(raw, fov_mm=500.0) for raw in raws]
    a, b = (reconstruct(ramp, kernel) for ramp in ramps)
    inner = slice(ramps[0].margin, -ramps[0].margin)
    predicted = (ramps[0].noise * _filter_noise(kernel, SCANNER))[inner, inner]
    for low, high in ((0, 40), (90, 120)):
        r = radius_mm(512, 500)
        ring = (r >= low) & (r < high)
        assert ((a - b) / np.sqrt(2))[ring].std() == pytest.approx(predicted[ring].mean(), rel=0.08)


def test_one_slice_under_many_protocols_is_the_same_as_each_alone_and_in_any_order():
    hu = disc_hu(100)[None]
    protocols = [
        CHEST.with_(kernel=k, ctdivol_mgy=d, iterative_strength=s, fov_mm=v)
        for k, d, s, v in (("Br40", 6.5, 0, 500), ("B70", 1.3, 0, 350), ("Br40", 1.3, 3, 500), ("Bl64", 6.5, 0, 350))
    ]
    together = render_slice(
        hu, [1.0], pixel_mm=OBJECT_MM, protocols=protocols, scanner=SCANNER, seed=3, slice_index=7, matrix=128
    )
    for protocol, image in zip(reversed(protocols), reversed(together), strict=True):
        (alone,) = render_slice(
            hu, [1.0], pixel_mm=OBJECT_MM, protocols=[protocol], scanner=SCANNER, seed=3, slice_index=7, matrix=128
        )
        assert np.array_equal(alone, image)


def test_a_phantom_becomes_series_of_whole_hu_on_their_own_grids():
    protocols = [CHEST.with_(slice_thickness_mm=t, kernel=k) for t, k in ((1.0, "B30"), (1.0, "FC51"), (3.0, "LUNG"))]
    found = scan_and_reconstruct(
        water_cylinder(200.0),
        protocols,
        z_range_mm=(10.0, 13.0),
        scanner=SCANNER,
        seed=1,
        matrix=64,
        object_matrix=256,
    )
    assert [s.hu.shape for s in found] == [(3, 64, 64), (3, 64, 64), (1, 64, 64)]
    assert [s.protocol.manufacturer for s in found] == ["Siemens", "Canon", "GE"]
    assert found[0].geometry.spacing_mm == (1.0, 500 / 64, 500 / 64)
    assert found[0].geometry.origin_mm[2] == 10.5
    assert found[2].geometry.origin_mm[2] == 11.5
    assert found[0].protocol.exposure_mas == pytest.approx(100)
    assert all(np.array_equal(s.hu, np.rint(s.hu)) for s in found)
    assert not np.array_equal(found[0].hu[0], found[0].hu[1])


def test_a_users_kernel_is_used():
    soft = Kernel("mine", np.array([0.0, 0.1, 0.2]), np.array([1.0, 0.5, 0.0]))
    (image,) = render_slice(
        disc_hu(100)[None],
        [1.0],
        pixel_mm=OBJECT_MM,
        protocols=[CHEST.with_(kernel="mine")],
        scanner=SCANNER,
        seed=1,
        slice_index=0,
        matrix=128,
        kernels={"mine": soft},
    )
    assert image[radius_mm(128, 500) < 60].std() < 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kernel": "Bl65"}, "did you mean Bl64"),
        ({"kernel": None}, "needs a kernel"),
        ({"ctdivol_mgy": 0.0}, "above 0"),
        ({"iterative_strength": 6.0}, "0 to 5"),
        ({"fov_mm": 600.0}, "wider than the scanner"),
        ({"fov_mm": None}, "fov_mm"),
        ({"slice_thickness_mm": 0.2}, "thinner than the phantom's sampling"),
        ({"slice_thickness_mm": 5.0}, "holds no slice"),
    ],
)
def test_a_bad_protocol_is_refused_before_any_computing(changes, words):
    class Never:
        def slab(self, *args, **kwargs):
            raise AssertionError("computing has started")

    with pytest.raises(HarmonictError, match=words):
        scan_and_reconstruct(Never(), [CHEST, CHEST.with_(**changes)], z_range_mm=(0.0, 2.0), scanner=SCANNER, seed=1)


def test_a_kernel_that_the_ramp_image_cannot_hold_is_refused(water):
    ramp = ramp_image(
        expose(water, protocol=CHEST, scanner=SCANNER, rng=None), fov_mm=500.0, matrix=128, band_per_mm=0.5
    )
    with pytest.raises(HarmonictError, match="band_per_mm="):
        reconstruct(ramp, get_kernel("B70"))
    with pytest.raises(HarmonictError, match="to 5, got -1"):
        reconstruct(ramp, get_kernel("B10"), iterative_strength=-1)
