"""HU of tissues, and how they move with kVp."""

import numpy as np
import pytest

from harmonict.core import HarmonictError
from harmonict.simulate import materials

# HU at 120 kVp that textbooks and ICRU-based calibrations give
PUBLISHED = {
    "fat": (-120, -80),
    "muscle": (35, 65),
    "blood": (35, 65),
    "liver": (45, 70),
    "spleen": (40, 60),
    "gland": (-20, 45),
    "cartilage": (70, 160),
    "csf": (0, 20),
    "cord": (25, 50),
    "marrow": (-70, 20),
    "spongiosa": (150, 450),
    "cortical_bone": (1200, 2000),
    "acrylic": (110, 140),
    "polyethylene": (-115, -80),
    "delrin": (320, 380),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_tissues_have_published_hu_at_120_kvp(name):
    low, high = PUBLISHED[name]
    assert low <= materials.tissue_hu(name, 120) <= high


@pytest.mark.parametrize("kvp", materials.KVP)
def test_water_is_0_and_air_minus_1000_at_every_kvp(kvp):
    assert materials.tissue_hu("water", kvp) == 0
    assert materials.tissue_hu("air", kvp) == pytest.approx(-1000, abs=1e-9)
    for name, hu in (("water", 0), ("air", -1000)):
        value = materials.material_values(name)
        assert value[0] == hu and not value[1:].any()


@pytest.mark.parametrize("name", ["cortical_bone", "spongiosa", "iodine", "cartilage", "blood"])
def test_hu_of_what_holds_heavy_elements_fall_with_kvp(name):
    assert np.all(np.diff([materials.tissue_hu(name, k) for k in materials.KVP]) < 0)


@pytest.mark.parametrize("name", ["fat", "polyethylene", "acrylic"])
def test_hu_of_what_is_lighter_than_water_in_atoms_rise_with_kvp(name):
    assert np.all(np.diff([materials.tissue_hu(name, k) for k in materials.KVP]) > 0)


def test_mass_attenuation_of_water_is_nists():
    # NIST table for liquid water, cm^2/g at 30, 60, 100 keV
    mixture = materials.COMPOSITIONS["water"][1]
    found = materials.mass_attenuation(mixture, np.array([30.0, 60.0, 100.0]))
    assert found == pytest.approx([0.3756, 0.2059, 0.1707], rel=2e-3)


def test_two_numbers_carry_every_material_through_all_kvp():
    for name in [*materials.COMPOSITIONS, "iodine"]:
        value = materials.material_values(name)
        for kvp in materials.KVP:
            b0, b1 = materials.spectral_shift(kvp)
            assert value[0] + value[1] * b0 + value[2] * b1 == pytest.approx(materials.tissue_hu(name, kvp), abs=0.5)


def test_mass_fractions_add_up_to_one():
    for name, (_, mixture) in materials.COMPOSITIONS.items():
        assert sum(mixture.values()) == pytest.approx(1, abs=0.012), name


def test_iodine_is_within_15_percent_of_the_clinical_26_hu_at_120_kvp():
    assert materials.tissue_hu("iodine", 120) == pytest.approx(26, rel=0.15)


def test_a_kvp_off_the_table_is_refused_with_those_on_it():
    with pytest.raises(HarmonictError, match="70, 80, 100, 120, 140"):
        materials.mu_water_per_mm(90)


def test_a_scan_moves_with_kvp_like_the_material_of_that_hu():
    hu = np.array([-1000, -850, *(materials.tissue_hu(n, 120) for n in ("fat", "muscle", "cortical_bone"))], np.float32)
    s = materials.spectral_from_hu120(hu)
    b0, b1 = materials.spectral_shift(80)
    moved = hu + b0 * s[0] + b1 * s[1]
    wanted = [-1000, -850, *(materials.tissue_hu(n, 80) for n in ("fat", "muscle", "cortical_bone"))]
    assert moved == pytest.approx(wanted, abs=1.0)
