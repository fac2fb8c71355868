"""Methods that thin the branches' deltas: bit for bit their formulas in fp64, rounded once, however they are run."""

import faulthandler
import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checks import run_at_level
from support.formulas import delta_method, f64, rounded, splitmix
from support.merges import bits, load, merge, write

from merit_fast.errors import InputError
from merit_fast.merge import MergeConfig
from merit_fast.merge.parameters import Case, ModelSettings

WEIGHTS = [0.5, 0.2, 0.3]
DTYPES = {
    "bf16": ([torch.bfloat16] * 4, None),
    "fp16": ([torch.float16] * 4, None),
    "fp32": ([torch.float32] * 4, None),
    "fp64": ([torch.float64] * 4, None),
    "mixed": ([torch.bfloat16, torch.float32, torch.float16, torch.bfloat16], "fp32"),
    "mixed with fp64": ([torch.float16, torch.float64, torch.bfloat16, torch.float32], "bf16"),
}
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


@pytest.fixture(params=["cpu", "eager"])
def backend(request, monkeypatch):
    monkeypatch.setenv("MERIT_FAST_BACKEND", request.param)
    return request.param


def tensors(k, dtype):
    """Branch k of three, or the base (3): random values and values chosen to hurt."""
    generator = torch.Generator().manual_seed(k)
    info = torch.finfo(dtype)

    def choose(values, *shape):
        values = torch.tensor(values, dtype=torch.float64)
        return values[torch.randint(len(values), shape, generator=generator)].to(dtype)

    return {
        "random": torch.randn(37, 29, generator=generator).to(dtype),
        "all equal": torch.full((5, 64), float(k), dtype=dtype),
        "few values": choose([-1.0, 0.0, 1.0], 300),
        "cancelling": torch.full((70,), (1.0, -1.0, 0.0, 0.0)[k], dtype=dtype),
        "signed zeros": choose([0.0, -0.0], 65),
        "denormals": choose(
            [info.smallest_normal / 8, -info.smallest_normal, info.smallest_normal / 2, 0.0], 4, 33
        ),
        "largest": choose([info.max, -info.max, info.max / 3, 0.0], 128)
        / (4 if dtype == torch.float64 else 1),
        "wide range": (torch.randn(200, generator=generator, dtype=torch.float64) * 3)
        .exp()
        .clamp(max=6e4)
        .to(dtype),
        "single": torch.randn(1, generator=generator).to(dtype),
        "scalar": torch.randn((), generator=generator).to(dtype),
        "column": torch.randn(40, 1, generator=generator).to(dtype),
        "cube": torch.randn(3, 4, 50, generator=generator).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "unmoved": torch.linspace(-2, 2, 90).to(dtype) + (k == 1),
    }


