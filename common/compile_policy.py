"""`python -m common.compile_policy TO SCRATCH`: the compiler's run behind `common.compiled`, in a process of its own.

mypyc ends its process when it finds an error, and setuptools reads its arguments from where it likes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mypyc.build import mypycify
from setuptools import Distribution

from common.compiled import LIBRARY, MODULES

# -O1: as fast as -O3 here (what is left is CPython's own work on objects), in two thirds of the time.
OPTIMIZATION = "1"
# How this project types its code is `make lint`'s affair.
MYPY_FLAGS = ("--config-file=", "--ignore-missing-imports", "--follow-imports=silent")


def main(to: str, scratch: str) -> None:
    sources = [str(Path("common", "policy", f"{name}.py")) for name in MODULES]
    extensions = mypycify(
        [*MYPY_FLAGS, *sources],
        opt_level=OPTIMIZATION,
        debug_level="0",
        group_name=LIBRARY,
        target_dir=scratch,
    )
    build = Distribution({"name": "pecsched", "packages": [], "ext_modules": extensions}).get_command_obj("build_ext")
    build.build_lib, build.build_temp = to, scratch
    build.ensure_finalized()
    build.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
