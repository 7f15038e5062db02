"""KV on one simulated worker. The scheduler must never order more than fits: here that is found out."""

from __future__ import annotations

from loadtest.simulator.errors import SimulationError


class KvBooks:
    __slots__ = ("_capacity", "_held", "_reserved", "_worker_id")

    def __init__(self, worker_id: str, capacity_tokens: int) -> None:
        self._worker_id = worker_id
        self._capacity = capacity_tokens
        self._held: dict[str, int] = {}
        self._reserved = 0

    def reserve(self, request_id: str, tokens: int) -> None:
        """Raises: SimulationError."""
        if request_id in self._held:
            raise SimulationError(f"{self._worker_id} was told twice to hold KV of {request_id}")
        self._held[request_id] = tokens
        self._reserved += tokens
        if self._reserved > self._capacity:
            held = f"KV for {self._reserved} tokens is ordered on {self._worker_id}"
            raise SimulationError(f"{held}, which holds {self._capacity}: the last was {request_id} with {tokens}")

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._held

    def free(self, request_id: str) -> int:
        """Tokens freed; 0: nothing was held."""
        tokens = self._held.pop(request_id, 0)
        self._reserved -= tokens
        return tokens
