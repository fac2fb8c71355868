"""The layers of a model, found by its structure."""

from collections.abc import Mapping

from torch import nn


def block_lists(model: nn.Module) -> list[str]:
    """Names of the largest outermost module lists.

    They have at least half of the largest one's parameters.

    Encoder and decoder are both among them; the vision tower of a language model is not.
    """
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(
            name.startswith(f"{outer}.") for outer in sizes
        ):
            sizes[name] = sum(parameter.numel() for parameter in module.parameters())
    largest = max(sizes.values(), default=0)
    return [name for name, size in sizes.items() if largest and 2 * size >= largest]


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers by name, each once, in the order in which the model holds them."""
    layers: dict[str, nn.Module] = {}
    for path in block_lists(model):
        for name, layer in model.get_submodule(path).named_children():
            if not any(layer is other for other in layers.values()):
                layers[f"{path}.{name}"] = layer
    return layers


def parameters_of_layers(
    model: nn.Module, layers: Mapping[str, nn.Module]
) -> dict[str, dict[str, nn.Parameter]]:
    """Layer -> its parameters by their names in the model, without those that others have too.

    A parameter of two layers, or of a layer and another module, is in none.
    """
    layer_of = {id(each): name for name, layer in layers.items() for each in layer.modules()}
    owners: dict[int, set[str]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(layer_of.get(id(module), ""))
    owned: dict[str, dict[str, nn.Parameter]] = {name: {} for name in layers}
    for name, parameter in model.named_parameters():
        layer, *others = owners[id(parameter)]
        if layer and not others:
            owned[layer][name] = parameter
    return owned
