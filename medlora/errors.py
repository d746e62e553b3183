"""The one error a user is meant to read."""


class InputError(Exception):
    """Something the user gave is wrong and only the user can mend it.

    The message names the file, line or dotted config key, what was found, what is allowed and what to do.
    Jobs print it without a traceback and exit with code 2.
    """
