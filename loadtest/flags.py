"""Flags that several commands share, and how their values are read."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def at_least_two(text: str) -> int:
    """A whole number of 2 or more."""
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError("must be 2 or more")
    return number


def not_negative(text: str) -> int:
    """A whole number of 0 or more."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return number


def rate(text: str) -> float:
    """A number above 0."""
    number = float(text)
    if not 0.0 < number < 1e6:
        raise argparse.ArgumentTypeError("must be more than 0")
    return number


def token_range(text: str) -> tuple[int, int]:
    """`32-256`, both ends in it, or one number."""
    low, _, high = text.partition("-")
    try:
        ends = int(low), int(high or low)
    except ValueError:
        raise argparse.ArgumentTypeError("must be like 32-256") from None
    if not 1 <= ends[0] <= ends[1]:
        raise argparse.ArgumentTypeError("must rise, like 32-256")
    return ends


def cluster_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Which cluster is measured."""
    parser.add_argument("--seed", type=not_negative, default=0, help="of all that is random [0]")
    parser.add_argument("--url", default="", help="measure the cluster there, instead of starting one")
    parser.add_argument("--nats-url", default="", help="of that cluster: what only the bus tells is measured too")
    parser.add_argument("--api-key", default="", help="bearer token, where the router asks for one")
    parser.add_argument(
        "--serve", default="", metavar="FLAGS", help="more flags for `pecsched serve`, as one argument: --serve '…'"
    )
