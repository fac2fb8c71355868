"""The checks by the number of ranks that run them, in this order."""

from collections.abc import Callable
from pathlib import Path

from support.kernels.ranks import replicated, sharded

CHECKS: dict[int, dict[str, Callable[[Path], None]]] = {
    2: {
        check.__name__: check
        for check in (
            sharded.fsdp2_rounds_as_one_process,
            sharded.columns_round_as_one_process,
            sharded.copies_count_once_and_unreduced_gradients_are_summed,
            sharded.fsdp2_trains_as_torch_does,
            sharded.fsdp2_updates_in_the_pass,
            sharded.one_nan_leaves_the_step_out_on_every_rank,
            sharded.checkpoints_resume_to_the_bit,
            sharded.whole_states_load_into_shards,
            sharded.other_kinds_are_refused,
            replicated.fsdp1_needs_a_group,
            replicated.zero_clips_by_the_norm_of_all,
            replicated.a_rank_without_parameters_takes_part,
            replicated.ddp_steps_as_one_process,
            replicated.ddp_updates_in_the_pass,
            replicated.plain_hooks_are_refused,
        )
    },
    4: {
        check.__name__: check
        for check in (
            sharded.hybrid_shards_count_once,
            sharded.strided_shards_round_to_nearest_only,
            sharded.other_meshes_load_checkpoints,
        )
    },
}
