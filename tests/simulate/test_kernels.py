"""Named kernels: what the table must hold, names, a user's own curve, agreement with the public pairs."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import harmonict.simulate
from harmonict.core import HarmonictError
from harmonict.simulate.kernels import get_kernel, kernel_names, kernel_vendor, load_kernel_csv

NAMED = """Br32 Br40 Br49 Br59 Br62 Br64 Br69 Qr32 Qr49 Qr59 Qr61 Bl57 Bl64 B10 B30 B50 B70 FC13 FC51 STANDARD LUNG BONE
B D""".split()


def test_every_named_kernel_is_there_and_says_where_it_comes_from():
    assert set(NAMED) <= set(kernel_names())
    for name in kernel_names():
        kernel = get_kernel(name)
        assert kernel.name == name
        assert kernel.note.startswith(("measured: ", "emulation: "))
        assert kernel_vendor(name) in ("Siemens", "Canon", "GE", "Philips")


def test_every_curve_starts_at_1_ends_at_0_and_crosses_a_half_once():
    for name in kernel_names():
        kernel = get_kernel(name)
        assert kernel.mtf[0] == 1
        assert kernel.mtf[-1] == 0
        assert kernel.frequency_per_mm[-1] <= 1.0
        assert kernel.mtf.min() >= 0
        assert np.count_nonzero(np.diff(kernel.mtf > 0.5)) == 1


def test_sharper_names_are_sharper():
    for order in (
        ("B10", "B30", "B50", "B70"),
        ("FC13", "FC51"),
        ("Br32", "Br40", "Br49", "Br59", "Br62", "Br64", "Br69"),
        ("Qr32", "Qr49", "Qr59", "Qr61"),
        ("Bl57", "Bl64"),
        ("STANDARD", "LUNG", "BONE"),
        ("B", "D"),
    ):
        f50 = [get_kernel(n).f50_per_mm for n in order]
        assert f50 == sorted(f50) and len(set(f50)) == len(f50), order


def test_edge_enhancing_kernels_pass_1_and_quantitative_ones_do_not():
    for name in ("Br64", "Br69", "Bl57", "Bl64", "B70", "LUNG", "BONE"):
        assert get_kernel(name).mtf.max() > 1.1
    for name in ("Br32", "Qr32", "Qr49", "Qr59", "Qr61", "B10", "B30", "FC13"):
        assert get_kernel(name).mtf.max() < 1.01


def test_names_are_found_whatever_their_case_and_siemens_suffix():
    assert get_kernel("bl64").name == "Bl64"
    assert get_kernel("Br40f").name == "Br40"
    assert get_kernel("Br40d").name == "Br40"
    assert get_kernel("B70f").name == "B70"
    assert get_kernel("B40").name == "B40f"
    assert get_kernel("D").name == "D"
    assert get_kernel(" lung ").name == "LUNG"


@pytest.mark.parametrize(("name", "near"), [("Bl65", "Bl64"), ("FC52", "FC51"), ("standart", "STANDARD")])
def test_an_unknown_kernel_names_the_nearest_and_all(name, near):
    with pytest.raises(HarmonictError, match=f"did you mean {near}") as caught:
        get_kernel(name)
    assert all(known in str(caught.value) for known in kernel_names())
    assert "\n" not in str(caught.value)


def test_a_users_curve_is_read_and_a_bad_one_refused(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("# our scanner\nfrequency_per_mm,mtf\n0,1\n0.3,0.5\n0.7,0\n")
    assert load_kernel_csv(path).f50_per_mm == pytest.approx(0.3)
    for text, words in (
        ("0,1\n0.3,0.5\n0.2,0\n", "rise"),
        ("0,0.8\n0.3,0.5\n0.7,0\n", "must be 1"),
        ("0.1,1\n0.3,0.5\n0.7,0\n", "must be 0"),
        ("0,1\n0.3,0.5\n", "down to 0.1"),
    ):
        path.write_text("frequency_per_mm,mtf\n" + text)
        with pytest.raises(HarmonictError, match=words) as caught:
            load_kernel_csv(path)
        assert "mine.csv" in str(caught.value)
    with pytest.raises(HarmonictError, match="cannot read"):
        load_kernel_csv(tmp_path / "none.csv")


def test_the_table_is_what_the_calibration_writes(data, tmp_path):
    """Absolute curves to what a skin MTF repeats to; the ratios of kernels of one scan, which need none, closely."""
    root = Path(__file__).parents[2]
    out = tmp_path / "kernels.csv"
    subprocess.run([sys.executable, root / "examples" / "calibrate_kernels.py", "--out", out], check=True)
    kept, made = (
        {row[0]: np.array(row[4:], float) for row in list(csv.reader(path.read_text().splitlines()))[1:]}
        for path in (Path(harmonict.simulate.__file__).parent / "kernels.csv", out)
    )
    assert list(made) == list(kept)
    for name, curve in made.items():
        assert np.abs(curve - kept[name]).max() < 0.03, name
    for soft, sharp in (("B10", "B70"), ("B30", "B70"), ("B50", "B70"), ("FC13", "FC51")):
        ratio = [t[soft][:14] / t[sharp][:14] for t in (kept, made)]  # to 0.65 per mm
        assert np.allclose(*ratio, atol=2e-3), soft


def test_measured_kernels_turn_one_public_image_into_the_other(data):
    from harmonict.volumes import read_volume

    folder = data / "paired" / "siemens-chest"
    image = {
        k: read_volume(folder / f"{k}.mha", spacing_mm=0.693359).hu[0].astype(float) for k in ("B10", "B30", "B50")
    }
    f = np.hypot(np.fft.fftfreq(512, 0.693359)[:, None], np.fft.rfftfreq(512, 0.693359))
    for sharp, soft, least in (("B50", "B30", 0.98), ("B30", "B10", 0.98)):
        top, bottom = get_kernel(soft).at(f), get_kernel(sharp).at(f)
        ratio = np.where(bottom > 0.01, top / np.maximum(bottom, 0.01), 0)
        made = np.fft.irfft2(np.fft.rfft2(image[sharp]) * ratio, (512, 512))
        body = image[soft] > -300
        explained = 1 - (made - image[soft])[body].var() / image[soft][body].var()
        assert explained > least
