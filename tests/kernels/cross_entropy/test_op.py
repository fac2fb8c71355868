"""Linear + cross-entropy as an op: bad input, torch.compile, threads, ISA levels, memory."""

import re

import pytest
import torch
from support.checks import run_at_level
from support.kernels.loss_cases import batch, everything, packed
from support.warm import run_python

from merit_fast.errors import BackendUnavailableError
from merit_fast.kernels.cross_entropy import _native, _ops, linear_cross_entropy
from merit_fast.kernels.cross_entropy._arguments import LogitForm
from merit_fast.kernels.sketch import CountSketch

IDS = torch.tensor([2, 0, 0, 2])
OFFSETS = torch.tensor([0, 5, 5, 20, 37])
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "eager"])


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"hidden": torch.zeros(37)}, "hidden must be [N, H] or [B, T, H] of float32 or bfloat16"),
        ({"hidden": torch.zeros(37, 45, dtype=torch.float16)}, "got torch.float16 [37, 45]"),
        (
            {"weight": torch.zeros(9, 44)},
            "weight must be torch.float32 [V, 45] as hidden is, got torch.float32 [9, 44]",
        ),
        ({"weight": torch.zeros(9, 45).bfloat16()}, "as hidden is, got torch.bfloat16 [9, 45]"),
        ({"weight": torch.zeros(0, 45)}, "got torch.float32 [0, 45]"),
        (
            {"labels": torch.zeros(36, dtype=torch.int64)},
            "labels must be int64 [37], got torch.int64 [36]",
        ),
        ({"labels": torch.zeros(37, dtype=torch.int32)}, "got torch.int32 [37]"),
        ({"bias": torch.zeros(3)}, "bias must be torch.float32 [1003], got torch.float32 [3]"),
        ({"dataset_ids": IDS[:3]}, "dataset_ids must be int64 [4], got torch.int64 [3]"),
        ({"num_datasets": None}, "num_datasets must be positive with dataset_ids, got None"),
        ({"dataset_ids": None}, "num_datasets and dataset_weights need dataset_ids"),
        (
            {"dataset_weights": torch.ones(2)},
            "dataset_weights must be float32 [3], got torch.float32 [2]",
        ),
        ({"cu_seqlens": torch.zeros(1, dtype=torch.int64)}, "cu_seqlens must be int64 [B + 1]"),
        ({"reduction": "none"}, "reduction must be 'mean' or 'sum', got 'none'"),
        ({"label_smoothing": 1.5}, "label_smoothing must be in [0, 1], got 1.5"),
        ({"softcap": 0.0}, "softcap must be positive and finite, got 0.0"),
        ({"softcap": float("inf")}, "softcap must be positive and finite, got inf"),
        ({"z_loss": -1.0}, "z_loss must be finite and not negative, got -1.0"),
        ({"z_loss": float("inf")}, "z_loss must be finite and not negative, got inf"),
        ({"sketch": CountSketch(4096)}, "sketch, sketch_name and sketch_out go together"),
        (
            {"sketch": CountSketch(4096), "sketch_name": "w", "sketch_out": torch.zeros(3, 4096)},
            "sketch_out must be contiguous float32 [4, 4096], got torch.float32 [3, 4096]",
        ),
    ],
)
def test_a_bad_argument_is_an_error_that_names_it(changes, words):
    of = packed()
    arguments = {
        "hidden": of.hidden,
        "weight": of.weight,
        "labels": of.labels,
        **of.options,
        **changes,
    }
    with pytest.raises(ValueError, match="^linear_cross_entropy: .*" + re.escape(words)):
        linear_cross_entropy(**arguments)


