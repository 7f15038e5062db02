"""IO that decides nothing: the bus, the store, the shell that runs a core."""
