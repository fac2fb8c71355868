"""Tensors of a mixture that no dense model has: routers, gates, biases of 0."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from merit_fast.errors import InputError
from merit_fast.integrations.mergekit.document import Reference
from merit_fast.integrations.mergekit.moe.dense import Dense, number_in
from merit_fast.integrations.mergekit.moe.document import Expert, MoeDocument
from merit_fast.integrations.mergekit.moe.gates import (
    Floats,
    embedding_direction,
    prompt_gates,
    random_gates,
    similar_layers,
)
from merit_fast.integrations.mergekit.moe.shapes import Shape
from merit_fast.progress import Progress

_EMBEDDING = "model.embed_tokens.weight"


def side_tensors(
    document: MoeDocument,
    models: Mapping[Reference, Dense],
    shape: Shape,
    seed: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Tensors by name: routers, gates of shared experts, and biases that the base lacks.

    With ``seed`` None routers are 0, for a plan that computes nothing.
    """
    base = models[document.base]
    layers = number_in(base, "num_hidden_layers")
    experts = [*document.experts, *(document.shared if shape.shared else ())]
    gates = _gates(document, base, experts, layers, seed)
    similar = similar_layers(gates) if seed is not None else []
    if similar:
        rule = "have routers that hardly differ: prompts may be too similar, some experts idle"
        progress.note(f"{document.where}: {len(similar)} of {layers} layers {rule}")
    side = {}
    count = len(document.experts)
    for layer in range(layers):
        side[shape.router(layer)] = gates[layer, :count].astype(np.float32)
        if shape.shared:
            side[shape.shared_gate(layer)] = gates[layer, count:].astype(np.float32)
        for inner in shape.filled:
            name = f"model.layers.{layer}.{inner}"
            weight = base.checkpoint.tensors.get(name.replace(".bias", ".weight"))
            if weight is not None and name not in base.checkpoint.tensors:
                side[name] = np.zeros(weight.shape[0], np.float32)
    return side


def _gates(
    document: MoeDocument,
    base: Dense,
    experts: Sequence[Expert],
    layers: int,
    seed: int | None,
) -> Floats:
    hidden = number_in(base, "hidden_size")
    mode = document.gate_mode
    if seed is None:
        return np.zeros((layers, len(experts), hidden))
    if document.is_drawn:
        return random_gates(mode, seed, layers, len(experts), hidden)
    if mode == "cheap_embed":
        embedding = base.checkpoint.tensors.get(_EMBEDDING)
        if embedding is None:
            raise InputError(f"{base.path}: {_EMBEDDING}: is missing, gate_mode {mode} reads it")
        gates = prompt_gates(experts, embedding_direction(base.path, embedding, layers))
    else:
        from merit_fast.integrations.mergekit.moe.hidden import hidden_direction

        gates = prompt_gates(experts, hidden_direction(base.path, mode))
    if gates.shape != (layers, len(experts), hidden):
        wanted = [layers, len(experts), hidden]
        rule = f"must give routers of shape {wanted}, got {list(gates.shape)}"
        raise InputError(f"{base.path}: gate_mode {mode}: {rule}")
    return gates
