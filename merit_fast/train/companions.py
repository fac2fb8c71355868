"""Files next to a branch's weights that decide how it is asked and where it stops."""

from pathlib import Path
from typing import Any

from merit_fast.data import DataConfig, pad_token_id
from merit_fast.data.images import load_tokenizer_or_processor
from merit_fast.data.saved import write_data_options
from merit_fast.data.template import end_token_ids, with_template
from merit_fast.model import copy_processor_files

_TEMPLATE_OF_PROCESSOR = "chat_template.json"  # the older place; chat_template.jinja replaces it


class Companions:
    """Tokenizer, chat template and end tokens with which a branch is trained.

    Args:
        start_path: the model from which the branch starts.
        data_config: the `data:` section that decides how rows become tokens.

    Raises:
        InputError: there is no tokenizer or no chat template.
    """

    def __init__(self, start_path: str, data_config: DataConfig) -> None:
        self.start = Path(start_path)
        self.data_config = data_config
        self.replaces_template = data_config.chat_template is not None
        self.tokenizer = with_template(load_tokenizer_or_processor(start_path), data_config)
        self.pad_token_id = pad_token_id(self.tokenizer)
        self.end_ids = end_token_ids(self.tokenizer, data_config)

    def complete(self, model: Any) -> None:
        """Adds the end tokens to the model's generation config, which is saved with it."""
        from transformers import GenerationConfig

        if model.generation_config is None:
            model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        known = model.generation_config.eos_token_id
        ids = [] if known is None else [known] if isinstance(known, int) else list(known)
        missing = [token_id for token_id in self.end_ids if token_id not in ids]
        if missing:
            joined = [*ids, *missing]
            model.generation_config.eos_token_id = joined if len(joined) > 1 else joined[0]

    def write(self, directory: Path) -> None:
        """Writes the tokenizer with the template in force, data.json and the processor's files.

        The tokenizer's end token becomes the one that ends answers, unless the template reads it.
        """
        tokenizer = self.tokenizer
        reads_eos = "eos_token" in str(tokenizer.chat_template)
        if tokenizer.eos_token_id not in self.end_ids and not reads_eos:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(self.end_ids[0])
        tokenizer.save_pretrained(directory)
        write_data_options(self.data_config, directory)
        copy_processor_files(self.start, directory)
        if self.replaces_template:
            (directory / _TEMPLATE_OF_PROCESSOR).unlink(missing_ok=True)
