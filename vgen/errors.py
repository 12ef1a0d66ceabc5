"""The error a user can act on, and how the command line tools report it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException


class UserError(ValueError):
    """Bad input, configuration or file; the message names the fix.

    The command line tools print only the message of this error and exit with status 2, so the message must stand
    alone: what was wrong, which key or file, and what to do.
    """


@contextmanager
def reported() -> Iterator[None]:
    """End the program with one line and status 2 on a mistake of the user."""
    try:
        yield
    except MissingMandatoryValue as error:
        print(f"error: {error.full_key} must be given: add {error.full_key}=... to the command", file=sys.stderr)
        sys.exit(2)
    except (UserError, OmegaConfBaseException) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
