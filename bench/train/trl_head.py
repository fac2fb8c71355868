"""TRL's fused head and ours in TRL's own call: python -m bench.train.trl_head [--rounds N]

A Llama with the sizes of SmolLM2-135M and few layers runs ``model(..., fused_lm_head=True)``, as
SFTTrainer calls it (log-probabilities, entropies, top-1), and the backward pass of its loss. Both
heads take turns in every round; figures are medians of CPU seconds and of the rounds' ratios, which
other work on the machine moves least. The losses are compared first. The last line of standard
output is one JSON object.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

FIELDS = ("log_probs", "entropy", "is_top1")


def twin_models(layers: int, dtype: str) -> dict[str, Any]:
    """A step of one model with TRL's head, and with ours."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from merit_fast.integrations.trl import use_head

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).to(getattr(torch, dtype))
    models = {"TRL": theirs, "ours": copy.deepcopy(theirs)}
    for model in models.values():
        add_fused_lm_head(model, outputs=FIELDS)
    use_head(SimpleNamespace(model=models["ours"]))
    return models


def steps(models: dict[str, Any], tokens: int, share: float) -> dict[str, Callable[[], float]]:
    """A forward and backward pass of each model; returns the loss."""
    import torch

    torch.manual_seed(1)
    ids = torch.randint(0, 49152, (1, tokens))
    labels = ids.masked_fill(torch.rand(1, tokens) >= share, -100)

    def step(model: Any) -> float:
        model.zero_grad()
        output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        output.loss.backward()
        return float(output.loss.detach())

    return {name: partial(step, model) for name, model in models.items()}


def measure(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each call, and the median ratio of ours to TRL's."""
    losses = {name: call() for name, call in calls.items()}
    assert abs(losses["ours"] - losses["TRL"]) < 1e-2 * abs(losses["TRL"]), losses
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            taken[name].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(taken["ours"], taken["TRL"], strict=True)]
    medians = {f"{name}_s": statistics.median(values) for name, values in taken.items()}
    return {**medians, "ratio": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=1, help="decoder layers below the head")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    rows = []
    for dtype in ("float32", "bfloat16"):
        models = twin_models(options.layers, dtype)
        for share in (0.25, 1.0):
            figures = measure(steps(models, options.tokens, share), options.rounds)
            rows.append({"dtype": dtype, "labelled": share, **figures})
            print(
                f"{dtype:9} {share:4.0%} labelled: TRL {figures['TRL_s']:.2f} s, ours "
                f"{figures['ours_s']:.2f} s, ratio {figures['ratio']:.2f}",
                flush=True,
            )
    print(json.dumps({"tokens": options.tokens, "layers": options.layers, "rows": rows}))


if __name__ == "__main__":
    main()
