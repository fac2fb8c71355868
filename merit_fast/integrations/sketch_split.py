"""A split from the sketches of a training run, without a mixture of rows."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from merit_fast.data import Dataset
from merit_fast.errors import InputError
from merit_fast.integrations.sketch_files import file_stem, read_states
from merit_fast.manifests.io import fingerprint
from merit_fast.manifests.schemas import SplitManifest
from merit_fast.manifests.sketch_state import SketchState
from merit_fast.split import SplitConfig, split_mixture


def split_sketches(
    folder: str | Path,
    config: SplitConfig | None = None,
    *,
    tokens: Mapping[str, int] | None = None,
    steps: int | None = None,
    **options: Any,
) -> SplitManifest:
    """Groups the datasets whose sketches lie in a folder, such as ``SketchCallback`` writes.

        split = split_sketches("out/sketches", groups=2)
        print({dataset.name: dataset.group for dataset in split.datasets})

    Sums of a training run belong to the weights along that run. Groups are balanced by the tokens
    that the states have counted; repeated epochs change no share.

    Args:
        folder: one ``NAME.safetensors`` per dataset.
        config: options of the split; None: made of ``options``.
        tokens: target tokens of every dataset, in place of the counted ones.
        steps: optimizer steps of a run on all datasets; ``groups="auto"`` needs it.
        options: fields of ``SplitConfig``, in place of ``config``.

    Returns:
        The split, as in split.json. ``write_manifest`` of ``merit_fast.manifests.io`` writes it.

    Raises:
        InputError: fewer than two datasets, a state of another run or of a single batch, a name
            that is no file name, datasets in ``tokens`` that are not those of the folder, or an
            option that is wrong.
    """
    if config is not None and options:
        raise InputError(f"{next(iter(options))}: goes into config, which is given")
    config = config or SplitConfig(**options)
    if config.groups == "auto" and steps is None:
        raise InputError("steps: must be given with groups auto")
    states = read_states(folder)
    _check(Path(folder), states, tokens)
    datasets = [
        _SketchedDataset(name, (), state=state, tokens=tokens[name] if tokens else None)
        for name, state in states.items()
    ]
    start = next(iter(states.values())).identity.model_fingerprint.split(": ", 1)[-1]
    return split_mixture(
        Path(folder),
        datasets,
        fingerprint({d.name: [d.num_examples, d.num_target_tokens] for d in datasets}),
        config,
        base_fingerprint=start,
        steps=steps or 0,
        sketched_at="the weights along a training run",
        texts=_no_texts,
    )


def _check(
    folder: Path, states: Mapping[str, SketchState], tokens: Mapping[str, int] | None
) -> None:
    if len(states) < 2:
        raise InputError(f"{folder}: must hold the sketches of two datasets or more")
    if tokens is not None and tokens.keys() != states.keys():
        odd = sorted(tokens.keys() ^ states.keys())
        raise InputError(f"tokens: must name the datasets of {folder}, differs in {odd[0]!r}")
    for name, state in states.items():
        if file_stem(name) != name:
            raise InputError(
                f"{folder}: a split needs dataset names of letters, digits, '.', '_', '-' and "
                f"spaces, got {name!r}"
            )
        filled = int((state.block_counts > 0).sum())
        if filled < 2 or not state.num_target_tokens:
            raise InputError(
                f"{folder}: {name}: must have two batches with target tokens or more, got "
                f"{filled} and {state.num_target_tokens} tokens"
            )


def _no_texts() -> dict[str, list[str]]:
    raise InputError("method: must read gradients: sketches hold no text to cluster")


@dataclasses.dataclass(frozen=True, eq=False)
class _SketchedDataset(Dataset):
    """A dataset whose rows stayed with the training stack; only its counts are known."""

    state: SketchState = dataclasses.field(kw_only=True)
    tokens: int | None = dataclasses.field(kw_only=True)

    @property
    def num_examples(self) -> int:
        return self.state.num_examples

    @cached_property
    def num_target_tokens(self) -> int:
        return self.state.num_target_tokens if self.tokens is None else self.tokens
