"""The exact share of largest deltas of large tensors, found in passes from a sample.
by index of those that tie, as a sort would have it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checks import run_at_level
from support.formulas import delta_method, largest, rounded
from support.merges import bits, load, merge, write

from merit_fast.merge import MergeConfig

COUNT = 70_001  # more than is sorted whole; 18 chunks of 16 KiB
# the engine's sample: runs of elements spread evenly
PLACES = 64
RUN = 256


def sampled(count=COUNT):
    mask = np.zeros(count, bool)
    for index in range(PLACES):
        mask[(count - RUN) // (PLACES - 1) * index :][:RUN] = True
    return mask


def distributions():
    """Name -> [COUNT] fp32 deltas, none of them 0."""
    random = np.random.default_rng(3)
    steps = np.arange(1, COUNT + 1)
    distinct = random.permutation(steps)
    seen = sampled()
    made = {
        "normal": random.standard_normal(COUNT),
        "constant": np.full(COUNT, -0.75),
        "two values": random.choice([1.0, -2.0], COUNT),
        "three values, one rare": np.where(distinct < 5, 7.0, np.where(distinct % 2, 1.0, -3.0)),
        "distinct": distinct / 8,
        "neighbours": (np.float32(1).view(np.uint32) + distinct.astype(np.uint32)).view(np.float32),
        "every exponent": random.integers(1, 0x7F800000, COUNT, np.uint32).view(np.float32),
        "rising": steps / 16,
        "falling": -steps[::-1] / 16,
        "sample all small": np.where(seen, 2.0**-20, 1 + distinct / COUNT),
        "sample all large": np.where(seen, 2.0**20, 1 + distinct / COUNT),
        "sample of one value inside": np.where(seen, 1.5, 1 + distinct / COUNT),
        "sample distinct, the rest constant": np.where(seen, 1 + distinct / COUNT, 1.5),
        "denormal": np.where(distinct % 3, distinct * 2.0**-149, -(2.0**-126)),
        "largest": np.where(distinct % 2, 1, -1)
        * np.float64(np.finfo(np.float32).max)
        / (1 + distinct % 5),
    }
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in made.items()}


KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base of zeros, a model of these values, and their shift by a third of a turn, by dtype."""
    root = tmp_path_factory.mktemp("thresholds")
    results_by_kind = {}
    made = distributions()
    for kind, dtype in KINDS.items():
        first = {name: tensor.clamp(-3e38, 3e38).to(dtype) for name, tensor in made.items()}
        second = {name: tensor.roll(COUNT // 3) for name, tensor in first.items()}
        base = {name: torch.zeros(COUNT, dtype=dtype) for name in made}
        paths = [write(root / kind / f"m{k}", each) for k, each in enumerate((first, second, base))]
        orders = {
            name: np.argsort(-ranks(tensor), kind="stable") for name, tensor in second.items()
        }
        results_by_kind[kind] = paths, [first, second], orders
    return results_by_kind


def ranks(tensor):
    return tensor.float().abs().numpy()


def assert_only(result, deltas, kept, name):
    """The merge, from a base of zeros, is the deltas that are kept."""
    expected = np.zeros(COUNT, np.float32)
    expected[kept] = deltas.float().numpy()[kept]
    np.testing.assert_array_equal(result.float().numpy(), expected, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [1e-9, 0.001, 0.5, 0.77, 1 - 1 / COUNT])
def test_ties_keeps_what_a_sort_would(models, tmp_path, kind, density):
    paths, loaded, orders = models[kind]
    config = MergeConfig(method="ties", density=density, chunk_kib=16)
    merge(paths[1:2], [1.0], tmp_path / "out", config, paths[2])
    for name, result in load(tmp_path / "out").items():
        assert_only(result, loaded[1][name], orders[name][: max(1, int(density * COUNT))], name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density,gamma", [(0.5, 0.01), (0.9, 0.1), (0.001, 0.5)])
def test_breadcrumbs_keeps_the_middle_that_a_sort_would(models, tmp_path, kind, density, gamma):
    paths, loaded, orders = models[kind]
    config = MergeConfig(method="breadcrumbs", density=density, gamma=gamma, chunk_kib=16)
    merge(paths[1:2], [1.0], tmp_path / "out", config, paths[2])
    keep = int(density * COUNT)
    top = COUNT - keep - max(0, COUNT - keep - int(gamma * COUNT))
    for name, result in load(tmp_path / "out").items():
        assert_only(result, loaded[1][name], orders[name][top : top + keep], name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.001, 0.7])
def test_sce_selects_what_a_sort_would(models, tmp_path, kind, share):
    paths, loaded, _ = models[kind]
    config = MergeConfig(method="sce", select_topk=share, chunk_kib=16)
    merge(paths[:2], [0.5, 0.5], tmp_path / "out", config, paths[2])
    for name, result in load(tmp_path / "out").items():
        first, second = (each[name].double().numpy() for each in loaded)
        mean = (first + second) / 2
        with np.errstate(over="ignore"):
            variance = (((first - mean) ** 2 + (second - mean) ** 2) / 2).astype(np.float32)
        kept = largest(variance, 0, int((variance != 0).sum() * share))
        nonzero = result.float().numpy() != 0
        assert not nonzero[~kept].any(), name
        if name != "denormal":  # whose results may round to 0
            assert nonzero[kept].all(), name


def test_ties_of_several_models_is_the_formula(models, tmp_path):
    """On a base that is not zero: differences of 16-bit floats are none."""
    torch.manual_seed(1)
    for kind, dtype in KINDS.items():
        inputs = [torch.randn(COUNT).to(dtype) for _ in range(4)]
        paths = [write(tmp_path / kind / f"m{k}", {"w": tensor}) for k, tensor in enumerate(inputs)]
        merge(
            paths[:3],
            [0.2, 0.3, 0.5],
            tmp_path / f"{kind}-out",
            MergeConfig(method="ties", density=0.3),
            paths[3],
        )
        truth = delta_method("ties", "w", inputs[:3], inputs[3], [0.2, 0.3, 0.5], density=0.3)
        np.testing.assert_array_equal(
            bits(load(tmp_path / f"{kind}-out")["w"]), rounded(truth, dtype)
        )


@pytest.mark.parametrize(
    "count", [1, 2, 511, 512, 513, PLACES * RUN - 1, PLACES * RUN, PLACES * RUN + 1, 65537]
)
def test_tensors_of_any_length(tmp_path, count):
    torch.manual_seed(count)
    inputs = [torch.randint(-9, 10, (count,)).float() for _ in range(3)]
    paths = [write(tmp_path / f"m{k}", {"w": tensor}) for k, tensor in enumerate(inputs)]
    for method in ("ties", "breadcrumbs_ties"):
        options = dict(density=0.4) | (dict(gamma=0.3) if method != "ties" else {})
        merge(
            paths[:2],
            [0.5, 0.5],
            tmp_path / method,
            MergeConfig(method=method, chunk_kib=4, **options),
            paths[2],
        )
        truth = delta_method(method, "w", inputs[:2], inputs[2], [0.5, 0.5], **options)
        np.testing.assert_array_equal(
            bits(load(tmp_path / method)["w"]), rounded(truth, torch.float32)
        )


def test_threads_chunks_and_backends_change_no_byte(models, tmp_path, monkeypatch):
    for kind in KINDS:
        paths = models[kind][0]
        outputs = set()
        for number, (threads, chunk) in enumerate([(1, 4), (2, 7), (5, 64), (2, 1024), (0, 0)]):
            monkeypatch.setenv("MERIT_FAST_BACKEND", "cpu" if threads else "eager")
            config = MergeConfig(
                method="ties", density=0.3, threads=threads or 1, chunk_kib=chunk or 256
            )
            merge(paths[:2], [0.5, 0.5], tmp_path / f"{kind}{number}", config, paths[2])
            outputs.add((tmp_path / f"{kind}{number}/model.safetensors").read_bytes())
        assert len(outputs) == 1


LEVEL_SCRIPT = """
import hashlib
from pathlib import Path
from merit_fast.merge import MergeConfig, merge_branches
from merit_fast.progress import SilentProgress
for kind, paths in {inputs!r}.items():
    for method in ("ties", "breadcrumbs", "sce"):
        out = Path({out!r}) / (kind + method)
        out.mkdir(parents=True)
        options = dict(select_topk=0.4) if method == "sce" else dict(density=0.4)
        config = MergeConfig(method=method, chunk_kib=32, **options)
        *models, base = [Path(p) for p in paths]
        merge_branches(models, [0.5, 0.5], base, out, config, SilentProgress())
        print(kind, method, hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
"""


def test_every_isa_level_gives_the_same_bits(models, tmp_path, native_levels):
    inputs = {kind: [str(path) for path in paths] for kind, (paths, *_) in models.items()}
    texts = {
        run_at_level(LEVEL_SCRIPT.format(inputs=inputs, out=str(tmp_path / level)), level)
        for level in native_levels
    }
    assert len(texts) == 1


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    distinct=st.sampled_from([1, 2, 3, 100, 1 << 20]),
    density=st.floats(0, 1),
    shape=st.sampled_from(["uniform", "geometric", "blocks"]),
)
def test_any_large_tensor(tmp_path_factory, seed, distinct, density, shape):
    """Blocks: every chunk of 1000 has values of its own, so a sample misleads."""
    root = tmp_path_factory.mktemp("any")
    random = np.random.default_rng(seed)
    count = int(random.integers(PLACES * RUN, 60_000))
    drawn = random.integers(1, distinct + 1, count).astype(np.float64)
    drawn = {
        "uniform": drawn,
        "geometric": 2.0 ** -(drawn % 60),
        "blocks": drawn + np.arange(count) // 1000,
    }[shape]
    tensor = torch.from_numpy(drawn * random.choice([1, -1], count)).float()
    paths = [
        write(root / f"m{k}", {"w": each}) for k, each in enumerate((tensor, torch.zeros(count)))
    ]
    merge(
        paths[:1],
        [1.0],
        root / "out",
        MergeConfig(method="ties", density=density, chunk_kib=8),
        paths[1],
    )
    kept = largest(ranks(tensor), 0, max(1, int(density * count)) if density > 0 else 0)
    np.testing.assert_array_equal(load(root / "out")["w"].numpy() != 0, kept)


# ---- values that are not finite, where they are allowed
NONFINITE_SCRIPT = """
import os, sys
from pathlib import Path
import numpy as np
from merit_fast.errors import InputError
from merit_fast.merge import MergeConfig, merge_branches
from merit_fast.progress import SilentProgress
root, base = Path({root!r}), Path({base!r})
for backend in ("cpu", "eager"):
    os.environ["MERIT_FAST_BACKEND"] = backend
    for model in sorted(root.glob("bad*")):
        for method in ("ties", "breadcrumbs", "della", "sce"):
            option = dict(select_topk=0.5) if method == "sce" else dict(density=0.5)
            out = root / "out" / f"{{backend}}-{{model.name}}-{{method}}"
            out.mkdir(parents=True)
            config = MergeConfig(method=method, allow_nonfinite=True, **option)
            merge_branches([model, root / "good"], [0.5, 0.5], base, out, config, SilentProgress())
            try:
                config = MergeConfig(method=method, **option)
                strict = out / "strict"
                strict.mkdir()
                pair = [model, root / "good"]
                merge_branches(pair, [0.5, 0.5], base, strict, config, SilentProgress())
            except InputError as error:
                assert str(error).startswith(str(model)), error
            else:
                sys.exit("not refused")
"""


def test_nonfinite_values_neither_hang_nor_pass_unseen(tmp_path):
    """In a process of its own with a limit: a search for the rank of a NaN may not end."""
    write(tmp_path / "base", {"w": torch.zeros(150, 500)})
    torch.manual_seed(0)
    write(tmp_path / "good", {"w": torch.randn(150, 500)})
    for k, (share, value) in enumerate(
        [(0.9, "nan"), (0.3, "nan"), (0.001, "nan"), (0.9, "inf"), (0.3, "-inf")]
    ):
        bad = torch.where(torch.rand(150, 500) < share, float(value), torch.randn(150, 500))
        write(tmp_path / f"bad{k}", {"w": bad})
    run_at_level(
        NONFINITE_SCRIPT.format(root=str(tmp_path), base=str(tmp_path / "base")), None, timeout=60
    )
    outputs = sorted((tmp_path / "out").iterdir())
    native = [out for out in outputs if out.name.startswith("cpu")]
    assert len(outputs) == 2 * len(native) == 40
    for out in native:
        other = out.with_name(out.name.replace("cpu", "eager"))
        np.testing.assert_array_equal(
            bits(load(out)["w"]), bits(load(other)["w"]), err_msg=out.name
        )
