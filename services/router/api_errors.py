"""What a client hears when its request cannot be served: one error, in OpenAI's shape, and who can act on it."""

from __future__ import annotations

from typing import Any

from common.errors import PecSchedError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
"""HTTP status → OpenAI's error type. Below 500 the client can act; 429 and 503 may be tried again later."""

REFUSALS: dict[str, tuple[int, str]] = {
    "too_long": (400, "context_length_exceeded"),
    "duplicate_id": (409, "duplicate_request_id"),
    "queue_full": (429, "queue_full"),
    "no_workers": (503, "no_workers"),
    "not_found": (404, "request_not_found"),
}
"""The scheduler's refusal code → (HTTP status, the API's error code)."""


class ApiError(PecSchedError):
    """One error for the client. `status` is an HTTP status, also on NATS."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """`Retry-After` (whole seconds, at least 1) where trying again later can help."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.status not in (429, 503):
            return {}
        return {"Retry-After": str(max(1, round(self.retry_after_s or 1.0)))}


def bad_request(message: str, *, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that would be refused again unless the client changes it."""
    return ApiError(400, code, message, param=param)


def refusal(code: str, message: str, retry_after_s: float | None) -> ApiError:
    """What the scheduler's refusal is to a client."""
    status, api_code = REFUSALS[code]
    return ApiError(status, api_code, message, retry_after_s=retry_after_s)
