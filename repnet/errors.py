"""`InputError`, the one error for what the user can put right, and `first_line` of other errors."""


class InputError(ValueError):
    """Bad input: a config, path, checkpoint or data set; the message says what to do about it."""


def first_line(error: BaseException) -> str:
    """Return the first line of what a library reports, or the name of the error."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
