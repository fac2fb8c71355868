"""Options of the train stage."""

import re
from typing import Literal

from merit_fast.kernels.average.dtypes import SPELLINGS
from merit_fast.options.fields import option, require
from merit_fast.records import record, replace
from merit_fast.train.adapter.config import AdapterConfig
from merit_fast.train.stack.options import Engine, check_engine_options


@record
class ControlsConfig:
    """Arms that are trained next to ``merit``, to compare it with."""

    joint: bool = option(False, "one run on all rows, from the base")
    joint_short: bool = option(
        False, "joint with only as many steps as the longest branch of merit"
    )
    joint_low: float | None = option(
        None, "joint with a lower learning rate: the factor on learning_rate"
    )
    random: int = option(0, "number of random balanced splits, distinct from merit's")
    iid: int | None = option(
        None, "number of deals of all rows to the branches; None: 1 with random splits, else 0"
    )

    def __post_init__(self) -> None:
        factor = self.joint_low
        is_lower = factor is None or 0 < factor < 1
        require(is_lower, "joint_low", "a factor above 0 and below 1", factor)
        require(self.random >= 0, "random", "at least 0", self.random)
        require(self.iid is None or self.iid >= 0, "iid", "at least 0", self.iid)

    @property
    def num_iid(self) -> int:
        """Number of iid arms: they tell the effect of merging from that of splitting."""
        return int(self.random > 0) if self.iid is None else self.iid


