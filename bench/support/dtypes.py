"""The element types of the benchmarks, by the names of their options."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
