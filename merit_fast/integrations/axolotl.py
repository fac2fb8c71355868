"""merit_fast in axolotl: kernels, optimizer and branch.json by three lines of its YAML.

    plugins: [merit_fast.integrations.axolotl.MeritPlugin]
    merit_kernels: auto
    merit_optimizer: {rounding: stochastic}

axolotl logs an ImportError of a plugin and trains without it. So the plugin prints a line when it
is there, and a run without that line has no plugin.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from merit_fast.errors import InputError, MeritFastError

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel, ConfigDict, model_validator
except ImportError as error:
    raise ImportError(
        f"merit_fast.integrations.axolotl needs axolotl: pip install axolotl ({error})"
    ) from error

from merit_fast.integrations.per_dataset.callback import MeritCallback
from merit_fast.integrations.stacks.axolotl_rows import COLUMN, keep_names, without_names
from merit_fast.integrations.stacks.callback import StackCallback
from merit_fast.integrations.training import fused_adamw
from merit_fast.kernels.optimizer import FusedAdamW

_PREFIX = "merit_"


class OptimizerArgs(BaseModel):  # type: ignore[misc]
    """Options of ``FusedAdamW`` that axolotl has no keys for; typos are refused."""

    model_config = ConfigDict(extra="forbid")

    rounding: Literal["stochastic", "nearest"] = "stochastic"
    master: Literal["none", "fp32", "split", "split8"] = "none"
    moments: Literal["fp32", "bf16", "int8"] = "fp32"


class MeritArgs(BaseModel):  # type: ignore[misc]
    """Our keys in axolotl's YAML.

    Attributes:
        merit_kernels: "auto": norms, MLPs, positions and loss by our kernels; "eager": none.
        merit_optimizer: options of ``FusedAdamW``, which replaces ``optimizer``; absent: none.
        merit_branch: write branch.json, by whose tokens merges weigh the model.
        merit_datasets: names of the datasets for branch.json.
        merit_losses: log losses and tokens of each dataset; ``merit_datasets`` then names all of
            them, or is absent: the names of their files.
        merit_column: column of the rows with the dataset's name, for ``merit_losses``.
    """

    merit_kernels: Literal["auto", "eager"] = "auto"
    merit_optimizer: OptimizerArgs | None = None
    merit_branch: bool = True
    merit_datasets: list[str] = []
    merit_losses: bool = False
    merit_column: str | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_unknown_keys(cls, values: Any) -> Any:
        """Refuses keys that begin with merit_ and are none of ours; axolotl would drop them."""
        names = [name for name in values if isinstance(name, str) and name.startswith(_PREFIX)]
        for name in names:
            if name not in MeritArgs.model_fields:
                known = ", ".join(MeritArgs.model_fields)
                raise ValueError(f"{name}: unknown key; merit_fast has {known}")
        return values


class MeritPlugin(BasePlugin):  # type: ignore[misc]
    """Patches the model that axolotl loads, and counts the tokens that it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.callback: StackCallback | None = None
        self.losses: MeritCallback | None = None

    def register(self, cfg: Any) -> None:
        """Prints that the plugin is there: axolotl only logs a plugin that cannot be imported."""
        print("merit_fast: the plugin is registered in axolotl", flush=True)

    def get_input_args(self) -> str:
        """The model of our keys, as axolotl names it."""
        return f"{__name__}.MeritArgs"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Lets axolotl's own loader keep the dataset of each row, where losses need it."""
        if cfg.get("merit_losses"):
            column = cfg.get("merit_column")
            names = () if column else tuple(cfg.get("merit_datasets") or ())
            keep_names(cfg, names, column)

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Patches the model before adapters are laid on it."""
        self._begin(cfg).patch(model)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Sets the optimizer, and counts and tells losses from here on.

        Raises:
            InputError: the YAML names optimizer options that FusedAdamW would not get.
        """
        options = cfg.get("merit_optimizer")
        if options is not None:
            trainer.optimizer_cls_and_kwargs = (FusedAdamW, optimizer_kwargs(options, trainer.args))
        if cfg.get("merit_losses"):
            trainer.eval_dataset = without_names(trainer.eval_dataset)
            self.losses = MeritCallback(COLUMN, start=cfg.get("base_model")).attach(trainer)
        if cfg.get("merit_branch", True):
            callback = self._begin(cfg)
            callback.watch(trainer.model)
            trainer.add_callback(callback)

    def post_train(self, cfg: Any, model: Any) -> None:
        """Checks and writes the counts; axolotl calls this before and after it saves.

        Raises:
            MeritFastError: no target token was counted.
        """
        if self.losses is not None:  # axolotl saves adapters past the Trainer
            self.losses.write_files(Path(cfg["output_dir"]))
        callback = self.callback
        if callback is None or not cfg.get("merit_branch", True):
            return
        if not callback.counts.num_target_tokens:
            raise MeritFastError("merit_fast: axolotl trained on no token that is in the loss")

    def _begin(self, cfg: Any) -> StackCallback:
        if self.callback is None:
            self.callback = StackCallback(
                cfg.get("merit_kernels") or "auto",
                start=cfg.get("base_model"),
                datasets=tuple(cfg.get("merit_datasets") or ()),
            )
        return self.callback


def optimizer_kwargs(options: Any, args: Any) -> dict[str, Any]:
    """Arguments of ``FusedAdamW`` from our keys and the Trainer's.

    Raises:
        InputError: a Trainer's argument changes the optimizer in a way that FusedAdamW has not.
    """
    if args.optim_args:
        raise InputError(f"optim_args: must be absent with merit_optimizer, got {args.optim_args}")
    chosen = OptimizerArgs(**dict(options)).model_dump()
    return fused_adamw(args, **chosen)[1]