@record
class TrainConfig:
    """Fine-tuning with AdamW, of all weights or of an adapter; one recipe for all branches."""

    epochs: int = option(1, "passes over each branch's examples")
    learning_rate: float = option(2.0e-4, "peak of the cosine schedule")
    batch_size: int = option(16, "examples per optimizer step; with packing on average")
    accumulation: int = option(1, "micro-batches per step (same gradient, less memory)")
    warmup_fraction: float = option(
        0.05, "share of the steps in which the learning rate rises from zero"
    )
    final_fraction: float = option(0.1, "learning rate at the last step, as a share of the peak")
    weight_decay: float = option(0.0, "decoupled, on every parameter of two or more dimensions")
    beta1: float = option(0.9, "AdamW's first moment decay")
    beta2: float = option(0.98, "AdamW's second moment decay")
    clip_norm: float = option(1.0, "gradients are scaled to at most this norm; 0 turns it off")
    dtype: Literal["auto", "bf16", "fp32"] = option(
        "auto",
        "dtype of the weights; bf16 keeps fp32 masters; auto: bf16 where the machine is fast at it",
        spellings=SPELLINGS,
    )
    kernels: Literal["auto", "eager"] = option(
        "auto", "auto: norms, MLPs, positions and loss by our kernels; eager: none"
    )
    packing: bool = option(
        False,
        "lay examples end to end in rows of up to data.max_length tokens, by best fit, without "
        "padding; each row is a micro-batch",
    )
    budget: Literal["epochs", "equal-steps", "equal-tokens"] = option(
        "epochs",
        "epochs: passes over each branch's rows; equal-steps, equal-tokens: the branches "
        "of an arm share the steps or target tokens of these epochs equally",
        omit_default=True,
    )
    mix: float = option(
        0.0,
        "share of every other group's rows that a branch also trains on; 0: MERIT",
        omit_default=True,
    )
    seed: int = option(0, "seed of the data order")
    seeds: int = option(1, "times that every arm is trained: with seed, seed + 1, ...")
    controls: ControlsConfig = option(
        ControlsConfig(),
        "control arms: {joint: true, joint_short: true, joint_low: FACTOR, random: N, iid: N}",
    )
    freeze: tuple[str, ...] | None = option(
        None,
        "regular expressions of parameters that stay as they are; null: the vision tower and the "
        "projector of a model that reads images (the paper), []: none",
    )
    checkpoint_steps: int = option(200, "optimizer steps between checkpoints to resume from")
    adapter: AdapterConfig = option(
        AdapterConfig(),
        "low-rank adapter in place of all weights: {kind: lora, rank: 16, targets: all-linear}",
        omit_default=True,
    )
    gradient_checkpointing: bool = option(
        False,
        "compute the layers again in the backward pass: less memory, about a third more time",
        omit_default=True,
    )
    optimizer: Literal["adamw", "adamw-8bit"] = option(
        "adamw",
        "adamw: fp32 masters and moments; adamw-8bit: 8-bit moments, and 8 more bits of the "
        "master next to a bf16 weight",
        omit_default=True,
    )
    shard: Literal["none", "full", "auto"] = option(
        "none",
        "what the processes of torchrun divide. none: the steps only; full: also weights, "
        "gradients, masters and moments (FSDP2); auto: full where whole models do not fit",
        omit_default=True,
    )
    update_in_backward: Literal["previous", "two-pass"] | None = option(
        None,
        "update each weight inside the backward pass, so that few gradients are in memory; clips "
        "by the norm of the step before (previous) or of a backward pass before (two-pass)",
        omit_default=True,
    )
    evaluate_steps: int | None = option(
        None,
        "optimizer steps between measurements of the loss on the branch's held-out rows",
        omit_default=True,
    )
    patience: int | None = option(
        None,
        "measurements without a better held-out loss after which a branch ends; it keeps the best",
        omit_default=True,
    )
    report_to: tuple[str, ...] = option(
        (),
        "trackers that get the metrics, by their names in transformers: tensorboard, wandb, ...",
        omit_default=True,
    )
    max_shard_size: str = option("2GB", "largest weight file of a branch")
    engine: Engine = option(
        "builtin", "the stack that trains the branches, in a process of its own", omit_default=True
    )
    engine_config: str | None = option(
        None,
        "your own YAML of that stack: its keys are kept, its model, rows and output replaced",
        form="FILE",
        omit_default=True,
    )
    engine_command: str | None = option(
        None,
        "engine command: the command of a branch, with {rows}, {config}, {base}, {out}, {branch}, "
        "{group} and {seed}",
        omit_default=True,
    )
    engine_python: str | None = option(
        None,
        "Python of the environment that has the stack; absent: this one",
        form="FILE",
        omit_default=True,
    )

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation", "seeds", "checkpoint_steps"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for pattern in self.freeze or ():
            require(_is_expression(pattern), "freeze", "regular expressions", pattern)
        require(self.learning_rate > 0, "learning_rate", "positive", self.learning_rate)
        for name in ("warmup_fraction", "final_fraction", "beta1", "beta2"):
            require(0 <= getattr(self, name) <= 1, name, "between 0 and 1", getattr(self, name))
        require(0 <= self.mix < 1, "mix", "from 0 to below 1", self.mix)
        require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        require(self.clip_norm >= 0, "clip_norm", "at least 0", self.clip_norm)
        for name in ("evaluate_steps", "patience"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "at least 1", value)
        for name, value in (("packing", self.packing), ("accumulation", self.accumulation > 1)):
            rule = "absent with update_in_backward, which needs one micro-batch a step"
            require(not (value and self.update_in_backward), name, rule, getattr(self, name))
        is_measured = self.patience is None or self.evaluate_steps is not None
        require(is_measured, "patience", "absent without evaluate_steps", self.patience)
        self._check_shard()
        check_engine_options(
            self.engine, self.engine_config, self.engine_command, self.engine_python
        )

    def _check_shard(self) -> None:
        """Checks that the options go with a divided model."""
        if self.shard != "full":
            return
        adapter = self.adapter
        apart = f"absent with shard {self.shard}"
        for key, holds, value in (
            ("adapter.kind", adapter.kind != "dora", adapter.kind),
            ("adapter.base", adapter.base == "as-is", adapter.base),
            ("adapter.save", not adapter.is_on or adapter.is_saved_apart, adapter.save),
            ("adapter.modules_to_save", not adapter.modules_to_save, adapter.modules_to_save),
        ):
            require(holds, key, apart, value)
        updates = self.update_in_backward if adapter.is_on else None
        require(updates is None, "update_in_backward", f"{apart} and an adapter", updates)

    def with_builtin_engine(self) -> "TrainConfig":
        """Returns these options for the built-in trainer."""
        return replace(
            self, engine="builtin", engine_config=None, engine_command=None, engine_python=None
        )

    def without_plan(self) -> "TrainConfig":
        """Returns the options of one branch, without those that decide which branches there are."""
        return replace(self, seeds=1, budget="epochs", mix=0.0, controls=ControlsConfig())


def _is_expression(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
