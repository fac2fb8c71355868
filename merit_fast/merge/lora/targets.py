"""Which form of an adapter holds each changed tensor of a fine-tune."""

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from merit_fast.merge.read.adapters.experts import PARAMETER_ORDER, TRANSPOSED_MODELS
from merit_fast.merge.read.adapters.tied import is_head
from merit_fast.merge.read.companions import is_embedding
from merit_fast.merge.read.entries import TensorEntry
from merit_fast.records import record

Kind = Literal["matrix", "parameter", "whole", "bias", "left out"]
# Models with layers that store [in, out] (transformers' Conv1D), and the names of those layers.
TURNED_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
TURNED_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")
_ROUTERS = ("gate", "router")


@record
class Target:
    """A changed tensor. ``transposed``: its matrices are stored as [in, out]."""

    name: str  # in memory
    kind: Kind
    transposed: bool = False

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


def targets_of(
    changed: Mapping[str, TensorEntry], everything: Mapping[str, TensorEntry], model_type: str
) -> list[Target]:
    """A target for each changed tensor, in order.

    Matrices of numbered layers become LoRA of linear layers, those of routers and stacks of experts
    LoRA of parameters. Biases of linear layers are biases. All other weights and biases make their
    module one of ``modules_to_save``; what stands in no such module is left out.

    Args:
        changed: entries of the base by name in memory.
        everything: all entries of the base.
        model_type: the base's, which tells how some layers are stored.
    """
    parents = {name.rpartition(".")[0] for name in everything}
    targets = [_target(name, entry, model_type) for name, entry in changed.items()]
    lora = {target.module for target in targets if target.kind in ("matrix", "parameter")}
    settled = []
    for target in targets:
        module = target.module
        is_bias = target.kind == "whole" and target.leaf == "bias"
        if is_bias and (module in lora or _is_linear(module, everything)):
            target = Target(target.name, "bias")
        elif target.kind == "whole" and (module in lora or _has_children(module, parents)):
            target = Target(target.name, "left out")
        settled.append(target)
    return settled


def shortest_names(modules: Collection[str], everything: Iterable[str]) -> list[str]:
    """Names by which PEFT finds exactly these modules: last parts where all others agree.

    Args:
        modules: full names.
        everything: names of all tensors.
    """
    parents = {name.rpartition(".")[0] for name in everything}
    others = {module.rpartition(".")[2] for module in parents - set(modules)}
    names = []
    for module in modules:
        leaf = module.rpartition(".")[2]
        names.append(module if leaf in others or leaf.isdecimal() else leaf)
    return sorted(set(names))


def _target(name: str, entry: TensorEntry, model_type: str) -> Target:
    module, _, leaf = name.rpartition(".")
    words = module.split(".")
    in_layer = any(word.isdecimal() for word in words)
    dims = len(entry.shape)
    if leaf in PARAMETER_ORDER and in_layer and dims in (2, 3):
        return Target(name, "parameter", dims == 3 and model_type in TRANSPOSED_MODELS)
    if dims == 2 and leaf == "weight" and in_layer and not _is_table(name):
        is_router = words[-1] in _ROUTERS
        turned = model_type in TURNED_MODELS and words[-1] in TURNED_LAYERS
        return Target(name, "parameter" if is_router else "matrix", turned)
    return Target(name, "whole" if leaf in ("weight", "bias") else "left out")


def _is_table(name: str) -> bool:
    """Whether a matrix is an embedding or a head, by its name."""
    words = name.split(".")
    return is_embedding(name) or is_head(name) or any("emb" in word for word in words)


def _is_linear(module: str, everything: Mapping[str, TensorEntry]) -> bool:
    """Whether a bias belongs to a matrix, which stays as it is."""
    weight = everything.get(f"{module}.weight")
    return weight is not None and len(weight.shape) == 2


def _has_children(module: str, parents: Collection[str]) -> bool:
    return any(parent.startswith(f"{module}.") for parent in parents)
