"""The runtime: buses, stores, wire, shell."""
