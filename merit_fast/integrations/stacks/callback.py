"""The callback of a stack: our kernels in its model, and branch.json next to what it saves."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from merit_fast.errors import InputError
from merit_fast.integrations.branches import BRANCH_FILE
from merit_fast.integrations.stacks.counts import (
    StackCounts,
    count_batch,
    over_all_ranks,
    read_counts,
    write_counts,
)
from merit_fast.manifests.io import write_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.merge.read.files import read_json
from merit_fast.model import model_fingerprint, resolve_model
from merit_fast.patch.model import patch_model

_STATE_FILE = "trainer_state.json"


class StackCallback(TrainerCallback):  # type: ignore[misc]
    """Patches a Trainer's model, counts what it is trained on, and writes branch.json.

    Any stack that takes callbacks of transformers takes it: it needs no Trainer, no batch and no
    column of ids. It counts in a hook on the model's forward, in training only, over all ranks.
    Every checkpoint and the output folder get branch.json, and merges weigh them by it; a resumed
    run continues to count from its checkpoint. With ``load_best_model_at_end`` the output folder
    gets the counts of the best checkpoint.

    Args:
        kernels: "auto" replaces norms, MLPs, positions and loss by our kernels; "eager": none.
        start: directory or hub id of the model that training starts from; None: the path that the
            model was loaded from.
        datasets: names of the datasets for branch.json.
        branch: name for branch.json; "": that of the output folder.

    Raises:
        InputError: the start is no model; a resumed checkpoint has no counts, or is not found.
        MeritFastError: a batch has no labels.
    """

    def __init__(
        self,
        kernels: str = "auto",
        start: str | Path | None = None,
        datasets: Sequence[str] = (),
        branch: str = "",
    ) -> None:
        self.kernels = kernels
        self.start = start
        self.datasets = tuple(datasets)
        self.branch = branch
        self.counts = StackCounts()
        self._patched: weakref.ref[nn.Module] | None = None
        self._fingerprint = ""
        self._hook: Any = None

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.patch(model)
        self.watch(model)

    def patch(self, model: nn.Module) -> None:
        """Puts our kernels into the model, once; prints what was replaced."""
        if self._patched is not None and self._patched() is model:
            return
        self._patched = weakref.ref(model)
        print(f"merit_fast: {patch_model(model, self.kernels)}", flush=True)

    def watch(self, model: nn.Module) -> None:
        """Counts the batches of the model from now on, and of no other.

        Raises:
            InputError: the start is no model.
        """
        self._fingerprint = model_fingerprint(resolve_model(str(self.start or loaded_from(model))))
        self._count_calls(model)

    def _count_calls(self, model: nn.Module) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if model.training:
            inputs = dict(kwargs)
            if args:
                inputs.setdefault("input_ids", args[0])
            self.counts += count_batch(inputs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counts = StackCounts()
        if state.global_step:
            folder = _checkpoint_of(args, state)
            self.counts = read_counts(folder) if args.process_index == 0 else StackCounts()

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        counts = over_all_ranks(self.counts, args.device)
        if args.process_index == 0:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_counts(folder, counts)
            self._write(folder, counts, state.global_step, args.seed)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        counts = over_all_ranks(self.counts, args.device)
        steps = state.global_step
        best = state.best_model_checkpoint
        if args.process_index:
            return
        if args.load_best_model_at_end and best is not None:
            counts = read_counts(Path(best))
            steps = state.best_global_step
        folder = Path(args.output_dir)
        write_counts(folder, counts)
        self._write(folder, counts, steps, args.seed)

    def _write(self, folder: Path, counts: StackCounts, steps: int, seed: int) -> None:
        """Writes branch.json; a run that has trained on no target token gets none."""
        if not counts.num_target_tokens:
            (folder / BRANCH_FILE).unlink(missing_ok=True)  # of an earlier run
            return
        manifest = BranchManifest(
            branch=self.branch or folder.resolve().name,
            arm="merit",
            group=0,
            datasets=self.datasets,
            **asdict(counts),
            steps=steps,
            seed=seed,
            base_fingerprint=self._fingerprint,
            start_fingerprint=self._fingerprint,
        )
        write_manifest(manifest, folder / BRANCH_FILE)


def _checkpoint_of(args: Any, state: Any) -> Path:
    """The checkpoint that a run resumes from; a callback is not told.

    It is the named one, or the output folder's of this step. The history of losses that the
    Trainer has read proves it.

    Raises:
        InputError: neither has that history.
    """
    own = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    named = getattr(args, "resume_from_checkpoint", None)
    folders = [Path(named), own] if isinstance(named, str) else [own]
    history = json.dumps(state.log_history)  # as text: a NaN is no other NaN's equal
    for folder in folders:
        file = folder / _STATE_FILE
        if file.is_file() and json.dumps(read_json(file).get("log_history")) == history:
            return folder
    raise InputError(
        f"{own}: is not the checkpoint that this run resumes from, so that the tokens before it "
        "are not known; name that one in the argument resume_from_checkpoint"
    )


def loaded_from(model: Any) -> str:
    """The path that a model was loaded from; with adapters, its base's.

    Raises:
        InputError: it was not loaded from one.
    """
    adapters = getattr(model, "peft_config", None)
    if isinstance(adapters, Mapping) and adapters:
        named = next(iter(adapters.values())).base_model_name_or_path
        if named:
            return str(named)
    name = getattr(getattr(model, "config", None), "name_or_path", "")
    if not name:
        raise InputError(
            "merit_fast: start: must name the model that training starts from: this one was not "
            "loaded from a folder or a hub id"
        )
    return str(name)
