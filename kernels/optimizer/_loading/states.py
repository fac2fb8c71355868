"""Loaded states: what is refused, what is converted, which options they were made with."""

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.optimizer._eager import flat
from merit_fast.kernels.optimizer._sharding import places
from merit_fast.kernels.optimizer._state import (
    Options,
    decoded_moment,
    encoded_moment,
    in_layout_of,
    new_state,
)

# The key of a group in a state dict, not in ``param_groups``, under which the options are.
OPTIONS_KEY = "fused_adamw"
# Options that a state remembers; the backend changes no number.
REMEMBERED = (
    "rounding",
    "master",
    "moments",
    "average_decay",
    "max_norm",
    "zero_grad",
    "skip_nonfinite",
    "seed",
)
ADAMW_KEYS = ("step", "exp_avg", "exp_avg_sq")
OUR_KEYS = (
    "exp_avg_scale",
    "exp_avg_sq_scale",
    "master",
    "low_bits",
    "average",
    "num_averaged",
)


def options_text(options: Options, counters: Mapping[str, Any]) -> str:
    """Options and counters as one JSON string, which every format of checkpoints can hold."""
    return json.dumps({name: getattr(options, name) for name in REMEMBERED} | dict(counters))


def states_of_members(states: Any, parameters: Iterable[Tensor]) -> Any:
    """The states without those of parameters that left the groups, with a warning about these."""
    known = {id(parameter) for parameter in parameters}
    kept = type(states)(states.default_factory)
    shapes = []
    for key, state in states.items():
        if not isinstance(key, Tensor) or id(key) in known:
            kept[key] = state
        elif state:
            shapes.append(str(list(key.shape)))
    if shapes:
        warnings.warn(
            "FusedAdamW: the state dict leaves out parameters that are in no group, of shapes "
            f"{', '.join(shapes)}",
            stacklevel=3,
        )
    return kept


def read_options(groups: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The options that a state dict's groups remember; None if another optimizer made them."""
    for group in groups:
        if OPTIONS_KEY in group:
            options: dict[str, Any] = json.loads(group[OPTIONS_KEY])
            return options
    return None


def check_kinds(
    saved: Mapping[str, Any] | None, options: Options, parameters: Iterable[Tensor]
) -> None:
    """Raises ValueError where sharded states of other kinds are loaded.

    Distributed checkpoints copy what they read into tensors of this optimizer's kinds, which loses
    8-bit moments and split masters.
    """
    if saved is None or not any(places.is_sharded(parameter) for parameter in parameters):
        return
    for name in ("moments", "master"):
        kinds = {saved[name], getattr(options, name)}
        if len(kinds) == 2 and kinds != {"fp32", "bf16"}:
            raise ValueError(
                f"FusedAdamW: the loaded state of sharded parameters was made with "
                f"{name}={saved[name]!r}; this optimizer has {name}={getattr(options, name)!r}"
            )


def taken_over(saved: Mapping[str, Any], options: Options) -> Options:
    """This optimizer's options with the seed that the state was made with.

    Any difference is a warning: another seed would not resume the same run.
    """
    lines = [
        f"{name} {saved[name]!r} (now {getattr(options, name)!r})"
        for name in REMEMBERED
        if name in saved and saved[name] != getattr(options, name)
    ]
    if lines:
        warnings.warn(
            f"FusedAdamW: the loaded state was made with other options: {', '.join(lines)}; the "
            "seed is taken over, the others stay as they are now",
            stacklevel=3,
        )
    return replace(options, seed=saved.get("seed", options.seed))


def check_loadable(state_dict: Mapping[str, Any]) -> None:
    """Refuses states of other rules than AdamW's.

    Raises:
        ValueError: names the option or the key that this optimizer has no place for.
    """
    for group in state_dict["param_groups"]:
        _check_group(group)
    for name, state in state_dict["state"].items():
        if isinstance(state, Mapping) and state:
            _check_state(name, state)


def _check_group(group: Mapping[str, Any]) -> None:
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"FusedAdamW: has no {name}, the loaded state was made with it")
    if group.get("decoupled_weight_decay") is False:
        if "amsgrad" not in group:
            raise ValueError("FusedAdamW: the loaded state is of RAdam or NAdam, not of AdamW")
        if group.get("weight_decay", 0):
            raise ValueError(
                "FusedAdamW: weight decay is decoupled, the loaded state was made with L2 decay "
                f"(torch.optim.Adam, weight_decay={group['weight_decay']})"
            )
    for name in ("bias_correction", "correct_bias"):
        if not group.get(name, True):
            raise ValueError(f"FusedAdamW: the loaded state was made with {name}=False")


