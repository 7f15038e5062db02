"""Load tests without GPUs: the production scheduler core in a fake world, on workloads from traces.

`workload.py`, `traces.py`, `synthetic.py`  what arrives, and when
`scenario.py`                               which cluster serves which model, under which policy
`world.py`                                  performs the scheduler's commands with a cost model
`summary.py`, `outputs.py`                  figures; a CSV of requests; a trace for Perfetto
"""
