"""Division of the values that a model's modules see among the examples of one forward pass."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from merit_fast.errors import MeritFastError
from merit_fast.kernels.sketch import CountSketch
from merit_fast.sketch.precondition.example_sketches import ExampleSketches


class Refusal(MeritFastError):
    """Parameters that no hook can cover: they need a backward pass per example.

    Attributes:
        site: their module.
        reason: a verb phrase, such as "is used outside its module's forward".
    """

    def __init__(self, site: "Site", reason: str) -> None:
        super().__init__(
            f"sketch_gradients: parameter {site.name} of {type(site.module).__name__} {reason}; "
            "leave it out (requires_grad_(False), or parameters=...)"
        )
        self.site = site
        self.reason = reason


class RepeatBatch(MeritFastError):
    """A batch after which more parameters take a backward pass per example: run it again."""


@dataclass(frozen=True)
class Site:
    """A module that owns sketched parameters.

    Attributes:
        owned: local name of each, such as "weight" -> its name in the model.
        tower: name of the vision tower around the module, whose rows are the patches of all images
            end to end.
    """

    module: nn.Module
    owned: Mapping[str, str]
    tower: str | None = None

    @property
    def name(self) -> str:
        """Name used in error messages: the module's first parameter."""
        return next(iter(self.owned.values()))

    def without(self, names: Collection[str]) -> "Site":
        """The site of the other parameters."""
        if not any(name in names for name in self.owned.values()):
            return self
        owned = {local: name for local, name in self.owned.items() if name not in names}
        return dataclasses.replace(self, owned=owned)

    def refusal(self, reason: str) -> Refusal:
        return Refusal(self, reason)

    def error(self, reason: str) -> MeritFastError:
        """The error where per-example gradients do not exist, or no pass can find them."""
        return MeritFastError(str(Refusal(self, reason)))


@dataclass
class Pass(ExampleSketches):
    """One forward pass: its examples, and the sketches that its backward pass adds to.

    Attributes:
        size, tokens: B and T of the model's input [B, T]; with ``cu_seqlens`` its segments and N of
            [1, N].
        cu_seqlens: [B + 1] int64 of a packed row.
        input_ids: of the model's input, if it had them.
        patches: vision tower -> [B + 1] int64 first patch of each example, and the patches per
            merged token.
        twice: towers that ran more than once, on other images.
        open: the model's forward is running.
        fired: some gradient has arrived.
        done: its sketches were taken or discarded.
        exploring: the first of its kind, with all weights unfrozen: refusals may come.
        is_late: gradients have arrived at the outputs, so a refusal makes the batch run again.
        trusts_check: the check will find rows that are taken for those of another example.
        also: other sketches to which the taps add in the user's backward pass.
        ran_without_grad: parameters whose module ran under no_grad, as reentrant checkpointing
            does, and not again since.
    """

    tokens: int
    cu_seqlens: Tensor | None = None
    input_ids: Tensor | None = None
    patches: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    twice: set[str] = field(default_factory=set)
    open: bool = True
    fired: bool = False
    done: bool = False
    exploring: bool = False
    is_late: bool = False
    trusts_check: bool = False
    also: list["Pass"] = field(default_factory=list)
    ran_without_grad: set[str] = field(default_factory=set)

    @property
    def is_divided(self) -> bool:
        """Whether values have to be divided among examples."""
        return self.size > 1 or self.cu_seqlens is not None

    def apart_at(self, sketch: CountSketch) -> "Pass":
        """The same examples with sketches of another width, apart by parameter, none yet."""
        return dataclasses.replace(
            self, sketch=sketch, apart=True, outs={}, also=[], collect=None, is_sketched=True
        )

    def divide(self, site: Site, *values: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Divides values [..., C] into [B, T', C], or [N, C] with the examples' offsets [B + 1].

        Raises:
            Refusal: the rows cannot be told apart by example.
        """
        offsets = self.offsets(site, values[0])
        if offsets is None:
            return [value.reshape(self.size, -1, value.shape[-1]) for value in values], None
        # Heads, where a norm sees them apart.
        each = values[0].shape[:-1].numel() // self._length(values[0])
        return [value.reshape(-1, value.shape[-1]) for value in values], offsets * each

    def parts(self, site: Site, value: Tensor) -> list[tuple[Any, ...]]:
        """Index of every example's part of a value."""
        if not self.is_divided:
            return [(...,)]
        offsets = self.offsets(site, value)
        if offsets is None:
            step = len(value) // self.size
            return [(slice(b * step, b * step + step),) for b in range(self.size)]
        bounds = offsets.tolist()
        before = () if len(value) == self._length(value) else (slice(None),)
        return [(*before, slice(*pair)) for pair in zip(bounds, bounds[1:], strict=False)]

    def offsets(self, site: Site, value: Tensor) -> Tensor | None:
        """[B + 1] int64 offsets into the tokens of a value [N, ...] or [1, N, ...].

        None: all examples have equally many.
        """
        if not self.is_divided:
            return None
        length = self._length(value) if value.dim() else 0
        if site.tower is not None:
            offsets = self._patches_of(site, length)
            if offsets is not None:
                return offsets
        elif self.cu_seqlens is not None:
            if length == self.tokens:
                return self.cu_seqlens
        elif value.dim() and self._is_even(len(value)):
            return None
        raise site.refusal(
            f"sees values of shape {list(value.shape)}, whose rows cannot be told apart by example "
            f"({self.size} examples, {self.tokens} tokens)"
        )

    def refusal(self, site: Site, value: Tensor) -> Refusal | None:
        """The refusal of a value that cannot be divided among the examples."""
        try:
            self.offsets(site, value)
        except Refusal as refusal:
            return refusal
        return None

    def _is_even(self, rows: int) -> bool:
        """Whether rows seem to be examples, tokens or, where a check follows, parts of tokens."""
        tokens = self.size * self.tokens
        return rows in (self.size, tokens) or (self.trusts_check and rows > 0 == rows % tokens)

    def _patches_of(self, site: Site, length: int) -> Tensor | None:
        if site.tower not in self.patches:
            raise site.refusal("is in a tower whose images are not known by example")
        offsets, merged = self.patches[site.tower]
        total = int(offsets[-1])
        if length == total:
            return offsets
        if length * merged == total:
            return offsets.div(merged, rounding_mode="floor")
        return None

    def example_of_rows(self, site: Site, value: Tensor) -> Tensor:
        """[N] int64: the example of each row of ``value`` [N, C]."""
        offsets = self.offsets(site, value)
        if offsets is None:
            return torch.arange(len(value), device=value.device) // (len(value) // self.size)
        return torch.repeat_interleave(
            torch.arange(self.size, device=value.device), offsets.diff().to(value.device)
        )

    @staticmethod
    def _length(value: Tensor) -> int:
        """N of a value [N, ...] or [1, N, ...]."""
        return value.shape[1] if len(value) == 1 and value.dim() > 2 else len(value)