def _check_state(name: Any, state: Mapping[str, Any]) -> None:
    missing = [key for key in ADAMW_KEYS if key not in state]
    unknown = sorted(str(key) for key in state if key not in ADAMW_KEYS + OUR_KEYS)
    if missing or unknown:
        raise ValueError(
            f"FusedAdamW: the loaded state of parameter {name} is not AdamW's: "
            f"missing {', '.join(missing) or 'nothing'}; unknown {', '.join(unknown) or 'nothing'}"
        )


@torch.no_grad()
def adopted(parameter: Tensor, saved: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """A loaded state in the dtypes and layout of ``new_state``; missing entries are new.

    Raises:
        ValueError: it holds a master of the other kind, or tensors of another size.
    """
    if not saved:
        return {}
    state = new_state(parameter, options)
    state["step"].fill_(float(saved["step"]))
    for name in ("exp_avg", "exp_avg_sq"):
        _adopt_moment(parameter, saved, state, name)
    for name, other in (("master", "low_bits"), ("low_bits", "master")):
        if name in state and name in saved:
            kind, kept = saved[name].dtype, state[name].dtype
            if name == "low_bits" and kind != kept:
                raise ValueError(
                    f"FusedAdamW: the loaded low_bits are {kind}, "
                    f"master={options.master!r} needs {kept}"
                )
            state[name] = _moved(parameter, saved[name], state[name].dtype, name)
        elif name in state and other in saved:
            raise ValueError(
                f"FusedAdamW: the loaded state keeps {other!r}, "
                f"master={options.master!r} needs {name!r}"
            )
    if "average" in state and "average" in saved:
        state["average"] = _moved(parameter, saved["average"], torch.float32, "average")
        state["num_averaged"] = int(saved["num_averaged"])
    return state


def _adopt_moment(
    parameter: Tensor, saved: Mapping[str, Any], state: dict[str, Any], name: str
) -> None:
    value = saved[name]
    scale = f"{name}_scale"
    if scale in saved and value.shape == (parameter.numel(),):  # flat, as version 0.2.0 wrote them
        value = torch.empty_like(parameter, dtype=value.dtype)
        flat(value).copy_(saved[name])
    if not places.is_sharded(parameter) and value.shape != parameter.shape:
        raise _of_another_size(name, value, parameter)
    alike = places.is_sharded(parameter) or value.stride() == state[name].stride()
    if scale in saved and scale in state and alike:
        for key, loaded in ((name, value), (scale, saved[scale])):
            if loaded.shape != state[key].shape:
                raise _of_another_size(key, loaded, state[key])
            moved = places.moved_onto(parameter, loaded)
            state[key] = moved.to(parameter.device, state[key].dtype)
        return
    if places.is_sharded(parameter) and (scale in saved) != (scale in state):
        raise ValueError(
            f"FusedAdamW: {name} of a sharded parameter is loaded by the kind of moments that made "
            f"it; the state has {value.dtype}, this optimizer {state[name].dtype}"
        )
    if not value.is_floating_point() and scale not in saved:
        raise ValueError(f"FusedAdamW: loaded {name} is {value.dtype} and has no {scale}")
    if scale in saved:
        value = decoded_moment(places.whole(value), places.whole(saved[scale]), name)
    if scale in state:
        value = places.whole(value).to(parameter.device, torch.float32)
        state[name] = encoded_moment(parameter, value, state[scale], name)
    else:
        state[name] = _moved(parameter, value, state[name].dtype, name)


def _moved(parameter: Tensor, value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if value.shape != parameter.shape:
        raise _of_another_size(name, value, parameter)
    value = places.moved_onto(parameter, value).to(device=parameter.device, dtype=dtype)
    if places.is_sharded(parameter):
        return places.like(parameter, places.local(value).contiguous())
    return in_layout_of(parameter, value)


def _of_another_size(name: str, value: Tensor, expected: Tensor) -> ValueError:
    return ValueError(
        f"FusedAdamW: loaded {name} must be {list(expected.shape)}, is {list(value.shape)}"
    )
