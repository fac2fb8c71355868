"""Loss of every target token of a forward pass that somebody else makes, from what it computes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merit_fast.errors import InputError, MeritFastError
from merit_fast.kernels.labels import IGNORED_LABEL
from merit_fast.patch.deferred import token_losses_seen_by

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class TokenValues:
    """Values at the places of the shifted labels; those where the label is -100 mean nothing.

    Attributes:
        losses: float32, -log of the label's probability.
        is_correct: bool, the label is the most likely token; None: not known.
    """

    losses: Tensor
    is_correct: Tensor | None


def shifted_labels(inputs: Mapping[str, Any]) -> Tensor:
    """The labels that a causal model predicts: [B, T - 1], or [B, T] ``shift_labels``.

    Raises:
        InputError: the batch has no labels.
    """
    if inputs.get("shift_labels") is not None:
        return torch.as_tensor(inputs["shift_labels"])
    if inputs.get("labels") is None:
        raise InputError(
            "train_dataset: labels: are missing in a batch; losses per dataset are those of a "
            "causal model with labels"
        )
    return torch.as_tensor(inputs["labels"])[..., 1:]


def called_model(model: nn.Module, wrapped: nn.Module) -> nn.Module:
    """The module whose hooks see a Trainer's forward passes.

    It is the compiled module of ``torch_compile``: its own hooks run outside of what is compiled.
    Otherwise it is the model itself, within DDP, FSDP and DeepSpeed.

    Args:
        model: the Trainer's model.
        wrapped: the model as the Trainer calls it.
    """
    is_compiled = any("_orig_mod" in module._modules for module in wrapped.modules())
    return wrapped if is_compiled else model


class TokenWatch:
    """Reads the token losses of a model's forward passes within a with-block.

    Three sources, the first that a pass has: the log-probabilities of TRL's fused head, the losses
    of a patched head, the logits. The last costs one more pass over the target tokens' logits.
    """

    def __init__(self) -> None:
        self._model_name = ""
        self._labels: Tensor | None = None
        self._found: dict[str, TokenValues] = {}

    @contextmanager
    def watching(self, model: nn.Module, labels: Tensor) -> Iterator["TokenWatch"]:
        """Watches the model's passes within the block, of a batch with these shifted labels."""
        self._model_name = type(model).__name__
        self._labels = labels
        self._found = {}
        handle = model.register_forward_hook(self._hook)
        try:
            with token_losses_seen_by(self._see_losses):
                yield self
        finally:
            handle.remove()

    def values(self) -> TokenValues:
        """The token values of the passes that were watched last.

        Raises:
            MeritFastError: no pass gave any.
        """
        for source in ("fused", "patched", "logits"):
            if source in self._found:
                return self._found[source]
        raise MeritFastError(
            f"MeritCallback: {self._model_name}: its forward pass gave neither logits nor "
            "token losses, so that no loss per dataset can be told"
        )

    def _see_losses(self, losses: Tensor) -> None:
        self._keep("patched", losses, None)

    @torch.no_grad()
    def _hook(self, module: nn.Module, args: Any, output: Any) -> None:
        fields = output if isinstance(output, Mapping) else {}
        log_probs = fields.get("log_probs")
        if log_probs is not None:
            self._keep("fused", -log_probs.detach(), fields.get("is_top1"))
        elif fields.get("logits") is not None and not {"fused", "patched"} & set(self._found):
            self._keep_logits(fields["logits"].detach())

    def _keep(self, source: str, losses: Tensor, is_correct: Tensor | None) -> None:
        """Keeps values of the labels' places; virtual tokens of prompt learning come before."""
        assert self._labels is not None
        width = self._labels.shape[-1]
        if losses.dim() != 2 or losses.shape[0] != self._labels.shape[0]:
            return
        correct = None if is_correct is None else is_correct[:, -width:].bool()
        if source == "patched" and losses.shape[-1] > width:  # one place more, for no label
            losses = losses[:, :-1]
        self._found[source] = TokenValues(losses[:, -width:].float(), correct)

    def _keep_logits(self, logits: Tensor) -> None:
        assert self._labels is not None
        labels = self._labels.to(logits.device)
        width = labels.shape[-1]
        # Predictions of the last ``width`` labels that follow a token.
        places = logits[:, -width - 1 : -1] if width < logits.shape[1] else logits
        if places.shape[:2] != labels.shape:
            return
        is_target = labels != IGNORED_LABEL
        losses = torch.zeros(labels.shape, device=logits.device)
        correct = torch.zeros(labels.shape, dtype=torch.bool, device=logits.device)
        rows = is_target.nonzero()
        for part in torch.split(rows, _ROWS_AT_ONCE):
            index = tuple(part.T)
            scores = places[index].float()
            losses[index] = F.cross_entropy(scores, labels[index], reduction="none")
            correct[index] = scores.argmax(-1) == labels[index]
        self._found["logits"] = TokenValues(losses, correct)
