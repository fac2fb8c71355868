"""One model divided among the processes of a branch, by FSDP2.

Each process holds some rows of every weight, gradient, master and moment. A layer is whole while it
computes, and the head and what lies outside of the layers while the model does.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from merit_fast.data import IGNORED_LABEL, Batch
from merit_fast.errors import InputError
from merit_fast.train.parallel.pieces import is_divided
from merit_fast.train.parallel.ranks import Ranks

KEY = "train.shard"


class Shards(nn.Module):
    """A divided model; a call runs a function of the model whose weights are at hand.

    FSDP2 gathers weights in hooks of modules. Those outside of the layers belong to this module, so
    the model itself has no hooks, and a loss without logits can read the head's weight.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        super().__init__()
        self.model = model
        self.ranks = ranks
        self.used: set[str] = set()  # names of parameters with a gradient since the last step

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.model, *arguments)

    def batches_of_rank(self, batches: Sequence[Batch]) -> list[Batch]:
        """This process's batches, and batches without a target until all have equally many.

        Every process must gather the same weights at the same time.
        """
        own = list(self.ranks.share(batches))
        missing = -(-len(batches) // self.ranks.size) - len(own)
        if missing:
            smallest = min(batches, key=lambda batch: batch.input_ids.numel())
            empty = replace(smallest, labels=torch.full_like(smallest.labels, IGNORED_LABEL))
            own += [empty] * missing
        return own

    def take_unused(self, names: Sequence[str]) -> list[str]:
        """Names of parameters that had no gradient in any process since the last call.

        FSDP2 gives them zeros, with which AdamW would still move and decay them.
        """
        counts = torch.tensor([name in self.used for name in names], dtype=torch.int32)
        self.ranks.add(counts)
        self.used.clear()
        return [name for name, count in zip(names, counts.tolist(), strict=True) if not count]

    def note_gradients(self, module: nn.Module, prefix: str) -> None:
        """Lets gathered parameters of a module note their gradients; FSDP2 keeps their objects."""

        def before(module: nn.Module, arguments: Any) -> None:
            parameters: Any = module.named_parameters()
            for last, parameter in parameters:
                if parameter.requires_grad and not is_divided(parameter):
                    name = (prefix + last).removeprefix("model.")
                    note = functools.partial(self._note, name)
                    parameter.register_post_accumulate_grad_hook(note)
            handle.remove()

        handle = module.register_forward_pre_hook(before)

    def _note(self, name: str, parameter: nn.Parameter) -> None:
        self.used.add(name)


def divide_model(model: nn.Module, ranks: Ranks) -> Shards:
    """Divides the parameters of a model, which may be on the device "meta"; sums their gradients.

    Args:
        model: a language model of transformers.
        ranks: the processes; at least two.

    Raises:
        InputError: see ``divided_layers``.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"mesh": init_device_mesh(kind, (ranks.size,))}
    options["reshard_after_forward"] = True
    shards = Shards(model, ranks)
    for layer in divided_layers(model):
        fully_shard(layer, **options)
    embedding = _embedding_apart(model)
    if embedding is not None:
        fully_shard(embedding, **options)
        embedding.set_unshard_in_backward(False)
    fully_shard(shards, **options)
    for name, module in shards.named_modules():
        gathering: Any = module
        if isinstance(module, FSDPModule):
            shards.note_gradients(gathering, f"{name}." if name else "")
            module.set_gradient_divide_factor(1.0)  # of this module only
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
            module.set_reduce_scatter_unused_params(True)
    return shards


def divided_layers(model: Any) -> list[nn.Module]:
    """The decoder's layers.

    Raises:
        InputError: torch is too old, the decoder has no list of layers, or two share a parameter.
    """
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise InputError(f"{KEY}: full needs torch 2.13, {torch.__version__} is installed")
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    layers = [layer for each in lists for layer in each if any(True for _ in layer.parameters())]
    if not layers:
        raise InputError(f"{KEY}: must be none, {type(model).__name__} has no list of layers")
    owners: dict[int, int] = {}
    for number, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            if owners.setdefault(id(parameter), number) != number:
                raise InputError(f"{KEY}: must be none, layers of this model share {name}")
    return layers


def _embedding_apart(model: Any) -> Any:
    """The input embedding, where no other module reads its weight."""
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or head is None:
        return None
    if any(parameter is head.weight for parameter in embedding.parameters()):
        return None
    return embedding
