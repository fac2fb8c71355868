"""Runs mergekit 0.1.5's example recipes and those of its merge tests here and there, and compares.

    python -m bench.merge.recipes.agreement DIR [--mergekit ENV_DIR]

Models are tiny and random, of the architectures of mergekit's tests; `dtype` is float32. Our output
is loaded with transformers, and every tensor that mergekit wrote is compared by its name. Prints a
Markdown table with the largest difference and the number of tensors of every recipe; recipes that
draw random numbers are only run. Of LLaVA mergekit 0.1.5 writes the vision tower and the projector.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench.merge import mergekit_env
from bench.merge.agreement import DRIVER
from merit_fast.integrations.mergekit.run import merge_mergekit
from merit_fast.progress import SilentProgress

SMALL: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_hidden_layers=4,
)
RANDOM = ("dare_ties", "della")
PAIR = (0.6, 0.4)


def write_models(root: Path) -> None:
    """Writes llama0 .. llama3, granite0, granite1, gpt2_0 and llava0 .. llava2."""
    import transformers as t

    vision = t.CLIPVisionConfig(
        image_size=32,
        patch_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_size=64,
        intermediate_size=128,
    )
    gpt = t.GPT2Config(n_embd=24, n_head=2, n_layer=3, n_positions=32, vocab_size=60)
    llava = t.LlavaConfig(
        vision_config=vision, text_config=t.LlamaConfig(**SMALL), image_seq_length=16
    )
    plan: list[tuple[str, int, Any, Any]] = [
        ("llama", 4, t.LlamaForCausalLM, t.LlamaConfig(**SMALL)),
        ("granite", 2, t.GraniteForCausalLM, t.GraniteConfig(**SMALL)),
        ("gpt2_", 1, t.GPT2LMHeadModel, gpt),
        ("llava", 3, t.LlavaForConditionalGeneration, llava),
    ]
    for seed, (name, count, cls, config) in enumerate(plan):
        for k in range(count):
            torch.manual_seed(10 * seed + k)
            model = cls(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.02 * torch.randn_like(parameter)
            model.save_pretrained(root / f"{name}{k}")


def two(method: str, names: tuple[str, str], base: str | None, **parameters: Any) -> dict[str, Any]:
    """A recipe of two models with weights 0.6 and 0.4, as mergekit's tests write it."""
    models = [
        {"model": name, "parameters": {"weight": weight}}
        for name, weight in zip(names, PAIR, strict=True)
    ]
    recipe: dict[str, Any] = {"merge_method": method, "models": models, "parameters": parameters}
    return recipe | ({"base_model": base} if base else {})


def of_examples() -> Iterator[tuple[str, dict[str, Any]]]:
    """The six recipes of mergekit's examples, with these models in place of theirs."""
    half = {"density": 0.5, "weight": 0.5}
    yield (
        "examples/arcee_fusion",
        {
            "models": [{"model": "llama0"}, {"model": "llama1"}],
            "merge_method": "arcee_fusion",
            "base_model": "llama0",
        },
    )
    yield (
        "examples/bio-merge",
        {
            "models": [{"model": f"llama{k}", "parameters": half} for k in (1, 2)],
            "merge_method": "ties",
            "base_model": "llama0",
            "parameters": {"normalize": False, "int8_mask": True},
        },
    )
    yield (
        "examples/gradient-slerp",
        {
            "slices": [
                {"sources": [{"model": f"llama{k}", "layer_range": [0, 4]} for k in (0, 1)]}
            ],
            "merge_method": "slerp",
            "base_model": "llama0",
            "parameters": {
                "t": [
                    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                    {"value": 0.5},
                ]
            },
        },
    )
    yield (
        "examples/linear",
        {
            "models": [
                {"model": f"llama{k}", "parameters": {"weight": weight}}
                for k, weight in enumerate((1.0, 0.3, 0.5))
            ],
            "merge_method": "linear",
        },
    )
    yield (
        "examples/orcamini-platy-44layer",
        {
            "slices": [
                {"sources": [{"model": "llama0", "layer_range": [0, 3]}]},
                {"sources": [{"model": "llama1", "layer_range": [1, 4]}]},
            ],
            "merge_method": "passthrough",
        },
    )
    by_mlp = [{"filter": "mlp", "value": 0.5}, {"value": 0}]
    yield (
        "examples/ties",
        {
            "models": [
                {"model": "llama1", "parameters": {"density": [1, 0.7, 0.1], "weight": 1.0}},
                {"model": "llama2", "parameters": {"density": 0.5, "weight": [0, 0.3, 0.7, 1]}},
                {"model": "llama3", "parameters": {"density": 0.33, "weight": by_mlp}},
            ],
            "merge_method": "ties",
            "base_model": "llama0",
            "parameters": {"normalize": True, "int8_mask": True},
        },
    )