@BACKENDS
@pytest.mark.parametrize(
    "name,index,value,words",
    [
        ("labels", 7, 1003, "labels must be -100 or in [0, 1003), got 1003"),
        ("labels", 7, -1, "labels must be -100 or in [0, 1003), got -1"),
        ("dataset_ids", 1, 3, "dataset_ids must be in [0, 3), got 3"),
        ("dataset_ids", 1, -1, "dataset_ids must be in [0, 3), got -1"),
        (
            "cu_seqlens",
            4,
            36,
            "cu_seqlens must rise from 0 to the 37 tokens, got [0, 5, 5, 20, 36]",
        ),
        (
            "cu_seqlens",
            1,
            21,
            "cu_seqlens must rise from 0 to the 37 tokens, got [0, 21, 5, 20, 37]",
        ),
        ("cu_seqlens", 0, 1, "cu_seqlens must rise from 0 to the 37 tokens, got [1, 5, 5, 20, 37]"),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_it(backend, name, index, value, words):
    of = packed()
    arguments = {"hidden": of.hidden, "weight": of.weight, "labels": of.labels, **of.options}
    arguments[name] = arguments[name].clone()
    arguments[name][index] = value
    with pytest.raises(ValueError, match=re.escape(f"linear_cross_entropy: {words}")):
        linear_cross_entropy(**arguments, backend=backend)


def test_backends_that_cannot_run_say_why():
    of = batch(dtype=torch.float64)
    with pytest.raises(ValueError, match="only the eager backend computes in float64"):
        linear_cross_entropy(of.hidden, of.weight, of.labels, backend="cpu")
    assert linear_cross_entropy(of.hidden, of.weight, of.labels).loss.dtype == torch.float64
    with pytest.raises(
        BackendUnavailableError, match="linear_cross_entropy: backend 'cuda' has no kernel"
    ):
        linear_cross_entropy(of.hidden.float(), of.weight.float(), of.labels, backend="cuda")


def op_arguments(learns=True, sketch_out=None):
    of = packed(bias=True)
    width = [] if sketch_out is None else [4096, 0]
    leaves = [tensor.requires_grad_(learns) for tensor in (of.hidden, of.weight, of.bias)]
    terms = (5.0, 0.1, 0.01, width, "head", sketch_out)
    weights = torch.tensor([1.0, 2, 0.5])
    vocabulary = ([0, len(of.weight)], "")
    return (*leaves, of.labels, OFFSETS, IDS, 3, weights, *terms, *vocabulary, learns, "cpu")


def test_no_op_of_a_head_is_captured_in_a_cuda_graph():
    """They count the rows that have a label, on the host; a compiler keeps traced strides."""
    for name in ("linear_cross_entropy", "linear_token_statistics"):
        for op in (name, f"{name}_backward"):
            tags = getattr(torch.ops.merit_fast, op).default.tags
            assert {torch.Tag.cudagraph_unsafe, torch.Tag.needs_exact_strides} <= set(tags)


@BACKENDS
@pytest.mark.parametrize("name", ["weight", "labels", "bias", "sketch_out"])
def test_a_tensor_on_another_device_is_refused(name, backend):
    """An offloaded weight lies on the meta device, where its address is null."""
    of = packed(bias=True)
    arguments = {"hidden": of.hidden, "weight": of.weight, "labels": of.labels, "bias": of.bias}
    sketch = {"sketch": CountSketch(4096), "sketch_name": "w", "sketch_out": torch.zeros(4, 4096)}
    arguments |= {**of.options, **sketch}
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} must be on hidden's device, cpu, got meta"):
        linear_cross_entropy(**arguments, backend=backend)


@pytest.mark.parametrize("learns", [True, False])
def test_the_op_is_what_torch_library_asks_for(learns):
    torch.library.opcheck(_ops.linear_cross_entropy, op_arguments(learns))


@pytest.mark.parametrize("sketch_out", [None, torch.zeros(4, 4096)], ids=["plain", "sketch"])
def test_so_is_the_op_of_its_gradients(sketch_out):
    arguments = op_arguments(sketch_out=sketch_out)
    of_forward = _ops.linear_cross_entropy(*arguments)
    detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments]
    tensors = detached[:6] + detached[7:8]
    options = detached[8:16]
    upstream = (torch.ones(()), None, torch.ones(3), [True, False, True])
    torch.library.opcheck(
        _ops.linear_cross_entropy_backward,
        (*tensors, *options, "cpu", *(value.detach() for value in of_forward[-2:]), *upstream),
    )


