"""The errors a user is meant to read."""


class InputError(Exception):
    """Something the user gave is wrong and only the user can fix it.

    The message names the file, line or dotted config key, what was found, what is allowed and what to do.
    Jobs print it without a traceback and exit with code 2.
    """


class RunError(Exception):
    """Work ended by an exception or by deaths that no key of the config explains.

    The message names what was raised and the log that holds its traceback. Jobs print it without a traceback and exit
    with code 1.
    """
