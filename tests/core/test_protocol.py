import pytest

from harmonict.core import HarmonictError, ScanProtocol, choose_protocol, parse_protocol


def test_a_bare_word_is_the_kernel_alone():
    assert parse_protocol("Bl64") == ScanProtocol(kernel="Bl64")


def test_keys_set_their_fields_and_units_are_allowed():
    wanted = parse_protocol("Bl64, thickness=1mm, strength=0, dose=6.5 mGy, vendor=Siemens")
    assert wanted == ScanProtocol(
        kernel="Bl64", slice_thickness_mm=1.0, iterative_strength=0.0, ctdivol_mgy=6.5, manufacturer="Siemens"
    )


@pytest.mark.parametrize("text", ["Bl64,sharpness=3", "thickness=thin", "Bl64,B30", "", "kernel=a,kernel=b"])
def test_a_protocol_that_cannot_be_read_is_refused(text):
    with pytest.raises(HarmonictError):
        parse_protocol(text)


def test_matching_ignores_case_and_what_is_not_asked_for():
    have = ScanProtocol(kernel="Bl64", slice_thickness_mm=1.0, kvp=120.0)
    assert have.matches(ScanProtocol(kernel="bl64"))
    assert have.matches(ScanProtocol(slice_thickness_mm=1.005))
    assert not have.matches(ScanProtocol(slice_thickness_mm=1.5))
    assert not have.matches(ScanProtocol(ctdivol_mgy=6.5))


def test_an_ambiguous_protocol_is_refused_with_the_candidates():
    present = [ScanProtocol(kernel="Bl64", slice_thickness_mm=t) for t in (1.0, 3.0)]
    with pytest.raises(HarmonictError, match=r"Bl64 1 mm, Bl64 3 mm"):
        choose_protocol(ScanProtocol(kernel="Bl64"), present)
    assert choose_protocol(parse_protocol("Bl64,thickness=3"), present) == present[1]
    with pytest.raises(HarmonictError, match="there are"):
        choose_protocol(ScanProtocol(kernel="B30"), present)
