"""torch's fused AdamW over fp32 master weights, with a state that saves to and loads from plain tensors."""

import torch
from torch import Tensor, nn

from merit_fast.train.config import TrainConfig


class MasterAdamW:
    """AdamW (Loshchilov & Hutter 2019) whose weights and moments are fp32 whatever the model's dtype.

    bf16 alone loses updates: at lr 1e-5 plain bf16 AdamW moves a weight 11 % of what it should. An fp32 model is its
    own master.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.clip_norm = config.clip_norm
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters: list[Tensor] = [p for _, p in named]
        self.masters = [p.detach().float() if p.dtype != torch.float32 else p for p in self.parameters]
        self.separate = any(m is not p for m, p in zip(self.masters, self.parameters, strict=True))
        decayed = [m for m in self.masters if m.dim() >= 2]
        plain = [m for m in self.masters if m.dim() < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=True,
        )

    def step(self, learning_rate: float) -> float:
        """One update from the parameters' gradients, which are then freed. Returns their norm before clipping."""
        self._gather_gradients()
        norm = nn.utils.clip_grad_norm_(self.masters, self.clip_norm or float("inf"), foreach=True)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self._copy_back()
        for parameter in self.parameters:
            parameter.grad = None
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """Masters, moments and step counts by parameter name: what ``load_state`` needs to go on exactly."""
        tensors = {}
        for name, master in zip(self.names, self.masters, strict=True):
            tensors[f"master.{name}"] = master.detach()
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for name, master in zip(self.names, self.masters, strict=True):
            with torch.no_grad():
                master.copy_(tensors[f"master.{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
            if keys:
                self.adamw.state[master] = {key: tensors[f"{key}.{name}"].to(master.device) for key in keys}
        self._copy_back()

    def _gather_gradients(self) -> None:
        """Widens gradients into buffers that live as long as the run: fresh ones cost a page fault per 4 KiB."""
        if not self.separate:
            return
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            if parameter.grad is None:
                master.grad = None
            elif master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.copy_(parameter.grad)

    def _copy_back(self) -> None:
        if self.separate:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)
