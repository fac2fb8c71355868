"""Loads a model of which one layer at a time is in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from merit_fast.errors import InputError, MeritFastError, one_line
from merit_fast.model.adapters import is_adapter
from merit_fast.model.dtype import DTYPES, Dtype, settle_dtype
from merit_fast.model.files import resolve_model, weight_files
from merit_fast.model.layered.mapped import map_tensors_of
from merit_fast.model.layered.recipes import Source, sources_of
from merit_fast.model.layered.stack import layers_of, parameters_of_layers
from merit_fast.model.layered.stream import LayerStream, stream_layer
from merit_fast.model.layered.unit import Unit, placeholder
from merit_fast.model.load import auto_class
from merit_fast.model.meta import parameters_on_meta


def load_layered(path: str | Path, dtype: Dtype = "auto") -> nn.Module:
    """Loads a causal language model whose layers stay in its files.

        model = merit_fast.load_layered("BASE")
        with merit_fast.sketch_gradients(model) as sketcher: ...

    A layer's parameters are in memory while it runs, forward or backward, and NaN at other times;
    embeddings, head and whatever is no layer stay there. The forward pass keeps each layer's
    arguments only, and the backward pass runs the layer again, with the same random numbers. So one
    batch reads every layer twice, values and gradients have the bytes of the model in memory, and a
    model may be larger than memory. The layers are the model's largest lists of modules.

    The model can be run and sketched, but not trained, moved or saved: its parameters cannot be
    written to. Call it with ``use_cache=False``, which its config says already.

    Args:
        path: directory or hub id of a model in safetensors files.
        dtype: "bf16", "fp32", or "auto": bf16 where this machine multiplies it fast. Tensors of
            another dtype are converted whenever their layer is read.

    Returns:
        The model in evaluation mode, on the GPU if there is one.

    Raises:
        InputError: the path holds no such model, an adapter or quantised weights; or a parameter
            has no tensor in the files, or one of another shape.
        MeritFastError: later, where a layer computes something else when it runs again.
    """
    folder = _checked_folder(Path(path))
    model = _empty_model(folder, getattr(torch, DTYPES[settle_dtype(dtype)]))
    tensors = map_tensors_of(weight_files(folder))
    sources = sources_of(model, tensors, getattr(torch, DTYPES[settle_dtype(dtype)]))
    layers = layers_of(model)
    if not layers:
        raise InputError(
            f"{folder}: must have layers in a list of modules, has none; memory: whole"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _fill(model, sources, layers, device)
    owned = parameters_of_layers(model, layers)
    units = [Unit(name, i, owned[name], sources, model) for i, name in enumerate(layers)]
    stream = LayerStream(units)
    for unit in units:
        stream_layer(layers[unit.name], stream, unit)
    model.register_state_dict_pre_hook(_refuse_state)
    loaded: nn.Module = model.eval()
    return loaded


def _checked_folder(path: Path) -> Path:
    if is_adapter(path):
        raise InputError(f"{path}: is an adapter; only a whole model can be read layer by layer")
    return resolve_model(str(path))


def _empty_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model with buffers and without the values of parameters, which are on the meta device."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None) is not None:
            raise InputError(
                f"{folder}: quantization_config: must be absent where layers are read one by one"
            )
        with parameters_on_meta():
            model = auto_class(config).from_config(config, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder}: is not a causal language model that transformers can load: "
            f"{one_line(error)}"
        ) from None
    for each in (model.config, model.config.get_text_config()):
        each.use_cache = False
    return model


def _fill(
    model: nn.Module,
    sources: Mapping[str, Source],
    layers: Mapping[str, nn.Module],
    device: torch.device,
) -> None:
    """Gives what is no layer's its values, and layers' parameters their placeholders."""
    of_layers = {n for owned in parameters_of_layers(model, layers).values() for n in owned}
    values: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        source = sources[name]
        if name in of_layers and parameter.is_floating_point():
            value = placeholder(parameter.to(source.recipe.dtype)).to(device)
        else:
            value = source.recipe.make(model, device)[source.name]
        # As transformers does for what it loads, also where the model's class had frozen it.
        values[id(parameter)] = nn.Parameter(value, value.is_floating_point())
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for local, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[local] = values[id(parameter)]
        for local, buffer in module._buffers.items():
            if buffer is None:
                continue
            saved = sources.get(prefix + local)
            if saved is None:
                module._buffers[local] = buffer.to(device)
            else:
                module._buffers[local] = saved.recipe.make(model, device)[saved.name]


def _refuse_state(*_: Any) -> NoReturn:
    raise MeritFastError(
        "load_layered: the model's weights are in its files, not in memory; load it with "
        "from_pretrained to save it"
    )
