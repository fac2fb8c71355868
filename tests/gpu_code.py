"""What a Triton kernel becomes for a GPU that is not here: its launch compiled, its registers and instructions read."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class GpuCode:
    ptx: str
    registers: int  # of a thread
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int  # of a block
    opcodes: tuple[str, ...]  # with their suffixes, in order

    def count(self, pattern: str) -> int:
        return sum(1 for opcode in self.opcodes if re.match(pattern, opcode))


class _Absent:
    """A driver without a GPU: enough of one to bind a launch's arguments and compile for ``architecture``."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_launch(kernel, arguments, options, architecture: int) -> GpuCode:
    """Compiles what ``kernel[grid](*arguments, **options)`` would run on an sm_``architecture``; launches nothing."""
    before = driver._active
    driver.set_active(_Absent(architecture))
    try:
        kernel.device_caches.clear()
        compiled = kernel.warmup(*arguments, grid=(1,), **options)
    finally:
        kernel.device_caches.clear()
        driver._active = before
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        (Path(folder) / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        report = _assemble(Path(folder), re.search(r"\.target\s+(sm_\w+)", ptx).group(1))
        code = _run("nvdisasm", "-c", f"{folder}/kernel.cubin").stdout
        usage = _run("cuobjdump", "--dump-resource-usage", f"{folder}/kernel.cubin").stdout
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", code, re.M)
    assert opcodes, code[-300:]
    return GpuCode(
        ptx=ptx,
        registers=_number(r"REG:(\d+)", usage),
        spill_bytes=_number(r"(\d+) bytes spill stores", report) + _number(r"(\d+) bytes spill loads", report),
        stack_bytes=_number(r"STACK:(\d+)", usage),
        shared_bytes=compiled.metadata.shared,
        opcodes=tuple(opcodes),
    )


def _assemble(folder: Path, target: str) -> str:
    """What the assembler says of its work; which of the two knows the ptx depends on the version and the target."""
    for name in ("ptxas", "ptxas-blackwell"):
        result = _run(name, "-v", f"--gpu-name={target}", f"{folder}/kernel.ptx", "-o", f"{folder}/again.cubin")
        if result.returncode == 0:
            return result.stderr
    raise AssertionError(result.stderr)


def _run(tool: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([NVIDIA_TOOLS / tool, *arguments], capture_output=True, text=True)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match, f"{pattern} not in {text[:300]}"
    return int(match.group(1))
