"""The KV of a paused long moved elsewhere by the engine, and back, as events of the worker's core."""

from __future__ import annotations

from common.logs import get_logger
from common.policy.prefill_events import KvMoved, KvRestored, KvSpilled, RestoreFailed, RestoreKv, SpillFailed, SpillKv
from services.engine.interface import EngineError, MoveStopped, PrefillEngine, SpillRefused

log = get_logger(__name__)


async def move_kv(engine: PrefillEngine, command: SpillKv | RestoreKv) -> KvMoved:
    """How it ended."""
    request_id, attempt = command.request_id, command.attempt
    try:
        if isinstance(command, RestoreKv):
            await engine.restore(request_id)
            return KvRestored(request_id=request_id, attempt=attempt)
        spilled = await engine.spill(request_id)
    except SpillRefused as error:
        log.warning("KV of a paused long stays", request_id=request_id, error=str(error))
        return SpillFailed(request_id=request_id, attempt=attempt, reason=str(error))
    except MoveStopped as error:
        return RestoreFailed(request_id=request_id, attempt=attempt, reason=str(error))
    except EngineError as error:
        log.error("KV could not be moved", request_id=request_id, error=str(error), exc_info=error)
        failed = RestoreFailed if isinstance(command, RestoreKv) else SpillFailed
        return failed(request_id=request_id, attempt=attempt, reason=str(error))
    log.info("KV of a paused long was moved", request_id=request_id, bytes=spilled.kv_bytes, to=spilled.moved_to)
    return KvSpilled(request_id=request_id, attempt=attempt, kv_bytes=spilled.kv_bytes, moved_to=spilled.moved_to)
