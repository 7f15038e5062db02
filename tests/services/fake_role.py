"""Stands in for every role of a machine, so that supervision is tested without an engine: run as `ROLE`.

The scheduler answers with a complete cluster, the router is healthy, the others only live. FAKE_FATE
(a JSON object of role to "refuses" or "crashes") lets one fail as real ones would.
"""

import asyncio
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

from common.messages.cluster import StepCost, WorkerProfile
from common.messages.views import ClusterView, DescribeCluster, WorkerView
from common.runtime import subjects
from common.runtime.bus_nats import connect_nats
from common.runtime.wire import decode, encode

WORKERS = {"prefill-0": "prefill", "decode-0": "decode"}


def view():
    def worker(worker_id, role):
        profile = WorkerProfile(
            worker_id=worker_id,
            role=role,
            incarnation="1",
            node="node-0",
            replica=worker_id,
            model_id="m",
            model_fingerprint="f",
            layers=2,
            kv_bytes_per_token=64,
            kv_capacity_tokens=1000,
            context_tokens=512,
            data_address=f"data-address-of-{worker_id}",
            step_cost=StepCost(pass_s=0.1, token_s=0.1, pair_s=0.0),
        )
        return WorkerView(profile=profile, requests=(), queued_tokens=0, kv_reserved_tokens=0, silent_s=0.0)

    return ClusterView(
        policy=os.environ["PECSCHED_POLICY"],
        workers=tuple(worker(*each) for each in WORKERS.items()),
        routers=("router-1",),
        coordinator_present=True,
        queued_shorts=0,
        queued_longs=0,
        queued_tokens=0,
        requests=(),
        counters={},
    )


async def scheduler():
    bus = await connect_nats(os.environ["PECSCHED_NATS_URL"], "fake")

    async def answer(delivery):
        decode(delivery.data, DescribeCluster)
        await bus.publish(delivery.reply, encode(view()))

    await bus.subscribe(subjects.SCHEDULER_QUERY, answer)
    await asyncio.Event().wait()


class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()


def main(role):
    fate = json.loads(os.environ.get("FAKE_FATE", "{}")).get(role)
    if fate == "refuses":
        sys.stderr.write(f"pecsched {role}: has its reasons\n")
        return 2
    if fate == "crashes":
        raise RuntimeError("a bug")
    if role == "scheduler":
        asyncio.run(scheduler())
    if role == "router":
        HTTPServer(("127.0.0.1", int(os.environ["PECSCHED_PORT"])), Health).serve_forever()
    asyncio.run(asyncio.sleep(600))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
