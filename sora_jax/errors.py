"""The one kind of error that a user can cause and repair."""


class InputError(ValueError):
    """Something the user gave cannot be used; one line says what is wrong, where, and what would be right."""


def one_line(error: Exception) -> str:
    """What another's error says, short enough for a message of ours."""
    return " ".join(str(error).split())[:200]
