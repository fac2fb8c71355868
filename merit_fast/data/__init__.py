"""Reads a mixture: files to rows, rows to messages, messages to token ids and labels, then batches.

The pipeline and the commands load datasets here; the stages that run a model collate their batches
here. Importing this package loads numpy, but neither torch, transformers, datasets nor pyarrow.
"""

from merit_fast.data.batch import Batch, PackedBatch, collate, pack, pad_token_id
from merit_fast.data.config import DataConfig, DatasetConfig
from merit_fast.data.dataset import IGNORED_LABEL, Dataset, Example, count_target_tokens
from merit_fast.data.fingerprint import dataset_fingerprints, mixture_fingerprint
from merit_fast.data.images import load_tokenizer_or_processor, tokenizer_of
from merit_fast.data.load import load_mixture
from merit_fast.data.media import has_images
from merit_fast.data.template import load_tokenizer

__all__ = [
    "IGNORED_LABEL",
    "Batch",
    "DataConfig",
    "Dataset",
    "DatasetConfig",
    "Example",
    "PackedBatch",
    "collate",
    "count_target_tokens",
    "dataset_fingerprints",
    "has_images",
    "load_mixture",
    "load_tokenizer",
    "load_tokenizer_or_processor",
    "mixture_fingerprint",
    "pack",
    "pad_token_id",
    "tokenizer_of",
]
