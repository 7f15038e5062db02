"""What runs: one package per role, and the engine they share."""
