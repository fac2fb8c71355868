"""TRL's MergeModelCallback with our engine: merges checkpoints while or after a trainer trains."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from merit_fast.errors import InputError
from merit_fast.integrations.branches import is_model_folder
from merit_fast.integrations.mergekit.document import document_of
from merit_fast.integrations.mergekit.recipe import locate, merge_recipe, recipe_of
from merit_fast.merge.table import DEFAULT_METHOD
from merit_fast.progress import SilentProgress

CHECKPOINT = "CHECKPOINT"  # in a recipe: the checkpoint that was saved
_METHODS = (DEFAULT_METHOD, "ties", "dare_ties", "slerp")
_POLICY_DENSITY = [1.0, 0.7, 0.1]  # from the first layer to the last, as TRL has it


class MergeConfig:
    """TRL's MergeConfig: fields and defaults are the same; no mergekit is needed.

    Args:
        method: linear, ties, dare_ties or slerp.

    Attributes:
        policy_model_path: the checkpoint; the callback sets it in a copy.
        target_model_path: the other model; None: the model that training started from.
        policy_model_weight: weight of the checkpoint (linear, ties, dare_ties).
        target_model_weight: weight of the other model.
        policy_model_density: kept shares of the checkpoint, a gradient over its layers (ties,
            dare_ties).
        target_model_density: kept shares of the other model.
        normalize: 1 divides the sum by the weights (ties, dare_ties).
        t_values: place between the checkpoint, 0, and the other model, 1 (slerp).
        dtype: of the merged model.

    Raises:
        InputError: another method.
    """

    def __init__(self, method: str = DEFAULT_METHOD) -> None:
        if method not in _METHODS:
            raise InputError(f"method: must be {', '.join(_METHODS)}; got {method!r}")
        is_linear = method == DEFAULT_METHOD
        self.method = method
        self.policy_model_path: str | None = None
        self.target_model_path: str | None = None
        self.policy_model_weight = 0.5 if is_linear else 1.0
        self.target_model_weight = 0.5 if is_linear else 1.0
        self.policy_model_density = list(_POLICY_DENSITY)
        self.target_model_density = [1.0]
        self.normalize = 1.0
        self.t_values = 0.5
        self.dtype = "float16"

    def create(self) -> dict[str, Any]:
        """The recipe of the merge, as mergekit's YAML holds it."""
        policy = self.policy_model_path
        target = self.target_model_path
        recipe: dict[str, Any] = {"merge_method": self.method, "dtype": self.dtype}
        if self.method == "slerp":
            models = [{"model": target}]
            return {**recipe, "base_model": policy, "models": models, "parameters": self._slerp()}
        weights = {"policy": self.policy_model_weight, "target": self.target_model_weight}
        if self.method == DEFAULT_METHOD:
            return {
                **recipe,
                "models": [
                    {"model": policy, "parameters": {"weight": weights["policy"]}},
                    {"model": target, "parameters": {"weight": weights["target"]}},
                ],
            }
        policy_numbers = {"density": self.policy_model_density, "weight": weights["policy"]}
        target_numbers = {"density": self.target_model_density, "weight": weights["target"]}
        return {
            **recipe,
            "base_model": policy,
            "models": [
                {"model": target, "parameters": target_numbers},
                {"model": policy, "parameters": policy_numbers},
            ],
            "parameters": {"normalize": bool(self.normalize)},
        }

    def _slerp(self) -> dict[str, Any]:
        return {"t": self.t_values}


