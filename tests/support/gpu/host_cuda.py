"""csrc/cuda without a GPU: run as g++ builds it with cuda_host/, or read as nvcc builds it."""

import ctypes
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.paths import ROOT

SOURCE = ROOT / "csrc" / "cuda" / "sketch_linear.cu"


def build_for_cpu(folder: Path, *flags: str) -> Path:
    """A library of the kernels that runs on this CPU."""
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("the host shim needs g++ on x86-64")
    host, library = Path(__file__).with_name("cuda_host"), folder / "sketch_host.so"
    command = [
        "g++",
        "-O2",
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        *flags,
    ]
    command += ["-shared", "-fPIC", "-pthread", f"-I{SOURCE.parent}", f"-I{host}"]
    result = subprocess.run(
        [*command, host / "sketch_host.cpp", "-o", library], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return library


def launcher(library: ctypes.CDLL, backwards: bool = False) -> Callable[..., None]:
    """Stands in for ``_cuda.launch``; ``backwards`` runs a block's threads in opposite order."""

    def launch(kernel: str, blocks: int, job: bytes, device: object) -> None:
        assert library.launch_kernel(kernel.encode(), blocks, job, int(backwards)) == 0, kernel

    return launch


@dataclass(frozen=True)
class Kernel:
    registers: int  # of a thread
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int  # of a block
    opcodes: tuple[str, ...]  # with their suffixes, in order

    def count(self, pattern: str) -> int:
        return sum(1 for opcode in self.opcodes if re.match(pattern, opcode))


def nvcc_release() -> str:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    answer = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return _match(r"release ([\d.]+)", answer)[1]


def _match(pattern: str, text: str, flags: int = 0) -> re.Match[str]:
    match = re.search(pattern, text, flags)
    assert match is not None, f"{pattern} not in {text[:300]}"
    return match


def compile_for(architectures: list[str], folder: Path) -> dict[str, dict[str, Kernel]]:
    """Compiles the source with nvcc: architecture -> kernel -> registers and instructions."""
    pytest.importorskip("triton", reason="triton, which brings nvdisasm, is not installed")
    from support.gpu.read_code import NVIDIA_TOOLS

    command = ["nvcc", "-std=c++17", "-cubin", "-Xptxas", "-v", str(SOURCE)]
    running = {
        name: subprocess.Popen(
            [*command, f"-arch={name}", "-o", folder / name], stderr=subprocess.PIPE, text=True
        )
        for name in architectures
    }
    compiled = {}
    for name, process in running.items():
        report = process.communicate()[1]
        assert process.returncode == 0, report
        code = subprocess.run(
            [NVIDIA_TOOLS / "nvdisasm", "-c", folder / name],
            capture_output=True,
            text=True,
        )
        compiled[name] = dict(_kernels(report, code.stdout))
    return compiled


def _kernels(report: str, code: str) -> Iterator[tuple[str, Kernel]]:
    for usage in report.split("Compiling entry function")[1:]:
        kernel = _match(r"'(\w+)'", usage)[1]
        memory = _match(r"(\d+) bytes stack.*?(\d+) bytes.*?(\d+) bytes", usage, re.S)
        stack, stores, loads = map(int, memory.groups())
        shared = re.search(r"(\d+) bytes smem", usage)
        text = _match(rf"^\.text\.{kernel}:$(.*?)(?=^\.text\.|\Z)", code, re.S | re.M)[1]
        opcodes = re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", text, re.M
        )
        registers = int(_match(r"Used (\d+) registers", usage)[1])
        yield (
            kernel,
            Kernel(
                registers, stores + loads, stack, int(shared[1]) if shared else 0, tuple(opcodes)
            ),
        )
