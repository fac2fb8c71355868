"""Parts of a model: which parameter belongs to which part, and the sketches of a pass by part.

Hash keys are the names of parameters, so the sketches of the parts and of the rest add up to the
whole's.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from merit_fast.errors import InputError, show
from merit_fast.sketch.capture.layout import Pass
from merit_fast.sketch.config import check_parts
from merit_fast.sketch.divided.tensor_parallel import Slices
from merit_fast.sketch.precondition.example_sketches import REST


def assign_parts(parts: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Parameter -> its part, for those that are in one.

    Args:
        parts: part -> regular expression, searched for in the names.
        names: canonical names of the sketched parameters.

    Raises:
        InputError: a name or an expression is wrong, a part matches no parameter, or two parts
            match the same one.
    """
    check_parts(parts)
    part_of: dict[str, str] = {}
    listed = list(names)
    for part, pattern in parts.items():
        matches = [name for name in listed if re.search(pattern, name)]
        if not matches:
            raise InputError(
                f"parts.{part}: must match at least one of the {len(listed)} sketched parameters, "
                f"got {show(pattern)}; such as {listed[0]}"
            )
        for name in matches:
            if name in part_of:
                raise InputError(
                    f"parts: must put a parameter into one part at most, but {name} matches "
                    f"{part_of[name]} ({show(parts[part_of[name]])}) and {part} ({show(pattern)})"
                )
            part_of[name] = part
    return part_of


def describe_rest(parts: Mapping[str, str], parameters: Mapping[str, nn.Parameter]) -> str:
    """One line on the parameters that are in no part; "" if all are in one or there are none."""
    part_of = assign_parts(parts, parameters)
    rest = {name: p.numel() for name, p in parameters.items() if name not in part_of}
    if not parts or not rest:
        return ""
    entries = sum(rest.values())
    share = entries / sum(parameter.numel() for parameter in parameters.values())
    return (
        f"sketch: {entries:,} entries ({share:.1%}) of {len(rest)} parameters are in no part, such "
        f"as {next(iter(rest))}; they count in the whole only"
    )


@dataclass(frozen=True)
class Sketches:
    """Sketches of the examples of one pass.

    Attributes:
        whole: [B, D] float32, of all parameters.
        parts: part -> [B, D] float32, of its parameters.
    """

    whole: Tensor
    parts: dict[str, Tensor]

    @classmethod
    def of(cls, run: Pass, parts: Iterable[str]) -> "Sketches":
        """Adds up the sums of a pass.

            whole = rest + part_1 + part_2 + ...    by the parts' names, in float32

        Without parts the whole is the only sum, so parts may change its rounding and nothing else.
        """
        sums: dict[str, Tensor] = {}
        for (part, _), out in run.outs.items():
            if part in sums:
                sums[part] += out.to(sums[part].device)
            else:
                sums[part] = out
        anywhere = next(iter(sums.values()), torch.zeros(run.size, run.sketch.proj_dim))
        whole = sums.pop(REST) if REST in sums else torch.zeros_like(anywhere)
        for part in sorted(sums):  # the order in which the config names them changes no bit
            whole += sums[part].to(whole.device)
        absent = [part for part in parts if part not in sums]  # no gradient reached them
        return cls(whole, sums | {part: torch.zeros_like(whole) for part in absent})

    def summed(self, slices: Slices) -> "Sketches":
        """The sums over the processes of tensor parallelism."""
        parts = {part: slices.summed(self.parts[part]) for part in sorted(self.parts)}
        return Sketches(slices.summed(self.whole), parts)

    def cpu(self) -> "Sketches":
        return Sketches(self.whole.cpu(), {p: rows.cpu() for p, rows in self.parts.items()})

    def by_example(self, row_examples: Sequence[int]) -> "Sketches":
        """Adds up rows [R] that belong to one example, by its number."""
        number = len(set(row_examples))

        def summed(rows: Tensor) -> Tensor:
            index = torch.tensor(row_examples, device=rows.device)
            return rows.new_zeros(number, rows.shape[1]).index_add(0, index, rows)

        return Sketches(summed(self.whole), {p: summed(rows) for p, rows in self.parts.items()})
