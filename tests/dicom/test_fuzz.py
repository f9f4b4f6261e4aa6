"""Damaged DICOM files: reading answers with a Series or a HarmonictError, quickly and in little memory."""

import resource
import signal

import numpy as np
import pytest
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from harmonict.core import HarmonictError, Series
from harmonict.dicom.inventory import find_series
from harmonict.dicom.read import read_series
from make_dicom import make_ct_series, make_enhanced_ct

SYNTAXES = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLSLossless,
    JPEGLosslessSV1,
    JPEG2000Lossless,
)
PARTS, EACH = 4, 500  # 2,000 mutations, in parts that run beside each other
SECONDS_EACH = 5
LARGEST_GROWTH_BYTES = 400 << 20


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three of: bytes flipped, a bit flipped, cut off, bytes inserted, bytes taken out, a length made huge."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if len(out) < 2:
            break
        # half of the places in the header, where most is decided
        end = min(len(out), 1600) if rng.random() < 0.6 else len(out)
        at = int(rng.integers(0, end))
        what = int(rng.integers(0, 6))
        if what == 0:
            for _ in range(int(rng.integers(1, 9))):
                out[int(rng.integers(0, end))] = int(rng.integers(0, 256))
        elif what == 1:
            out[at] ^= 1 << int(rng.integers(0, 8))
        elif what == 2:
            del out[at:]
        elif what == 3:
            out[at:at] = rng.bytes(int(rng.integers(1, 33)))
        elif what == 4:
            del out[at : at + int(rng.integers(1, 33))]
        else:
            out[at : at + 4] = b"\xff\xff\xff\xff"[: int(rng.integers(1, 5))]
    return bytes(out)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> list[bytes]:
    """A slice in each transfer syntax, and a multi-frame file plain and compressed."""
    folder = tmp_path_factory.mktemp("originals")
    files = [
        make_ct_series(folder / f"{n}", n=1, transfer_syntax=syntax, padding_value=0)[0]
        for n, syntax in enumerate(SYNTAXES)
    ]
    files.append(make_enhanced_ct(folder / "enhanced.dcm", n=3))
    files.append(make_enhanced_ct(folder / "enhanced_jls.dcm", n=3, transfer_syntax=JPEGLSLossless))
    return [file.read_bytes() for file in files]


@pytest.mark.parametrize("part", range(PARTS))
def test_a_mutated_file_is_read_or_refused_in_one_line(part, originals, tmp_path):
    rng = np.random.default_rng(20_000 + part)
    path = tmp_path / "mutated.dcm"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = refused = 0
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"hang at mutation {read + refused}"))
    try:
        for k in range(EACH):
            path.write_bytes(mutate(originals[k % len(originals)], rng))
            signal.alarm(SECONDS_EACH)
            try:
                assert isinstance(read_series([path]), Series)
                read += 1
            except HarmonictError as error:
                assert "\n" not in str(error), f"mutation {k}: more than one line"
                refused += 1
            find_series(path)
            signal.alarm(0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < LARGEST_GROWTH_BYTES
    assert read >= 10, "hardly any mutation was harmless"
    assert refused >= 10, "hardly any mutation did harm"


def test_the_files_are_read_before_they_are_mutated(originals, tmp_path):
    for data in originals:
        (tmp_path / "whole.dcm").write_bytes(data)
        assert isinstance(read_series([tmp_path / "whole.dcm"]), Series)
