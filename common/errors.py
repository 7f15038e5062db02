"""Errors that a person reads. Everything this project raises on purpose derives from `PecSchedError`."""

from __future__ import annotations


class PecSchedError(Exception):
    """Base of every error raised on purpose."""


class StartupError(PecSchedError):
    """A process cannot start. Its text is one line: what is wrong and what to do about it."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
