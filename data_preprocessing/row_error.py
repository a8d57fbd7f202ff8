"""What is wrong with one row."""

from toolkits.foundation.errors import DataError


class RowError(DataError):
    """What is wrong with one row; `reason` is the short code that reports count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.reason, str(self))  # as `reason` and message: it travels between processes
