"""Writes the mixture of experts of a recipe, streamed from the dense models' files."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from merit_fast.errors import InputError
from merit_fast.integrations.mergekit.document import Reference
from merit_fast.integrations.mergekit.moe.dense import Dense, model_types, number_in, read_models
from merit_fast.integrations.mergekit.moe.document import Expert, MoeDocument, seed_of
from merit_fast.integrations.mergekit.moe.routers import side_tensors
from merit_fast.integrations.mergekit.moe.shapes import (
    PARTS,
    RESIDUAL,
    Shape,
    choose_shape,
    mixture_config,
)
from merit_fast.kernels.average.dtypes import DTYPES, SHORT_NAMES, SPELLINGS
from merit_fast.manifests.atomic import write_bytes
from merit_fast.merge import MergeConfig
from merit_fast.merge.combine.combination import combine
from merit_fast.merge.engine.layout import lay_out
from merit_fast.merge.engine.memory import fit_memory
from merit_fast.merge.engine.prepare import Inputs
from merit_fast.merge.parameters import Case
from merit_fast.merge.prepared import PreparedMerge
from merit_fast.merge.read.checkpoint import Checkpoint, read_files
from merit_fast.merge.read.companions import CONFIG_FILE, list_companions
from merit_fast.merge.read.entries import TensorEntry, is_quantised
from merit_fast.merge.read.remote import as_location
from merit_fast.merge.sizes import parse_bytes
from merit_fast.merge.table import METHODS
from merit_fast.merge.write.places import check_paths
from merit_fast.options.parser import override, parse
from merit_fast.progress import Progress

RECIPE_FILE = "mergekit_moe_config.json"
_ROUTERS = "routers.safetensors"
_COPY = METHODS["passthrough"].name


def merge_experts(
    document: MoeDocument,
    out: str,
    progress: Progress,
    assignments: Sequence[str] = (),
    *,
    dry_run: bool = False,
    share: tuple[int, int] = (1, 1),
) -> dict[str, Any]:
    """Writes the mixture into the directory ``out``.

    Every tensor outside the MLPs is the base's, every expert's MLP that of its model (times
    ``residual_scale`` on the way out). Names are those of the hub's checkpoints.

    Args:
        assignments: ``seed=N`` of random routers, and ``key=value`` of MergeConfig's options of
            output and engine.
        dry_run, share: as in ``merge_models``.

    Returns:
        The summary of ``merge_models``.

    Raises:
        InputError: a model is absent, does not fit the others or the mixture, or lacks a tensor.
    """
    seed, others = seed_of(assignments, document.where)
    models = read_models(document)
    base = models[document.base]
    shape = choose_shape(document, model_types(document, models))
    paths = [model.path for model in models.values()]
    target = as_location(out)
    if not isinstance(target, Path):
        raise InputError(f"{out}: a mixture of experts needs a local OUT")
    check_paths(paths, target)
    side = side_tensors(document, models, shape, None if dry_run else seed, progress)
    with _kept_file(target, save(side), dry_run) as file:
        routers = read_files(file.parent, [file.name]).tensors
        tensors, scales = _tensors(document, models, shape, routers, progress)
        config = _config(document, base, scales, others)
        inputs = _inputs(base, tensors, config)
        config = replace(config, chunk_kib=fit_memory(inputs, config))
        records = _records(document, models, shape, inputs, seed)
        weights = (1.0,) * len(paths)
        merge = PreparedMerge(tuple(paths), weights, base.path, config, inputs, ())
        summary = merge.summary(target) | {
            "method": f"{shape.title} mixture of experts",
            "weights_reason": "none: tensors are copied",
        }
        if dry_run:
            return summary
        finished = merge.write(target, progress, share, records)
    if finished:
        shutil.rmtree(file.parent, ignore_errors=True)
    return summary | {"finished": finished}


@contextmanager
def _kept_file(out: Path, content: bytes, dry_run: bool) -> Iterator[Path]:
    """A file of the routers next to ``out``: one name, so that a killed merge resumes.

    It stays until the output is finished, unless the merge is refused. A dry run has a temporary
    one.
    """
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="merit_fast_moe_") as folder:
            file = Path(folder) / _ROUTERS
            file.write_bytes(content)
            yield file
        return
    file = out.with_name(f".{out.name}.routers") / _ROUTERS
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_bytes() != content:
        write_bytes(file, content)
    try:
        yield file
    except InputError:
        shutil.rmtree(file.parent, ignore_errors=True)
        raise


def _tensors(
    document: MoeDocument,
    models: Mapping[Reference, Dense],
    shape: Shape,
    routers: Mapping[str, TensorEntry],
    progress: Progress,
) -> tuple[dict[str, TensorEntry], dict[str, float]]:
    """Every tensor of the mixture by its name, and factors other than 1 by name."""
    base = models[document.base]
    tensors = _outside_mlps(base, shape, progress)
    scales: dict[str, float] = {}
    for layer in range(number_in(base, "num_hidden_layers")):
        for part in PARTS:
            for number, expert in enumerate(document.experts):
                name = shape.expert(layer, number, part)
                tensors[name] = _part_of(document, models, expert, layer, part)
                _add_scale(scales, name, expert, part)
            for expert in document.shared:
                name = shape.shared_expert(layer, part)
                tensors[name] = _part_of(document, models, expert, layer, part)
                _add_scale(scales, name, expert, part)
    tensors |= routers
    return {name: replace(entry, name=name) for name, entry in tensors.items()}, scales


def _add_scale(scales: dict[str, float], name: str, expert: Expert, part: str) -> None:
    if part == RESIDUAL and expert.residual_scale != 1.0:
        scales[name] = expert.residual_scale


def _outside_mlps(base: Dense, shape: Shape, progress: Progress) -> dict[str, TensorEntry]:
    tensors = {}
    left_out = []
    for name, entry in base.checkpoint.tensors.items():
        if shape.takes(name):
            tensors[name] = entry
        elif name.endswith("rotary_emb.inv_freq"):
            left_out.append(name)
        elif not _is_part(name):
            rule = f"has no place in a {shape.title} model"
            raise InputError(f"{entry.file}: {name}: {rule}")
    if left_out:
        progress.note(f"{base.path}: left out: {left_out[0]} and {len(left_out) - 1} like it")
    return tensors


def _is_part(name: str) -> bool:
    return any(name.endswith(f".mlp.{part}.weight") for part in PARTS)


def _part_of(
    document: MoeDocument,
    models: Mapping[Reference, Dense],
    expert: Expert,
    layer: int,
    part: str,
) -> TensorEntry:
    name = f"model.layers.{layer}.mlp.{part}.weight"
    base = models[document.base]
    model = models[expert.source]
    entry = model.checkpoint.tensors.get(name)
    if entry is None:
        raise document.error(f"{expert.key}.source_model", f"{model.path}: {name}: is missing")
    wide = (number_in(base, "intermediate_size"), number_in(base, "hidden_size"))
    wanted = wide[::-1] if part == RESIDUAL else wide
    if entry.shape != wanted:
        rule = f"must be of shape {list(wanted)} as in {base.path}, got {list(entry.shape)}"
        raise document.error(f"{expert.key}.source_model", f"{entry.file}: {name}: {rule}")
    return entry


def _config(
    document: MoeDocument, base: Dense, scales: Mapping[str, float], assignments: Sequence[str]
) -> MergeConfig:
    values: dict[str, Any] = {"method": _COPY, "shard_size": "5G"}
    own = base.config.get("dtype", base.config.get("torch_dtype"))
    dtype = document.dtype or (SPELLINGS.get(own) if isinstance(own, str) else None)
    chosen = override({}, assignments)
    for key in chosen:
        if key in ("method", "scale", "models", "weights"):
            raise InputError(f"command line: {key}: is set by the recipe {document.where}")
    values |= {"dtype": dtype} | chosen
    config = parse(MergeConfig, values, f"{document.where} with command line")
    cases = [Case(scale, name) for name, scale in scales.items()]
    return replace(config, scale=(*cases, Case(1.0)) if cases else 1.0)


def _inputs(base: Dense, tensors: Mapping[str, TensorEntry], config: MergeConfig) -> Inputs:
    mixture = Checkpoint(base.path, tensors, (("model.safetensors", tuple(tensors)),))
    combination = combine([base.path], [1.0], None, config, tensors)
    shard_bytes = parse_bytes("shard_size", config.shard_size) if config.shard_size else None
    dtype = SHORT_NAMES[config.dtype] if config.dtype else None
    files = lay_out([mixture], None, dtype, shard_bytes=shard_bytes)
    list_companions(base.path)
    decoded = any(map(is_quantised, tensors.values()))
    return Inputs(combination, (mixture,), files, base.path, decoded, (base.path,), "", ())


def _records(
    document: MoeDocument,
    models: Mapping[Reference, Dense],
    shape: Shape,
    inputs: Inputs,
    seed: int,
) -> dict[str, str]:
    """config.json, and the recipe with its models."""
    base = models[document.base]
    common = inputs.dtypes.split(", ")[0]
    dtype = DTYPES[SHORT_NAMES[common]].torch_name
    config = mixture_config(shape, base.config, document, dtype)
    facts = {
        "base_model": str(base.path),
        "gate_mode": document.gate_mode,
        "seed": seed if document.is_drawn else None,
        "experts_per_token": document.experts_per_token,
        "experts": [_facts(expert, models) for expert in document.experts],
        "shared_experts": [_facts(expert, models) for expert in document.shared],
    }
    return {
        CONFIG_FILE: json.dumps(config, indent=2) + "\n",
        RECIPE_FILE: json.dumps(facts, indent=2, ensure_ascii=False) + "\n",
    }


def _facts(expert: Expert, models: Mapping[Reference, Dense]) -> dict[str, Any]:
    path = models[expert.source].path
    return {
        "source_model": str(path),
        "positive_prompts": list(expert.positive),
        "negative_prompts": list(expert.negative),
        "residual_scale": expert.residual_scale,
    }
