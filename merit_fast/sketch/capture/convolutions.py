"""Sketches of convolutions, and of biases."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from merit_fast.sketch.capture.layout import Pass, Site


def conv_backward(site: Site, run: Pass, dy: Tensor, x: Tensor) -> None:
    """Sketches Conv2d and Conv3d: the unfolded windows of x times dy.

    Patch embeddings unfold without a copy.
    """
    module = site.module
    assert isinstance(module, _ConvNd)
    dims = len(module.kernel_size)
    if any(module._reversed_padding_repeated_twice):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for i in range(dims):
        x = x.unfold(2 + i, module.kernel_size[i], module.stride[i])
    positions = list(range(2, 2 + dims))
    x = x.permute(0, *positions, 1, *range(2 + dims, 2 + 2 * dims))
    windows = x.flatten(1, dims).flatten(2)  # [B, L, I k...]
    (dy, windows), offsets = run.divide(site, dy.flatten(2).transpose(1, 2), windows)
    if name := site.owned.get("weight"):
        run.add_product(name, dy, windows, offsets)
    sketch_bias(site, run, dy, offsets)


def signal_backward(site: Site, run: Pass, dy: Tensor, x: Tensor) -> None:
    """Sketches Conv1d, dense or with one group per input: dW exists, small, for every example."""
    module = site.module
    assert isinstance(module, nn.Conv1d)
    if any(module._reversed_padding_repeated_twice):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    options = (module.kernel_size[0], module.stride[0], module.dilation[0], module.groups == 1)
    _signal(site, run, dy, x, *options)


def depthwise_call_backward(
    given: Mapping[str, Any], site: Site, run: Pass, dy: Tensor, x: Tensor
) -> None:
    """Sketches a call of F.conv1d with a weight [C, 1, k] and C groups."""
    stride, padding, dilation = (
        value[0] if isinstance(value, list | tuple) else value
        for value in (given.get("stride", 1), given.get("padding", 0), given.get("dilation", 1))
    )
    kernel = given["weight"].shape[2]
    _signal(site, run, dy, F.pad(x, (padding, padding)), kernel, stride, dilation, dense=False)


def _signal(
    site: Site,
    run: Pass,
    dy: Tensor,
    x: Tensor,
    kernel: int,
    stride: int,
    dilation: int,
    dense: bool,
) -> None:
    parts = run.parts(site, dy)
    if len(parts) != len(dy):
        raise site.refusal(f"sees {len(dy)} signals for {len(parts)} examples")
    windows = x.unfold(2, dilation * (kernel - 1) + 1, stride)[..., ::dilation]  # [B, I, L, k]
    if name := site.owned.get("weight"):
        if dense:
            gradient = torch.einsum("bol,bilk->boik", dy.float(), windows.float())
        else:
            windows = windows.repeat_interleave(dy.shape[1] // x.shape[1], dim=1)
            gradient = torch.einsum("bol,bolk->bok", dy.float(), windows.float())
        run.add_gradients(name, gradient.flatten(1, -2))
    sketch_bias(site, run, dy.transpose(1, 2), None)


def sketch_bias(site: Site, run: Pass, dy: Tensor, offsets: Tensor | None) -> None:
    if name := site.owned.get("bias"):
        run.add_vector(name, dy, offsets)
