"""Reads registers, memory and instructions from what Triton compiled for a GPU.

A change of this module's code changes every fingerprint of ``fingerprint.py``.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Patterns of opcodes with their suffixes, for either maker, matched from the first character.
MATRIX_PRODUCTS = {
    "HMMA": r"HMMA",
    "WGMMA": r"[HQ]GMMA",
    "TCGEN5": r"UTC\w*MMA",
    "MFMA": r"v_s?mfmac?_",
}
WIDE_LOADS = r"LDG(STS)?\.\S*(128|256)|(global|buffer)_load_(lds_)?dwordx4"
WIDE_STORES = r"STG\.\S*(128|256)|(global|buffer)_store_dwordx4"
AMD_ATOMICS = (
    r"(global|buffer|flat)_atomic|ds_(add|sub|rsub|inc|dec|min|max|and|or|xor|cmp|wrxchg|pk_add)"
)
NVIDIA_ATOMICS = r"^\s*(?:@!?%p\d+\s+)?(?:red|atom|multimem\.red)\."
NVIDIA_OPCODE = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)"
AMD_OPCODE = r"^\t((?:s|v|ds|global|buffer|flat|scratch)_\w+)"


@dataclass(frozen=True)
class GpuCode:
    ptx: str  # empty for AMD
    registers: int  # of a thread
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int  # of a block
    atomics: int
    tf32: int  # matrix products that round float32 to 10 bits of fraction
    opcodes: tuple[str, ...]  # with their suffixes, in order

    def count(self, pattern: str) -> int:
        return sum(1 for opcode in self.opcodes if re.match(pattern, opcode))


def figures(code: GpuCode) -> Mapping[str, int]:
    """Figures that the gate holds fast. ``wide``: 128 bits or more, also into shared memory."""
    products = {kind: code.count(pattern) for kind, pattern in MATRIX_PRODUCTS.items()}
    return {
        "registers": code.registers,
        "spill_bytes": code.spill_bytes,
        "stack_bytes": code.stack_bytes,
        "shared_bytes": code.shared_bytes,
        "wide_loads": code.count(WIDE_LOADS),
        "wide_stores": code.count(WIDE_STORES),
        "atomics": code.atomics,
        "tf32": code.tf32,
        **{kind: count for kind, count in products.items() if count},
    }


def read(compiled: Any, assembler_log: str) -> GpuCode:
    """Registers and instructions of a compiled kernel."""
    if "ptx" in compiled.asm:
        return _read_nvidia(compiled, assembler_log)
    return _read_amd(compiled)


def _read_nvidia(compiled: Any, assembler_log: str) -> GpuCode:
    ptx = compiled.asm["ptx"]
    opcodes = re.findall(NVIDIA_OPCODE, _disassemble(compiled.asm["cubin"]), re.M)
    assert opcodes, compiled.metadata
    spill_stores = _numbers(r"(\d+) bytes spill stores", assembler_log)
    spill_loads = _numbers(r"(\d+) bytes spill loads", assembler_log)
    return GpuCode(
        ptx=ptx,
        registers=max(_numbers(r"Used (\d+) registers", assembler_log)),
        spill_bytes=sum(spill_stores) + sum(spill_loads),
        stack_bytes=sum(_numbers(r"(\d+) bytes stack frame", assembler_log)),
        shared_bytes=compiled.metadata.shared,
        # Of the ptx: sm_100 hands out its tensor memory by atomics of its own, and names no types
        # in its code.
        atomics=len(re.findall(NVIDIA_ATOMICS, ptx, re.M)),
        tf32=len(re.findall(r"mma\S*\.(?:kind::tf32|tf32\.tf32)", ptx)),
        opcodes=tuple(opcodes),
    )


def _read_amd(compiled: Any) -> GpuCode:
    text = compiled.asm["amdgcn"]
    opcodes = re.findall(AMD_OPCODE, text, re.M)
    assert opcodes, text[-300:]
    (registers,) = _numbers(r"\.vgpr_count:\s+(\d+)", text)
    (spilled_registers,) = _numbers(r"\.vgpr_spill_count:\s+(\d+)", text)
    (stack_bytes,) = _numbers(r"\.private_segment_fixed_size:\s+(\d+)", text)
    return GpuCode(
        ptx="",
        registers=registers,
        spill_bytes=4 * spilled_registers,  # of each thread
        stack_bytes=stack_bytes,
        shared_bytes=compiled.metadata.shared,
        atomics=sum(1 for opcode in opcodes if re.match(AMD_ATOMICS, opcode)),
        tf32=sum(1 for opcode in opcodes if opcode.startswith("v_mfma") and "_xf32" in opcode),
        opcodes=tuple(opcodes),
    )


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command: list[str | Path] = [NVIDIA_TOOLS / "nvdisasm", "-c", file.name]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    return str(result.stdout)


def _numbers(pattern: str, text: str) -> list[int]:
    numbers = [int(number) for number in re.findall(pattern, text)]
    assert numbers, f"{pattern} not in {text[:300]}"
    return numbers
