"""`InputError`, the one error for what the user can put right, and short texts of other errors."""


class InputError(ValueError):
    """Bad input: a config, path, checkpoint or data set; the message says what to do about it."""


def one_line(error: BaseException, most: int = 300) -> str:
    """Return what a library reports as one line of at most so many characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def first_line(error: BaseException) -> str:
    """Return the first line of what a library reports, or the name of the error."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