@pytest.mark.parametrize("sketched", [False, True])
def test_torch_compile_sees_one_graph_and_gives_the_same(sketched):
    of = packed(bias=True, softcap=5.0, label_smoothing=0.1, z_loss=0.01)
    outs = [torch.zeros(4, 4096), torch.zeros(4, 4096)]

    def step(hidden, weight, bias, out):
        where = (
            {"sketch": CountSketch(4096), "sketch_name": "head", "sketch_out": out}
            if sketched
            else {}
        )
        result = linear_cross_entropy(
            hidden.tanh(), weight, of.labels, bias=bias, **of.options, **where
        )
        return result.loss + result.dataset_loss[0], result.dataset_tokens

    results = []
    for run, out in zip((step, torch.compile(step, fullgraph=True)), outs, strict=True):
        leaves = [tensor.clone().requires_grad_() for tensor in (of.hidden, of.weight, of.bias)]
        loss, counts = run(*leaves, out)
        loss.backward()
        results.append([loss.detach(), counts, *(leaf.grad for leaf in leaves)])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(*outs)
    assert outs[0].any() == sketched


EPILOGUES = """
import hashlib, torch
from merit_fast.kernels.cross_entropy import _native
from merit_fast.kernels.cross_entropy._arguments import LogitForm
torch.manual_seed(0)
digest = hashlib.sha256()
labels = torch.randint(0, 2500, (7,))
for dtype in (torch.float32, torch.bfloat16):
    for form in (LogitForm(), LogitForm(3.0), LogitForm(3.0, 0.7, 1.3)):
        logits, bias = (8 * torch.randn(7, 2313)).to(dtype), torch.randn(2313)
        state = torch.zeros(6, 7, dtype=torch.float64)
        state[0] = state[5] = -torch.inf
        for first in (0, 100):
            _native.update(logits, first, bias, form, labels, state)
        uniform, linear = torch.full((2, 7), 0.1)
        terms = torch.stack([state[0], 1 / state[1], torch.ones(7), uniform, linear]).float()
        out = torch.empty_like(logits)
        _native.gradient(logits, 100, bias, form, labels, terms, out)
        digest.update(state.numpy().tobytes() + out.float().numpy().tobytes())
print(digest.hexdigest())
"""


def test_all_isa_levels_give_the_same_bits(native_levels):
    levels = [level for level in native_levels if level != "avx512_bf16"]
    assert len({run_at_level(EPILOGUES, level) for level in levels}) == 1


def test_the_number_of_threads_changes_no_bit_between_the_products():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            logits = torch.randn(13, 1500)
            labels = torch.randint(0, 1500, (13,))
            state = torch.zeros(4, 13, dtype=torch.float64)
            _native.update(logits, 0, None, LogitForm(3.0), labels, state)
            _native.gradient(
                logits,
                0,
                None,
                LogitForm(3.0),
                labels,
                torch.ones(4, 13),
                out := torch.empty_like(logits),
            )
            results.append((state, out))
    finally:
        torch.set_num_threads(before)
    assert all(
        torch.equal(state, results[0][0]) and torch.equal(out, results[0][1])
        for state, out in results[1:]
    )


def test_two_runs_give_the_same_bits():
    of = packed(bias=True)
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(everything(of, "cpu").values() for _ in range(2)), strict=True)
    )


MEMORY = """
import torch
from pathlib import Path
from merit_fast.kernels.cross_entropy import linear_cross_entropy

def mib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024

def step(vocabulary):
    weight = torch.randn(vocabulary, 896).requires_grad_()
    hidden = torch.randn(512, 896, requires_grad=True)
    labels = torch.randint(0, vocabulary, (512,))
    labels[::4] = -100
    Path("/proc/self/clear_refs").write_text("5")
    before = mib("VmRSS")
    linear_cross_entropy(hidden, weight, labels).loss.backward()
    return mib("VmHWM") - before - weight.nbytes / 2**20

step(64)  # what libraries load when they first multiply
print(step(49152))
"""


def test_a_step_needs_the_gradient_of_the_head_and_40_mib():
    result = run_python(["-c", MEMORY])
    assert result.returncode == 0, result.stderr
    # The logits would take 72 MiB, and their gradient as much.
    assert float(result.stdout) <= 40
