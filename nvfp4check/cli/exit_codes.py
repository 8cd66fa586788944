"""The exit codes, the same for every command."""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ended. A crash is never DOES_NOT_HOLD."""

    HOLDS = 0
    DOES_NOT_HOLD = 1
    COULD_NOT_CHECK = 2
    UNDECIDED = 3
    INTERRUPTED = 130
