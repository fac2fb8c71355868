"""Per-example gradient sketches from one ordinary backward pass.

All weights are frozen, so autograd computes gradients of activations only; forward hooks keep each layer's input x,
tensor hooks meet its output's gradient dy, and the kernels sketch dy^T x per example. No weight gradient is stored.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from merit_fast.errors import MeritFastError
from merit_fast.kernels.sketch import CountSketch, embedding_grad_sketch, flat_sketch, linear_grad_sketch

Backward = Callable[[Tensor], None]


class GradientSketcher:
    """Sketches the gradient of every trainable parameter, per example.

        with GradientSketcher(model, CountSketch(65536)) as sketcher:
            loss_per_example.sum().backward()
            sketches = sketcher.take()  # [B, D]

    The result equals ``sum over parameters of flat_sketch(d loss_b / d parameter)`` up to rounding. Parameters that
    require no gradient on entry are left out; tied ones count once. Flags and hooks are restored on exit. Linear,
    Conv1D (GPT-2) and Embedding layers use the kernels; any other module that owns parameters and maps one [B, ...]
    tensor to one [B, ...] tensor (norms, for example) is replayed per example by ``torch.func``.

    Raises:
        MeritFastError: in the forward or backward pass, for a parameter whose module fits none of these; names it.
    """

    def __init__(self, model: nn.Module, sketch: CountSketch) -> None:
        self.model, self.sketch = model, sketch
        self.names: dict[int, str] = {
            id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        if not self.names:
            raise MeritFastError("GradientSketcher: the model has no trainable parameter")
        if self._input_embedding() is None:
            raise MeritFastError(f"GradientSketcher: {type(model).__name__} names no input embedding")
        self._sketches: Tensor | None = None
        self._replaying = False

    @property
    def parameter_names(self) -> list[str]:
        return list(self.names.values())

    def __enter__(self) -> "GradientSketcher":
        self._flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
        self._handles = []
        for module in self.model.modules():
            owned = {
                local: self.names[id(parameter)]
                for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
                if id(parameter) in self.names
            }
            if owned or module is self._input_embedding():
                hook = self._forward_hook(module, owned)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
            if isinstance(module, nn.Linear):
                self._handles.append(module.register_forward_pre_hook(_contiguous_input))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._sketches = None

    def take(self) -> Tensor:
        """The sketches [B, D] float32 of the batch whose backward pass has just run; the next batch starts at zero."""
        if self._sketches is None:
            raise MeritFastError("GradientSketcher: take() before a forward and backward pass")
        sketches, self._sketches = self._sketches, None
        return sketches

    def _input_embedding(self) -> nn.Module | None:
        try:
            embedding: nn.Module | None = self.model.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return None
        return embedding

    def _forward_hook(self, module: nn.Module, owned: dict[str, str]) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._replaying:
                return
            x = args[0] if args else next(iter(kwargs.values()), None)
            name = next(iter(owned.values()), type(module).__name__)
            if not isinstance(output, Tensor) or not isinstance(x, Tensor):
                raise MeritFastError(
                    f"sketch: parameter {name} belongs to {type(module).__name__}, which does not map one tensor to "
                    "one tensor; freeze it (requires_grad_(False)) to leave it out"
                )
            if module is self._input_embedding():
                self._sketches = torch.zeros(len(x), self.sketch.proj_dim, device=output.device)
            if not output.requires_grad and torch.is_grad_enabled():
                output.requires_grad_(True)  # embeddings: with frozen weights nothing before them asks for a gradient
            if output.requires_grad and owned:
                backward = self._backward(module, owned, x.detach())
                output.register_hook(lambda dy: backward(dy))  # type: ignore[no-untyped-call]

        return hook

    def _backward(self, module: nn.Module, owned: dict[str, str], x: Tensor) -> Backward:
        if isinstance(module, nn.Linear):
            return lambda dy: self._linear(owned, x, dy, stored_transposed=False)
        if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers"):
            return lambda dy: self._linear(owned, x, dy, stored_transposed=True)
        if isinstance(module, nn.Embedding):
            return lambda dy: self._embedding(module, owned, x, dy)
        return lambda dy: self._replay(module, owned, x, dy)

    def _linear(self, owned: dict[str, str], x: Tensor, dy: Tensor, stored_transposed: bool) -> None:
        dy, x = self._by_example(owned, dy), self._by_example(owned, x)
        if name := owned.get("weight"):
            left, right = (x, dy) if stored_transposed else (dy, x)
            linear_grad_sketch(left, right, name, self.sketch, out=self._out())
        if name := owned.get("bias"):
            flat_sketch(dy.float().sum(1), name, self.sketch, out=self._out())

    def _embedding(self, module: nn.Embedding, owned: dict[str, str], token_ids: Tensor, dy: Tensor) -> None:
        if type(module).forward is not nn.Embedding.forward:
            if not hasattr(module, "embed_scale"):  # Gemma and others: rows times a constant
                raise MeritFastError(
                    f"sketch: parameter {owned['weight']} belongs to {type(module).__name__}, an embedding with a "
                    "forward of its own; freeze it (requires_grad_(False)) to leave it out"
                )
            dy = dy.float() * module.embed_scale  # type: ignore[operator]
        if len(token_ids) != len(self._out()):
            token_ids = token_ids.expand(len(self._out()), -1)  # positions, shared by the batch
        dy = dy.expand(*token_ids.shape, dy.shape[-1])
        if module.padding_idx is not None:  # torch gives this row no gradient
            dy = dy.masked_fill((token_ids == module.padding_idx).unsqueeze(-1), 0.0)
        embedding_grad_sketch(dy, token_ids, owned["weight"], self.sketch, out=self._out())

    def _replay(self, module: nn.Module, owned: dict[str, str], x: Tensor, dy: Tensor) -> None:
        x, dy = self._by_example(owned, x).float(), self._by_example(owned, dy).float()
        parameters = dict(module.named_parameters(recurse=False))
        fixed = {local: p.detach().float() for local, p in parameters.items() if local not in owned}
        wanted = {local: p.detach().float() for local, p in parameters.items() if local in owned}

        def gradient(one_x: Tensor, one_dy: Tensor) -> dict[str, Tensor]:
            def forward(values: dict[str, Tensor]) -> Tensor:
                result: Tensor = torch.func.functional_call(module, {**fixed, **values}, (one_x.unsqueeze(0),))
                return result.squeeze(0)

            _, pull_back = torch.func.vjp(forward, wanted)  # type: ignore[misc]
            gradients: dict[str, Tensor] = pull_back(one_dy)[0]
            return gradients

        self._replaying = True
        try:
            gradients = torch.func.vmap(gradient)(x, dy)
        finally:
            self._replaying = False
        for local, value in gradients.items():  # [B, *shape]
            rows = value.flatten(2) if value.dim() > 2 else value.unsqueeze(1)
            flat_sketch(rows.contiguous(), owned[local], self.sketch, out=self._out())

    def _out(self) -> Tensor:
        assert self._sketches is not None  # set by the input embedding, which runs first
        return self._sketches

    def _by_example(self, owned: dict[str, str], value: Tensor) -> Tensor:
        """[B, T, C] of a layer that saw [B, T, C], [B, C] or the tokens of all examples in one dimension."""
        batch = len(self._out())
        if value.dim() >= 2 and len(value) == batch:
            return value.flatten(1, -2) if value.dim() > 2 else value.unsqueeze(1)
        if value.dim() == 2 and len(value) % batch == 0 and not self._is_expert(owned):
            return value.view(batch, -1, value.shape[-1])
        name = next(iter(owned.values()))
        raise MeritFastError(
            f"sketch: parameter {name} sees an input of shape {list(value.shape)}, whose first dimension is not the "
            f"batch ({batch}); freeze it (requires_grad_(False)) to leave it out"
        )

    @staticmethod
    def _is_expert(owned: dict[str, str]) -> bool:
        """Routed experts see tokens in an order of their own, so their rows cannot be told apart by position."""
        return any("experts" in name for name in owned.values())


def _contiguous_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """With a frozen weight and strided input (a head after a slice) torch copies the weight once per example."""
    return tuple(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args)
