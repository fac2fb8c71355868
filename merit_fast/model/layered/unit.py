"""One layer's parameters: in memory while the layer runs, a placeholder of NaN at other times."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from merit_fast.model.layered.mapped import MappedTensor, forget_pages, prefetch_pages
from merit_fast.model.layered.recipes import Recipe, Source


class Unit:
    """A layer of a model.

    Args:
        name: of the layer.
        number: its place among the layers.
        parameters: name -> parameter that is in memory only while the layer runs.
        sources: of these.
        model: for transformers' conversions.
    """

    def __init__(
        self,
        name: str,
        number: int,
        parameters: Mapping[str, nn.Parameter],
        sources: Mapping[str, Source],
        model: nn.Module,
    ) -> None:
        self.name = name
        self.number = number
        self._parameters = {n: (p, sources[n].name) for n, p in parameters.items()}
        recipes = {id(sources[name].recipe): sources[name].recipe for name in parameters}
        self._recipes: list[Recipe] = list(recipes.values())
        self._tensors: list[MappedTensor] = [t for r in self._recipes for _, t in r.tensors]
        self._model = model

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameters while the layer runs."""
        return sum(parameter.nbytes for parameter, _ in self._parameters.values())

    @torch.no_grad()
    def load(self) -> None:
        """Gives the parameters their values."""
        made: dict[str, Tensor] = {}
        for recipe in self._recipes:
            device = next(iter(self._parameters.values()))[0].device
            made.update(recipe.make(self._model, device))
        for parameter, source in self._parameters.values():
            parameter.data = made[source].view(parameter.shape)

    @torch.no_grad()
    def free(self) -> None:
        """Takes the values out of memory."""
        for parameter, _ in self._parameters.values():
            parameter.data = placeholder(parameter)
        forget_pages(self._tensors)

    def prefetch(self) -> None:
        """Lets the system begin to read the values from the disk."""
        prefetch_pages(self._tensors)


def placeholder(like: Tensor) -> Tensor:
    """NaN in a parameter's shape and dtype, in the memory of one number; writing to it fails."""
    device = like.device if like.device.type != "meta" else "cpu"
    return torch.full((), torch.nan, dtype=like.dtype, device=device).expand(like.shape)
