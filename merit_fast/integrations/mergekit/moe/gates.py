"""Router weights of a mixture: random ones, or directions of the experts' prompts.

direction(prompts) = unit(sum over tokens of their embeddings)                    # cheap_embed
direction(prompts) = mean over prompts of the layer's input at the last token     # hidden
gate = unit(direction(positive) - direction(negative))
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from merit_fast.errors import InputError
from merit_fast.integrations.mergekit.moe.document import Expert
from merit_fast.kernels.average._eager import to_float64
from merit_fast.merge.engine.driver import input_files
from merit_fast.merge.engine.opened import open_files
from merit_fast.merge.engine.plan import Segment
from merit_fast.merge.engine.values import values
from merit_fast.merge.read.entries import TensorEntry
from merit_fast.merge.read.files import list_directory, read_json
from merit_fast.merge.read.remote import Location

Floats = npt.NDArray[np.float64]
# Prompts -> [layers, hidden]
Direction = Callable[[Sequence[str]], Floats]
_LEAST_LENGTH = 1e-8
_DEGENERATE = 5.0  # condition number of a layer's routers from which prompts are too similar


def random_gates(mode: str, seed: int, layers: int, experts: int, hidden: int) -> Floats:
    """[layers, experts, hidden] numbers: of N(0, 1), or as torch.nn.Linear begins.

    The generator is NumPy's RandomState, whose stream does not change between versions.
    """
    draws = np.random.RandomState(seed)
    if mode == "random":
        return draws.standard_normal((layers, experts, hidden))
    bound = (1.0 / hidden) ** 0.5
    return np.asarray(draws.uniform(-bound, bound, (layers, experts, hidden)))


def prompt_gates(experts: Sequence[Expert], direction: Direction) -> Floats:
    """[layers, experts, hidden] unit vectors from each expert's prompts."""
    gates = []
    for expert in experts:
        gate = direction(expert.positive)
        if expert.negative:
            gate = gate - direction(expert.negative)
        gates.append(unit(gate))
    return np.stack(gates, axis=1)


def unit(vectors: Floats) -> Floats:
    """Vectors along the last dimension at length 1; those shorter than 1e-8 at length up to 1."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, _LEAST_LENGTH))


def similar_layers(gates: Floats) -> list[int]:
    """Layers whose experts have so similar routers that some will hardly be used."""
    return [layer for layer, gate in enumerate(gates) if np.linalg.cond(gate) > _DEGENERATE]


def embedding_direction(base: Location, embedding: TensorEntry, layers: int) -> Direction:
    """Directions of prompts from the base's token embeddings, the same for every layer.

    Raises:
        InputError: the base has no tokenizer.json, or a token has no row.
    """
    encode = _encoder(base)
    hidden = embedding.shape[1]
    segment = Segment(("",), (embedding.num_elements,), embedding.dtype, 0, (embedding,))

    def direction(prompts: Sequence[str]) -> Floats:
        total = np.zeros(hidden)
        with open_files(input_files([segment]), None) as opened:
            for token in (token for prompt in prompts for token in encode(prompt)):
                if not 0 <= token < embedding.shape[0]:
                    rule = f"has no row for token {token} of {base}'s tokenizer"
                    raise InputError(f"{embedding.file}: {embedding.name}: {rule}")
                total += to_float64(*values(embedding, token * hidden, hidden, opened))
        return np.repeat(unit(total)[None], layers, axis=0)

    return direction


def _encoder(base: Location) -> Callable[[str], list[int]]:
    """Text -> tokens, with the tokenizer's begin-of-text token in front, if it has one."""
    if "tokenizer.json" not in list_directory(base):
        raise InputError(f"{base}: gate_mode cheap_embed needs a tokenizer.json, there is none")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    begin = begin_token(base)
    return lambda prompt: list(tokenizer.encode(begin + prompt, add_special_tokens=False).ids)


def begin_token(base: Location) -> str:
    """The text of the begin-of-text token that the tokenizer's files name; "" without one."""
    present = list_directory(base)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token: Any = read_json(base / name).get("bos_token") if name in present else None
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return ""
