"""Work for the tests of map_series, in a module that a spawned process can import."""

import os
import signal

from harmonict.core import HarmonictError


def work(item):
    if item == "bad":
        raise HarmonictError("bad series")
    if item == "bug":
        raise ZeroDivisionError("oops")
    if item == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return item.upper()
