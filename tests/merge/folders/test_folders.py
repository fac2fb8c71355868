"""Folders of several models, as sentence-transformers and diffusers write them."""

import json
import os
from pathlib import Path

import pytest
import torch
from support.merge.merges import load, write
from support.tiny import make_model, make_tokenizer

from merit_fast.cli.merge.command import describe
from merit_fast.errors import InputError
from merit_fast.merge import load_merged, merge_models
from merit_fast.merge.folders.several import FolderMerge

ST = "sentence_transformers.models"
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": f"{ST}.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{ST}.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": f"{ST}.Dense"},
]
PIPELINE = {
    "_class_name": "TinyPipeline",
    "_diffusers_version": "0.30.0",
    "scheduler": ["diffusers", "PNDMScheduler"],
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}


SMALLER = {**PIPELINE, "unet": [None, None]}


def put(folder, name, content):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def sentence_model(folder, seed):
    make_tokenizer(folder)
    make_model(folder, seed=seed)
    put(folder, "modules.json", MODULES)
    put(folder, "config_sentence_transformers.json", {"prompts": {"query": "q: "}})
    put(folder, "sentence_bert_config.json", {"max_seq_length": 64})
    put(folder, "1_Pooling/config.json", {"pooling_mode_cls_token": True})
    put(folder, "2_Dense/config.json", {"in_features": 72, "out_features": 8})
    put(folder, "README.md", "# another model")
    put(folder, ".gitattributes", "x")
    put(folder, "onnx/model.onnx", "x")
    generator = torch.Generator().manual_seed(seed)
    dense = {"linear.weight": torch.randn(8, 72, generator=generator)}
    write(folder / "2_Dense", dense)


def pipeline(folder, seed, shards=False):
    generator = torch.Generator().manual_seed(seed)
    put(folder, "model_index.json", PIPELINE)
    put(folder, "scheduler/scheduler_config.json", {"steps": 7})
    put(folder, "unet/config.json", {"_class_name": "UNet2DConditionModel"})
    put(folder, "text_encoder/config.json", {"model_type": "clip_text_model"})
    put(folder, "extra/config.json", {})
    write(folder / "text_encoder", {"t": torch.randn(3, 4, generator=generator)})
    tensors = {name: torch.randn(5, 6, generator=generator) for name in ("a", "b")}
    if not shards:
        write(folder / "unet", tensors, "diffusion_pytorch_model.safetensors")
        write(folder / "unet", tensors, "diffusion_pytorch_model.fp16.safetensors")
        return
    files = {}
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        files[name] = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        write(folder / "unet", {name: tensor}, files[name])
    index = {"metadata": {}, "weight_map": files}
    put(folder, "unet/diffusion_pytorch_model.safetensors.index.json", index)


