"""Launches of the CUDA C++ sketch: a fake answers every call of NVRTC and the driver, and fails."""

import contextlib
import ctypes
import enum
import sys
from types import SimpleNamespace

import pytest
import torch
from support.gpu.host_cuda import SOURCE

from merit_fast.errors import BackendUnavailableError, MeritFastError
from merit_fast.kernels.sketch import _cuda


class Status(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_FAKED = 1


class Fake:
    """cuda.bindings' driver and NVRTC: keeps every call; all succeed except ``failing``."""

    def __init__(self, failing: str = "", context: int = 1) -> None:
        self.failing = failing
        self.context = context
        self.calls = []
        self.launched = b""

    def CUstream(self, stream: int) -> int:
        return stream

    def __getattr__(self, name: str):
        def function(*arguments):
            self.calls.append((name, *arguments))
            if name == self.failing:
                return (Status.CUDA_ERROR_FAKED,)
            answer = self.answer(name, arguments)
            return (Status.CUDA_SUCCESS,) if answer is None else (Status.CUDA_SUCCESS, answer)

        return function

    def answer(self, name: str, arguments):
        if name == "nvrtcGetProgramLog":
            arguments[1][:] = b"line 3: error:\n no such thing\0"
        elif name == "nvrtcGetCUBIN":
            arguments[1][:] = b"\x7fELF"
        elif name == "cuLaunchKernel":
            pointers = (ctypes.c_void_p * 1).from_address(arguments[-2])
            self.launched = ctypes.string_at(pointers[0], 176)
        elif name == "cuModuleGetFunction":
            return arguments[1].decode()
        sizes = {
            "nvrtcGetProgramLogSize": 30,
            "nvrtcGetCUBINSize": 4,
            "cuCtxGetCurrent": self.context,
        }
        return sizes.get(
            name, 7 if name in ("nvrtcCreateProgram", "cuModuleLoadData", "cuDeviceGet") else None
        )


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that device 2 is a GPU. Call it with the fake driver and the GPU's capability."""

    def pretend(fake, capability=(9, 0)):
        monkeypatch.setattr(_cuda, "bindings", lambda: (fake, fake))
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        return fake

    _cuda.kernels.cache_clear()
    yield pretend
    _cuda.kernels.cache_clear()


def test_a_launch_compiles_once_and_hands_over_stream_grid_and_job(gpu):
    fake = gpu(Fake())
    job = bytes(range(176))
    for _ in range(2):
        _cuda.launch("add_splits", 5, job, torch.device("cuda", 2))
    assert fake.launched == job
    calls = {name: rest for name, *rest in fake.calls}
    assert calls["cuLaunchKernel"][:9] == ["add_splits", 5, 1, 1, 128, 1, 1, 0, 77]
    assert calls["nvrtcCreateProgram"][0] == SOURCE.read_bytes()
    assert calls["nvrtcCompileProgram"][2] == [b"--gpu-architecture=sm_90", b"--std=c++17"]
    assert calls["cuModuleLoadData"] == [b"\x7fELF"]
    names = [name for name, *_ in fake.calls]
    assert names.count("nvrtcCompileProgram") == names.count("nvrtcDestroyProgram") == 1
    assert names.count("cuLaunchKernel") == 2 and "cuCtxSetCurrent" not in names


def test_a_thread_without_a_context_gets_the_device_s_own(gpu):
    fake = gpu(Fake(context=0))
    _cuda.launch("add_splits", 1, bytes(176), torch.device("cuda", 2))
    names = [name for name, *_ in fake.calls]
    assert ("cuDeviceGet", 2) in fake.calls
    assert (
        names.index("cuDevicePrimaryCtxRetain")
        < names.index("cuCtxSetCurrent")
        < names.index("cuModuleLoadData")
    )


@pytest.mark.parametrize(
    "failing", ["nvrtcCreateProgram", "cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel"]
)
def test_a_failing_call_is_named_with_its_error(failing, gpu):
    gpu(Fake(failing))
    with pytest.raises(
        MeritFastError, match=f"^linear_grad_sketch: {failing} failed with CUDA_ERROR_FAKED$"
    ):
        _cuda.launch("add_splits", 1, bytes(176), torch.device("cuda", 2))


def test_a_failed_compilation_shows_the_log_in_one_line(gpu):
    fake = gpu(Fake("nvrtcCompileProgram"))
    with pytest.raises(
        MeritFastError, match=r"CUDA_ERROR_FAKED for sm_90: line 3: error: no such thing$"
    ):
        _cuda.launch("add_splits", 1, bytes(176), torch.device("cuda", 2))
    assert fake.calls[-1][0] == "nvrtcDestroyProgram"


def test_errors_name_missing_hardware_and_libraries(gpu, monkeypatch):
    bindings = _cuda.bindings
    gpu(Fake(), capability=(7, 5))
    with pytest.raises(BackendUnavailableError, match="needs a GPU of sm_80 or newer, got sm_75"):
        _cuda.launch("add_splits", 1, bytes(176), torch.device("cuda", 2))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(BackendUnavailableError, match="needs cuda-bindings"):
        bindings()

    def no_library(*arguments):
        raise RuntimeError("libnvrtc.so.13\n not found")

    with pytest.raises(MeritFastError, match=r"nvrtcCreateProgram: libnvrtc.so.13 not found$"):
        _cuda.compile_source(SimpleNamespace(nvrtcCreateProgram=no_library), "sm_90")


def test_nvrtc_compiles_the_source_and_reports_errors():
    """NVRTC needs no GPU; it comes with a CUDA build of torch."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings are not installed")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError:
        pytest.skip("cuda-bindings find no NVRTC")
    for architecture in ("sm_80", "sm_90", "sm_100"):
        cubin = _cuda.compile_source(nvrtc, architecture)
        assert cubin.startswith(b"\x7fELF") and all(
            name.encode() in cubin for name in _cuda.KERNELS
        )
    with pytest.raises(
        MeritFastError,
        match="nvrtcCompileProgram failed with NVRTC_ERROR_COMPILATION for sm_75: .*error",
    ):
        _cuda.compile_source(nvrtc, "sm_75")  # has no asynchronous copies
