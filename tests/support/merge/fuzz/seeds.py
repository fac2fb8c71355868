"""Right documents of each kind, and the values that a fuzzer puts in their places."""

from typing import Any

from support.merge.headers import tensor

HEADER = {
    "v": tensor([2, 3], 0, 24),
    "w": tensor([0, 4], 24, 24, "BF16"),
    "__metadata__": {"format": "pt"},
}
PAIR = {
    "base_model.model.q.lora_A.weight": tensor([2, 3], 0, 24),
    "base_model.model.q.lora_B.weight": tensor([1, 2], 24, 32),
}
CONFIG = {
    "vocab_size": 4,
    "dtype": "float32",
    "tie_word_embeddings": True,
    "text_config": {"torch_dtype": "x"},
    "quantization_config": {"quant_method": "fp8"},
    "auto_map": {},
}
LORA = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4.0,
    "bias": "none",
    "rank_pattern": {"q": 2},
    "alpha_pattern": {},
    "init_lora_weights": True,
    "modules_to_save": ["x"],
    "use_dora": False,
}
JUNK: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**63 - 1,
    2**63,
    2**70,
    10**400,
    1e3,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "w",
    "v",
    "a\nb",
    "\ud800",
    "\x1b[2J",
    "x" * 2000,
    "F32",
    "BF16",
    "F4",
    "F8_E8M0",
    [],
    {},
    [[]],
    [0],
    [2, 3],
    [0, 8],
    {"w": 1},
    "../x.safetensors",
    "/x.safetensors",
    "x.safetensors",
    "model.safetensors",
    "\0.safetensors",
    "(a+)+b",
    ".*",
    "(",
)
QUANTISED = {  # a weight in each form, with its scales; 256 bytes of data
    "a.weight": tensor([4, 4], 0, 16, "F8_E4M3"),
    "a.weight_scale_inv": tensor([2, 2], 16, 32),
    "b.weight": tensor([2, 4], 32, 40, "F8_E5M2"),
    "b.weight_scale": tensor([], 40, 44),
    "c.weight_packed": tensor([2, 1], 44, 52, "I32"),
    "c.weight_scale": tensor([2, 2], 52, 60, "BF16"),
    "c.weight_shape": tensor([2], 60, 76, "I64"),
    "d_blocks": tensor([1, 2, 1, 16], 76, 108, "U8"),
    "d_scales": tensor([1, 2, 1], 108, 110, "U8"),
    "e.weight": tensor([1, 16], 110, 126, "U8"),
    "e.weight_scale": tensor([1, 2], 126, 128, "F8_E4M3"),
    "e.weight_scale_2": tensor([], 128, 132),
    "f.weight": tensor([2, 2], 132, 136, "F8_E4M3"),
    "f.scale": tensor([1, 1], 136, 137, "F8_E8M0"),
    "g.weight": tensor([1, 119], 137, 256, "I8"),
}
SCHEME = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "weight_block_size": [2, 2],
        "quant_algo": "NVFP4",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "group_size": 2, "symmetric": True},
            }
        },
        "ignore": ["re:.*g$", "lm_head"],
        "modules_to_not_convert": ["g"],
    }
}
KINDS = ("header", "index", "config", "lora", "pair", "raw", "quantised", "scheme")
SEEDS = {
    "header": HEADER,
    "index": {"weight_map": {"w": "x.safetensors"}},
    "config": CONFIG,
    "lora": LORA,
    "pair": PAIR,
    "quantised": QUANTISED,
    "scheme": SCHEME,
}
DATA_BYTES = {"pair": 32, "quantised": 256}  # after the header; else 24
