"""Errors of the simulator."""

from __future__ import annotations

from common.errors import PecSchedError


class SimulationError(PecSchedError):
    """The scheduler gave an order that no worker could follow, or the simulation cannot be set up. One line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
