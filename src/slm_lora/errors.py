"""The errors a user can meet; each kind is one exit code of the command.

A message is one line: what is wrong, where, and how to mend it.
"""


class SlmLoraError(Exception):
    """An error that is explained to the user without a traceback."""

    exit_code = 1


class UsageError(SlmLoraError):
    """The command, the recipe or the installation asks for something that cannot be."""

    exit_code = 2


class DataError(SlmLoraError):
    """Rows are malformed, missing or too few."""

    exit_code = 3


class IntegrityError(SlmLoraError):
    """A file is broken, or two things do not belong together (adapter and base, say)."""

    exit_code = 4


class NumericError(SlmLoraError):
    """A loss, a gradient or a weight is not finite."""

    exit_code = 5


class StorageError(SlmLoraError):
    """The disk or the network failed."""

    exit_code = 6


STOPPED_RESUMABLE = 75
"""Exit code of a run that was stopped on request; the same command continues it."""
