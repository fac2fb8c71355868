"""Every quantised form is decoded to the values that its writer means, in float64."""

import numpy as np
import pytest
import torch
from support.merge.formats.cases import CASES, e8m0, fp8_model
from support.merge.formats.quantised import Stored, write_model
from support.merge.formulas import delta_method, rounded
from support.merge.merges import bits, load, merge, write

from merit_fast.merge import MergeConfig


@pytest.mark.parametrize("case", CASES)
def test_a_merge_has_the_values_that_the_writer_means(tmp_path, case, backend):
    stored = CASES[case]
    norm = {"norm.weight": torch.randn(7)}
    plain = {name: torch.randn(value.shape) for name, value in stored.values.items()}
    models = [
        write_model(tmp_path / "quantised", stored, norm),
        write(tmp_path / "plain", {**plain, **norm}),
    ]
    merge(models, [0.3, 0.7], tmp_path / "out", MergeConfig(dtype="fp32", chunk_kib=4))
    merged = load(tmp_path / "out")
    assert merged.keys() == {*stored.values, "norm.weight"}
    for name, value in stored.values.items():
        exact = 0.3 * value + 0.7 * plain[name].double().numpy()
        np.testing.assert_array_equal(merged[name].numpy(), exact.astype(np.float32), name)


def test_the_dtype_f8_e8m0_of_safetensors_is_a_scale(tmp_path):
    stored = CASES["V4 .scale, E8M0 dtype"]
    typed = stored.tensors["l.scale"].view(torch.float8_e8m0fnu)
    tensors = stored.tensors | {"l.scale": typed}
    model = write_model(tmp_path / "m", Stored(tensors, stored.values, stored.config))
    merge([model], [1.0], tmp_path / "out", MergeConfig(dtype="fp32"))
    assert torch.equal(
        load(tmp_path / "out")["l.weight"], torch.from_numpy(stored.values["l.weight"]).float()
    )


@pytest.mark.parametrize("case", ["gpt-oss", "int4, ordered columns", "experts in cut blocks"])
@pytest.mark.parametrize("method", ["ties", "dare_linear", "della", "breadcrumbs"])
def test_methods_on_deltas_take_quantised_inputs(tmp_path, case, method, backend):
    stored = CASES[case]
    ((name, value),) = stored.values.items()
    base = torch.randn(value.shape)
    other = torch.randn(value.shape)
    models = [
        write_model(tmp_path / "quantised", stored),
        write(tmp_path / "plain", {name: other}),
    ]
    start = write(tmp_path / "base", {name: base})
    options = MergeConfig(method=method, density=0.6, dtype="fp32", chunk_kib=4)
    merge(models, [0.5, 0.5], tmp_path / "out", options, start)
    made = torch.from_numpy(np.ascontiguousarray(value))
    truth = delta_method(method, name, [made, other], base, [0.5, 0.5], density=0.6)
    np.testing.assert_array_equal(bits(load(tmp_path / "out")[name]), rounded(truth, torch.float32))


def test_a_scale_that_is_not_a_number_is_found(tmp_path, backend):
    stored = fp8_model((2, 64), e8m0(2, 2), (1, 32), "l.weight_scale")
    stored.tensors["l.weight_scale"][1, 0] = 255
    model = write_model(tmp_path / "m", stored)
    with pytest.raises(Exception, match="m/model.safetensors: l.weight: must be finite"):
        merge([model], [1.0], tmp_path / "bad", MergeConfig(dtype="bf16"))
