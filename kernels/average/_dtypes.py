"""Float types of tensors that can be averaged, in the order of their codes in csrc's levels.h."""

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