def models_of(dtypes, directory):
    """(directories of the branches, that of the base, tensors of each)"""
    loaded = [tensors(k, dtype) for k, dtype in enumerate(dtypes)]
    paths = [write(directory / f"m{k}", tensors) for k, tensors in enumerate(loaded)]
    return paths[:-1], paths[-1], loaded


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return {
        name: models_of(dtypes, tmp_path_factory.mktemp(name.replace(" ", "-")))
        for name, (dtypes, _) in DTYPES.items()
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
        inputs = [one[name] for one in loaded]
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
    """What rounds from within 1e-13 of the truth, measured by the inputs that cancel in it."""
    spread = 1e-13 * np.max([np.abs(f64(x)) for x in inputs], axis=0, initial=0.0)
    if tensor.dtype == torch.float64:
        np.testing.assert_allclose(
            tensor.numpy().ravel(), truth, rtol=0, atol=spread.max(initial=0), err_msg=name
        )
    else:
        low, high = (rounded(truth - sign * spread, tensor.dtype) for sign in (1, -1))
        exact, found = rounded(truth, tensor.dtype), bits(tensor)
        assert ((found == exact) | (found == low) | (found == high)).all(), name


def options_of(case):
    return {key: value for key, value in case.items() if key != "method"}


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
        merge_branches([Path(p) for p in paths], {weights!r}, config, out, SilentProgress(), Path(base))
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


# ---- what the formulas mean
def one(tmp_path, models, base, weights=None, /, **options):
    """Merges single tensors named "w"."""
    write(tmp_path / "base", {"w": base})
    paths = [write(tmp_path / f"m{k}", {"w": model}) for k, model in enumerate(models)]
    number = len(list(tmp_path.glob("out*")))
    out = tmp_path / f"out{number}"
    merge(
        paths,
        weights or [1 / len(models)] * len(models),
        out,
        MergeConfig(**options),
        tmp_path / "base",
    )
    return load(out)["w"]


@pytest.mark.parametrize("density,kept", [(0.0, 0), (1e-9, 1), (0.25, 25), (0.999, 99), (1.0, 100)])
def test_ties_keeps_exactly_its_share_and_at_least_one(tmp_path, density, kept, backend):
    for values in (torch.randn(100), torch.ones(100)):
        result = one(tmp_path, [values], torch.zeros(100), method="ties", density=density)
        assert int((result != 0).sum()) == kept
        assert torch.equal(result[result != 0], values[result != 0])


def test_among_equal_sizes_the_first_stay(tmp_path, backend):
    values = torch.tensor([1.0, -2.0, 1.0, -1.0, 2.0, -1.0, 1.0, 3.0])
    kept = one(tmp_path, [values], torch.zeros(8), method="ties", density=5 / 8)
    assert kept.tolist() == [1.0, -2.0, 1.0, 0.0, 2.0, 0.0, 0.0, 3.0]
    middle = one(
        tmp_path, [values], torch.zeros(8), method="breadcrumbs", density=4 / 8, gamma=2 / 8
    )
    assert middle.tolist() == [
        1.0,
        0.0,
        1.0,
        -1.0,
        2.0,
        0.0,
        0.0,
        0.0,
    ]  # 3 and the first 2 go, the last ones too


def test_breadcrumbs_drops_the_largest_then_the_smallest(tmp_path, backend):
    values = torch.arange(1.0, 11)
    for gamma, expected in [
        (0.2, [4.0, 5, 6, 7, 8]),
        (0.0, [6.0, 7, 8, 9, 10]),
        (0.7, [1.0, 2, 3, 4, 5]),
    ]:
        result = one(
            tmp_path, [values], torch.zeros(10), method="breadcrumbs", density=0.5, gamma=gamma
        )
        assert (
            result[result != 0].tolist() == expected
        )  # gamma 0.7: only so many of the largest go as leave half
    everything = one(
        tmp_path, [values], torch.zeros(10), method="breadcrumbs", density=1.0, gamma=0.3
    )
    assert torch.equal(everything, values)


def test_the_sign_of_the_sum_is_elected_and_a_zero_sum_elects_plus(tmp_path, backend):
    models = [torch.tensor([3.0, 1.0, -1.0, 0.0]), torch.tensor([-1.0, -1.0, -4.0, -2.0])]
    result = one(tmp_path, models, torch.zeros(4), [0.5, 0.5], method="ties", density=1.0)
    assert result.tolist() == [3.0, 1.0, -2.5, -2.0]
    plain = one(
        tmp_path, models, torch.zeros(4), [0.5, 0.5], method="ties", density=1.0, normalize=False
    )
    assert plain.tolist() == [1.5, 0.5, -2.5, -1.0]
    weighty = one(tmp_path, models, torch.zeros(4), [0.2, 0.8], method="ties", density=1.0)
    assert weighty.tolist() == pytest.approx([-1.0, -1.0, -3.4, -2.0])  # weights vote too


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_density_0_gives_the_base_and_1_the_whole_delta(tmp_path, method, backend):
    base, models = torch.randn(4, 25), [torch.randn(4, 25), torch.randn(4, 25)]
    assert torch.equal(one(tmp_path, models, base, method=method, density=0.0), base)
    whole = one(tmp_path, models, base, method=method, density=1.0)
    known = {"della": "ties", "dare_ties": "ties"}.get(method, "task_arithmetic")
    options = {"density": 1.0} if known == "ties" else {}
    truth = one(tmp_path, models, base, method=known, **options)
    torch.testing.assert_close(whole, truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "dare_linear", "della", "sce"])
def test_scale_multiplies_the_step_from_the_base(tmp_path, method, backend):
    base, models = torch.randn(8, 25).double(), [torch.randn(8, 25).double() for _ in range(2)]
    options = {} if method == "sce" else {"density": 0.6}
    full = one(tmp_path, models, base, method=method, **options) - base
    half = one(tmp_path, models, base, method=method, scale=0.5, **options) - base
    assert full.abs().max() > 0
    torch.testing.assert_close(half, full / 2, rtol=0, atol=1e-14)
    assert torch.equal(one(tmp_path, models, base, method=method, scale=0.0, **options), base)


