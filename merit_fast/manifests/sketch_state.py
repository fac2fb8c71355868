"""The sketch state: sums only, so that states of shards, restarts and workers add up."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import pad

from merit_fast.errors import InputError, MeritFastError, one_line
from merit_fast.kernels.sketch import HASH_VERSION, CountSketch
from merit_fast.records import record

Weight = Literal["tokens", "examples"]
_TENSORS = (
    "block_sums",
    "block_square_norms",
    "block_counts",
    "block_weights",
    "block_square_weights",
    "other_sum",
    "length_counts",
    "shared_rows",
)


def state_path(directory: Path, dataset: str, part: str = "") -> Path:
    """File of a dataset's state in the sketch stage's output; ``part``: of a part of the model."""
    folder = directory / "parts" / part if part else directory
    return folder / f"{dataset}.safetensors"


@record
class SketchIdentity:
    """Identity that two states must share before they may be added or compared.

    Attributes:
        weight: what an example counts in the sums, next to its gradient: "tokens", its target
            tokens; "examples", 1.
    """

    sketch: CountSketch
    model_fingerprint: str
    parameters: tuple[str, ...]
    weight: Weight = "examples"

    @property
    def model(self) -> str:
        """Fingerprint of the model itself, without what its gradients were multiplied by."""
        multipliers, _, rest = self.model_fingerprint.partition(": ")
        is_multiplied = multipliers.startswith(("adam ", "kfac "))
        return rest if is_multiplied else self.model_fingerprint

    def metadata(self) -> dict[str, str]:
        return {
            "hash_version": str(HASH_VERSION),
            "proj_dim": str(self.sketch.proj_dim),
            "seed": str(self.sketch.seed),
            "model_fingerprint": self.model_fingerprint,
            "parameters": "\n".join(self.parameters),
            "weight": self.weight,
        }


def _no_numbers() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


@dataclass
class SketchState:
    """Sums over the examples of one dataset, in G blocks. All sums in float64.

    An example r has the sketch s_r of its own loss's gradient and the weight w_r: its target tokens
    or 1, by the identity.

    Attributes:
        block_sums: [G, D] sum of w s.
        block_square_norms: [G] sum of |w s|^2.
        block_counts: [G] int64 examples.
        block_weights: [G] sum of w.
        block_square_weights: [G] sum of w^2.
        other_sum: [D] sum of s under the other weighting (1 for "tokens", the target tokens for
            "examples"); NaN where these were not given.
        length_counts: [L + 1] int64 examples by number of target tokens, from 0 to L; those of
            which it was not given are in none.
        shared_rows: [S] int64 hashes of those rows that another dataset has too, ascending.
        loss_sum: summed loss of all target tokens, nats.
        num_target_tokens: number of those tokens.
    """

    identity: SketchIdentity
    block_sums: Tensor
    block_square_norms: Tensor
    block_counts: Tensor
    block_weights: Tensor
    block_square_weights: Tensor
    other_sum: Tensor
    length_counts: Tensor = field(default_factory=_no_numbers)
    shared_rows: Tensor = field(default_factory=_no_numbers)
    loss_sum: float = 0.0
    num_target_tokens: int = 0

    @classmethod
    def zeros(cls, identity: SketchIdentity, blocks: int) -> "SketchState":
        width = identity.sketch.proj_dim
        return cls(
            identity,
            block_sums=torch.zeros(blocks, width, dtype=torch.float64),
            block_square_norms=torch.zeros(blocks, dtype=torch.float64),
            block_counts=torch.zeros(blocks, dtype=torch.int64),
            block_weights=torch.zeros(blocks, dtype=torch.float64),
            block_square_weights=torch.zeros(blocks, dtype=torch.float64),
            other_sum=torch.zeros(width, dtype=torch.float64),
        )

    @property
    def num_examples(self) -> int:
        return int(self.block_counts.sum())

    @property
    def weighting_cosine(self) -> float | None:
        """Cosine of the mean gradient with the one under the other weighting, over these examples.

        None: the target tokens were not given, or a mean is 0.
        """
        total = self.block_sums.sum(0)
        scale = float(total.norm() * self.other_sum.norm())
        return float(total @ self.other_sum) / scale if scale > 0 else None

    def length_quantile(self, share: float) -> int | None:
        """Least number of target tokens that ``share`` of the examples do not exceed.

        None: the target tokens of some examples were not given.
        """
        number = int(self.length_counts.sum())
        if not number or number != self.num_examples:
            return None
        rank = max(math.ceil(share * number), 1)
        return int((self.length_counts.cumsum(0) < rank).sum())

    def add_examples(
        self,
        sketches: Tensor,
        blocks: Tensor,
        loss_sum: float = 0.0,
        num_target_tokens: Tensor | None = None,
    ) -> None:
        """Adds B examples.

        Args:
            sketches: [B, D] float32.
            blocks: [B] int64 block of each example.
            loss_sum: summed loss of their target tokens, nats.
            num_target_tokens: [B] int64 number of those tokens; required where they are weights.

        Raises:
            MeritFastError: the identity's weights are tokens, and they are not given.
        """
        exact = sketches.cpu().double()
        ones = torch.ones(len(exact), dtype=torch.float64)
        tokens = None if num_target_tokens is None else num_target_tokens.double()
        weights = ones if self.identity.weight == "examples" else tokens
        others = tokens if self.identity.weight == "examples" else ones
        if weights is None:
            raise MeritFastError("sketch state: weight tokens needs num_target_tokens")
        weighted = exact * weights[:, None]
        self.block_sums.index_add_(0, blocks, weighted)
        self.block_square_norms.index_add_(0, blocks, weighted.square().sum(1))
        self.block_counts.index_add_(0, blocks, torch.ones_like(blocks))
        self.block_weights.index_add_(0, blocks, weights)
        self.block_square_weights.index_add_(0, blocks, weights.square())
        self.other_sum += torch.nan if others is None else others @ exact
        self.loss_sum += loss_sum
        if num_target_tokens is not None:
            self._add_lengths(num_target_tokens.cpu().long().bincount())
            self.num_target_tokens += int(num_target_tokens.sum())

    def merge(self, other: "SketchState") -> None:
        """Adds another state of the same sketch, model, parameters and weights.

        Raises:
            MeritFastError: they differ; the message names the difference.
        """
        self.require_same(other)
        self.block_sums += other.block_sums
        self.block_square_norms += other.block_square_norms
        self.block_counts += other.block_counts
        self.block_weights += other.block_weights
        self.block_square_weights += other.block_square_weights
        self.other_sum += other.other_sum
        self._add_lengths(other.length_counts)
        self.add_shared_rows(other.shared_rows)
        self.loss_sum += other.loss_sum
        self.num_target_tokens += other.num_target_tokens

    def add_shared_rows(self, hashes: Tensor) -> None:
        """Notes rows [S] int64 that another dataset has too; one that comes twice counts once."""
        rows = {*self.shared_rows.tolist(), *hashes.tolist()}
        self.shared_rows = torch.tensor(sorted(rows), dtype=torch.int64)

    def _add_lengths(self, counts: Tensor) -> None:
        size = max(len(counts), len(self.length_counts))
        padded = (pad(given, (0, size - len(given))) for given in (self.length_counts, counts))
        self.length_counts = sum(padded, torch.zeros(size, dtype=torch.int64))

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
        tensors = {name: getattr(self, name) for name in _TENSORS}
        tensors["loss_sum"] = torch.tensor(self.loss_sum, dtype=torch.float64)
        tensors["num_target_tokens"] = torch.tensor(self.num_target_tokens, dtype=torch.int64)
        # One JSON string: the writer keeps several keys in an order that changes from run to run.
        return save(tensors, {"identity": json.dumps(self.identity.metadata(), sort_keys=True)})

    @classmethod
    def read(cls, path: Path) -> "SketchState":
        """Reads a state file.

        Raises:
            InputError: the file is absent, broken, of another hash version or without weights.
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
        if metadata.get("weight") not in get_args(Weight):
            raise InputError(
                f"{path}: weight: must be tokens or examples, got {metadata.get('weight')}; "
                "remove it to sketch again"
            )
        identity = SketchIdentity(
            CountSketch(int(metadata["proj_dim"]), int(metadata["seed"])),
            metadata["model_fingerprint"],
            tuple(metadata["parameters"].split("\n")),
            metadata["weight"],
        )
        return cls(
            identity,
            **{name: tensors[name] for name in _TENSORS},
            loss_sum=float(tensors["loss_sum"]),
            num_target_tokens=int(tensors["num_target_tokens"]),
        )