def files_of(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@pytest.fixture
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_part_of_a_sentence_model_is_merged(inside):
    for k in range(3):
        sentence_model(Path(f"s{k}"), k)
    summary = merge_models(["s0", "s1"], [0.25, 0.75], "s2", out="out", scale=0.5, dtype="fp32")
    for part in ("", "2_Dense"):
        models = [load(Path(f"s{k}") / part) for k in range(3)]
        merged = load(Path("out") / part)
        assert merged.keys() == models[0].keys()
        for name, tensor in merged.items():
            a, b, base = (model[name].double() for model in models)
            truth = base + 0.5 * (0.25 * a + 0.75 * b - base)
            torch.testing.assert_close(tensor, truth.float(), rtol=1e-6, atol=1e-7)
    copied = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
    for name in (*copied, "1_Pooling/config.json", "2_Dense/config.json", "tokenizer.json"):
        assert Path("out", name).read_bytes() == Path("s0", name).read_bytes(), name
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "float32"
    assert summary["parts"] == [".", "2_Dense"] and summary["left_out"] == ["README.md", "onnx/"]
    assert "Merged model" in Path("out/README.md").read_text()
    assert [name for name in files_of(Path("out")) if name.endswith("README.md")] == ["README.md"]
    assert summary["models"] == [["s0", 0.25], ["s1", 0.75]]
    text = describe(summary, dry_run=False)
    assert "  parts: ., 2_Dense\n  left out: README.md, onnx/" in text


@pytest.mark.parametrize("shards", [False, True])
def test_every_part_of_a_pipeline_is_merged(inside, shards):
    for k in range(2):
        pipeline(Path(f"d{k}"), k, shards)
    summary = merge_models(["d0", "d1"], out="out")
    for part in ("unet", "text_encoder"):
        models = [load(Path(f"d{k}") / part) for k in range(2)]
        for name, tensor in load(Path("out") / part).items():
            mean = (models[0][name].double() + models[1][name].double()) / 2
            torch.testing.assert_close(tensor, mean.float(), rtol=1e-6, atol=1e-7)
    unet = ["config.json", "diffusion_pytorch_model.safetensors"]
    left_out = ["extra/", "unet/diffusion_pytorch_model.fp16.safetensors"]
    if shards:
        index = "diffusion_pytorch_model.safetensors.index.json"
        names = [f"diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)]
        unet = ["config.json", *names, index]
        left_out = ["extra/"]
        weight_map = json.loads(Path("out/unet", index).read_text())["weight_map"]
        assert weight_map == {"a": names[0], "b": names[1]}
    assert files_of(Path("out/unet")) == sorted(unet)
    assert Path("out/scheduler/scheduler_config.json").read_text() == '{"steps": 7}'
    assert summary["left_out"] == left_out
    assert json.loads(Path("out/model_index.json").read_text()) == PIPELINE


def test_a_killed_merge_resumes_at_its_part(inside, monkeypatch):
    for k in range(2):
        pipeline(Path(f"d{k}"), k)
    merge_models(["d0", "d1"], out="whole")

    def die(self, directory):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FolderMerge, "_copy", die)
        with pytest.raises(KeyboardInterrupt):
            merge_models(["d0", "d1"], out="out")
    assert not Path("out").exists()
    merge_models(["d0", "d1"], out="out")
    assert files_of(Path("out")) == files_of(Path("whole"))
    for name in files_of(Path("whole")):
        if name not in ("README.md", "stage.json"):
            assert Path("out", name).read_bytes() == Path("whole", name).read_bytes(), name


def test_a_dry_run_writes_nothing(inside):
    for k in range(2):
        pipeline(Path(f"d{k}"), k)
    before = files_of(Path())
    plan = merge_models(["d0", "d1"], out="out", dry_run=True)
    assert plan["parameters"] == 12 + 60 and files_of(Path()) == before


def change(listing, values):
    return lambda: put(Path("d0"), listing, values)


@pytest.mark.parametrize(
    "act, options, message",
    [
        (
            lambda: os.remove("d1/model_index.json"),
            {},
            "d1: must hold the parts text_encoder, ",
        ),
        (
            lambda: put(Path("d1"), "model_index.json", {**PIPELINE, "unet": [None, None]}),
            {},
            "got",
        ),
        (change("model_index.json", []), {}, "model_index.json: must be a mapping of parts, got"),
        (change("model_index.json", {"a": 1}), {}, "names no folder that holds weights"),
        (change("model_index.json", {"..": ["diffusers", "X"]}), {}, "must name folders inside d0"),
        (change("model_index.json", {"gone": ["diffusers", "X"]}), {}, "'gone', which is absent"),
        (change("modules.json", {}), {}, "modules.json: must be a list of modules, got {}"),
        (change("modules.json", [{"path": 1}]), {}, "module 0: path: must be text, got 1"),
        (change("modules.json", [{"path": "/etc"}]), {}, "must name folders inside d0, got '/etc'"),
        (lambda: None, {"shard_size": "1M"}, "merge.shard_size: must be absent, as d0 holds sev"),
        (lambda: None, {"share": (1, 2)}, "share and records go with one model"),
    ],
)
def test_bad_folders_are_refused(inside, act, options, message):
    for k in range(2):
        pipeline(Path(f"d{k}"), k)
    act()
    with pytest.raises(InputError, match=message):
        merge_models(["d0", "d1"], out="out", **options)
    assert not Path("out").exists()


def test_pickled_weights_of_a_part_are_no_config(inside):
    for k in range(2):
        pipeline(Path(f"d{k}"), k)
        (Path(f"d{k}") / "text_encoder/model.safetensors").unlink()
        put(Path(f"d{k}"), "text_encoder/pytorch_model.bin", "x")
    with pytest.raises(InputError, match="d0/text_encoder: holds neither .*pytorch_model.bin"):
        merge_models(["d0", "d1"], out="out")


def test_such_a_folder_is_not_loaded_as_one_model(inside):
    for k in range(2):
        sentence_model(Path(f"s{k}"), k)
    with pytest.raises(InputError, match="s0/modules.json: lists several models"):
        load_merged(["s0", "s1"])


def test_what_a_plain_folder_loses_is_named(inside):
    for k in range(2):
        make_tokenizer(Path(f"m{k}"))
        make_model(Path(f"m{k}"), seed=k)
    put(Path("m0"), "README.md", "x")
    put(Path("m0"), "modeling_x.py", "x")
    put(Path("m0"), "original/params.json", "x")
    put(Path("m0"), "optimizer.pt", "x")
    put(Path("m0"), "tune.json", "{}")
    put(Path("m0"), ".gitattributes", "x")
    summary = merge_models(["m0", "m1"], out="out", weights="uniform")
    assert summary["left_out"] == ["README.md", "modeling_x.py", "optimizer.pt", "original/"]
    assert "  left out: README.md, modeling_x.py, optimizer.pt, original/" in describe(
        summary, dry_run=False
    )