class MergeModelCallback(TrainerCallback):  # type: ignore[misc]
    """Merges a trainer's checkpoint with another model, into ``checkpoint-N/merged``.

        callback = MergeModelCallback(MergeConfig("slerp"), merge_at_every_checkpoint=True)
        trainer = DPOTrainer(..., callbacks=[callback])

    It takes the place of ``trl.experimental.merge_model_callback.MergeModelCallback``: arguments
    and places of files are the same, and the merge needs neither mergekit nor the models in memory.
    One process merges. Checkpoints that are adapters are merged as the base with the adapter.

    Args:
        merge_config: a ``MergeConfig``; or a recipe of mergekit, any method, as a mapping in which
            the model ``CHECKPOINT`` stands for the checkpoint. None: ``MergeConfig()``.
        merge_at_every_checkpoint: merge every checkpoint; False: only the last.
        push_to_hub: upload the merged model.

    Raises:
        InputError: before the first step: no checkpoint will be saved, the other model is not
            there, or a method that adapters do not go with. At a save: what the merge refuses.
    """

    def __init__(
        self,
        merge_config: "MergeConfig | Mapping[str, Any] | None" = None,
        merge_at_every_checkpoint: bool = False,
        push_to_hub: bool = False,
    ) -> None:
        self.merge_config = MergeConfig() if merge_config is None else merge_config
        self.merge_at_every_checkpoint = merge_at_every_checkpoint
        self.push_to_hub = push_to_hub

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if str(getattr(args.save_strategy, "value", args.save_strategy)) == "no":
            raise InputError("save_strategy: must save checkpoints to be merged, got no")
        recipe = self._recipe("POLICY", model)
        for reference in _models_of(recipe):
            if reference != "POLICY":
                locate(reference)
        if hasattr(model, "peft_config") and isinstance(self.merge_config, MergeConfig):
            method = self.merge_config.method
            if method != DEFAULT_METHOD:
                raise InputError(
                    f"merge_config.method: must be linear where the checkpoints are adapters, got "
                    f"{method}"
                )

    def on_save(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self.merge_at_every_checkpoint:
            self._merge(args, state, model)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if not self.merge_at_every_checkpoint:
            self._merge(args, state, model)

    def _merge(self, args: Any, state: Any, model: Any) -> None:
        if not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not is_model_folder(checkpoint):
            raise InputError(
                f"{checkpoint}: is not there to be merged: save_strategy did not save the last step"
            )
        recipe = self._recipe(str(checkpoint), model)
        if (checkpoint / "adapter_config.json").is_file():
            _put_adapter(recipe, str(checkpoint), _start_of(model))
        out = checkpoint / "merged"
        merge_recipe(recipe_of(document_of(recipe, "merge_config")), out, SilentProgress())
        if self.push_to_hub:
            _upload(out, f"{args.output_dir}_checkpoint-{state.global_step}_merged")

    def _recipe(self, checkpoint: str, model: Any) -> dict[str, Any]:
        config = self.merge_config
        if isinstance(config, Mapping):
            recipe: dict[str, Any] = _replaced(dict(config), CHECKPOINT, checkpoint)
            if checkpoint not in _models_of(recipe):
                raise InputError(f"merge_config: must have a model named {CHECKPOINT}")
            return recipe
        config = copy.copy(config)  # the user's may serve several trainers
        config.policy_model_path = checkpoint
        if config.target_model_path is None:
            config.target_model_path = _start_of(model)
        return config.create()


def _start_of(model: Any) -> str:
    """Path of the model that training started from."""
    path = getattr(model.config, "name_or_path", "")
    if not path:
        raise InputError(
            "merge_config.target_model_path: must be set: the model was not loaded from a path"
        )
    return str(path)


def _models_of(value: Any) -> list[str]:
    """Lists the models that a recipe names by a text."""
    if isinstance(value, Mapping):
        named = [
            text
            for key, text in value.items()
            if key in ("model", "base_model") and isinstance(text, str)
        ]
        return named + [name for each in value.values() for name in _models_of(each)]
    return [name for each in value for name in _models_of(each)] if isinstance(value, list) else []


def _replaced(value: Any, text: str, other: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(each, text, other) for key, each in value.items()}
    if isinstance(value, list):
        return [_replaced(each, text, other) for each in value]
    return copy.deepcopy(other) if value == text else value


def _put_adapter(recipe: dict[str, Any], checkpoint: str, start: str) -> None:
    """Names the checkpoint as an adapter on the model that it was trained on."""
    reference = {"model": start, "lora": checkpoint}
    recipe["models"] = _replaced(recipe.get("models", []), checkpoint, reference)
    recipe.setdefault("base_model", start)


def _upload(folder: Path, name: str) -> None:
    from trl.experimental.merge_model_callback import upload_model_to_hf

    upload_model_to_hf(str(folder), name)
