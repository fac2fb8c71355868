"""The summary of adapters that are merged into one adapter."""

from typing import Any

from merit_fast.units import human_count


def describe_adapter(summary: dict[str, Any], state: str) -> str:
    """The summary of adapters that are merged into one."""
    count = len(summary["models"])
    low, high = summary["rank"]
    lines = [
        f"{summary['merged']}: {state}: an adapter, the {summary['method']} sum of {count} "
        f"adapter{'s' * (count != 1)}"
    ]
    lines += [f"  weight {weight:.6f}  {path}" for path, weight in summary["models"]]
    lines.append(f"  weights: {summary['weights_reason']}")
    lines += [
        f"  {path} lacks {number} of the layers; it counts as zero there"
        for path, number in summary["lacking"]
    ]
    rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
    lines.append(
        f"  {human_count(summary['parameters'])} parameters in {summary['layers']} layers and "
        f"{summary['whole_tensors']} whole tensors, {rank}, {summary['dtype']}"
    )
    if summary["largest_error"]:
        name, error = summary["largest_error"]
        lines.append(f"  relative error {summary['error']:.3e}, largest {error:.3e} in {name}")
    elif summary["is_exact"]:
        lines.append("  exact: the ranks add up")
    return "\n".join(lines)
