"""What can go wrong with a notification."""


class NotifyError(Exception):
    """A notification was not taken; the message says by whom and why. permanent: trying again would not help."""

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent
