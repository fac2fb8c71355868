"""Vision towers that see the patches of all images end to end: the patches of each example."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from merit_fast.sketch.capture.layout import Pass, Site


def find_towers(model: nn.Module) -> dict[str, nn.Module]:
    """Outermost modules whose forward takes ``grid_thw``, by name, as the Qwen-VL family's does."""
    towers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in towers)
        if not inside and "grid_thw" in inspect.signature(type(module).forward).parameters:
            towers[name] = module
    return towers


def read_grid(
    run: Pass, site: Site, tower: nn.Module, config: Any, args: tuple[Any, ...], kwargs: Any
) -> None:
    """Notes in ``run`` the first patch of each example, by the tower's grid and the image tokens.

    Raises:
        Refusal: the image tokens do not divide the images among the examples.
    """
    assert site.tower is not None
    grid = inspect.signature(type(tower).forward).bind(tower, *args, **kwargs).arguments["grid_thw"]
    merge = int(getattr(tower, "spatial_merge_size", 1))
    candidates: list[Tensor] = []
    for key in ("image_token_id", "video_token_id"):
        token = getattr(config, key, None)
        if token is not None and run.input_ids is not None:
            offsets = patch_offsets(grid, merge, _per_example(run, run.input_ids == token))
            if offsets is None or any(torch.equal(offsets, other) for other in candidates):
                continue
            candidates.append(offsets)
    if len(candidates) != 1:
        raise site.refusal(
            f"sees {len(grid)} images that cannot be told apart by example: "
            "config.image_token_id or video_token_id "
            f"must mark their tokens in input_ids, got {len(candidates)} ways to read them"
        )
    (offsets,) = candidates
    if site.tower in run.patches and not torch.equal(run.patches[site.tower][0], offsets):
        run.twice.add(site.tower)
    run.patches[site.tower] = (offsets, merge**2)


def uneven_images(run: Pass, config: Any, pixel_values: Tensor) -> str | None:
    """Why images [images, ...] cannot be divided evenly among examples; None if they can.

    A model whose config names no image token has no such token to count: one image per example.
    """
    token = getattr(config, "image_token_id", None)
    if len(pixel_values) == run.size:
        if token is None or run.input_ids is None:
            return None
        counts = _per_example(run, run.input_ids == token)
        if not bool((counts != counts[0]).any()):
            return None
    return (
        f"sees pixel_values of {len(pixel_values)} images for {run.size} examples: parameters "
        "outside the decoder need one image per example, or batches of one example"
    )


def patch_offsets(grid: Tensor, merge: int, token_counts: Tensor) -> Tensor | None:
    """Computes the first patch of each example.

        patches = grid.prod(1); tokens = patches / merge**2      of each image
        an example's images are those whose tokens it holds, in order

    Args:
        grid: [images, 3] int64: frames, height and width in patches.
        merge: patches along each side of an image token.
        token_counts: [B] int64: image tokens of each example.

    Returns:
        [B + 1] int64 on the CPU; None if the counts do not fit the images.
    """
    ends = nn.functional.pad(grid.prod(1).cpu().cumsum(0), (1, 0))
    bounds = nn.functional.pad((token_counts.cpu() * merge**2).cumsum(0), (1, 0))
    return bounds if bool(torch.isin(bounds, ends).all()) and bounds[-1] == ends[-1] else None


def _per_example(run: Pass, mask: Tensor) -> Tensor:
    """[B] how often a mask over the input's tokens holds."""
    if run.cu_seqlens is None:
        return mask.sum(1)
    total = nn.functional.pad(mask.flatten().cumsum(0), (1, 0))
    return total[run.cu_seqlens.to(mask.device)].diff()
