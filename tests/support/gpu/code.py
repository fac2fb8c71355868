"""What a Triton kernel becomes for a GPU that is not here: its launch compiled, its registers and instructions read."""

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WAVE = 64  # threads that an AMD data-centre GPU runs in step
# What is counted in the code, for either maker, by the first characters of an opcode with its suffixes.
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


@dataclass(frozen=True)
class GpuLaunch:
    """``kernel[grid](*arguments, **options)``; of tensors only dtype and address matter."""

    name: str
    kernel: Any  # a triton.jit function
    arguments: Sequence[Any]
    options: Mapping[str, Any]


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


class _Absent:
    """A driver without a GPU: enough of one to bind a launch's arguments and compile for ``target``."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_launch(kernel, arguments, options, architecture: int | str) -> GpuCode:
    """What ``kernel[grid](*arguments, **options)`` would run on ``architecture``; launches nothing."""
    return read(build(kernel, arguments, options, architecture))


def build(kernel, arguments, options, architecture: int | str):
    """Compiles a launch for an architecture: 90 is NVIDIA's sm_90, "gfx942" AMD's."""
    nvidia = isinstance(architecture, int)
    before = driver._active
    driver.set_active(
        _Absent(GPUTarget("cuda" if nvidia else "hip", architecture, 32 if nvidia else WAVE))
    )
    try:
        kernel.device_caches.clear()
        return kernel.warmup(*arguments, grid=(1,), **options)
    finally:
        kernel.device_caches.clear()
        driver._active = before


def read(compiled) -> GpuCode:
    """Registers and instructions of what ``build`` gave."""
    return _read_nvidia(compiled) if "ptx" in compiled.asm else _read_amd(compiled)


def _read_nvidia(compiled) -> GpuCode:
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        (Path(folder) / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        report = _assemble(Path(folder), re.search(r"\.target\s+(sm_\w+)", ptx).group(1))
        code = _run("nvdisasm", "-c", f"{folder}/kernel.cubin").stdout
        usage = _run("cuobjdump", "--dump-resource-usage", f"{folder}/kernel.cubin").stdout
    opcodes = re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", code, re.M
    )
    assert opcodes, code[-300:]
    return GpuCode(
        ptx=ptx,
        registers=_number(r"REG:(\d+)", usage),
        spill_bytes=_number(r"(\d+) bytes spill stores", report)
        + _number(r"(\d+) bytes spill loads", report),
        stack_bytes=_number(r"STACK:(\d+)", usage),
        shared_bytes=compiled.metadata.shared,
        # Of the ptx: sm_100 hands out its tensor memory by atomics of its own, and names no types in its code.
        atomics=len(re.findall(r"^\s*(?:@!?%p\d+\s+)?(?:red|atom|multimem\.red)\.", ptx, re.M)),
        tf32=len(re.findall(r"mma\S*\.(?:kind::tf32|tf32\.tf32)", ptx)),
        opcodes=tuple(opcodes),
    )


def _read_amd(compiled) -> GpuCode:
    text = compiled.asm["amdgcn"]
    opcodes = re.findall(r"^\t((?:s|v|ds|global|buffer|flat|scratch)_\w+)", text, re.M)
    assert opcodes, text[-300:]
    return GpuCode(
        ptx="",
        registers=_number(r"\.vgpr_count:\s+(\d+)", text),
        spill_bytes=4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text),  # of each thread
        stack_bytes=_number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        shared_bytes=compiled.metadata.shared,
        atomics=sum(1 for opcode in opcodes if re.match(AMD_ATOMICS, opcode)),
        tf32=sum(1 for opcode in opcodes if opcode.startswith("v_mfma") and "_xf32" in opcode),
        opcodes=tuple(opcodes),
    )


def _assemble(folder: Path, target: str) -> str:
    """What the assembler says of its work; which of the two knows the ptx depends on the version and the target."""
    for name in ("ptxas", "ptxas-blackwell"):
        result = _run(
            name,
            "-v",
            f"--gpu-name={target}",
            f"{folder}/kernel.ptx",
            "-o",
            f"{folder}/again.cubin",
        )
        if result.returncode == 0:
            return result.stderr
    raise AssertionError(result.stderr)


def _run(tool: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([NVIDIA_TOOLS / tool, *arguments], capture_output=True, text=True)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match, f"{pattern} not in {text[:300]}"
    return int(match.group(1))
