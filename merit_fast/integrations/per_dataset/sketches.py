"""Sketches of mixed and packed batches: a pass of its own over the examples of each dataset."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from merit_fast.errors import InputError
from merit_fast.integrations.per_dataset.codes import BatchDatasets
from merit_fast.kernels.labels import IGNORED_LABEL
from merit_fast.sketch.summed import SummedSketcher

_TEXT_KEYS = {
    "input_ids",
    "labels",
    "attention_mask",
    "position_ids",
    "seq_idx",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
}


@dataclass(frozen=True)
class TextExample:
    """One example of a batch, without its padding and its neighbours: [T] tokens and labels."""

    input_ids: Tensor
    labels: Tensor

    @property
    def num_targets(self) -> int:
        """Tokens in the loss, after the shift."""
        return int((self.labels[1:] != IGNORED_LABEL).sum())


def unpacked(inputs: Mapping[str, Any], datasets: BatchDatasets) -> dict[str, list[TextExample]]:
    """Examples of a batch by dataset; each attends to itself only.

    Raises:
        InputError: the batch holds images, or examples that attend to one another.
    """
    other = sorted(set(inputs) - _TEXT_KEYS)
    if other:
        raise InputError(f"MeritCallback: sketch_every: works with text only, got {other[0]}")
    positions = inputs.get("position_ids")
    examples: dict[str, list[TextExample]] = {}
    for line, owners in enumerate(datasets.of_tokens):
        places = (owners >= 0).nonzero()[:, 0]
        is_first = torch.zeros_like(places, dtype=torch.bool)
        if positions is not None:
            is_first = positions[line, places] == 0
        is_first[:1] = True  # of an example, or of its part that was cut off
        if (datasets.starts[line, places] & ~is_first).any():
            raise InputError(
                "MeritCallback: sketch_every: needs rows whose examples do not attend to one "
                "another: packing_strategy must be bfd or bfd_split, got wrapped"
            )
        firsts = places[is_first]
        ends = [*firsts[1:].tolist(), int(places[-1]) + 1] if len(places) else []
        for first, end in zip(firsts.tolist(), ends, strict=True):
            example = TextExample(
                inputs["input_ids"][line, first:end], inputs["labels"][line, first:end]
            )
            if example.num_targets:
                name = datasets.names[int(owners[first])]
                examples.setdefault(name, []).append(example)
    return examples


def add_passes(
    model: nn.Module, sketcher: SummedSketcher, examples: Mapping[str, Sequence[TextExample]]
) -> None:
    """Adds the gradients of the examples' token losses to the sketcher's states.

        state[name] += sketch(gradient of the sum of the token losses of name's examples)

    The model runs in evaluation mode, without dropout; gradients of parameters, random state and
    modes stay. A pass holds no more tokens than the longest example or the batch.
    """
    tokens = sum(len(example.input_ids) for listed in examples.values() for example in listed)
    with _evaluating(model), sketcher:
        for name, listed in sorted(examples.items()):
            for part in _parts(listed, tokens):
                loss_sum = _backward(model, sketcher, part)
                targets = sum(example.num_targets for example in part)
                sketcher.update(name, len(part), loss_sum, targets)


def _backward(model: Any, sketcher: SummedSketcher, part: Sequence[TextExample]) -> float:
    """Takes the gradients into the sketcher's hooks, not into ``parameter.grad``."""
    labels = pad_sequence([e.labels for e in part], batch_first=True, padding_value=IGNORED_LABEL)
    options: dict[str, Any] = {}
    if "output_router_logits" in inspect.signature(type(model).forward).parameters:
        options["output_router_logits"] = False  # the loss of tokens, not of routers
    output = model(
        input_ids=pad_sequence([e.input_ids for e in part], batch_first=True),
        attention_mask=pad_sequence(
            [torch.ones_like(example.input_ids) for example in part], batch_first=True
        ),
        labels=labels,
        use_cache=False,
        **options,
    )
    loss = output.loss * sum(example.num_targets for example in part)
    torch.autograd.grad(loss, list(sketcher.parameters.values()), allow_unused=True)
    return float(loss.detach())


def _parts(listed: Sequence[TextExample], most_tokens: int) -> Iterator[Sequence[TextExample]]:
    """Cuts a list into batches that hold ``most_tokens`` with their padding."""
    part: list[TextExample] = []
    for example in listed:
        width = max(len(each.input_ids) for each in [*part, example])
        if part and width * (len(part) + 1) > most_tokens:
            yield part
            part = []
        part.append(example)
    yield part


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
