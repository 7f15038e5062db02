"""What is told of a run, live or simulated: the same figures, table, JSON, plots and page for both.

`record.py` says what a run leaves and which figures are made of it, `table.py` prints them, `plots.py` and
`page.py` draw.
"""
