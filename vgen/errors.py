"""The error a user can act on."""


class UserError(ValueError):
    """Bad input, configuration or file; the message names the fix.

    The command line tools print only the message of this error and exit with status 2, so the message must stand
    alone: what was wrong, which key or file, and what to do.
    """
