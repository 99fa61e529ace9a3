"""What goes wrong with data."""


class DataError(RuntimeError):
    """A data set that cannot be had, or a file that is not what it should be; the message is one line."""
