"""The folder of a distributed checkpoint, and the part of its state dict that is the model."""

import math
import re
from collections.abc import Mapping, Sequence

from merit_fast.errors import InputError
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.read.companions import CONFIG_FILE, is_embedding
from merit_fast.merge.read.dcp.metadata import METADATA_FILE, Metadata, Place, SavedTensor
from merit_fast.merge.read.files import is_directory, list_directory, quote, read_json
from merit_fast.merge.read.remote import Location

# Keys under which trainers keep what is no weight. "optimizer_0", "optim_state" count too.
_NO_MODEL = re.compile(
    r"(optim|optimizers?|optimizer_states?|lr_schedulers?|schedulers?|lr_scheduler_states?|"
    r"dataloaders?|dataset|train_state|trainer|rng|rng_states?|random_states?|scaler|"
    r"grad_scaler|callbacks|loops|progress|timestamp|metrics|args|hparams|extra)(_?\d+|_state.*)?",
    re.IGNORECASE,
)
_MOST_SHOWN = 6


def find_dcp(path: Location) -> Location | None:
    """The folder with ``.metadata``: ``path``, or the only one below it that holds a model.

    Raises:
        InputError: several folders below hold models.
    """
    if (path / METADATA_FILE).exists():
        return path
    below = [path / name for name in list_directory(path) if is_directory(path / name)]
    found = [folder for folder in below if (folder / METADATA_FILE).exists()]
    models = [folder for folder in found if not _NO_MODEL.fullmatch(folder.name)]
    if len(models) > 1:
        names = _listed([folder.name for folder in models])
        raise InputError(f"{path}: holds {len(models)} distributed checkpoints; name one: {names}")
    return models[0] if models else None


def choose_subtree(metadata: Metadata, wanted: str | None, config: Location | None) -> Place:
    """The keys that lead to the dict of the model's tensors; it may be nested further.

    A checkpoint holds a nested dict such as ``{"model": {...}, "optimizer": {...}}``. What belongs
    to an optimizer, a scheduler, a data loader or a trainer is no choice, nor is a dict of
    single numbers.

    Args:
        wanted: keys joined by dots, "" for the outermost dict; None: the only dict that is left,
            or the only one whose names and shapes fit config.json.
        config: the folder of config.json.

    Raises:
        InputError: none fits, or several do; lists the choices.
    """
    places = [tensor.place for tensor in metadata.tensors.values()]
    if wanted is not None:
        match = {p[:n] for p in places for n in range(len(p)) if _text(p[:n]) == wanted}
        if match:
            return match.pop()
        raise _choose(metadata, _groups(metadata, places), f"has no dict {quote(wanted)}")
    groups = _groups(metadata, [p for p in places if not is_no_model(p)])
    if len(groups) > 1:
        fitting = {key: group for key, group in groups.items() if holds_model(group, config)}
        groups = fitting or groups
    if len(groups) == 1:
        return next(iter(groups))
    rule = "holds more than one dict of tensors" if groups else "holds no dict of a model"
    raise _choose(metadata, groups or _groups(metadata, places), rule)


def is_no_model(place: Place) -> bool:
    """Whether a tensor belongs to an optimizer and the like, by its keys."""
    *keys, name = place
    if any(_NO_MODEL.fullmatch(str(key)) for key in keys):
        return True
    return not keys and _NO_MODEL.fullmatch(str(name).partition(".")[0]) is not None


def _groups(metadata: Metadata, places: Sequence[Place]) -> dict[Place, list[SavedTensor]]:
    """Tensors by the outermost dict that holds them, less dicts of single numbers."""
    wanted = set(places)
    by_key: dict[Place, list[SavedTensor]] = {}
    for tensor in metadata.tensors.values():
        if tensor.place in wanted:
            by_key.setdefault(tensor.place[: min(1, len(tensor.place) - 1)], []).append(tensor)
    return {
        _common([tensor.place[:-1] for tensor in group]): group
        for group in by_key.values()
        if any(math.prod(tensor.shape) != 1 for tensor in group)
    }


def _common(places: Sequence[Place]) -> Place:
    """The keys with which all places begin."""
    common = places[0]
    for place in places[1:]:
        count = 0
        while count < min(len(common), len(place)) and common[count] == place[count]:
            count += 1
        common = common[:count]
    return common


def holds_model(tensors: Sequence[SavedTensor], config: Location | None) -> bool:
    """Whether tensors hold an input embedding, as wide as config.json has it."""
    widths = _widths(config)
    return any(
        is_embedding(_text(tensor.place))
        and len(tensor.shape) == 2
        and (not widths or tensor.shape[1] in widths)
        for tensor in tensors
    )


def _widths(config: Location | None) -> set[int]:
    if config is None or not (config / CONFIG_FILE).exists():
        return set()
    values = read_json(config / CONFIG_FILE)
    configs = [values, *(value for value in values.values() if isinstance(value, dict))]
    found = (each.get(key) for each in configs for key in ("hidden_size", "n_embd", "d_model"))
    return {width for width in found if type(width) is int}


def _choose(
    metadata: Metadata, choices: Mapping[Place, Sequence[SavedTensor]], rule: str
) -> OptionError:
    texts = [f"{_text(place) or '(outermost)'} ({len(choices[place])})" for place in choices]
    listed = f"tensors lie in {_listed(texts)}" if texts else "it holds no tensor"
    return OptionError(f"{metadata.file}: {rule}; {listed}", "subtree", "name one by {}")


def _text(place: Place) -> str:
    return ".".join(map(str, place))


def _listed(texts: Sequence[str]) -> str:
    shown = ", ".join(quote(text)[1:-1] for text in texts[:_MOST_SHOWN])
    more = len(texts) - _MOST_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
