"""The projector: its law, its independence of batches and forms, and its peers' call sequences."""

import subprocess
import sys
from enum import StrEnum

import pytest
import torch

from merit_fast.integrations import Projector
from merit_fast.kernels.sketch import CountSketch, flat_sketch

ENTRIES = 5000
SEEDS = 400
# Widths with and without folding: (proj_dim, width of the sketch).
WIDTHS = [(1, 4096), (64, 4096), (1000, 4096), (5000, 20480), (8192, 8192)]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def few(*places):
    """A pair of gradients of which only some entries, in places that a tile shares, are not 0."""
    pair = torch.zeros(2, ENTRIES)
    pair[:, list(places)] = gaussian(2, len(places), seed=3)
    return pair


PAIRS = {
    "dense": gaussian(2, ENTRIES),
    "alike": gaussian(1, ENTRIES).expand(2, -1) + 0.1 * gaussian(2, ENTRIES, seed=1),
    "equal entries": torch.ones(2, ENTRIES),
    "a square of equal entries": (few(*(64 * i + j for i in range(8) for j in range(8))) != 0)
    * 1.0,
    "neighbours": few(*range(40)),
    "one column of a tile": few(*range(5, 64 * 40, 64)),
    "a square of a tile": few(*(64 * i + j for i in range(8) for j in range(8))),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("proj_dim,width", WIDTHS)
def test_inner_products_are_unbiased_with_the_stated_variance(proj_dim, width):
    """Bounds leave four standard errors, at a kurtosis of 15 for one number and 9 for others."""
    pairs = torch.cat(list(PAIRS.values()))
    wide = pairs.double()
    truth = (wide[::2] * wide[1::2]).sum(1)
    law = wide[::2].square().sum(1) * wide[1::2].square().sum(1) + truth**2
    projections = torch.stack(
        [Projector(ENTRIES, proj_dim, seed).project(pairs).double() for seed in range(SEEDS)]
    )
    errors = (projections[:, ::2] * projections[:, 1::2]).sum(2) - truth
    assert (errors.mean(0).abs() <= 4 * errors.std(0) / SEEDS**0.5 + 1e-5 * law.sqrt()).all()
    extra = 0 if width == proj_dim else (proj_dim / 2 / width) ** 2
    assert extra <= 1 / 64
    slack = 1 + 4 * ((14 if proj_dim == 1 else 8) / SEEDS) ** 0.5
    shares = proj_dim * errors.var(0) / law
    assert (shares <= slack * (1 + extra)).all(), dict(zip(PAIRS, shares.tolist(), strict=True))


def test_the_variance_of_dense_gradients_is_not_below_that_of_a_dense_random_matrix():
    """A projection that hid a part of the gradient would have too small a variance."""
    pairs = PAIRS["dense"]
    products = [Projector(ENTRIES, 100, seed).project(pairs).prod(0).sum() for seed in range(SEEDS)]
    law = pairs.double().square().sum(1).prod() + pairs.double().prod(0).sum() ** 2
    share = 100 * torch.stack(products).double().var() / law
    assert 0.8 < share < 1.2


@pytest.mark.parametrize("grad_dim", [1, 63, 4096, 8192, 16384])
def test_a_gradient_of_up_to_proj_dim_entries_keeps_its_inner_products(grad_dim):
    grads = gaussian(3, grad_dim).double()
    projections = Projector(grad_dim, 16384).project(grads).double()
    torch.testing.assert_close(projections @ projections.T, grads @ grads.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("proj_dim", [777, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad_dim", [1000, 128 * 300, 70_001])
def test_batches_slices_and_strides_change_no_bit(grad_dim, dtype, proj_dim, backend):
    grads = gaussian(8, grad_dim).to(dtype)
    projector = Projector(grad_dim, proj_dim, backend=backend)
    whole = projector.project(grads)
    assert whole.shape == (8, proj_dim) and whole.dtype == torch.float32
    for b in (0, 7):
        assert torch.equal(projector.project(grads[b : b + 1]), whole[b : b + 1])
    assert torch.equal(projector.project(grads[2:7]), whole[2:7])
    assert torch.equal(projector.project(grads[::3]), whole[::3])
    assert torch.equal(projector.project(grads.T.contiguous().T), whole)
    assert torch.equal(projector.project(grads.float()), whole)


def test_long_gradients_in_pieces_have_the_bits_of_one_sketch():
    """Whole rows in memory are read in place, odd lengths are copied piece by piece."""
    grads = gaussian(2, 600_011)
    in_pieces = Projector(600_011, 4096, seed=3).project(grads)
    padded = torch.nn.functional.pad(grads, (0, -600_011 % 64))
    whole = flat_sketch(padded.view(2, -1, 64), "model 0", CountSketch(4096, 3))
    assert torch.equal(in_pieces, whole)


@pytest.mark.parametrize("proj_dim", [50, 4096, 8192])
def test_a_mapping_is_projected_as_its_tensors_end_to_end(proj_dim):
    shapes = {"norm": (7,), "scale": (), "weight": (70, 130), "none": (0,), "bias": (301,)}
    grads = {name: gaussian(4, *shape, seed=len(name)) for name, shape in shapes.items()}
    grads["weight"] = grads["weight"].bfloat16()
    flat = torch.cat([grad.float().reshape(4, -1) for grad in grads.values()], 1)
    projector = Projector(flat.shape[1], proj_dim)
    assert torch.equal(projector.project(grads), projector.project(flat))


def test_threads_change_no_bit():
    grads = gaussian(5, 30_000)
    projector = Projector(30_000, 12288)
    whole = projector.project(grads)
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(projector.project(grads), whole)
    finally:
        torch.set_num_threads(1)


def test_projections_are_linear():
    g, h = gaussian(2, 9000)
    projector = Projector(9000, 300)
    sums = 3 * projector.project(g[None]) - 2 * projector.project(h[None])
    torch.testing.assert_close(projector.project((3 * g - 2 * h)[None]), sums, rtol=0, atol=1e-4)


@pytest.mark.parametrize("proj_dim", [500, 4096])
def test_seed_and_model_id_choose_the_hash_and_nothing_else_does(proj_dim):
    grads = gaussian(1, 9000)

    def projected(seed, model_id, **options):
        return Projector(9000, proj_dim, seed, **options).project(grads, model_id)

    first = projected(0, 0)
    assert torch.equal(first, projected(0, 0))
    assert torch.equal(first, projected(0, 0, proj_type="normal", block_size=8, max_batch_size=16))
    others = [projected(1, 0), projected(0, 1), projected(0, 2), projected(1, 1)]
    for one, other in zip([first, *others], [*others, first], strict=True):
        cosine = torch.cosine_similarity(one, other)
        assert abs(float(cosine)) < 5 / proj_dim**0.5


def test_no_memory_grows_with_the_gradient():
    """A projector for as many entries as a model of a terabyte has is made at once."""
    projector = Projector(grad_dim=1 << 38, proj_dim=5000)
    assert not [value for value in vars(projector).values() if isinstance(value, torch.Tensor)]


def test_an_empty_batch_has_no_projections():
    assert Projector(70, 50).project(torch.zeros(0, 70)).shape == (0, 50)
    assert Projector(70, 50).project({"w": torch.zeros(0, 7, 10)}).shape == (0, 50)


def test_traks_scale_is_the_root_of_proj_dim_times_as_large():
    grads = gaussian(2, 900)
    unbiased = Projector(900, 100).project(grads)
    traks = Projector(900, 100, normalized=False, dtype=torch.float16).project(grads)
    assert traks.dtype == torch.float16
    torch.testing.assert_close(traks, (10 * unbiased).half())


def test_traks_call_sequence():
    """Of trak.TRAKer: attributes of a given projector, gradients by name, keywords, free_memory."""
    projector = Projector(
        grad_dim=35, proj_dim=16, seed=0, proj_type="normal", device="cpu", normalized=False
    )
    assert (projector.proj_dim, projector.proj_type, projector.grad_dim) == (16, "normal", 35)
    grads = {"weight": gaussian(3, 6, 5), "bias": gaussian(3, 5)}
    projected = projector.project(grads, model_id=2)
    projector.free_memory()
    assert torch.equal(projector.project(grads, model_id=2), projected)
    projected /= torch.sqrt(torch.tensor(35, dtype=torch.float32))
    assert projected.shape == (3, 16)


def test_lesss_call_sequence():
    """Of collect_grad_reps.py: TRAK's enum, a dtype, options of its other classes, fp16 rows."""

    class ProjectionType(StrEnum):
        rademacher = "rademacher"

    projector = Projector(
        grad_dim=700,
        proj_dim=128,
        seed=0,
        proj_type=ProjectionType.rademacher,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        block_size=128,
        max_batch_size=16,
    )
    rows = torch.stack([gaussian(700, seed=seed) for seed in range(3)]).to(torch.float16)
    projected = projector.project(rows, model_id=0)
    assert projected.dtype == torch.bfloat16 and projected.shape == (3, 128)


def test_dattris_call_sequence():
    """Of make_random_projector and of the function that random_project returns."""
    projector = Projector(
        feature_dim=35, proj_dim=16, seed=3, proj_type="sjlt", device="cpu", dtype=torch.float32
    )
    features = {"weight": gaussian(3, 6, 5), "bias": gaussian(3, 5)}
    projected = projector.project(features, 4)
    assert projector.feature_dim == 35
    assert torch.equal(projector(features, ensemble_id=4), projected)
    assert torch.equal(projector.project(features, model_id=4), projected)


GRADS = torch.zeros(2, 35)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: Projector(), ValueError, "give one of grad_dim and feature_dim"),
        (lambda: Projector(0), ValueError, "grad_dim must be a positive integer, got 0"),
        (lambda: Projector(35, feature_dim=35), ValueError, "one of grad_dim and feature_dim"),
        (lambda: Projector(35, 2.5), ValueError, "proj_dim must be a positive integer, got 2.5"),
        (
            lambda: Projector(35, proj_type="identity"),
            ValueError,
            "proj_type must be one of rademacher, normal, sjlt, count_sketch, got identity",
        ),
        (lambda: Projector(35, dtype=torch.int8), ValueError, "float type, got torch.int8"),
        (
            lambda: Projector(35).project(GRADS[:, 1:]),
            ValueError,
            "must have 35 entries an example, got 34",
        ),
        (
            lambda: Projector(35).project(GRADS[0]),
            ValueError,
            r"grads must be \[B, 35\], got \[35\]",
        ),
        (lambda: Projector(35).project(GRADS.long()), TypeError, "grads: dtype must be a float"),
        (lambda: Projector(35).project([GRADS]), TypeError, "grads must be a tensor, got list"),
        (lambda: Projector(35).project({"w": GRADS, "b": 3}), TypeError, "b must be a tensor"),
        (lambda: Projector(35).project({}), ValueError, "got an empty mapping"),
        (
            lambda: Projector(35).project({"w": GRADS, "b": GRADS[:1]}),
            ValueError,
            r"b must be \[2, ...\], got \[1, 35\]",
        ),
        (
            lambda: Projector(35).project({"w": GRADS[0, 0]}),
            ValueError,
            r"w must be \[B, ...\], got \[\]",
        ),
        (lambda: Projector(35).project(GRADS, "last"), TypeError, "integer, got 'last'"),
        (
            lambda: Projector(35).project(GRADS, 1, ensemble_id=1),
            ValueError,
            "one of model_id and ensemble_id",
        ),
    ],
)
def test_bad_arguments_are_named_in_one_line(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_the_name_is_imported_when_it_is_used():
    script = (
        "import sys, merit_fast.integrations as i; assert 'torch' not in sys.modules; "
        "i.Projector; assert 'torch' in sys.modules and not hasattr(i, 'Projectors')"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
