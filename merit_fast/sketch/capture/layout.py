"""Division of the values that a model's modules see among the examples of one forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from merit_fast.errors import MeritFastError
from merit_fast.kernels.sketch import CountSketch


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

    def refusal(self, reason: str) -> MeritFastError:
        return MeritFastError(
            f"sketch_gradients: parameter {self.name} of {type(self.module).__name__} {reason}; "
            "leave it out (requires_grad_(False), or parameters=...)"
        )


@dataclass
class Pass:
    """One forward pass: its examples, and the sketches that its backward pass adds to.

    Attributes:
        size, tokens: B and T of the model's input [B, T]; with ``cu_seqlens`` its segments and N of
            [1, N].
        cu_seqlens: [B + 1] int64 of a packed row.
        input_ids: of the model's input, if it had them.
        scales: parameter name -> factors of its gradients, in ``matrix_shape``, float32.
        patches: vision tower -> [B + 1] int64 first patch of each example, and the patches per
            merged token.
        twice: towers that ran more than once, on other images.
        open: the model's forward is running.
        fired: some gradient has arrived.
        done: its sketches were taken or discarded.
        ran_without_grad: parameters whose module ran under no_grad, as reentrant checkpointing
            does, and not again since.
    """

    sketch: CountSketch
    scales: Mapping[str, Tensor]
    size: int
    tokens: int
    cu_seqlens: Tensor | None = None
    input_ids: Tensor | None = None
    patches: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    twice: set[str] = field(default_factory=set)
    open: bool = True
    fired: bool = False
    done: bool = False
    ran_without_grad: set[str] = field(default_factory=set)
    outs: dict[torch.device, Tensor] = field(default_factory=dict)

    def out(self, device: torch.device) -> Tensor:
        """[B, D] float32, to which modules on ``device`` add."""
        if device not in self.outs:
            self.outs[device] = torch.zeros(
                self.size, self.sketch.proj_dim, dtype=torch.float32, device=device
            )
        return self.outs[device]

    def divide(self, site: Site, *values: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Divides values [..., C] into [B, T', C], or [N, C] with the examples' offsets [B + 1].

        Raises:
            MeritFastError: the rows cannot be told apart by example.
        """
        offsets = self.offsets(site, values[0])
        if offsets is None:
            return [value.reshape(self.size, -1, value.shape[-1]) for value in values], None
        # Heads, where a norm sees them apart.
        each = values[0].shape[:-1].numel() // self._length(values[0])
        return [value.reshape(-1, value.shape[-1]) for value in values], offsets * each

    def examples(self, site: Site, value: Tensor) -> list[Tensor]:
        """Splits a value into the examples' own, each with its leading dimensions."""
        offsets = self.offsets(site, value)
        if offsets is None:
            return list(value.tensor_split(self.size))
        dim = 0 if len(value) == self._length(value) else 1
        return list(value.tensor_split(offsets[1:-1].tolist(), dim=dim))

    def offsets(self, site: Site, value: Tensor) -> Tensor | None:
        """[B + 1] int64 offsets into the tokens of a value [N, ...] or [1, N, ...].

        None: all examples have equally many.
        """
        length = self._length(value)
        if self.size == 1 and self.cu_seqlens is None:
            return None
        if site.tower is not None:
            offsets, merged = self.patches[site.tower]
            total = int(offsets[-1])
            if length == total:
                return offsets
            if length * merged == total:
                return offsets.div(merged, rounding_mode="floor")
        elif self.cu_seqlens is not None:
            if length == self.tokens:
                return self.cu_seqlens
        elif len(value) in (self.size, self.size * self.tokens):
            return None
        raise site.refusal(
            f"sees values of shape {list(value.shape)}, whose rows cannot be told apart by example "
            f"({self.size} examples, {self.tokens} tokens)"
        )

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
