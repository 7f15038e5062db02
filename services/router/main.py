"""The router's process: model folder, socket, uvicorn and the router on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn

from common import model_files
from common.errors import StartupError
from common.logs import get_logger
from common.metrics import Metrics
from common.runtime.bus import Bus
from common.runtime.process import run_role
from common.runtime.store import Store
from common.runtime.supervisor import Supervisor
from common.runtime.tracing import traced
from common.settings import RouterSettings
from services.router.model_text import ModelText, load
from services.router.openai_http import create_app
from services.router.service import Router

ROLE = "router"
BACKLOG = 2_048
KEEP_ALIVE_S = 75
CLOSE_S = 3
"""How long open connections may take to end once every request was answered."""

log = get_logger(__name__)


def main(settings: RouterSettings) -> int:
    """Serve until a signal. Returns the exit status; 2, with one line on stderr, if it could not start."""

    metrics = Metrics(ROLE)

    async def start(bus: Bus, store: Store, stop: asyncio.Event) -> None:
        text = await asyncio.to_thread(load_text, settings)
        async with traced(ROLE, settings.otlp_endpoint, metrics) as tracer:
            with listening(settings.host, settings.port, reuse_port=settings.reuse_port) as listener:
                router = Router(settings, bus, store, text, metrics=metrics, tracer=tracer)
                await serve(router, listener, stop)

    return run_role(ROLE, settings, start, metrics=metrics, cpu_slice_ms=settings.cpu_slice_ms)


def load_text(settings: RouterSettings) -> ModelText:
    """The words of the model these settings name. Raises: StartupError."""
    return load(
        model_files.model_folder(settings.model, settings.cache_dir),
        name=settings.served_model_name or model_files.model_name(settings.model),
        default_max_tokens=settings.default_max_tokens,
    )


@contextlib.contextmanager
def listening(host: str, port: int, *, reuse_port: bool = False) -> Iterator[socket.socket]:
    """A bound, listening socket. Raises: StartupError, if the address is taken or unknown."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=reuse_port)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartupError(f"cannot listen on {host}:{port}: {reason}; choose another with --host, --port") from error
    with listener:
        yield listener


async def serve(router: Router, listener: socket.socket, stop: asyncio.Event) -> None:
    """Run the router and its HTTP door until `stop`; then drain both.

    A router that stops refuses connections from its first moment on, and whoever is refused may safely try elsewhere.
    What comes over connections that are open it still takes, for `late_s`; each closes behind its answer, and those on
    which nobody asks close in the middle of that time.
    """
    host, port = listener.getsockname()[:2]
    router.address = f"{host}:{port}"
    server = Server(
        uvicorn.Config(
            create_app(router),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=CLOSE_S,
        )
    )
    async with Supervisor() as tasks:
        running = tasks.spawn(router.run(), name="router")
        await router.started()
        serving = tasks.spawn(server.serve(sockets=[listener]), name="http")
        log.info("listening", address=router.address, model=router.text.facts.name)
        await stop.wait()
        server.accept_no_more(listener)
        router.stop()
        await asyncio.sleep(router.settings.late_s / 2)
        server.close_idle()
        # The router first: it answers everyone, then the connections can close.
        await running
        server.should_exit = True
        await serving


class Server(uvicorn.Server):
    """uvicorn, without its own signal handlers: the process has its own."""

    def accept_no_more(self, listener: socket.socket) -> None:
        """Connections that are open go on, to the end of the answer that is on its way."""
        if self.started:
            for server in self.servers:
                server.close()
            listener.close()
        for connection in self.server_state.connections:
            cycle = connection.cycle  # type: ignore[union-attr]
            if cycle is not None:
                cycle.keep_alive = False

    def close_idle(self) -> None:
        for connection in list(self.server_state.connections):
            connection.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
