"""What `loadtest/locustfile.py` is made of.

`options.py` the arguments, `users.py` the users and their tasks, `bridge.py` asyncio beside gevent, `start.py` what is
done before the first user: where is the cluster, is it there, what does it take. `shape.py` replays a trace.
"""
