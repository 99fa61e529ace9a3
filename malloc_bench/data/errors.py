"""What goes wrong with data."""

LONGEST = 4000


class DataError(RuntimeError):
    """A data set that cannot be had, or a file that is not what it should be; the message is one printable line."""

    def __init__(self, message: str) -> None:
        """What files hold may stand in the message: signs that would steer a terminal are written out."""
        line = " ".join(message.split())
        line = line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
        super().__init__("".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line))