def test_sce_weighs_branches_by_their_squares(tmp_path, backend):
    models = [torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([3.0, -1.0, 0.0, 2.0])]
    result = one(tmp_path, models, torch.zeros(4), method="sce")
    q = (2 / 16, 14 / 16)
    # in the second place the plain deltas cancel, so plus is elected, though the second branch weighs more
    assert result.tolist() == pytest.approx([q[0] + 3 * q[1], 1.0, 0.0, 2.0])
    half = one(
        tmp_path, models, torch.zeros(4), method="sce", select_topk=0.4
    )  # 1 of the 3 that vary: the first
    assert half.tolist() == pytest.approx([1 / 10 + 3 * 9 / 10, 0.0, 0.0, 0.0])
    assert (
        one(tmp_path, [models[0]] * 2, torch.zeros(4), method="sce", select_topk=0.5).tolist()
        == [0.0] * 4
    )


# ---- random numbers
def test_random_numbers_are_splitmix64s():
    """The first numbers of the published C code for seed 1234567."""
    known = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [splitmix(1234567, i) for i in range(5)] == known


def dropped(tmp_path, names, seed=0, order=(0, 1), extra=(), **options):
    """Which elements dare drops, by (tensor, branch): branch 0 moves everything by 1, branch 1 by 16."""
    number = len(list(tmp_path.glob("run*")))
    root = tmp_path / f"run{number}"
    base = write(root / "base", {name: torch.zeros(50, 40) for name in [*extra, *names]})
    moved = [
        write(root / f"m{k}", {n: torch.full((50, 40), 16.0**k) for n in [*extra, *names]})
        for k in (0, 1)
    ]
    config = MergeConfig(method="dare_linear", density=0.5, seed=seed, **options)
    merge([moved[k] for k in order], [0.5, 0.5], root / "out", config, base)
    values = load(root / "out")
    return {
        (name, k): values[name].numpy().ravel() >= 16
        if k
        else values[name].numpy().ravel() % 16 > 0
        for name in names
        for k in (0, 1)
    }


def test_random_masks_depend_on_seed_tensor_branch_and_element_alone(tmp_path):
    first = dropped(tmp_path, ["a", "b"])
    same = dropped(tmp_path, ["b", "a"], extra=["0", "c"], threads=1, chunk_kib=4)
    assert all(np.array_equal(first[key], same[key]) for key in first)
    for one, other in itertools.combinations(first.values(), 2):  # other tensors, other branches
        assert 0.4 < (one == other).mean() < 0.6
    other_seed = dropped(tmp_path, ["a", "b"], seed=1)
    assert all(0.4 < (first[key] == other_seed[key]).mean() < 0.6 for key in first)
    swapped = dropped(tmp_path, ["a", "b"], order=(1, 0))  # branches are counted, not named
    assert np.array_equal(first["a", 0], swapped["a", 1]) and np.array_equal(
        first["b", 1], swapped["b", 0]
    )


def test_the_share_that_stays_is_the_density(tmp_path):
    n, base = 400 * 500, torch.zeros(400, 500)
    for density in (0.1, 0.5, 0.9):
        kept = (
            one(tmp_path, [torch.ones(400, 500)], base, method="dare_linear", density=density) != 0
        )
        sigma = (density * (1 - density) / n) ** 0.5
        assert abs(kept.double().mean() - density) < 5 * sigma
    ramp = torch.arange(1.0, 501).repeat(400, 1)
    kept = (
        (one(tmp_path, [ramp], base, method="della", density=0.5, epsilon=0.4) != 0)
        .double()
        .mean(0)
    )
    expected = 0.1 + 0.8 * torch.arange(500) / 499  # rising with the size, in every row
    sigma = (expected * (1 - expected) / 400).sqrt()
    assert ((kept - expected).abs() < 5 * sigma).all()


def test_what_stays_is_enlarged_so_that_the_mean_is_kept(tmp_path):
    values = torch.arange(1.0, 101).repeat(2000, 1)
    for method in ("dare_linear", "della_linear"):
        result = (
            one(tmp_path, [values], torch.zeros(2000, 100), method=method, density=0.5)
            .double()
            .mean(0)
        )
        assert ((result / values[0]).mean() - 1).abs() < 0.02


# ---- parameters of one model, of one tensor
def test_every_model_has_its_own_parameters(tmp_path, backend):
    base, models = torch.zeros(6, 50), [torch.randn(6, 50) for _ in range(2)]
    for method, own in [
        ("ties", dict(density=(0.2, 0.9))),
        ("breadcrumbs", dict(density=(0.4, 0.8), gamma=(0.3, 0.0))),
        ("dare_linear", dict(density=(0.2, 1.0))),
        ("della", dict(density=(0.3, 0.7), epsilon=(0.2, 0.05))),
    ]:
        settings = tuple(
            ModelSettings(weight=(3.0, 1.0)[k], **{key: values[k] for key, values in own.items()})
            for k in (0, 1)
        )
        result = one(tmp_path, models, base, [0.5, 0.5], method=method, models=settings)
        truth = delta_method(method, "w", models, base, [0.75, 0.25], **own)
        np.testing.assert_array_equal(bits(result), rounded(truth, torch.float32), err_msg=method)


