"""`InputError`, the one error for what the user can put right."""


class InputError(ValueError):
    """Bad input: a config, path, checkpoint or data set; the message says what to do about it."""
