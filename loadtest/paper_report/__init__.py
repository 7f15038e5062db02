"""The paper's experiments on the simulator, and the report of them (`python -m loadtest paper`).

`variants.py`        what is compared: policies, ablations, what runs at which load
`capacity.py`        how many shorts per second a cluster serves, and what share of it a load is
`runs.py`            simulations as tasks of a pool of processes
`targets.py`         what the project promised, and whether it holds
`paper_figures.py`   the paper's results, and how ours are read from a run
`comparison.py`      each of the paper's figures beside ours, with a sentence
`plots.py`, `page.py`, `page.html.j2`   one HTML file that needs nothing else
"""