def test_parameters_by_name_and_along_the_layers(tmp_path, backend):
    names = [
        *(f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("mlp", "attn")),
        "norm.weight",
    ]
    loaded = [{name: torch.randn(8, 30) for name in names} for _ in range(3)]
    paths = [write(tmp_path / f"m{k}", tensors) for k, tensors in enumerate(loaded)]
    density = (Case((0.2, 0.8), "mlp"), Case(0.5))
    config = MergeConfig(method="ties", density=density, scale=(1.0, 0.0, 0.5))
    merge(paths[:2], [0.5, 0.5], tmp_path / "out", config, paths[2])
    for name, tensor in load(tmp_path / "out").items():
        layer = int(name.split(".")[2]) if "layers" in name else 0
        inputs = [one[name] for one in loaded]
        share = (0.2, 0.5, 0.8)[layer] if "mlp" in name else 0.5
        scale = (1.0, 0.0, 0.5)[layer]
        truth = delta_method(
            "ties", name, inputs[:2], inputs[2], [0.5, 0.5], density=share, scale=scale
        )
        np.testing.assert_array_equal(bits(tensor), rounded(truth, torch.float32), err_msg=name)


def test_a_tensor_without_a_case_is_named(tmp_path):
    models, base = [torch.randn(4)], torch.randn(4)
    with pytest.raises(InputError, match="merge: w: density has no case that matches this tensor"):
        one(tmp_path, models, base, method="ties", density=(Case(0.5, "mlp"),))
    own = (ModelSettings(weight=(Case(1.0, "mlp"),), density=0.5),)
    with pytest.raises(
        InputError,
        match=re.escape("merge: w: models[0].weight has no case that matches this tensor"),
    ):
        one(tmp_path, models, base, method="ties", models=own)
    half = (ModelSettings(weight=1.0), ModelSettings())
    with pytest.raises(InputError, match=re.escape("models[1].weight has no case")):
        one(tmp_path, models * 2, base, method="ties", density=0.5, models=half)
    zero = (ModelSettings(weight=1.0), ModelSettings(weight=-1.0))
    with pytest.raises(
        InputError,
        match=re.escape("merge: w: weights must have a sum other than 0, got [1.0, -1.0]"),
    ):
        one(tmp_path, models * 2, base, method="ties", density=0.5, models=zero)


def test_della_refuses_probabilities_outside_0_and_1(tmp_path):
    models, base = [torch.randn(4)], torch.randn(4)
    for density, epsilon in ((0.2, 0.2), (0.9, 0.1), (0.5, 0.6)):
        with pytest.raises(
            InputError, match="merge: w: density .* epsilon must lie between 0 and 1"
        ):
            one(tmp_path, models, base, method="della", density=density, epsilon=epsilon)


# ---- what is not finite
@pytest.fixture
def limited():
    """Ends the whole run with a traceback rather than waiting for a search that finds nothing."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "dare_linear", "della", "sce"])
def test_nonfinite_inputs_and_results_are_named(tmp_path, method, backend, limited):
    options = {"select_topk": 0.5} if method == "sce" else {"density": 0.5}
    for k, bad in ((0, float("nan")), (1, float("inf")), (2, float("-inf"))):
        inputs = [torch.randn(10, 10) for _ in range(3)]
        inputs[k][3, 3] = bad
        where = "base" if k == 2 else f"m{k}"
        with pytest.raises(
            InputError, match=f"{where}/model.safetensors: w: must be finite, holds NaN or infinity"
        ):
            one(tmp_path, inputs[:2], inputs[2], method=method, **options)
    far = [torch.full((10, 10), 6e4).half(), torch.full((10, 10), -6e4).half()]
    with pytest.raises(InputError, match="w: the result overflows F16"):
        one(
            tmp_path,
            far[:1],
            far[1],
            method=method,
            scale=3.0,
            **({"density": 1.0} if method != "sce" else {}),
        )


# ---- any small tensors at all
NUMBERS = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, -3.0, 1e-40, -1e-40, 3e38, -3e38, 2.0**-126, 7.0]
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tensors(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("any")
    branches, rows, row = (data.draw(st.integers(1, most)) for most in (3, 3, 9))
    draw = st.lists(NUMBERS | st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=rows * row,
                    max_size=rows * row)  # fmt: skip
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
