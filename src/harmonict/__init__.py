"""harmonict: CT image harmonization for radiomics, DICOM in and DICOM out."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("harmonict")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
