"""Router weights from the base's hidden states. The only part of a merge that runs a model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from merit_fast.integrations.mergekit.moe.gates import Direction, Floats, begin_token
from merit_fast.merge.read.remote import Location

if TYPE_CHECKING:
    import torch


def hidden_direction(base: Location, mode: str) -> Direction:
    """Directions of prompts: the mean over them of the inputs of every layer.

    Loads the model with transformers in its own dtype. Prompts run one by one, so that none is
    padded. A prompt gives the state of its last token, with mode hidden_avg the mean of its tokens.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(base))
    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype="auto")
    model.eval()
    begin = begin_token(base)

    def states(prompt: str) -> "torch.Tensor":
        encoded = tokenizer(begin + prompt, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            output = model(input_ids=encoded["input_ids"], output_hidden_states=True)
        return torch.stack(output.hidden_states[:-1])[:, 0].double()  # [layers, tokens, hidden]

    def direction(prompts: Sequence[str]) -> Floats:
        ends = []
        for prompt in prompts:
            layers = states(prompt)
            ends.append(layers.mean(dim=1) if mode == "hidden_avg" else layers[:, -1])
        return np.asarray(torch.stack(ends).mean(dim=0).numpy())

    return direction
