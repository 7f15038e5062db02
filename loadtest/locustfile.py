"""Users over HTTP and over NATS, for locust.

    locust -f loadtest/locustfile.py --headless -u 8 -r 4 -t 60s --html report.html
    locust -f loadtest/locustfile.py --headless --trace conv.csv --trace-rate-scale 0.1 --user-rps 0.2
    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --nats-url nats://127.0.0.1:4222     (a web page)

Without `-u` there are 8 users, half over each. Without `--host` and `--nats-url` they ask the `pecsched serve` that
runs here. What the statistics mean: `loadtest/locust_users/users.py`; all arguments:
`locust -f loadtest/locustfile.py --help`.
"""

from __future__ import annotations

from locust import events

from loadtest.locust_users.options import add_arguments
from loadtest.locust_users.start import finish, prepare
from loadtest.locust_users.users import HttpPrompts, NatsPrompts

__all__ = ["HttpPrompts", "NatsPrompts"]

events.init_command_line_parser.add_listener(add_arguments)
events.init.add_listener(prepare)
events.quitting.add_listener(finish)