def of_tests() -> Iterator[tuple[str, dict[str, Any]]]:
    """Recipes of mergekit's basic merge tests."""
    for name in ("granite0", "gpt2_0"):
        yield f"passthrough {name}", {"merge_method": "passthrough", "models": [{"model": name}]}
    stack = {"sources": [{"model": "gpt2_0", "layer_range": [0, 3]}]}
    yield "passthrough gpt2_0 twice", {"merge_method": "passthrough", "slices": [stack, stack]}
    scale = [{"filter": "o_proj", "value": 0}, {"value": 1}]
    yield (
        "passthrough scale",
        {
            "merge_method": "passthrough",
            "models": [{"model": "llama0", "parameters": {"scale": scale}}],
        },
    )
    for kind, count in (("granite", 2), ("llama", 3), ("llava", 3)):
        yield f"linear {kind}", two("linear", (f"{kind}0", f"{kind}1"), None)
        yield f"slerp {kind}", two("slerp", (f"{kind}0", f"{kind}1"), f"{kind}0", t=0.35)
        if count == 3:
            yield from _of_three(kind)


def _of_three(kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    a, b, c = (f"{kind}{k}" for k in range(3))
    for base in (None, c):
        for row_wise in (False, True):
            for flatten in (False, True):
                words = f"row_wise {row_wise}, flatten {flatten}, base {base}"
                flags = {"nuslerp_row_wise": row_wise, "nuslerp_flatten": flatten}
                yield f"nuslerp {kind}, {words}", two("nuslerp", (a, b), base, **flags)
    cancelling = two("nuslerp", (a, b), c, nuslerp_flatten=False)
    cancelling["models"][0]["parameters"]["weight"] = -0.5
    cancelling["models"][1]["parameters"]["weight"] = 0.5
    yield f"nuslerp {kind}, weights of sum 0", cancelling
    with_base: dict[str, dict[str, Any]] = {
        "task_arithmetic": {},
        "breadcrumbs": {},
        "ties": {"density": 0.3},
        "sce": {"select_topk": 0.5},
        "ram": {},
        "ramplus_tl": {"r": 0.05, "alpha": 1.0},
        "multislerp": {},
        "dare_ties": {"density": 0.66},
        "della": {"density": 0.66, "epsilon": 0.05, "lambda": 0.5},
        "karcher": {"max_iter": 5, "tol": 1e-5},
    }
    for method, parameters in with_base.items():
        yield f"{method} {kind}", two(method, (a, b), c, **parameters)
    for filter_wise in (False, True):
        recipe = two("model_stock", (b, c), a, filter_wise=filter_wise)
        yield f"model_stock {kind}, filter_wise {filter_wise}", recipe
    yield f"arcee_fusion {kind}", two("arcee_fusion", (a, b), a)
    yield f"nearswap {kind}", two("nearswap", (a, b), a, t=0.0001)


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    """State dict of a model as transformers loads it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = json.loads((model / "config.json").read_text())
    is_text = config["model_type"] != "llava"
    loader = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    return dict(loader.from_pretrained(model, dtype=torch.float32).state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    arguments, python, words = mergekit_env.parse_with_mergekit(parser)
    root = arguments.directory.absolute() / "recipes"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    write_models(root)
    recipes = [*of_examples(), *of_tests()]
    for number, (_, recipe) in enumerate(recipes):
        text = json.dumps({"dtype": "float32", **recipe}, indent=1)
        for kind in ("llama", "granite", "gpt2_", "llava"):
            text = text.replace(f'"{kind}', f'"{root}/{kind}')
        (root / f"{number:02d}.yml").write_text(text)
    command = [python, "-P", "-c", DRIVER, root]
    env = {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if run.returncode:  # it also complains about every model without a tokenizer
        sys.exit(run.stderr)
    print(f"{words}; {len(recipes)} recipes\n")
    print("| recipe | largest difference | tensors there | tensors here |\n|---|---|---|---|")
    for number, (name, recipe) in enumerate(recipes):
        out = root / f"{number:02d}-ours"
        merge_mergekit(root / f"{number:02d}.yml", str(out), SilentProgress())
        mine = tensors_of(out)
        theirs: dict[str, torch.Tensor] = {}
        for file in (root / f"{number:02d}").glob("*.safetensors"):
            theirs |= load_file(file)
        if unknown := sorted(theirs.keys() - mine.keys()):
            raise ValueError(f"{name}: tensors that our output lacks: {unknown}")
        difference = max((mine[key] - theirs[key]).abs().max().item() for key in theirs)
        is_random = recipe["merge_method"] in RANDOM
        shown = "random" if is_random else f"{difference:.1e}"
        print(f"| {name} | {shown} | {len(theirs)} | {len(mine)} |")


if __name__ == "__main__":
    main()
