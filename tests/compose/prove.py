"""`make compose-test`: the cluster in containers, from build to nothing left, with the real engine and model.

Builds the images, brings everything up, asks over HTTP and over NATS from this machine, and then, with requests
running all the time, scales workers up and down, kills a process, and restarts every role, container after container.
Not one request may fail. Needs a Docker engine and Compose v2, says in one line what is missing, and takes its own
ports and names: a cluster that runs already is not touched.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import httpx
import nats

from tests.compose.engine import (
    DockerFailed,
    NoEngine,
    Project,
    TookTooLong,
    docker,
    free_ports,
    image_mb,
    publishes_ports,
    require_engine,
)
from tests.compose.load import Load, Tally, ask_nats

CONTROL_MB_MAX = 450
STEPS = ("scale", "kill", "router", "scheduler", "sp-coordinator", "prefill-worker", "decode-worker", "redis", "nats")
"""Workers scaled, a process killed, and the services whose containers are restarted one after another."""
SETTLE_S = 3.0
"""Of load before and after something is done to the cluster."""
EXIT_FAILED, EXIT_NOT_STARTED = 1, 2


class Failed(Exception):
    """What was to be proved is not so."""


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@contextmanager
def stage(title: str) -> Iterator[None]:
    begun_s = time.monotonic()
    yield
    say(f"  {time.monotonic() - begun_s:6.1f} s  {title}")


class Proof:
    """The stages, in order."""

    def __init__(self, *, on_host: bool) -> None:
        first = free_ports(6)
        ports = {"NATS_PORT": first + 2, "REDIS_PORT": first + 3, "NATS_MONITOR_PORT": first + 4}
        self.urls = [f"http://127.0.0.1:{first}"] + ([] if on_host else [f"http://127.0.0.1:{first + 1}"])
        self.nats_url = f"nats://127.0.0.1:{ports['NATS_PORT']}"
        # On one network two routers share a port; between containers each has one of its own.
        router_ports = str(first) if on_host else f"{first}-{first + 1}"
        env = {name: str(port) for name, port in ports.items()} | {"PECSCHED_PORT": router_ports}
        self.project = Project(f"pecsched-test-{secrets.token_hex(3)}", env, on_host=on_host)
        self.load = Load(self.urls, self.nats_url)
        self.total = Tally()

    async def run(self, steps: Sequence[str]) -> None:
        """Build, up, ask, then these of `STEPS` under load. Raises: Failed, DockerFailed, TookTooLong."""
        with stage("images built"):
            for service in ("router", "model"):  # not at once: the classic builder would make what they share twice
                await self._do(self.project.compose, "build", "-q", service)
        self._check_sizes()
        if not self.project.on_host:
            with stage("a port that is taken is named"):
                await self._do(self._take_a_port)
        with stage("up: two routers, two schedulers, two prefill workers, a decode worker, a coordinator"):
            await self._do(self._up, 2)
        with stage("a chat over HTTP, a request over NATS"):
            await self._ask_once()
        for step in steps:
            match step:
                case "scale":
                    await self._scale()
                case "kill":
                    await self._kill()
                case service:
                    # What is sent to a NATS client while NATS is away is lost, and it has to ask again.
                    await self._restart(service, over_nats=service != "nats")
        say(f"in all {self.total}")

    def clean_up(self) -> None:
        """Raises: Failed, if anything of the project is left."""
        with stage("down"):
            self.project.down()
        if left := self.project.leftovers():
            raise Failed(f"left behind: {', '.join(left)}")

    async def _do(self, work: Callable[..., object], *arguments: object) -> None:
        """Docker's commands take seconds, and clients go on meanwhile."""
        await asyncio.to_thread(work, *arguments)

    def _check_sizes(self) -> None:
        sizes = {name: image_mb(f"pecsched-{name}") for name in ("control", "worker")}
        say("           " + ", ".join(f"{name} {size:.0f} MB" for name, size in sizes.items()))
        if sizes["control"] > CONTROL_MB_MAX:
            raise Failed(f"the control image has {sizes['control']:.0f} MB, at most {CONTROL_MB_MAX} are allowed")

    def _take_a_port(self) -> None:
        port = int(self.nats_url.rpartition(":")[2])
        with socket.create_server(("127.0.0.1", port)):
            try:
                self.project.up("nats")
            except DockerFailed as error:
                if f":{port}" not in str(error):
                    raise Failed(f"port {port} is taken, and what is said is: {error}") from None
            else:
                raise Failed(f"port {port} is taken, and NATS started")

    def _up(self, prefill_workers: int) -> None:
        self.project.up(scale={"router": 2, "prefill-worker": prefill_workers})

    async def _ask_once(self) -> None:
        question = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
        async with httpx.AsyncClient(timeout=60.0, trust_env=False) as http:
            for url in self.urls:
                answer = await http.post(f"{url}/v1/chat/completions", json=question)
                text = answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else answer.text
                if "Paris" not in text:
                    raise Failed(f"{url}: HTTP {answer.status_code}: {text[:200]}")
        client = await nats.connect(self.nats_url)
        await ask_nats(client, "The capital of France is", 4)
        await client.close()

    async def _scale(self) -> None:
        for workers in (4, 2):
            await self._under_load(f"prefill workers scaled to {workers}", lambda n=workers: self._up(n))

    async def _kill(self) -> None:
        victim = self.project.containers("prefill-worker")[0].id

        def kill() -> None:
            self.project.kill_process(victim)
            self.project.wait_restarted(victim)
            self.project.wait_well(victim)

        await self._under_load("a prefill worker's process killed, and back", kill)

    async def _restart(self, service: str, *, over_nats: bool = True) -> None:
        def restart() -> None:
            for container in self.project.containers(service):
                docker("restart", container.id)
                self.project.wait_well(container.id)

        await self._under_load(f"{service} restarted, one container after another", restart, over_nats=over_nats)

    async def _under_load(self, title: str, work: Callable[[], None], *, over_nats: bool = True) -> None:
        begun_s = time.monotonic()
        async with self.load.running(over_nats=over_nats) as tally:
            await asyncio.sleep(SETTLE_S)
            await self._do(work)
            await asyncio.sleep(SETTLE_S)
        self.total.whole += tally.whole
        self.total.failed += tally.failed
        say(f"  {time.monotonic() - begun_s:6.1f} s  {title}: {tally}")
        if tally.failed:
            raise Failed(f"{title}: {tally.failed[0]} ({len(tally.failed)} failed)")
        kinds = {"short", "long", *(["nats"] if over_nats else [])}
        if silent := kinds - tally.whole.keys():
            raise Failed(f"{title}: no client of {', '.join(sorted(silent))} got an answer")


