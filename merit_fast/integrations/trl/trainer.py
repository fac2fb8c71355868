"""TRL's SFTTrainer with losses per dataset, under packing and padding-free too, and our head."""

import copy
from typing import Any

from trl.trainer.sft_trainer import SFTTrainer

from merit_fast.errors import InputError
from merit_fast.integrations.one_dataset import dataset_ids
from merit_fast.integrations.per_dataset.callback import MeritCallback
from merit_fast.integrations.per_dataset.checks import has_datasets
from merit_fast.integrations.trl.head import use_head
from merit_fast.integrations.trl.packing import pack_rows


class MeritSFTTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer whose rows say their dataset; trains the same weights.

        trainer = MeritSFTTrainer("BASE", args=SFTConfig("out", packing=True), train_dataset=rows)
        trainer.train()         # logs merit/loss/NAME, merit/accuracy/NAME, merit/tokens/NAME
        trainer.save_model()    # with branch.json

    Rows, arguments and results are SFTTrainer's; it takes two keywords more. Packing puts the same
    tokens into the same rows as SFTTrainer's, and the datasets of the tokens go with them.

    Args:
        merit: options of ``MeritCallback`` and the sketch; None: its defaults.
        head: computes log-probabilities, entropies and top-1 by our kernels, over the target tokens
            only; False: by TRL's own head.

    Raises:
        InputError: rows that say no dataset, or a rule of ``MeritCallback`` or ``use_head``.
    """

    def __init__(
        self, *args: Any, merit: MeritCallback | None = None, head: bool = True, **kwargs: Any
    ) -> None:
        self.merit = merit or MeritCallback()
        super().__init__(*args, **kwargs)
        if head:
            use_head(self)
        self.merit.attach(self)

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """Packs as SFTTrainer, with the datasets of the tokens."""
        column = self.merit.column
        if not packing or not has_datasets(dataset, column):
            return super()._prepare_dataset(
                dataset, processing_class, args, packing, formatting_func, dataset_name
            )
        if args.max_length is None:
            raise InputError("max_length: must be a number with packing, got None")
        unpacked_args = copy.copy(args)
        unpacked_args.max_length = None  # packing cuts
        unpacked_args.shuffle_dataset = False
        rows = super()._prepare_dataset(
            dataset, processing_class, unpacked_args, False, formatting_func, dataset_name
        )
        known = list(self.merit.names or ())
        new = sorted(set(dataset_ids(rows, column)) - set(known))
        self.merit.names = [*known, *new]
        seed = args.seed if args.shuffle_dataset else None
        packed, _ = pack_rows(
            rows,
            args.max_length,
            args.packing_strategy,
            column=column,
            names=self.merit.names,
            seed=seed,
        )
        return packed if seed is None else packed.shuffle(seed=seed)
