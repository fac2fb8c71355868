"""Merges models that any training stack has trained from one start, weighed by their tokens.

    python examples/merge_branches.py OUT --start MODEL --branch out-0:120000 --branch out-1:90000

Each branch is a model's directory and the number of tokens that were in its loss, epochs counted.
The number goes into the branch's branch.json, from which ``merge_models`` and ``merit-fast merge``
take it.
"""

import argparse

from merit_fast import merge_models
from merit_fast.integrations.branches import write_branch


def main() -> None:
    options = read_options()
    models = []
    for branch in options.branch:
        directory, _, tokens = branch.rpartition(":")
        write_branch(directory, int(tokens), start=options.start)
        models.append(directory)
    summary = merge_models(models, "tokens", out=options.out)
    for model, weight in zip(models, summary["weights"], strict=True):
        print(f"{model}: {weight:.4f}")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="directory of the merged model")
    parser.add_argument("--start", required=True, help="model that all branches started from")
    parser.add_argument("--branch", action="append", required=True, metavar="DIRECTORY:TOKENS")
    return parser.parse_args()


if __name__ == "__main__":
    main()
