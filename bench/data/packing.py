"""Share of packed rows that holds tokens, for a run's mixture and for long-tailed lengths.

The last column leaves out the emptiest row, which holds what is left at the end of an epoch.

    python -m bench.data.packing runs/demo/demo.yml --max-length 256 512
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from merit_fast.data import load_mixture, load_tokenizer_or_processor
from merit_fast.model import resolve_model
from merit_fast.pipeline.config import read_run_config
from merit_fast.train import TrainConfig
from merit_fast.train.packing import PackedSchedule

_NUM_SYNTHETIC = 20_000


def main() -> None:
    """Prints the fill of an epoch's rows, one line for each mixture and row length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, nargs="?", help="YAML of a run")
    parser.add_argument("--max-length", type=int, nargs="+", default=[256, 512, 1024, 2048])
    args = parser.parse_args()
    mixtures = {"log-normal lengths": _long_tailed(max(args.max_length))}
    if args.config:
        mixtures[str(args.config)] = _lengths(args.config)
    print(f"{'mixture':<32} {'row length':>10} {'rows':>7} {'fill':>8} {'but one':>8}")
    for name, lengths in mixtures.items():
        for limit in args.max_length:
            _report(name, np.minimum(lengths, limit), limit)


def _lengths(config: Path) -> NDArray[np.int64]:
    run = read_run_config(config)
    processor = load_tokenizer_or_processor(str(resolve_model(run.model)))
    datasets = load_mixture(run.mixture, processor, run.data, part="train")
    return np.concatenate([dataset.lengths for dataset in datasets])


def _long_tailed(limit: int) -> NDArray[np.int64]:
    drawn = np.random.default_rng(0).lognormal(5.3, 0.9, _NUM_SYNTHETIC)
    return np.clip(drawn, 8, limit).astype(np.int64)


def _report(name: str, lengths: NDArray[np.int64], limit: int) -> None:
    """The rows of an epoch of one step, so that no step is smaller than a row."""
    config = TrainConfig(packing=True, batch_size=len(lengths))
    schedule = PackedSchedule(lengths, config, limit)
    fills = sorted(int(lengths[row].sum()) / limit for row in schedule.rows(0))
    others = fills[1:] or fills
    print(
        f"{name[-32:]:<32} {limit:>10,} {len(fills):>7,} {np.mean(fills):>8.1%} "
        f"{np.mean(others):>8.1%}"
    )


if __name__ == "__main__":
    main()
