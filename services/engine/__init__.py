"""The model: the only package that imports torch. It computes what it is told to and decides nothing."""
