"""An optimizer's parameters, their states, and the dicts that hold these."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.optimizer._backward.hooks import InBackward
from merit_fast.kernels.optimizer._checks import OF_OPTIMIZER, check_not_replaced
from merit_fast.kernels.optimizer._loading import states as loading
from merit_fast.kernels.optimizer._loading.foreign import as_adamw
from merit_fast.kernels.optimizer._state import Options, new_state, refit
from merit_fast.kernels.optimizer._update import Member


class OptimizerWithStates(torch.optim.Optimizer):
    """The parameters and states of ``FusedAdamW``, without its step."""

    options: Options
    shard_group: Any
    grad_norm: Tensor | None
    last_norm: float | None
    num_skipped: int
    _in_backward: InBackward | None
    _written: dict[torch.device, Tensor]  # on GPUs: whether weights were written, not read yet
    _noted = False

    def members(self) -> list[Member]:
        """All parameters, numbered through the groups that they are in now."""
        pairs = ((group, p) for group in self.param_groups for p in group["params"])
        return [Member(group, number, p) for number, (group, p) in enumerate(pairs)]

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """The state of a parameter; makes it if needed. Its master exists before the first step.

        Raises:
            ValueError: a parameter of the same shape left the groups, and its state with it; or
                the parameter's data was replaced by data that the state does not fit.
        """
        state: dict[str, Any] = self.state[parameter]
        if not state:
            check_not_replaced(parameter, self._parameters(), self.state)
            state.update(new_state(parameter, self.options))
        else:
            refit(parameter, state, self.options)
        return state

    def note_written(self, results: Sequence[Tensor]) -> None:
        """Remembers what the op says of weights that someone else wrote."""
        if self.options.master != "fp32" or self._noted:
            return
        for result in results:
            before = self._written.get(result.device)
            found = result.any()
            self._written[result.device] = found if before is None else found | before
        if all(device.type == "cpu" for device in self._written):
            self.read_notes()

    def read_notes(self) -> None:
        """Warns once of such weights. Called before a step, it waits for no running kernel."""
        found = any(bool(flag) for flag in self._written.values())
        self._written = {}
        if found and not self._noted:
            self._noted = True
            warnings.warn(
                "FusedAdamW: weights were written since the last step; they became their float32 "
                "masters",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """torch's dict, with the options as text in every group. Leaves out departed parameters."""
        whole = self.state
        try:
            self.state = loading.states_of_members(whole, self._parameters())
            state_dict = super().state_dict()
        finally:
            self.state = whole
        counters = {"num_skipped": self.num_skipped, "last_norm": self.last_norm}
        text = loading.options_text(self.options, counters)
        for group in state_dict["param_groups"]:
            for name in OF_OPTIMIZER:  # ZeroRedundancyOptimizer puts them back at every step
                group.pop(name, None)
            group[loading.OPTIONS_KEY] = text
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of ours, of ``torch.optim.AdamW``, or of bitsandbytes' or torchao's AdamW.

        States keep their own dtypes; codes of other libraries are decoded exactly, then stored as
        ``moments`` says.

        Raises:
            ValueError: a state of other rules, kinds or sizes; nothing is changed then.
        """
        state_dict = as_adamw(state_dict, self._parameters())
        loading.check_loadable(state_dict)
        saved = loading.read_options(state_dict["param_groups"])
        loading.check_kinds(saved, self.options, self._parameters())
        before = (self.state, self.param_groups)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        try:
            # torch casts states to the parameters' dtypes; ``adopted`` gives them those they need.
            super().load_state_dict(state_dict)
            for name, parameter in zip(names, self._parameters(), strict=True):
                if name in state_dict["state"]:
                    kept = state_dict["state"][name]
                    self.state[parameter] = loading.adopted(parameter, kept, self.options)
        except Exception:
            self.state, self.param_groups = before
            raise
        for group in self.param_groups:
            group.pop(loading.OPTIONS_KEY, None)
        if saved is not None:
            self.options = loading.taken_over(saved, self.options)
            self.num_skipped = saved.get("num_skipped", 0)
            self.last_norm = saved.get("last_norm")

    def __getstate__(self) -> dict[str, Any]:
        kept = ("options", "grad_norm", "last_norm", "num_skipped")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy has no hooks and no group of processes.
        self.__dict__.setdefault("shard_group", None)
        self.__dict__.setdefault("_in_backward", None)
        self.__dict__.setdefault("_written", {})
