"""Models of every kind, with all their parameters: exact, and none refused."""

import importlib.util

import pytest
import torch
from support.checks import assert_close
from support.sketch.exact_gradients import SKETCH, sketch_of_loss, tiny

from bench.sketch.architectures import build, measure
from merit_fast.sketch.gradients import GradientSketcher

# Types by what is odd about them; `python -m bench.sketch.architectures` runs all.
FAST = [
    "bert",  # a bias with two owners
    "gpt2",
    "gpt_oss",  # sinks in an attention that returns a tuple
    "whisper",  # position tables with two arguments
    "blenderbot",  # positions without batch
    "ernie4_5_moe",  # a router that casts its weight
    "rwkv",
    "mamba2",  # a convolution's weight that the mixer reads, a norm of two tensors
    "qwen3_next",
    "lfm2_moe",
]
SLOW = ["mamba", "llama4", "xlnet"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model_type", [*FAST, *SLOW])
def test_causal_language_models(model_type):
    outcome = measure(build(model_type), tokens=8)
    assert outcome.kind == ("fast" if model_type in FAST else "slow"), outcome


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_parameters_that_are_used_under_no_grad_only_have_no_gradient():
    assert measure(build("deepseek_v32"), tokens=8).kind == "fast"


def assert_exact(model, loss, rows=3, fast=None):
    """``loss(model, rows)`` is the summed loss of some rows."""
    model.eval()
    truth = torch.cat([sketch_of_loss(model, lambda b=b: loss(model, [b])) for b in range(rows)])
    options = dict(uncovered="autograd", notify=str)
    with GradientSketcher(model, SKETCH, **options) as sketcher:
        for _ in range(2):
            loss(model, list(range(rows))).backward()
            for mine, exact in zip(sketcher.take(), truth, strict=True):
                assert_close(mine, exact)
    assert sketcher.checked.kinds == 1
    if fast is not None:
        assert (sketcher.slow_parameters == {}) == fast, sketcher.slow_parameters


IDS = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(0))
LLAMA = dict(target_modules=["q_proj", "down_proj"])
PEFT = {
    "lora": lambda p: p.LoraConfig(r=4, init_lora_weights=False, **LLAMA),
    "dora": lambda p: p.LoraConfig(r=4, use_dora=True, init_lora_weights=False, **LLAMA),
    "rslora": lambda p: p.LoraConfig(r=4, use_rslora=True, init_lora_weights=False, **LLAMA),
    "prompt": lambda p: p.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda p: p.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=12
    ),
    "prefix": lambda p: p.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "ia3": lambda p: p.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "oft": lambda p: p.OFTConfig(oft_block_size=4, **LLAMA),
    "vera": lambda p: p.VeraConfig(r=4, **LLAMA),
    "boft": lambda p: p.BOFTConfig(boft_block_size=4, **LLAMA),
    "loha": lambda p: p.LoHaConfig(r=4, **LLAMA),
    "lokr": lambda p: p.LoKrConfig(r=4, **LLAMA),
    "adalora": lambda p: p.AdaLoraConfig(init_r=4, total_step=10, **LLAMA),
    "layernorm": lambda p: p.LNTuningConfig(task_type="CAUSAL_LM"),
    "fourier": lambda p: p.FourierFTConfig(n_frequency=20, **LLAMA),
    "hra": lambda p: p.HRAConfig(r=4, **LLAMA),
}


def language_loss(model, rows):
    return model(input_ids=IDS[rows]).logits[:, -9:].float().square().sum()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not installed")
@pytest.mark.parametrize("method", PEFT)
def test_adapters(method):
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(tiny("llama"), PEFT[method](peft))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    assert_exact(model, language_loss)


def clip(t):
    text = dict(vocab_size=97, hidden_size=24, intermediate_size=32, num_hidden_layers=2)
    text |= dict(num_attention_heads=2, max_position_embeddings=16, eos_token_id=2)
    vision = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2)
    vision |= dict(num_attention_heads=2, image_size=8, patch_size=4)
    config = t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return t.CLIPModel(config)


def swin(t):
    return t.SwinModel(
        t.SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4
        )
    )


def vit(t):
    sizes = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return t.ViTModel(t.ViTConfig(**sizes, image_size=16, patch_size=4), add_pooling_layer=False)


def t5(t):
    sizes = dict(vocab_size=97, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    return t.T5ForConditionalGeneration(t.T5Config(**sizes, decoder_start_token_id=0))


def whisper(t):
    sizes = dict(d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
    sizes |= dict(decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)
    sizes |= dict(vocab_size=97, max_source_positions=10, max_target_positions=16)
    sizes |= dict(num_mel_bins=6, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return t.WhisperForConditionalGeneration(t.WhisperConfig(**sizes, decoder_start_token_id=1))


PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
SOUND = torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(2))


def clip_loss(model, rows):
    output = model(input_ids=IDS[rows], pixel_values=PIXELS[rows][..., :8, :8])
    return output.text_embeds[:, :4].sum() + output.image_embeds[:, :4].square().sum()


OTHERS = {
    "clip": (clip, clip_loss),
    "swin": (swin, lambda m, r: m(pixel_values=PIXELS[r]).last_hidden_state.square().sum()),
    "vit": (vit, lambda m, r: m(pixel_values=PIXELS[r]).last_hidden_state.square().sum()),
    "t5": (t5, lambda m, r: m(input_ids=IDS[r], decoder_input_ids=IDS[r]).logits.square().sum()),
    "whisper": (
        whisper,
        lambda m, r: (
            m(input_features=SOUND[r], decoder_input_ids=IDS[r], use_cache=False)
            .logits.square()
            .sum()
        ),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name):
    import transformers

    make, loss = OTHERS[name]
    torch.manual_seed(0)
    model = make(transformers)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert_exact(model, loss)


def test_one_line_tells_number_share_and_cost_of_slow_parameters():
    model = build("mamba")
    lines = []
    with GradientSketcher(model, SKETCH, uncovered="autograd", notify=lines.append) as sketcher:
        model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
        sketcher.take()
    assert "backbone.layers.0.mixer.dt_proj.weight" in sketcher.slow_parameters
    (line,) = lines
    assert "parameters (" in line and "% of the entries) take a backward pass per example" in line
