"""The names that a merge's output has, and the model that gives its config.json."""

from collections.abc import Sequence

from merit_fast.merge.read.adapters.folder import is_adapter
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.files import folder_of
from merit_fast.merge.read.names.heads import match_heads
from merit_fast.merge.read.names.matching import match_names
from merit_fast.merge.read.remote import Location


def in_common_names(
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    companions: Location | None,
    donor: Checkpoint | None = None,
) -> tuple[list[Checkpoint], Location]:
    """All models in the names of the base, or of the first one that is no adapter.

    Args:
        models: of the merge, the base last.
        base: one of them, or None.
        companions: the directory that gives config and tokenizer. None: the first model that is no
            adapter; the base where that one is only the language model inside the base.
        donor: the model whose names count, if it is no other one.

    Returns:
        the models in their order, and ``companions``.

    Raises:
        InputError: see ``match_names`` and ``match_heads``.
    """
    first = next((model for model in models if not is_adapter(model.path)), models[0])
    donor = donor or base or first
    matched = match_names(donor, models)
    if companions is None:
        is_part = first is not donor and _is_part(first, donor)
        companions = folder_of(donor.path if is_part else first.path)
    giver = next((model for model in matched if folder_of(model.path) == companions), donor)
    return match_heads(giver, matched), companions


def _is_part(text: Checkpoint, whole: Checkpoint) -> bool:
    if text.tensors.keys() == whole.tensors.keys():
        return False
    from merit_fast.merge.read.names.model_class import is_language_model_of, model_class

    return is_language_model_of(model_class(text.path), model_class(whole.path))
