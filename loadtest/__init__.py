"""Measures a PecSched cluster, or pieces of it, as a client meets them.

`python -m loadtest run`       a trace, or arrivals like one, replayed on a live cluster in an open loop
`python -m loadtest compare`   two such runs, or simulated ones, side by side
`python -m loadtest mixed`     shorts alone, then shorts and longs under FIFO and under PecSched, same arrivals
`python -m loadtest overhead`  what router, scheduler and NATS add to a short request on an idle cluster
`python -m loadtest control`   what routers, scheduler and bus can do, beside 64 engines that take no time
`python -m loadtest pause`     one prefill worker: from a short that is ready to the long that stands
`python -m loadtest engine`    stepped prefill beside transformers' own forward; a decode step by batch size
`python -m loadtest sp`        a long prefill by a group of workers beside one of them alone
`python -m loadtest fit-costs` the simulator's coefficients of a GPU, fitted to measured tables
`python -m loadtest page`      what the live page costs the router, and its frames per second
`python -m loadtest sim`       a workload on a simulated cluster of GPUs, under any policy
`python -m loadtest paper`     the paper's experiments on simulated clusters, each figure beside the paper's, as HTML
`python -m loadtest scale`     what a decision of the scheduler costs in clusters of 32 to 8,192 GPUs

Each prints a table and writes the same figures with `--json FILE`. What is measured, and from when to
when, stands at the top of the file of the same name. Run them on a quiet machine.
"""
