"""A simulated patient's skin shows the MTF that its kernel asks for."""

import pytest

from harmonict.core import ScanProtocol
from harmonict.physics import skin_air_mtf
from harmonict.simulate.kernels import get_kernel, kernel_names
from harmonict.simulate.phantom import make_patient
from harmonict.simulate.reconstruct import scan_and_reconstruct, system_mtf
from harmonict.simulate.scanner import Scanner

FOV_MM = 355.0  # pixels of 0.69 mm: those of the real pairs
CAP_PER_MM = 0.9 * 0.5 / (FOV_MM / 512)
TOLERANCE = {6.5: 0.10, 1.3: 0.15}


@pytest.fixture(scope="module")
def found():
    """f50 at the skin of one patient, (kernel, dose) -> 1/mm: two slices, all kernels from the same raw data."""
    patient, low = make_patient(3), 140.0
    protocols = [
        ScanProtocol(kernel=k, kvp=120, ctdivol_mgy=d, slice_thickness_mm=1.0, fov_mm=FOV_MM)
        for d in TOLERANCE
        for k in kernel_names()
    ]
    scans = scan_and_reconstruct(patient, protocols, z_range_mm=(low, low + 2), scanner=Scanner(), seed=3)
    return {(p.kernel, p.ctdivol_mgy): skin_air_mtf(s).f50_per_mm for p, s in zip(protocols, scans, strict=True)}


@pytest.mark.parametrize("dose", list(TOLERANCE))
@pytest.mark.parametrize("name", kernel_names())
def test_f50_at_the_skin_is_that_of_the_chain(found, name, dose):
    asked = min(system_mtf(get_kernel(name), Scanner()).f50_per_mm, CAP_PER_MM)
    assert min(found[name, dose], CAP_PER_MM) == pytest.approx(asked, rel=TOLERANCE[dose])


@pytest.mark.parametrize("dose", list(TOLERANCE))
@pytest.mark.parametrize("names", [("B10", "B30", "B50", "B70"), ("FC13", "FC51"), ("Br32", "Br40", "Br49", "Br59")])
def test_kernels_are_ordered_at_the_skin_as_they_are_asked_for(found, names, dose):
    f50 = [found[name, dose] for name in names]
    assert f50 == sorted(f50)
