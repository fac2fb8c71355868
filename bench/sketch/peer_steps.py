"""One peer's steps, timed in turn with the plain step in one process of the peers' environment.

    python -m bench.sketch.peer_steps PEER [--rounds 3] [--threads 1] [--tokens 128] [--quick]

Each step's result (peer_libraries.py) is compared with exact gradients first. The last line is
JSON: of round 0 and step "plain", "0/plain/wall_s" and "0/plain/cpu_s".
"""

import argparse
import json
import math

import torch

from bench.sketch.peer_libraries import BATCH, PEERS
from bench.sketch.work import Work, plain, rotated, small_model, timed, token_work


def measure(arguments: argparse.Namespace, work: Work) -> dict[str, float]:
    """Checks every step once, then times each and the plain step in every round."""
    steps = PEERS[arguments.peer]
    if arguments.peer in ("trak", "dattri"):
        # vmap refuses the masks of sdpa.
        work.model.set_attn_implementation("eager")  # type: ignore[operator]
    for make in steps.values():
        with make(work) as (run, check):
            result = run()
        work.model.zero_grad()
        check(result)  # after the peer has removed its hooks
        del result
        work.model.zero_grad()
    seconds: dict[str, float] = {}
    for number in range(arguments.rounds):
        for name in rotated(["plain", *steps], number):
            if name == "plain":
                with plain(work) as step:
                    taken = timed(step)
            else:
                with steps[name](work) as (run, _):
                    taken = timed(run)
            work.model.zero_grad()
            seconds |= {f"{number}/{name}/{key}": value for key, value in taken.items()}
    assert all(math.isfinite(value) for value in seconds.values())
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens = 16 if arguments.quick else arguments.tokens
    work = token_work(small_model("fp32", arguments.quick), BATCH, tokens)
    print(json.dumps(measure(arguments, work)))


if __name__ == "__main__":
    main()
