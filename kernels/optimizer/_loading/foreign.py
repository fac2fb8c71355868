"""States of other libraries' optimizers as states of torch's AdamW: bitsandbytes and torchao."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.optimizer._sharding import places

_MOMENTS = ("exp_avg", "exp_avg_sq")
_WRAPPED = "__bnb_optimizer_quant_state__"  # bitsandbytes hides its tensors from FSDP in it
_KEYS = frozenset(("step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"))
_BLOCKS = (256, 2048)  # elements with one scale: from bitsandbytes 0.44 on, and before
_NUM_CODES = 256


@torch.no_grad()
def as_adamw(state_dict: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """The state dict with the moments of bitsandbytes' and torchao's Adam in float32.

    bitsandbytes: moment = qmap[code] * absmax of its block of 256 elements (2048 before 0.44), or a
    float32 tensor. torchao: its tensors' own ``dequantize``. Everything else stays as it is.

    Args:
        state_dict: of any optimizer.
        parameters: those of the optimizer that loads it, in the order of its groups.

    Raises:
        ValueError: a state of bitsandbytes or torchao that is not Adam's, or of a form that is not
            known, or of a sharded parameter.
    """
    names = [name for group in state_dict["param_groups"] for name in group["params"]]
    by_name = dict(zip(names, parameters, strict=False))  # torch refuses another number later
    states = dict(state_dict["state"])
    with_codes = set()
    for name, state in state_dict["state"].items():
        parameter = by_name.get(name)
        if not isinstance(state, Mapping) or parameter is None:
            continue
        if _WRAPPED in state or "state1" in state:
            states[name] = _of_bitsandbytes(name, state, parameter)
        elif any(_is_quantised(places.local(value)) for value in _tensors(state)):
            with_codes.add(name)
            states[name] = _of_torchao(name, state, parameter)
    groups = [_group(group, with_codes) for group in state_dict["param_groups"]]
    return {**state_dict, "state": states, "param_groups": groups}


def _group(group: Mapping[str, Any], with_codes: set[Any]) -> Mapping[str, Any]:
    """A group with the numbers of torch's AdamW."""
    if group.get("alpha"):
        raise ValueError(
            f"FusedAdamW: the loaded state is of AdEMAMix (alpha={group['alpha']}), not of AdamW"
        )
    if not with_codes.intersection(group["params"]):
        return group
    if group.get("weight_decay"):
        warnings.warn(
            "FusedAdamW: the loaded state of torchao does not tell AdamW from Adam; its weight "
            f"decay of {group['weight_decay']} is taken as AdamW's, decoupled",
            stacklevel=4,
        )
    return {**group, "lr": float(group["lr"])}  # a tensor there


def _of_bitsandbytes(name: Any, state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """A state of bitsandbytes' Adam or AdamW, whose decay is decoupled in both."""
    values = {key: value for key, value in state.items() if key != _WRAPPED}
    values |= state.get(_WRAPPED, {})
    _refuse_sharded(name, parameter, "bitsandbytes")
    missing = sorted({"step", "state1", "state2"} - values.keys())
    unknown = sorted(values.keys() - _KEYS)
    if missing or unknown:
        raise ValueError(
            f"FusedAdamW: the loaded state of parameter {name} is of bitsandbytes, but not of its "
            f"Adam: missing {', '.join(missing) or 'nothing'}; "
            f"unknown {', '.join(unknown) or 'nothing'}"
        )
    moments = (_decoded(name, values, number, parameter) for number in (1, 2))
    return {"step": values["step"], **dict(zip(_MOMENTS, moments, strict=True))}


def _decoded(name: Any, values: Mapping[str, Any], number: int, parameter: Tensor) -> Tensor:
    """One moment of bitsandbytes in float32, with the bits of its own dequantize_blockwise."""
    codes: Tensor = values[f"state{number}"]
    if codes.shape != parameter.shape or not codes.is_contiguous():
        raise _unreadable(name, f"state{number}", f"contiguous {list(parameter.shape)}", codes)
    if codes.dtype == torch.float32:
        return codes
    if codes.dtype != torch.uint8:
        raise _unreadable(name, f"state{number}", "of uint8 or float32", codes)
    qmap = values.get(f"qmap{number}")
    absmax = values.get(f"absmax{number}")
    if qmap is None or qmap.shape != (_NUM_CODES,):
        raise _unreadable(name, f"qmap{number}", f"[{_NUM_CODES}]", qmap)
    count = codes.numel()
    blocks = {-(-count // block): block for block in reversed(_BLOCKS)}
    if absmax is None or absmax.dim() != 1 or len(absmax) not in blocks:
        expected = f"[{' or '.join(str(number) for number in sorted(blocks, reverse=True))}]"
        raise _unreadable(name, f"absmax{number}", expected, absmax)
    scales = absmax.float().repeat_interleave(blocks[len(absmax)])[:count]
    moment: Tensor = qmap.float()[codes.flatten().int()].mul_(scales)
    return moment.view(codes.shape)


def _unreadable(name: Any, key: str, expected: str, value: Any) -> ValueError:
    found = "nothing"
    if isinstance(value, Tensor):
        layout = "" if value.is_contiguous() else "not contiguous "
        found = f"{layout}{value.dtype} {list(value.shape)}"
    return ValueError(
        f"FusedAdamW: the loaded state of parameter {name} is of bitsandbytes: {key} must be "
        f"{expected}, is {found}"
    )


def _of_torchao(name: Any, state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    _refuse_sharded(name, parameter, "torchao")
    return {
        key: value.dequantize().float() if _is_quantised(value) else value
        for key, value in state.items()
    }


def _refuse_sharded(name: Any, parameter: Tensor, library: str) -> None:
    if places.is_sharded(parameter):
        raise ValueError(
            f"FusedAdamW: the loaded state of parameter {name} is of {library}, which is read for "
            "whole parameters only; load it in one process, and save it again for these shards"
        )


def _tensors(state: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


def _is_quantised(value: Any) -> bool:
    """Whether a tensor is of a class that stores codes and dequantizes itself, as torchao's."""
    return isinstance(value, Tensor) and type(value).dequantize is not Tensor.dequantize
