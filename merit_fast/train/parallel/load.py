"""Loads a divided model: each process reads its own rows of every weight from the files."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from merit_fast.errors import InputError
from merit_fast.model import (
    DTYPES,
    auto_class,
    is_adapter,
    reads_images,
    settle_dtype,
    weight_files,
)
from merit_fast.model.dtype import Dtype
from merit_fast.model.meta import parameters_on_meta
from merit_fast.train.parallel.files import fill_tensor
from merit_fast.train.parallel.pieces import own_part
from merit_fast.train.parallel.ranks import Ranks
from merit_fast.train.parallel.shards import KEY, divided_layers
from merit_fast.train.parallel.stored import Run, stored_runs

# Buffers that older files hold and newer models compute.
_COMPUTED = (".inv_freq", "position_ids")


def make_hollow_model(path: str, dtype: Dtype) -> Any:
    """The model of a folder with parameters on the device "meta" and real buffers.

    Raises:
        InputError: a weight of the model has no tensor of its name and shape in the files, or the
            reverse; the files are quantised, or an adapter's; the model reads images; see
            ``divided_layers``.
    """
    from transformers import AutoConfig, GenerationConfig

    if is_adapter(Path(path)):
        raise InputError(f"{KEY}: must be none for a start that is an adapter, got {path}")
    config = AutoConfig.from_pretrained(path)
    if reads_images(config):
        raise InputError(f"{KEY}: must be none for a model that reads images, as that of {path}")
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{KEY}: must be none for quantised weights, as those of {path}")
    kind = getattr(torch, DTYPES[settle_dtype(dtype)])
    with parameters_on_meta():
        model = auto_class(config).from_config(config, dtype=kind)
    if (Path(path) / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    _check_dtypes(model, kind)
    divided_layers(model)
    _choose_conversions(model, stored_names(Path(path)), path)
    return model.eval()


def stored_names(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a checkpoint.

    Raises:
        InputError: it has no safetensors files.
    """
    names: dict[str, Path] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            names |= dict.fromkeys(opened.keys(), file)
    return names


def fill_model(model: nn.Module, path: str, ranks: Ranks) -> None:
    """Gives a divided model on "meta" its weights, by rows of the files.

    Raises:
        InputError: a tensor does not fit, or two copies of a tied weight differ.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = stored_names(Path(path))
    with contextlib.ExitStack() as stack:
        opened = {
            file: stack.enter_context(safe_open(file, framework="pt")) for file in {*files.values()}
        }

        runs = _runs_of_parameters(model)

        def fill(name: str, tensor: Tensor) -> None:
            for stored, run in runs.get(name, {name: None}).items():
                part = run if run is not None and run.shape != tensor.shape else None
                fill_tensor(opened[files[stored]], stored, tensor, ranks, files[stored], part)

        for names in _names_of_parameters(model).values():
            parameter = _on_device(model.get_parameter(names[0]), device)
            first, *copies = [name for name in names if runs[name].keys() <= files.keys()]
            fill(first, parameter)
            for copy in copies:
                other = _on_device(parameter, device)
                fill(copy, other)
                _check_equal(first, copy, parameter, other, ranks)
            for name in names:
                owner, _, last = name.rpartition(".")
                setattr(model.get_submodule(owner), last, parameter)
        for name, buffer in _stored_buffers(model, files).items():
            fill(name, buffer)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def load_divided_model(path: str, dtype: Dtype, ranks: Ranks, key: str) -> Any:
    """A model that FSDP2 divides layer by layer, to be called as any other.

    Args:
        key: option that asks for it, for errors.

    Raises:
        InputError: as ``make_hollow_model`` and ``fill_model``, under ``key``.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(kind, (ranks.size,))
    with _errors_of(key):
        model = make_hollow_model(path, dtype)
        for layer in divided_layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        fill_model(model, path, ranks)
    return model


def check_divisible(path: str, dtype: Dtype, key: str) -> None:
    """Checks what can be checked of ``load_divided_model`` by one process."""
    with _errors_of(key):
        make_hollow_model(path, dtype)


@contextlib.contextmanager
def _errors_of(key: str) -> Iterator[None]:
    """Lets errors name another option than ``train.shard``."""
    try:
        yield
    except InputError as error:
        words = str(error).replace(f"{KEY}: must be none", f"{key}: must not be divided")
        raise InputError(words.replace(f"{KEY}: full", f"{key}: divided")) from None


def _check_dtypes(model: Any, dtype: torch.dtype) -> None:
    """Refuses weights that transformers loads in float32 next to others in bfloat16."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None)
    other = next((name for name, p in model.named_parameters() if p.dtype != dtype), None)
    if other is not None or (kept and dtype != torch.float32):
        name = other or sorted(kept or ())[0]
        raise InputError(
            f"{KEY}: must be none or train.dtype fp32, this model keeps {name} in fp32"
        )


def _choose_conversions(model: Any, files: Mapping[str, Path], path: str) -> None:
    """Notes in the model how its names and those of the files go together.

    Either they are the same, or the files have those under which transformers writes the model:
    experts one by one, for example.

    Raises:
        InputError: they are neither.
    """
    model._weight_conversions = []  # of transformers: the model is written as it is
    try:
        _check_names(model, files, path)
    except InputError:
        del model._weight_conversions  # it is written by the conversions of its kind
        _check_names(model, files, path)


def _check_names(model: nn.Module, files: Mapping[str, Path], path: str) -> None:
    """Checks that the files hold every run of every parameter, and nothing else."""
    runs = _runs_of_parameters(model)
    known: set[str] = set()
    for names in _names_of_parameters(model).values():
        for name in names:
            known |= runs[name].keys()
        if not any(runs[name].keys() <= files.keys() for name in names):
            missing = next(stored for stored in runs[names[0]] if stored not in files)
            raise InputError(
                f"{KEY}: must be none, transformers converts the files of {path} for this model, "
                f"which have no {missing}"
            )
    known |= _stored_buffers(model, files).keys()
    ignored = re.compile("|".join(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []))
    for name in files.keys() - known:
        if name.endswith(_COMPUTED) or (ignored.pattern and ignored.search(name)):
            continue
        raise InputError(f"{KEY}: must be none, no weight of this model reads {name} of {path}")


def _runs_of_parameters(model: nn.Module) -> dict[str, dict[str, Run]]:
    """Parameter -> the stored tensors that hold it."""
    runs: dict[str, dict[str, Run]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for stored, run in stored_runs(model, parameters).items():
        runs.setdefault(run.name, {})[stored] = run
    return runs


def _names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter; a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _stored_buffers(model: nn.Module, files: Mapping[str, Path]) -> dict[str, Tensor]:
    kept = model.state_dict().keys()
    return {name: b for name, b in model.named_buffers() if name in kept and name in files}


def _on_device(parameter: Any, device: torch.device) -> nn.Parameter:
    """A parameter without values on a device, divided as the given one."""
    part = torch.empty_like(own_part(parameter), device=device)
    divided: Any = DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(divided, parameter.requires_grad)


def _check_equal(first: str, copy: str, one: Tensor, other: Tensor, ranks: Ranks) -> None:
    differs = torch.tensor([int(not torch.equal(own_part(one), own_part(other)))])
    ranks.add(differs)
    if differs.item():
        raise InputError(
            f"{KEY}: must be none, the model ties {first} and {copy}, whose stored values differ"
        )
