"""The parsers of axolotl and LLaMA-Factory read an export, where these packages are installed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml


def test_axolotl_knows_every_key(export, marked_run):
    schemas = pytest.importorskip("axolotl.utils.schemas.datasets")
    out, report = export(marked_run, "axolotl")
    for group in report["groups"]:
        config = yaml.safe_load((out / group["config"]).read_text())
        for entry in (*config["datasets"], *config["test_datasets"]):
            assert set(entry) <= set(schemas.SFTDataset.model_fields)
            parsed = schemas.SFTDataset(**entry)
            assert parsed.chat_template == "tokenizer_default"
            assert parsed.field_messages == entry["field_messages"]


def test_llamafactory_converts_every_row(export, plain_run):
    parser = pytest.importorskip("llamafactory.data.parser")
    converter = pytest.importorskip("llamafactory.data.converter")
    out, report = export(plain_run, "llamafactory")
    options = SimpleNamespace(media_dir=str(out))
    for group in report["groups"]:
        config = yaml.safe_load((out / group["config"]).read_text())
        for attributes in parser.get_dataset_list(config["dataset"].split(","), str(out)):
            convert = converter.get_dataset_converter(attributes.formatting, attributes, options)
            for line in Path(out, attributes.dataset_name).read_bytes().splitlines():
                row = json.loads(line)
                turns = convert(row)
                answer = turns["_response"][0]
                assert answer["role"] == "assistant" and answer["content"]
                assert len(turns["_prompt"]) == (3 if row["dataset"] == "shared" else 1)
                system = "Be brief." if row["dataset"] == "shared" else ""
                assert turns["_system"] == system
