"""Opens what users name as a model: a directory of safetensors or a distributed checkpoint."""

from collections.abc import Sequence

from merit_fast.errors import InputError
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.read.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, read_checkpoint
from merit_fast.merge.read.companions import CONFIG_FILE
from merit_fast.merge.read.files import folder_of, is_weight_file, list_directory
from merit_fast.merge.read.remote import Location


def open_checkpoint(
    path: Location, subtree: str | None = None, config: Location | None = None
) -> Checkpoint:
    """The headers of a model.

    Args:
        path: a safetensors file; a directory with some; one with ``.metadata``, or that holds one
            such directory.
        subtree: where the model's tensors lie in a distributed checkpoint's state dict.
        config: the directory of config.json, where the model's own has none.

    Raises:
        InputError: see ``read_checkpoint`` and ``read_distributed``.
    """
    if is_weight_file(path):
        return read_checkpoint(path)
    present = list_directory(path)
    if not any(name.endswith(".safetensors") for name in present):
        from merit_fast.merge.read.dcp.folder import find_dcp

        folder = find_dcp(path)
        if folder is not None:
            from merit_fast.merge.read.dcp.checkpoint import read_distributed

            return read_distributed(path, folder, subtree, config)
    elif not {INDEX_FILE, SINGLE_FILE} & set(present):
        from merit_fast.merge.read.dcp.sharded import read_sharded, sharded_files

        files = sharded_files(path, present)
        if files:
            return read_sharded(path, files)
    return read_checkpoint(path)


def companions_of(models: Sequence[Checkpoint], given: Location | None) -> Location | None:
    """The directory whose config.json and tokenizer an output gets; None: the usual rule.

    It is ``given``. Where the first model is a distributed checkpoint without a config.json, it is
    the first other model that has one.

    Raises:
        InputError: ``given`` has no config.json.
    """
    if given is not None:
        if CONFIG_FILE not in list_directory(given):
            rule = f"{given}: has no {CONFIG_FILE}"
            raise OptionError(rule, "config_from", "{} must name a directory that has one")
        return given
    if not models[0].is_distributed:
        return None
    folders = [folder_of(model.path) for model in models]
    return next((each for each in folders if (each / CONFIG_FILE).exists()), folders[0])


def check_names(
    checkpoints: Sequence[Checkpoint], companions: Location, subtree: str | None
) -> None:
    """Refuses distributed checkpoints that would become no model of transformers.

    The names of their tensors must be checked by something: another checkpoint of the merge, an
    input embedding that fits config.json, or the user, who names the dict.

    Raises:
        InputError: there is no config.json, or the names do not fit it.
    """
    if not any(each.is_distributed for each in checkpoints):
        return
    from merit_fast.merge.read.dcp.checkpoint import DistributedCheckpoint
    from merit_fast.merge.read.dcp.folder import holds_model

    distributed = [each for each in checkpoints if isinstance(each, DistributedCheckpoint)]
    first = distributed[0]
    if CONFIG_FILE not in list_directory(companions):
        rule = f"{first.path}: has no {CONFIG_FILE}, nor has the folder above it"
        raise OptionError(
            rule,
            "config_from",
            "name a directory that has one by {}, or write a distributed checkpoint by form distcp",
        )
    if len(distributed) < len(checkpoints) or subtree is not None:
        return
    if not holds_model(list(first.saved.values()), companions):
        name = next(iter(first.tensors))
        raise InputError(
            f"{first.metadata.file}: {name}: the names are not those of {companions / CONFIG_FILE}"
            ": none is an input embedding of its width; write a distributed checkpoint by form "
            "distcp, or name the dict of the model's tensors by subtree"
        )
