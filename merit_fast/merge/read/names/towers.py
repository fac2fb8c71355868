"""The towers of a multimodal or sequence-to-sequence model, under the names that mergekit gives.

text_decoder            the language model and its output head
vision_tower            the vision model without its projector (vision_model where that is its
                        name in memory, as in Llama 4); audio_tower likewise
multi_modal_projector   everything else of a multimodal model
encoder, decoder        of a sequence-to-sequence model; ``shared`` is everything else
default                 the whole of any other model
"""

from collections.abc import Mapping

from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.names.model_class import ModelClass
from merit_fast.merge.read.names.modules import ModuleNames
from merit_fast.records import record, replace

TEXT = "text_decoder"
_PROJECTOR = "multi_modal_projector"
_SHARED = "shared"
_WHOLE = "default"
# Parts of a vision model in memory that lead from it to the language model.
_PROJECTORS = ("merger", "deepstack_merger_list", "merger_list")
_TOWERS = {"vision_config": "vision_tower", "audio_config": "audio_tower"}
_HEAD = "lm_head."


def towers_of(names: ModuleNames) -> dict[str, str]:
    """The tower of every tensor in a model's file."""
    return {
        name: _tower(names.kind, names.parameters_of(name)[0]) for name in names.checkpoint.tensors
    }


@record
class Tower:
    """One tower of a model. ``towers``: that of every tensor in the file of ``donor``."""

    name: str
    donor: Checkpoint
    towers: Mapping[str, str]

    def of(self, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint in the donor's names, without the tensors of other towers."""
        tensors = {
            name: entry
            for name, entry in checkpoint.tensors.items()
            if self.towers.get(name, self.name) == self.name
        }
        shards = (
            (file, tuple(name for name in held if name in tensors))
            for file, held in checkpoint.shards
        )
        return replace(
            checkpoint, tensors=tensors, shards=tuple(shard for shard in shards if shard[1])
        )


def _tower(kind: ModelClass, module: str) -> str:
    """The tower of a parameter by its name in memory."""
    if kind.text_path is not None:
        return _modality(kind, module)
    parts = module.split(".")
    halves = {"encoder", "decoder"} & (kind.roots | kind.inner_roots)
    if len(halves) < 2:
        return _WHOLE
    first = parts[1] if parts[0] == kind.prefix and len(parts) > 1 else parts[0]
    return first if first in halves else _SHARED


def _modality(kind: ModelClass, module: str) -> str:
    if module.startswith((f"{kind.text_path}.", _HEAD)):
        return TEXT
    for submodel in kind.submodels:
        tower = _TOWERS.get(submodel.section)
        if tower is None or not module.startswith(f"{submodel.path}."):
            continue
        inner = module.removeprefix(f"{submodel.path}.").partition(".")[0]
        own_name = submodel.path.rpartition(".")[2]
        tower = own_name if own_name == "vision_model" else tower
        return _PROJECTOR if inner in _PROJECTORS else tower
    return _PROJECTOR
