"""The base model before it is loaded: its kind, its size, and the kernels that it gets."""

from collections.abc import Sequence
from pathlib import Path

from merit_fast.data import Dataset
from merit_fast.errors import InputError, show
from merit_fast.kernels import dispatch
from merit_fast.manifests.stages import MERGE, SKETCH, TRAIN, Stage
from merit_fast.merge.read.checkpoint import read_checkpoint
from merit_fast.merge.read.entries import is_float
from merit_fast.merge.read.files import read_json
from merit_fast.pipeline.config import RunConfig
from merit_fast.split.config import SplitConfig
from merit_fast.train.config import TrainConfig
from merit_fast.train.parallel.world import world_size

# Ops of each stage that have no way around them.
_OPS = {
    SKETCH.name: ("flat_sketch", "linear_grad_sketch"),
    TRAIN.name: ("adamw",),
    MERGE.name: ("merge_files",),
}


def num_parameters(base: Path) -> int:
    """Number of the base's parameters, from the headers of its files."""
    tensors = read_checkpoint(base).tensors.values()
    return sum(entry.num_elements for entry in tensors if is_float(entry))


def num_trained_parameters(base: Path, train: TrainConfig) -> int:
    """Number of parameters that training changes: the base's, or those of an adapter.

    Raises:
        InputError: an expression of ``train.freeze`` matches no parameter, or all are frozen; see
            ``check_adapter``.
    """
    from merit_fast.model import freeze_parameters, make_empty_model

    freeze = train.freeze
    if train.adapter.is_on:
        from merit_fast.train.adapter.build import check_adapter

        return check_adapter(base, train.adapter, freeze)
    if freeze is None and read_json(base / "config.json").get("vision_config") is None:
        return num_parameters(base)
    model = make_empty_model(str(base))
    freeze_parameters(model, freeze)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def check_parts(base: Path, split: SplitConfig, freeze: Sequence[str] | None) -> None:
    """Checks that ``split.parts`` name disjoint sets of the sketched parameters.

    Raises:
        InputError: a part matches no parameter, or two match the same one.
    """
    if not split.parts:
        return
    from merit_fast.model import freeze_parameters, make_empty_model
    from merit_fast.sketch.passes.parts import assign_parts
    from merit_fast.sketch.selection import select_parameters

    model = make_empty_model(str(base))
    freeze_parameters(model, freeze)
    try:
        assign_parts(split.parts, select_parameters(model, split.parameters))
    except InputError as error:
        raise InputError(f"split.{error}") from None


def check_memory(base: Path, split: SplitConfig) -> None:
    """Checks that a base can be read layer by layer, or divided, if ``split.memory`` wants that.

    Raises:
        InputError: it has quantised weights, or no safetensors files; see ``load_divided_model``.
    """
    if split.memory == "divided" and world_size() > 1:
        from merit_fast.train.parallel.load import check_divisible

        check_divisible(str(base), split.dtype, "split.memory")
    if split.memory != "layers":
        return
    from merit_fast.model import weight_files

    weight_files(base)
    if read_json(base / "config.json").get("quantization_config") is not None:
        raise InputError(
            "split.memory: must be auto or whole for quantised weights, got layers: "
            f"{base / 'config.json'} has a quantization_config"
        )


def check_architecture(base: Path) -> str:
    """The base's ``model_type``, checked to be a causal language model of transformers.

    Raises:
        InputError: the installed transformers cannot load it as one.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    file = base / "config.json"
    values = read_json(file)
    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{file}: model_type: must be one that the installed transformers knows, "
            f"got {show(model_type)}"
        )
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    if values.get("vision_config") is not None:
        known.update(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    if model_type not in known:
        architectures = values.get("architectures")
        raise InputError(
            f"{file}: model_type: must be a causal language model, got {show(model_type)} "
            f"(architectures: {show(architectures)})"
        )
    return str(model_type)


def check_kernels(stages: tuple[Stage, ...]) -> None:
    """Checks that the backend somebody asked for can run.

    Raises:
        InputError: MERIT_FAST_BACKEND names a backend that cannot run an op of these stages here.
    """
    import torch

    asked = dispatch.asked(None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for stage in stages if asked else ():
        for op in _OPS.get(stage.name, ()):
            where = "cpu" if stage == MERGE else device
            reason = dispatch.unavailable(op, asked or "", where)
            if reason:
                raise InputError(f"MERIT_FAST_BACKEND: {asked!r} cannot run {op} here: {reason}")


def check_packing(base: Path, config: RunConfig, datasets: Sequence[Dataset]) -> None:
    """Checks that examples may be packed, and do not see each other in this model; loads it once.

    Raises:
        InputError: they do, or a row holds images.
    """
    from merit_fast.model import load_model
    from merit_fast.train.loss import choose_attention, require_packing, require_text

    require_text(datasets)
    model = load_model(str(base), config.train.dtype)
    choose_attention(model)
    require_packing(model, datasets[0].examples[:2])
