"""What can go wrong in ways that concern the user: input that cannot be used, refused requests, lost hosts."""


class InputError(ValueError):
    """Something the user gave cannot be used; one line says what is wrong, where, and what would be right."""


class NoTimeStamp(InputError):
    """The time-stamp server gives no time stamp, or one that does not fit. Without one the file could be signed."""


class Refused(Exception):
    """The policy forbids what was asked for, or what came out; one line says why, and never quotes the prompt.

    Attributes:
        categories, layer: of the prompt gate's verdict, if that refuses; see `safety.gate.Verdict`.
    """

    def __init__(self, reason: str, categories: tuple[str, ...] = (), layer: str = ""):
        super().__init__(reason)
        self.categories, self.layer = categories, layer


class HostLost(Exception):
    """Another process of this run has failed, or is gone and something that was computed with it has failed.

    Where nothing fails but only waits, as on TPUs, JAX ends the process by itself after some silence of the other.
    """


def one_line(error: Exception) -> str:
    """What another's error says, short enough for a message of ours."""
    return " ".join(str(error).split())[:200]
