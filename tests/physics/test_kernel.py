import numpy as np
import pytest

from harmonict.core import HarmonictError
from harmonict.physics.kernel import Kernel, read_kernel, write_kernel

F = np.linspace(0, 2, 201)
GAUSS = Kernel("gauss", F, np.exp(-np.log(2) * (F / 0.4) ** 2))


def test_f50_and_f10_of_a_gaussian_are_its_closed_form():
    assert GAUSS.f50_per_mm == pytest.approx(0.4, rel=1e-3)
    assert GAUSS.f10_per_mm == pytest.approx(0.4 * np.sqrt(np.log2(10)), rel=1e-3)


def test_a_curve_that_never_falls_to_half_has_no_f50():
    assert np.isnan(Kernel("flat", [0, 1], [1, 0.8]).f50_per_mm)


def test_between_samples_it_is_linear_and_past_the_last_it_falls_to_zero_and_stays_there():
    kernel = Kernel("k", [0, 0.5, 1.0], [1, 0.8, 0.4])
    assert kernel.at([0.25, 1.0, 1.05, 1.1, 7.0]) == pytest.approx([0.9, 0.4, 0.2, 0.0, 0.0])


def test_edge_enhancing_kernels_may_pass_one():
    assert Kernel("sharp", [0, 0.3, 1], [1, 1.2, 0]).mtf.max() == 1.2


@pytest.mark.parametrize(
    ("frequency", "mtf", "words"),
    [
        ([0, 0.2, 0.1], [1, 0.5, 0.2], "must rise"),
        ([0, 0.2, 0.2], [1, 0.5, 0.2], "must rise"),
        ([0.1, 0.2], [1, 0.5], "first frequency must be 0"),
        ([0, 0.2], [0.9, 0.5], "must be 1"),
        ([0, 0.2], [1, np.nan], "NaN"),
        ([0, 0.2, 0.3], [1, 0.5], "equal length"),
    ],
)
def test_what_is_no_mtf_is_refused_in_words(frequency, mtf, words):
    with pytest.raises(HarmonictError, match=words):
        Kernel("bad", frequency, mtf)


def test_a_written_curve_reads_back(tmp_path):
    write_kernel(Kernel("x", GAUSS.frequency_per_mm, GAUSS.mtf, "a note"), tmp_path / "Bx.csv")
    back = read_kernel(tmp_path / "Bx.csv")
    assert back.name == "Bx" and back.note == "a note"
    assert np.allclose(back.mtf, GAUSS.mtf, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "columns frequency_per_mm, mtf"),
        ("", "columns frequency_per_mm, mtf"),
        ("frequency_per_mm,mtf\n0,1\nx,0.5\n", "two numbers"),
        ("frequency_per_mm,mtf\n0,1\n0.5\n", "two numbers"),
        ("frequency_per_mm,mtf\n0,1\n0.5,0.4\n0.3,0.2\n", "must rise"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, text, words):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(HarmonictError, match=words) as error:
        read_kernel(tmp_path / "bad.csv")
    assert "bad.csv" in str(error.value)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(HarmonictError, match=r"none\.csv"):
        read_kernel(tmp_path / "none.csv")
