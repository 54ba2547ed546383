"""The one exception for input that a user can mend."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, told in one line that names the value, the place and the remedy.

    The command line prints the message without a traceback and exits with status 2.
    """