def prove(network: str, steps: Sequence[str], *, keep: bool) -> None:
    """Raises: NoEngine, Failed, DockerFailed, TookTooLong."""
    say(require_engine())
    on_host = network == "host" or (network == "auto" and not publishes_ports())
    say(f"network: {'the host’s (compose.host.yaml)' if on_host else 'a bridge, ports published'}")
    proof = Proof(on_host=on_host)
    try:
        asyncio.run(proof.run(steps))
    except BaseException:
        say(proof.project.logs())
        raise
    finally:
        if not keep:
            proof.clean_up()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 proved, 1 not so, 2 something is missing here."""
    parser = argparse.ArgumentParser(prog="make compose-test", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--network", choices=("auto", "bridge", "host"), default="auto")
    parser.add_argument("--only", choices=STEPS, nargs="+", default=STEPS, metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--keep", action="store_true", help="leave the cluster running")
    options = parser.parse_args(argv)
    begun_s = time.monotonic()
    try:
        prove(options.network, options.only, keep=options.keep)
    except NoEngine as error:
        sys.stderr.write(f"compose-test: {error}\n")
        return EXIT_NOT_STARTED
    except (Failed, DockerFailed, TookTooLong) as error:
        sys.stderr.write(f"compose-test: {error}\n")
        return EXIT_FAILED
    say(f"passed in {time.monotonic() - begun_s:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
