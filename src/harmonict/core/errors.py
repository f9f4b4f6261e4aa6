"""The one exception that is meant for the user's eyes."""


class HarmonictError(Exception):
    """Bad input or a refused request.

    The message is one line: what was expected, what came, which file, what to do next. The command line prints it
    without a traceback and exits with code 2; in a run over many series it becomes the `reason` of that row.
    """
