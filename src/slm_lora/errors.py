"""Errors for the user; each class has its exit code.

A message is one line: the place, the problem, and the way out.
"""


class SlmLoraError(Exception):
    """An error that is reported as its message, without a traceback."""

    exit_code = 1


class UsageError(SlmLoraError):
    """Invalid command line, recipe or installation."""

    exit_code = 2


class DataError(SlmLoraError):
    """Malformed, missing or too few rows."""

    exit_code = 3


class IntegrityError(SlmLoraError):
    """A broken file, or files that do not match (such as adapter and base)."""

    exit_code = 4


class NumericError(SlmLoraError):
    """A loss, gradient or weight that is not finite."""

    exit_code = 5


class StorageError(SlmLoraError):
    """Failure of disk, network or cluster."""

    exit_code = 6


STOPPED_RESUMABLE = 75
"""Exit code after a stop on request; the same command resumes the run."""

NOT_SHOWN_BETTER = 10
"""Exit code of `slm-lora tune` where the adapter is not shown to be better than its base."""

DO_NOT_SHIP, NOT_ENOUGH_EVIDENCE = 10, 11
"""Exit codes of `slm-lora verdict`: a condition is violated; one is undecided, none violated."""
