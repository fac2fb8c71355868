"""Compares merges of models with different vocabularies with mergekit 0.1.5, run for real.

    python -m bench.merge.recipes.vocabularies [--mergekit ENV_DIR]

Both read the same recipes over tiny models in float32. Rows are compared by the token that each
side's own tokenizer gives them. Prints a Markdown table: tokens and rows on either side, and the
largest difference of a row of embedding or head, and of any other tensor.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.merge import mergekit_env
from bench.merge.agreement import DRIVER
from merit_fast.integrations.mergekit.recipe import merge_recipe, read_mergekit
from merit_fast.progress import SilentProgress

OWN = ("<unk>", "<s>", "</s>", *(f"_tok_{number}" for number in range(3, 64)))
CHAT = ("<|im_start|>", "<|im_end|>")
# name -> (added tokens, rows)
MODELS: dict[str, tuple[Sequence[str], int]] = {
    "base": ((), 64),
    "chat": (CHAT, 66),
    "tool": (("<tool>", CHAT[0]), 66),
    "padded": (("<u0>", "<u1>"), 64),
}
MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Case:
    """One recipe: its models, and what it says about the tokenizer."""

    label: str
    models: Sequence[str]
    tokenizer: dict[str, Any]
    method: str = "linear"
    base: str | None = "base"


def of_chat(**row: Any) -> dict[str, Any]:
    return {"kind": "model_token", "model": "chat", **row}


CASES = (
    Case("union", ("base", "padded", "chat"), {"source": "union"}),
    Case("union of two that add", ("base", "chat", "tool"), {"source": "union"}),
    Case("union, no base", ("base", "chat", "tool"), {"source": "union"}, base=None),
    Case("union, ties", ("base", "chat", "tool"), {"source": "union"}, "ties"),
    Case("union, slerp", ("base", "chat"), {"source": "union"}, "slerp"),
    Case("base", ("base", "padded", "chat"), {"source": "base"}),
    Case("a model", ("base", "chat"), {"source": "chat"}),
    Case("padded to 16", ("base", "chat"), {"source": "union", "pad_to_multiple_of": 16}),
    Case(
        "forced rows",
        ("base", "chat"),
        {
            "source": "union",
            "tokens": {
                "_tok_10": {"source": "chat", "force": True},
                "_tok_11": {"source": "base", "force": True},
                "_tok_20": {"source": of_chat(token_id=64), "force": True},
                "_tok_21": {"source": of_chat(token="<s>"), "force": True},
                "<new>": {"source": of_chat(token=CHAT[1])},
                "<nil>": {"source": {"kind": "zero"}},
            },
        },
    ),
)


def write_model(folder: Path, added: Sequence[str], rows: int, seed: int) -> None:
    import torch

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_hidden_layers=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    model = models.BPE({text: number for number, text in enumerate(OWN)}, [])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(model), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(folder)


def recipe(case: Case, folder: Path) -> str:
    """The recipe in JSON, which is YAML, over models in a folder."""
    weights = {"slerp": None, "ties": {"weight": 1.0, "density": 0.5}}
    parameters = weights.get(case.method, {"weight": 1.0})
    entries = [
        {"model": name} | ({"parameters": parameters} if parameters else {})
        for name in case.models
        if case.method != "ties" or name != case.base
    ]
    values: dict[str, Any] = {
        "merge_method": case.method,
        "models": entries,
        "dtype": "float32",
        "tokenizer": case.tokenizer,
    }
    if case.method == "slerp":
        values["parameters"] = {"t": 0.3}
    if case.base:
        values["base_model"] = case.base
    return json.dumps(_placed(values, folder))


def _placed(value: Any, folder: Path, key: str = "") -> Any:
    """The values with every model's name replaced by its path; "base" stays a tokenizer's word."""
    if isinstance(value, dict):
        is_tokenizer = key == "tokenizer"
        return {
            name: item
            if is_tokenizer and (name, item) == ("source", "base")
            else _placed(item, folder, name)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_placed(item, folder) for item in value]
    return str(folder / value) if isinstance(value, str) and value in MODELS else value


def read(folder: Path) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """The ids of an output by its own tokenizer, and its tensors in float64."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    ids = AutoTokenizer.from_pretrained(folder).get_vocab()
    return ids, {name: tensor.astype(np.float64) for name, tensor in tensors.items()}


def compare(case: Case, mine: Path, theirs: Path) -> str:
    our_ids, ours = read(mine)
    their_ids, others = read(theirs)
    if our_ids.keys() != their_ids.keys():
        raise ValueError(f"{case.label}: other tokens: {sorted(our_ids ^ their_ids.keys())}")
    rows = 0.0
    for name in MATRICES:
        for token, number in our_ids.items():
            gap = np.abs(ours[name][number] - others[name][their_ids[token]])
            rows = max(rows, float(gap.max()))
        padding = ours[name][len(our_ids) :] - others[name][len(our_ids) :]
        rows = max(rows, float(np.abs(padding).max(initial=0.0)))
    rest = max(float(np.abs(ours[n] - others[n]).max()) for n in ours if n not in MATRICES)
    count = len(ours[MATRICES[0]])
    return f"| {case.label} | {len(our_ids)} | {count} | {rows:.1e} | {rest:.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _, python, words = mergekit_env.parse_with_mergekit(parser)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for seed, (name, (added, rows)) in enumerate(MODELS.items()):
            write_model(work / name, added, rows, seed)
        for number, case in enumerate(CASES):
            (work / f"{number:02d}.yml").write_text(recipe(case, work))
        environment = {"HF_HUB_OFFLINE": "1"}
        command = [str(python), "-P", "-c", DRIVER, "."]
        subprocess.run(command, check=True, cwd=work, env=environment, stderr=subprocess.DEVNULL)
        print(f"{words}\n")
        print("| tokenizer | tokens | rows | largest difference of a row | of another tensor |")
        print("|---|---|---|---|---|")
        for number, case in enumerate(CASES):
            out = work / f"{number:02d}-ours"
            merge_recipe(read_mergekit(work / f"{number:02d}.yml"), out, SilentProgress())
            print(compare(case, out, work / f"{number:02d}"))


if __name__ == "__main__":
    main()
