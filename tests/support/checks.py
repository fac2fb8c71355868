"""The meaning of "equal" in these tests, in one place."""

import hashlib
import os
from pathlib import Path

import torch
from support.warm import run_python

# What rounding may add to a result whose reference itself is exact: relative, by the dtype of the
# computation.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 1e-2}

# Draws taken together where a result rounds to bf16 at another place than eager does.
DRAWS = 8


def rounding_share(numbers: int) -> float:
    """Share of eager's error that a result which rounds to bf16 at another place may add to it.

    Such errors are equal in size, not in value: the ratio of the norms of n independent ones
    scatters by 1 / sqrt(n). Three times that is allowed, and 5 % for gradients, whose rows share
    errors: over 8 draws their ratio scatters by 2 %. A kernel that rounds partial sums to bf16 adds
        17 % or more.
    """
    share: float = 3 / numbers**0.5
    return max(0.05, share)


def assert_close(
    actual: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype = torch.float32
) -> None:
    """|actual - truth| <= floor * |truth| in the 2-norm, and no NaN."""
    error = (actual.double() - truth.double()).norm() / truth.double().norm()
    assert error <= FLOOR[dtype], f"relative error {error:.2e} above {FLOOR[dtype]:.0e}"


def tree_bytes(directory: Path, ignore: tuple[str, ...] = ()) -> dict[str, str]:
    """Relative path -> sha256 of every file below, but for the names to ignore."""
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name not in ignore
    }


def run_at_level(script: str, level: str | None, timeout: float | None = None) -> str:
    """Standard output of a Python script, run in a process with one ISA level forced, if given."""
    environment = {**os.environ, **({"MERIT_FAST_SIMD": level} if level else {})}
    result = run_python(["-c", script], environment=environment, timeout=timeout)
    assert result.returncode == 0, result.stderr
    return str(result.stdout).strip()


def assert_never_worse(
    actual: torch.Tensor,
    eager: torch.Tensor,
    truth: torch.Tensor,
    share: float = 0.0,
    name: str = "",
) -> None:
    """|truth - actual| <= (1 + share) * |truth - eager| + floor * |truth| in the 2-norm.

    The floor is float32's for all dtypes.
    """
    truth = truth.double()
    ours, theirs = ((values.double() - truth).norm() for values in (actual, eager))
    bound = (1 + share) * theirs + FLOOR[torch.float32] * truth.norm()
    assert ours <= bound, (
        f"{name} error {ours:.3e}, eager has {theirs:.3e}, the truth's norm is {truth.norm():.3e}"
    )
