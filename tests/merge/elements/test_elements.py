"""Methods that decide by element equal their formulas in fp64, rounded once, bit for bit."""

import numpy as np
import pytest
import torch
from support.checks import run_at_level
from support.formulas.elements import fusion_by_hand, nearswap_by_hand, ram_by_hand
from support.merge.delta_cases import DTYPES, one
from support.merge.formulas import rounded
from support.merge.merges import bits, load, merge

from merit_fast.errors import InputError
from merit_fast.kernels.average.elements import exponential, logarithm
from merit_fast.merge import MergeConfig

CASES = {
    "nearswap": dict(method="nearswap", t=0.3),
    "nearswap, large": dict(method="nearswap", t=5.0),
    "ram": dict(method="ram"),
    "ram, wide": dict(method="ram", epsilon=0.7),
    "ramplus_tl": dict(method="ramplus_tl", epsilon=0.7, parameters={"r": 0.4, "alpha": 0.6}),
    "arcee_fusion": dict(method="arcee_fusion"),
}
PAIRS = ("nearswap", "arcee_fusion")


def truth_of(case, base, models):
    if case["method"] == "nearswap":
        return nearswap_by_hand(base, models[0], case["t"])
    if case["method"] == "arcee_fusion":
        return fusion_by_hand(base, models[0])
    own = case.get("parameters", {})
    return ram_by_hand(
        base, models, case.get("epsilon", 1e-5), own.get("r", 0.0), own.get("alpha", 0.0)
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", DTYPES)
def test_every_bit_is_the_formulas(written, tmp_path, kind, case, backend):
    paths, base, loaded = written[kind]
    options = CASES[case]
    number = 1 if options["method"] in PAIRS else 3
    config = MergeConfig(**options, dtype=DTYPES[kind][1], allow_nonfinite=True, chunk_kib=4)
    merge(paths[:number], [1 / number] * number, tmp_path / "out", config, base)
    merged = load(tmp_path / "out")
    assert merged.keys() == loaded[0].keys()
    for name, tensor in merged.items():
        if tensor.numel() == 0:
            continue
        with np.errstate(all="ignore"):
            truth = truth_of(options, loaded[3][name], [model[name] for model in loaded[:number]])
        np.testing.assert_array_equal(bits(tensor), rounded(truth, tensor.dtype), err_msg=name)


def test_quantiles_of_a_large_tensor_are_exact(tmp_path, backend):
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(700, 211, generator=generator)
    model = base + 0.1 * torch.randn(700, 211, generator=generator) ** 3
    model[:300] = base[:300]  # half of the importances are 0
    merged = one(tmp_path, [model], base, method="arcee_fusion", chunk_kib=8, threads=3)
    expected = rounded(fusion_by_hand(base, model), torch.float32)
    np.testing.assert_array_equal(bits(merged), expected)
    share = (merged != base).float().mean().item()
    assert 0.02 < share < 0.5


def test_a_chunk_holds_whole_rows(tmp_path, backend):
    generator = torch.Generator().manual_seed(4)
    base = torch.randn(3, 5000, generator=generator)
    model = base + 0.1 * torch.randn(3, 5000, generator=generator)
    merged = one(tmp_path, [model], base, method="arcee_fusion", chunk_kib=4)
    expected = rounded(fusion_by_hand(base, model), torch.float32)
    np.testing.assert_array_equal(bits(merged), expected)


LEVEL_SCRIPT = """
import hashlib
from pathlib import Path
from merit_fast.merge import MergeConfig, merge_branches
from merit_fast.progress import SilentProgress
paths, base, dtype = {inputs!r}
for name, case in {cases!r}.items():
    for threads, chunk in ((1, 4), (3, 64)):
        out = Path({out!r}) / f"{{name}}{{threads}}"
        out.mkdir(parents=True)
        config = MergeConfig(
            **case, dtype=dtype, allow_nonfinite=True, threads=threads, chunk_kib=chunk
        )
        models = [Path(p) for p in paths][: 1 if case["method"] in {pairs!r} else 3]
        merge_branches(models, [1.0] * len(models), Path(base), out, config, SilentProgress())
        digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
        print(name, digest)
"""


def test_levels_threads_and_chunks_change_no_bit(written, tmp_path, native_levels):
    paths, base, _ = written["mixed"]
    texts = set()
    for level in native_levels:
        script = LEVEL_SCRIPT.format(
            inputs=([str(p) for p in paths], str(base), "fp32"),
            cases=CASES,
            out=str(tmp_path / level),
            pairs=PAIRS,
        )
        text = run_at_level(script, level)
        lines = text.splitlines()
        assert lines[0::2] == lines[1::2]
        texts.add(text)
    assert len(texts) == 1


@pytest.mark.parametrize("method", ["nearswap", "ram", "ramplus_tl", "arcee_fusion"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_is_named(tmp_path, method, bad, backend):
    base = torch.ones(40, 30)
    model = torch.ones(40, 30)
    model[37, 3] = bad
    options = {"t": 0.1} if method == "nearswap" else {}
    with pytest.raises(InputError, match=r"m0/model.safetensors: w: must be finite, holds NaN"):
        one(tmp_path, [model], base, method=method, **options)


def test_functions_are_near_the_true_ones():
    x = -np.concatenate([np.linspace(0, 699, 20001), np.geomspace(1e-300, 1, 500)])
    np.testing.assert_allclose(exponential(x), np.exp(x), rtol=4e-16)
    assert exponential(np.array([-1e9, -np.inf])).max() < 1e-300
    y = np.concatenate([np.geomspace(1e-8, 1e8, 20001), 1 + np.linspace(-1e-3, 1e-3, 999)])
    np.testing.assert_allclose(logarithm(y), np.log(y), rtol=4e-16, atol=1e-18)


def test_nearswap_needs_its_t():
    with pytest.raises(InputError, match="t: must be given for method nearswap, got None"):
        MergeConfig(method="nearswap")
    assert MergeConfig(method="slerp").t is None


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(method="ram", models=[{"epsilon": 0.1}]), "ram has one epsilon for all models"),
        (dict(method="linear", vectors="row"), "vectors: must be tensor with method linear"),
        (dict(method="slerp", rescale=True), "rescale: must be absent: method slerp enlarges"),
        (dict(method="ram", stats=True), "stats: must be absent: method ram mixes element by"),
        (dict(method="ram", parameters={"r": 1.0}), "parameters.r: must be absent: method ram"),
        (dict(method="nuslerp", vectors="row", stats=True), "stats: must be absent"),
    ],
)
def test_options_of_other_methods_are_refused(options, message):
    from support.merge.merges import config_of

    with pytest.raises(InputError, match=message):
        config_of(options)
