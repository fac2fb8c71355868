"""merit_fast in LLaMA-Factory: its own YAML, trained with our kernels and branch.json.

    python -m merit_fast.integrations.llamafactory train.yml

LLaMA-Factory has no entry points; its ``run_exp`` takes callbacks. From Python:

    from llamafactory.train.tuner import run_exp
    run_exp(args={...}, callbacks=[StackCallback()])
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError, MeritFastError
from merit_fast.integrations.stacks.callback import StackCallback
from merit_fast.options.yaml import read_yaml

__all__ = ["StackCallback", "train"]


def train(config: str | Path | Mapping[str, Any], callback: StackCallback | None = None) -> None:
    """Runs LLaMA-Factory's training with our callback.

    Args:
        config: its YAML, or the keys of it; ``stage: sft`` or ``pt``.
        callback: None: kernels "auto", and branch.json.

    Raises:
        InputError: LLaMA-Factory is not installed, the file is no mapping, another stage is asked
            for, or a key of ours, such as axolotl's plugin has.
    """
    values = read_yaml(Path(config)) if isinstance(config, str | Path) else dict(config)
    if not isinstance(values, Mapping):
        raise InputError(f"{config}: must be a mapping of keys, got {type(values).__name__}")
    _check_keys(values)
    try:
        from llamafactory.train.tuner import run_exp
    except ImportError as error:
        raise InputError(
            f"merit_fast.integrations.llamafactory needs LLaMA-Factory: pip install llamafactory "
            f"({error})"
        ) from error
    run_exp(args=dict(values), callbacks=[callback or StackCallback()])


def _check_keys(values: Mapping[str, Any]) -> None:
    """Refuses what the callback cannot do here."""
    stage = values.get("stage", "sft")
    if stage not in ("sft", "pt"):
        raise InputError(f"stage: must be sft or pt, whose tokens can be counted, got {stage!r}")
    if "merit_losses" in values:
        raise InputError(
            "merit_losses: must be absent: LLaMA-Factory's rows lose their dataset when it "
            "tokenizes them, and its callbacks see no batch; take engine trl, axolotl or swift for "
            "losses per dataset"
        )
    ours = next((key for key in values if str(key).startswith("merit_")), None)
    if ours is not None:
        raise InputError(f"{ours}: must be absent: it is a key of merit_fast's axolotl plugin")


def main(words: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    if len(words) != 1:
        print("usage: python -m merit_fast.integrations.llamafactory CONFIG.yml", file=sys.stderr)
        return 2
    try:
        train(words[0])
    except MeritFastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
