"""Models of other architectures: transformers loads the output, and rows belong to their tokens."""

import pytest
import torch
import transformers
from support.merge.vocabulary.models import OWN, make_tokenizer
from transformers import AutoTokenizer

from merit_fast.merge import merge_models

DECODER = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
ENCODER_DECODER = dict(
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
)
VISION = dict(image_size=32, patch_size=16, **DECODER)
# Name of the model's class and of its config -> options.
CASES = {
    ("GPT2LMHeadModel", "GPT2Config"): dict(n_embd=16, n_layer=1, n_head=2),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig"): DECODER,
    ("CodeGenForCausalLM", "CodeGenConfig"): dict(n_embd=16, n_layer=1, n_head=4, rotary_dim=2),
    ("PhiForCausalLM", "PhiConfig"): DECODER,
    ("BertForMaskedLM", "BertConfig"): DECODER,
    ("RobertaForMaskedLM", "RobertaConfig"): DECODER,
    ("T5ForConditionalGeneration", "T5Config"): dict(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    ),
    ("BartForConditionalGeneration", "BartConfig"): ENCODER_DECODER,
    ("WhisperForConditionalGeneration", "WhisperConfig"): dict(
        **ENCODER_DECODER,
        num_mel_bins=8,
        pad_token_id=1,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
    ),
    ("MambaForCausalLM", "MambaConfig"): dict(hidden_size=16, num_hidden_layers=1, state_size=4),
    ("RwkvForCausalLM", "RwkvConfig"): dict(
        hidden_size=16, num_hidden_layers=2, attention_hidden_size=16
    ),
    ("LlavaForConditionalGeneration", "LlavaConfig"): None,
}


def config_of(name, options, rows):
    if options is not None:
        return getattr(transformers, name)(vocab_size=rows, **options)
    text = transformers.LlamaConfig(vocab_size=rows, num_key_value_heads=2, **DECODER)
    vision = transformers.CLIPVisionConfig(**VISION)
    return transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=3)


@pytest.mark.parametrize("names", CASES, ids=lambda names: names[0])
def test_a_union_of_two_vocabularies_loads(tmp_path, names):
    model_class = getattr(transformers, names[0])
    models = []
    for number, (added, rows) in enumerate((((), 7), (("<y>", "<x>"), 8))):
        torch.manual_seed(number)
        model = model_class(config_of(names[1], CASES[names], rows))
        model.save_pretrained(tmp_path / str(number))
        own = OWN[::-1] if number else OWN
        models.append((model, make_tokenizer(tmp_path / str(number), added, own=own).get_vocab()))
    paths = [tmp_path / "0", tmp_path / "1"]
    merge_models(paths, out=tmp_path / "out", tokenizer={"source": "union"})
    merged, report = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert merged.config.get_text_config().vocab_size == len(ids) == len(OWN) + 2
    for part in ("get_input_embeddings", "get_output_embeddings"):
        rows = getattr(merged, part)().weight
        assert len(rows) == len(ids)
        for token, number in ids.items():
            own = [getattr(m, part)().weight[v[token]].double() for m, v in models if token in v]
            assert torch.allclose(rows[number].double(), torch.stack(own).mean(0), atol=1e-7)
