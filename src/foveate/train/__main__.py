"""`python -m foveate.train NAME --out DIR [--seed 0] [--fresh] [--smoke] [--set steps=100 …]`."""

from __future__ import annotations

import argparse
import ast
import sys
from typing import Any

from foveate.method import InputError
from foveate.train import names, run


def main() -> None:
    """Reads the arguments and runs the recipe; a bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m foveate.train", description="Train a model of the zoo.")
    parser.add_argument("name", help=", ".join(names()))
    parser.add_argument("--out", required=True, help="folder for weights, metrics, log and checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="delete earlier progress in the folder")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and a few steps: does everything work?")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the recipe")
    given = parser.parse_args()
    try:
        overrides = dict(_setting(text) for text in given.set)
        run(given.name, out=given.out, seed=given.seed, resume=not given.fresh, smoke=given.smoke, **overrides)
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set wants NAME=VALUE, not {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a bare word is a string


if __name__ == "__main__":
    main()
