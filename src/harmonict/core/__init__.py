"""The nouns: Series, Geometry, ScanProtocol. No file formats, no torch."""

from harmonict.core.errors import HarmonictError
from harmonict.core.geometry import Geometry
from harmonict.core.protocol import PROTOCOL_COLUMNS, ScanProtocol, choose_protocol, parse_protocol
from harmonict.core.series import Series

__all__ = [
    "PROTOCOL_COLUMNS",
    "Geometry",
    "HarmonictError",
    "ScanProtocol",
    "Series",
    "choose_protocol",
    "parse_protocol",
]
