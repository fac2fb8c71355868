"""The sketch state: sums only, so that states of shards, restarts and workers add up."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from merit_fast.errors import InputError, MeritFastError, one_line
from merit_fast.kernels.sketch import HASH_VERSION, CountSketch


def state_path(directory: Path, dataset: str, part: str = "") -> Path:
    """File of a dataset's state in the sketch stage's output; ``part``: of a part of the model."""
    folder = directory / "parts" / part if part else directory
    return folder / f"{dataset}.safetensors"


@dataclass(frozen=True)
class SketchIdentity:
    """Identity that two states must share before they may be added or compared."""

    sketch: CountSketch
    model_fingerprint: str
    parameters: tuple[str, ...]

    def metadata(self) -> dict[str, str]:
        return {
            "hash_version": str(HASH_VERSION),
            "proj_dim": str(self.sketch.proj_dim),
            "seed": str(self.sketch.seed),
            "model_fingerprint": self.model_fingerprint,
            "parameters": "\n".join(self.parameters),
        }


@dataclass
class SketchState:
    """Sums over the examples of one dataset, in G blocks. All sums in float64.

    Attributes:
        block_sums: [G, D] sum of the sketches s of the block's examples.
        block_square_norms: [G] sum of |s|^2.
        block_counts: [G] int64 examples.
        loss_sum: summed loss of all target tokens, nats.
        num_target_tokens: number of those tokens.
    """

    identity: SketchIdentity
    block_sums: Tensor
    block_square_norms: Tensor
    block_counts: Tensor
    loss_sum: float = 0.0
    num_target_tokens: int = 0

    @classmethod
    def zeros(cls, identity: SketchIdentity, blocks: int) -> "SketchState":
        return cls(
            identity,
            torch.zeros(blocks, identity.sketch.proj_dim, dtype=torch.float64),
            torch.zeros(blocks, dtype=torch.float64),
            torch.zeros(blocks, dtype=torch.int64),
        )

    @property
    def num_examples(self) -> int:
        return int(self.block_counts.sum())

    def add_examples(
        self, sketches: Tensor, blocks: Tensor, loss_sum: float, num_target_tokens: int
    ) -> None:
        """Adds B examples.

        Args:
            sketches: [B, D] float32.
            blocks: [B] int64 block of each example.
            loss_sum: summed loss of their target tokens, nats.
            num_target_tokens: number of those tokens.
        """
        exact = sketches.cpu().double()
        self.block_sums.index_add_(0, blocks, exact)
        self.block_square_norms.index_add_(0, blocks, exact.square().sum(1))
        self.block_counts.index_add_(0, blocks, torch.ones_like(blocks))
        self.loss_sum += loss_sum
        self.num_target_tokens += num_target_tokens

    def merge(self, other: "SketchState") -> None:
        """Adds another state of the same sketch, model and parameters.

        Raises:
            MeritFastError: they differ; the message names the difference.
        """
        self.require_same(other)
        self.block_sums += other.block_sums
        self.block_square_norms += other.block_square_norms
        self.block_counts += other.block_counts
        self.loss_sum += other.loss_sum
        self.num_target_tokens += other.num_target_tokens

    def require_same(self, other: "SketchState") -> None:
        """Raises MeritFastError if the two may not be added or compared; the message names why."""
        mine = self.identity.metadata()
        theirs = other.identity.metadata()
        for key, value in mine.items():
            if value != theirs[key]:
                raise MeritFastError(
                    f"sketch states disagree in {key}: {value[:60]!r} and {theirs[key][:60]!r}"
                )
        if self.block_counts.shape != other.block_counts.shape:
            raise MeritFastError(
                f"sketch states disagree in blocks: {len(self.block_counts)} and "
                f"{len(other.block_counts)}"
            )

    def to_bytes(self) -> bytes:
        """One safetensors file; the same state gives the same bytes."""
        tensors = {
            "block_sums": self.block_sums,
            "block_square_norms": self.block_square_norms,
            "block_counts": self.block_counts,
            "loss_sum": torch.tensor(self.loss_sum, dtype=torch.float64),
            "num_target_tokens": torch.tensor(self.num_target_tokens, dtype=torch.int64),
        }
        # One JSON string: the writer keeps several keys in an order that changes from run to run.
        return save(tensors, {"identity": json.dumps(self.identity.metadata(), sort_keys=True)})

    @classmethod
    def read(cls, path: Path) -> "SketchState":
        """Reads a state file.

        Raises:
            InputError: the file is absent, broken or of another hash version.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {})["identity"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise InputError(f"{path}: is not a sketch state ({one_line(error)})") from None
        if metadata["hash_version"] != str(HASH_VERSION):
            raise InputError(
                f"{path}: hash_version: must be {HASH_VERSION}, got {metadata['hash_version']}; "
                "remove it to sketch again"
            )
        identity = SketchIdentity(
            CountSketch(int(metadata["proj_dim"]), int(metadata["seed"])),
            metadata["model_fingerprint"],
            tuple(metadata["parameters"].split("\n")),
        )
        return cls(
            identity,
            tensors["block_sums"],
            tensors["block_square_norms"],
            tensors["block_counts"],
            float(tensors["loss_sum"]),
            int(tensors["num_target_tokens"]),
        )
