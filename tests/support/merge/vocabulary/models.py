"""Small models with tokenizers that the tokenizers library writes, and their rows by token."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from support.merge.merges import load, write
from tokenizers import AddedToken, Tokenizer, models
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
HIDDEN = 10
OWN = ("<unk>", "<s>", "</s>", "a", "b", "ab")


@dataclass(frozen=True)
class Made:
    """A model directory with its tensors and the ids of its tokens, by the library."""

    path: Path
    tensors: Mapping[str, Tensor]
    ids: Mapping[str, int]

    def row(self, name: str, token: str) -> NDArray[np.float64] | None:
        """The row of a token in float64; None where the model has none."""
        number = self.ids.get(token)
        tensor = self.tensors[name]
        if number is None or number >= len(tensor):
            return None
        return np.asarray(tensor[number].double().numpy())


def make_model(
    directory: Path,
    added: Sequence[str | AddedToken] = (),
    *,
    rows: int | None = None,
    own: Sequence[str] = OWN,
    kind: str = "BPE",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    extra: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Made:
    """Writes weights, config.json and tokenizer of one model.

    Args:
        added: tokens that the library adds to its ``own``.
        rows: of embedding and head; None: as many as there are tokens.
        kind: BPE, Unigram or WordLevel.
        extra: further tensors.
        config: further keys of config.json.
    """
    tokenizer = make_tokenizer(directory, added, own=own, kind=kind)
    ids = tokenizer.get_vocab()
    rows = len(ids) if rows is None else rows
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {
        EMBEDDING: values(rows, HIDDEN),
        HEAD: values(rows, HIDDEN),
        "model.layers.0.mlp.up_proj.weight": values(7, HIDDEN),
        "model.norm.weight": values(HIDDEN),
        **(extra or {}),
    }
    write(directory, tensors)
    sizes = {"vocab_size": rows, "hidden_size": HIDDEN, "num_attention_heads": 1}
    values_of = {"model_type": "llama", **sizes, **config}
    (directory / "config.json").write_text(json.dumps(values_of))
    return Made(directory, tensors, ids)


def make_tokenizer(
    directory: Path,
    added: Sequence[str | AddedToken] = (),
    *,
    own: Sequence[str] = OWN,
    kind: str = "BPE",
) -> PreTrainedTokenizerFast:
    """Saves a tokenizer of the given tokens, as transformers does."""
    ids = {text: number for number, text in enumerate(own)}
    merges = [("a", "b")] if {"a", "b", "ab"} <= ids.keys() else []
    model: Any
    if kind == "Unigram":
        model = models.Unigram([(text, -1.0) for text in own], unk_id=0)
    else:
        model = models.BPE(ids, merges) if kind == "BPE" else models.WordLevel(ids, own[0])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(model), bos_token="<s>", eos_token="</s>"
    )
    fast.add_tokens(list(added))
    directory.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(directory)
    return fast


def merged_rows(out: Path) -> Made:
    """An output with the ids that AutoTokenizer reads from it."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    return Made(out, load(out), tokenizer.get_vocab())


def mean_row(models: Sequence[Made], name: str, token: str) -> NDArray[np.float64]:
    """The mean of a token's rows over the models that have it."""
    rows = [row for model in models if (row := model.row(name, token)) is not None]
    return np.asarray(np.mean(rows, 0))


def assert_rows(
    out: Made, name: str, expected: Mapping[str, NDArray[np.float64]], tolerance: float = 2.0**-22
) -> None:
    """Asserts each token's row in the output, and that these are all of its tokens."""
    assert set(out.ids) == set(expected)
    for token, truth in expected.items():
        found = out.row(name, token)
        assert found is not None, token
        assert np.allclose(found, truth, rtol=tolerance, atol=1e-9), (name, token)
