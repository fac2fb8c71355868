"""Methods that thin deltas equal their formulas in fp64, rounded once, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checks import run_at_level
from support.merge.delta_cases import DTYPES, one
from support.merge.formulas import delta_method, f64, rounded
from support.merge.merges import bits, load, merge, write

from merit_fast.merge import MergeConfig

WEIGHTS = [0.5, 0.2, 0.3]


CASES = {
    "ties": dict(method="ties", density=0.4),
    "ties of all": dict(method="ties", density=1.0, normalize=False, scale=0.7),
    "dare_linear": dict(method="dare_linear", density=0.3, seed=5),
    "dare_ties": dict(method="dare_ties", density=0.7, scale=-1.5),
    "breadcrumbs": dict(method="breadcrumbs", density=0.5, gamma=0.2),
    "breadcrumbs_ties": dict(method="breadcrumbs_ties", density=0.85, gamma=0.3, normalize=False),
    "della": dict(method="della", density=0.5, epsilon=0.3),
    "della_linear": dict(method="della_linear", density=0.6, epsilon=0.1, seed=7),
    "sce": dict(method="sce", select_topk=0.3),
    "sce of all": dict(method="sce", select_topk=1.0, scale=0.5),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", DTYPES)
def test_every_bit_is_the_formulas(written, tmp_path, kind, case, backend):
    paths, base, loaded = written[kind]
    config = MergeConfig(**CASES[case], dtype=DTYPES[kind][1], allow_nonfinite=True, chunk_kib=4)
    merge(paths, WEIGHTS, tmp_path / "out", config, base)
    merged = load(tmp_path / "out")
    assert merged.keys() == loaded[0].keys()
    for name, tensor in merged.items():
        inputs = [model[name] for model in loaded]
        truth = delta_method(
            CASES[case]["method"], name, inputs[:-1], inputs[-1], WEIGHTS, **options_of(CASES[case])
        )
        assert tensor.shape == inputs[0].shape
        if (
            "sce" in case
        ):  # the order of its sums of squares is the engine's own: the last bit of fp64 is free
            assert_nearly_rounded(tensor, truth, inputs, name)
        else:
            np.testing.assert_array_equal(bits(tensor), rounded(truth, tensor.dtype), err_msg=name)


def assert_nearly_rounded(tensor, truth, inputs, name):
    """Asserts a rounding of a value within 1e-13 of the truth, relative to the inputs."""
    spread = 1e-13 * np.max([np.abs(f64(x)) for x in inputs], axis=0, initial=0.0)
    if tensor.dtype == torch.float64:
        np.testing.assert_allclose(
            tensor.numpy().ravel(), truth, rtol=0, atol=spread.max(initial=0), err_msg=name
        )
    else:
        low, high = (rounded(truth - sign * spread, tensor.dtype) for sign in (1, -1))
        exact = rounded(truth, tensor.dtype)
        actual = bits(tensor)
        assert ((actual == exact) | (actual == low) | (actual == high)).all(), name


def options_of(case):
    return {key: value for key, value in case.items() if key != "method"}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count", range(1, 10))
def test_ties_of_any_number_of_bf16_models_with_equal_sizes(tmp_path, count, normalize):
    """Few values, so that cuts lie among equal sizes, which count by their index."""
    generator = torch.Generator().manual_seed(count)
    models = [
        torch.randint(-3, 4, (3, 2011), generator=generator).bfloat16() for _ in range(count + 1)
    ]
    *paths, base = [write(tmp_path / f"m{k}", {"a": model}) for k, model in enumerate(models)]
    weights = [(k + 1) / 7 for k in range(count)]
    for density in (0.05, 0.37, 0.8):
        options = dict(density=density, normalize=normalize, scale=1.3)
        config = MergeConfig(method="ties", **options, dtype="bf16", chunk_kib=4)
        out = tmp_path / f"{density}"
        merge(paths, weights, out, config, base)
        merged = load(out)["a"]
        truth = delta_method("ties", "a", models[:-1], models[-1], weights, **options)
        np.testing.assert_array_equal(bits(merged), rounded(truth, torch.bfloat16))


@pytest.mark.parametrize("case", CASES)
def test_threads_and_chunks_change_no_bit(written, tmp_path, case):
    paths, base, _ = written["mixed"]
    outputs = set()
    for number, (threads, chunk) in enumerate([(1, 4), (2, 5), (5, 64), (2, 1024)]):
        config = MergeConfig(
            **CASES[case], dtype="fp32", allow_nonfinite=True, threads=threads, chunk_kib=chunk
        )
        merge(paths, WEIGHTS, tmp_path / f"{number}", config, base)
        outputs.add((tmp_path / f"{number}/model.safetensors").read_bytes())
    assert len(outputs) == 1


def bytes_read():
    """Bytes that this process has read by system calls."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_chunks_kept_between_passes_are_read_once_and_change_no_bit(tmp_path):
    """TIES holds 8 MiB of a tensor's inputs, and nothing under a limit on memory."""
    elements = 1_600_000
    models = [torch.randn(elements, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    *paths, base = [
        write(tmp_path / f"m{k}", {"a": model.bfloat16()}) for k, model in enumerate(models)
    ]
    read = []
    outputs = set()
    for number, (threads, limit) in enumerate([(1, None), (2, None), (2, "64MB")]):
        config = MergeConfig(method="ties", density=0.3, threads=threads, max_memory=limit)
        before = bytes_read()
        merge(paths, [0.5, 0.5], tmp_path / f"{number}", config, base)
        read.append(bytes_read() - before)
        outputs.add((tmp_path / f"{number}/model.safetensors").read_bytes())
    assert len(outputs) == 1
    assert all(each < read[2] - (7 << 20) for each in read[:2])


LEVEL_SCRIPT = """
import hashlib
from pathlib import Path
from merit_fast.merge import MergeConfig, merge_branches
from merit_fast.progress import SilentProgress
for kind, paths, base, dtype in {inputs!r}:
    for name, case in {cases!r}.items():
        out = Path({out!r}) / (kind + name)
        out.mkdir(parents=True)
        config = MergeConfig(**case, dtype=dtype, allow_nonfinite=True)
        models = [Path(p) for p in paths]
        merge_branches(models, {weights!r}, Path(base), out, config, SilentProgress())
        print(kind, name, hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
"""


def test_every_isa_level_gives_the_same_bits(written, tmp_path, native_levels):
    inputs = [
        (kind, [str(p) for p in written[kind][0]], str(written[kind][1]), DTYPES[kind][1])
        for kind in DTYPES
    ]
    texts = set()
    for level in native_levels:
        script = LEVEL_SCRIPT.format(
            inputs=inputs, cases=CASES, weights=WEIGHTS, out=str(tmp_path / level)
        )
        texts.add(run_at_level(script, level))
    assert len(texts) == 1


# ---- any small tensors at all
NUMBERS = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, -3.0, 1e-40, -1e-40, 3e38, -3e38, 2.0**-126, 7.0]
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tensors(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("any")
    branches, rows, row = (data.draw(st.integers(1, most)) for most in (3, 3, 9))
    draw = st.lists(
        NUMBERS | st.floats(width=32, allow_nan=False, allow_infinity=False),
        min_size=rows * row,
        max_size=rows * row,
    )
    inputs = [
        torch.tensor(data.draw(draw), dtype=torch.float32).reshape(rows, row)
        for _ in range(branches + 1)
    ]
    weights = [data.draw(st.sampled_from([1.0, -1.0, 0.25, 0.0])) for _ in range(branches)]
    case = dict(data.draw(st.sampled_from(list(CASES.values()))))
    if case["method"] in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        case |= {"density": data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))}
    result = one(root, inputs[:-1], inputs[-1], weights, allow_nonfinite=True, dtype="bf16", **case)
    truth = delta_method(case["method"], "w", inputs[:-1], inputs[-1], weights, **options_of(case))
    np.testing.assert_array_equal(bits(result), rounded(truth, torch.bfloat16))
