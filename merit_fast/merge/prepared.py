"""A merge with checked inputs: it can be summarised, written, uploaded, or loaded as a model."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit_fast.errors import InputError
from merit_fast.manifests.atomic import write_text
from merit_fast.manifests.directories import begin_directory, finish_directory
from merit_fast.manifests.io import (
    STAGE_FILE,
    StageManifest,
    fingerprint,
    stage_manifest,
    write_manifest,
)
from merit_fast.manifests.kept import remove_records
from merit_fast.manifests.locks import claim, exclusive, locks_of, this_process
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.memory import fit_memory
from merit_fast.merge.engine.notes.dtypes import dtype_reason
from merit_fast.merge.engine.plan import Plan
from merit_fast.merge.engine.prepare import Inputs, make_plan, read_inputs
from merit_fast.merge.read.files import folder_of
from merit_fast.merge.read.remote import Location, RemotePath
from merit_fast.merge.read.slices import Slice, describe_slices, write_depth
from merit_fast.merge.write.card import CARD_FILE, CardFacts, RunFacts, model_card
from merit_fast.merge.write.coefficients import input_facts, weighed_models
from merit_fast.merge.write.fingerprints import input_fingerprints
from merit_fast.merge.write.finished import is_up_to_date
from merit_fast.merge.write.form import (
    file_sizes,
    finish_form,
    layout_of,
    plan_of_form,
    write_before,
)
from merit_fast.merge.write.same import (
    check_unchanged,
    method_fingerprint,
    module_digest,
    same_bytes,
)
from merit_fast.merge.write.shards import (
    ShardWriter,
    Share,
    all_written,
    free_bytes,
    share_of,
)
from merit_fast.options.parser import to_plain
from merit_fast.progress import Progress, SilentProgress
from merit_fast.records import record, replace

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from merit_fast.merge.engine.modules import Module
    from merit_fast.merge.write.distcp.layout import DistributedLayout


@record
class PreparedMerge:
    """A checked merge. ``weights`` are final; ``config.chunk_kib`` keeps within ``max_memory``."""

    models: tuple[Location, ...]
    weights: tuple[float, ...]
    base: Location | None
    config: MergeConfig
    inputs: Inputs
    slices: tuple[Slice, ...]
    run: RunFacts | None = None
    modules: "tuple[Module, ...]" = ()

    def summary(self, out: Location) -> dict[str, Any]:
        """JSON-ready facts: weights, coefficients, bytes in and out, memory of the buffers."""
        sizes = file_sizes(self.inputs.files, self.layout)
        facts = {
            "merged": str(out),
            "models": [[str(path), weight] for path, weight in self._weighed()],
            "base": str(self.base) if self.base else None,
            "dtype_reason": self._dtype_reason(),
            "weights": list(self.weights),
        }
        return facts | input_facts(self.inputs, self.config, sizes, free_bytes(out))

    @property
    def manifest(self) -> StageManifest:
        """Inputs and options that decide the output's bytes, with their fingerprint."""
        return self._manifest({})

    def write_into(self, directory: Path, progress: Progress) -> None:
        """Writes the whole output into an unfinished directory that the caller owns."""
        plan = self._plan(progress, directory)
        writer = ShardWriter(self.config, directory, progress)
        write_before(plan, writer)
        writer.write(plan.shards)
        writer.prove(plan.shards)
        self._finish(plan, directory, {})

    def write_files(self, directory: Path, progress: Progress, share: Share) -> None:
        """Writes this share's weight files, and no other file, into an unfinished directory."""
        writer = ShardWriter(self.config, directory, progress)
        shards = share_of(self._plan(progress, directory), share)
        writer.write(shards)
        writer.prove(shards)

    def write(
        self,
        out: Path,
        progress: Progress,
        share: Share = (1, 1),
        records: Mapping[str, str] | None = None,
    ) -> bool:
        """Writes this process's share of the output, and finishes it when all shares are there.

        The process owns ``out`` from the first byte to the last one, together with processes that
        make the same merge. An output of this merge whose files all agree with their hashes stays.

        Args:
            out: the output's final name.
            share: (i, n): write every n-th shard from the i-th on.
            records: names and texts of files to write next to the weights.

        Returns:
            False while other processes' shards are missing.

        Raises:
            LockedError: another merge of other inputs or options works on ``out``.
            InputError: an input changed while it was read.
        """
        manifest = self._manifest(records or {})
        locks = locks_of(out)
        with claim(locks, this_process(manifest.fingerprint), out):
            with exclusive(locks / "turn"):  # nobody gives the output its name meanwhile
                if is_up_to_date(out, manifest, progress):
                    return True
                directory = begin_directory(out, manifest.fingerprint, fsync=self.config.fsync)
            plan = self._plan(progress, directory)
            writer = ShardWriter(self.config, directory, progress, locks)
            write_before(plan, writer, share)
            writer.write(share_of(plan, share))
            if not all_written(plan, directory):
                return False
            with exclusive(locks / "turn"):
                if directory.exists():  # else another process has finished it
                    writer.prove(plan.shards)
                    self._finish(plan, directory, records or {})
                    check_unchanged(manifest, self._manifest(records or {}))
                    finish_directory(directory, out, manifest, self.config.fsync)
        return True

    def upload(
        self,
        out: RemotePath,
        progress: Progress,
        share: Share = (1, 1),
        records: Mapping[str, str] | None = None,
    ) -> bool:
        """Makes the output shard by shard and sends it to a store; arguments as in ``write``."""
        manifest = self._manifest(records or {})
        if self.layout is not None:
            raise InputError(f"{out}: a distributed checkpoint can be written to a local disk only")
        from merit_fast.merge.write.upload import Upload, spool_directory

        upload = Upload(out, file_sizes(self.inputs.files, self.layout))
        config = replace(self.config, fsync=False)  # files pass through the disk only
        if not upload.begin(manifest.fingerprint):
            plan = self._plan(progress)
            with spool_directory(out.name) as spool:
                ShardWriter(config, spool, progress, upload=upload).write(share_of(plan, share))
                if not upload.all_written():
                    return False
                if upload.fetch_parts(spool):
                    self._finish(plan, spool, records or {}, weights_at=out)
                    check_unchanged(manifest, self._manifest(records or {}))
                    remove_records(spool)
                    write_manifest(manifest, spool / STAGE_FILE)
                    upload.finish(spool)
        upload.sweep()
        return True

    def load(self, device: "torch.device") -> "PreTrainedModel":
        """Loads the transformers model of the output, merged while it is loaded."""
        from merit_fast.merge.in_memory.lazy import open_merged
        from merit_fast.merge.in_memory.loading import build_model, fit_config, kind_of

        companions = self.inputs.companions
        kind = kind_of(companions, self.inputs.vocabulary)
        plan = self._plan(SilentProgress())
        staged = device if device.type == "cuda" else None
        with open_merged(plan, self.config, staged) as source:
            fit_config(kind, source, self.inputs.dequantized)
            return build_model(companions, kind, source, device)

    @cached_property
    def layout(self) -> "DistributedLayout | None":
        """Shards and chunks of the output, if it is a distributed checkpoint."""
        return layout_of(self.inputs, self.config)

    def _plan(self, progress: Progress, directory: Path | None = None) -> Plan:
        plan = make_plan(self.inputs, self.config, progress)
        return plan_of_form(plan, self.layout, directory)

    def _finish(
        self,
        plan: Plan,
        directory: Path,
        records: Mapping[str, str],
        weights_at: Location | None = None,
    ) -> None:
        finish_form(plan, self.layout, self.inputs, self.models, self.config, directory, weights_at)
        if self.slices:
            write_depth(directory, self.slices)
        for name, text in records.items():
            write_text(directory / name, text, fsync=False)  # with the whole output
        card = model_card(self._card_facts(), directory)
        write_text(directory / CARD_FILE, card, fsync=False)

    def _card_facts(self) -> CardFacts:
        reason = self._dtype_reason()
        return CardFacts(
            self.models,
            [weight for _, weight in self._weighed()],
            self.base,
            self.config,
            f"{self.inputs.dtypes} ({reason})",
            self.slices,
            self.run,
            self.modules,
        )

    def _dtype_reason(self) -> str:
        dtypes = (self.inputs.dtypes, self.inputs.base_dtypes)
        return dtype_reason(self.config.dtype, *dtypes, self.inputs.models, self.base)

    def _weighed(self) -> list[tuple[Location, float | None]]:
        in_parts = bool(self.slices or self.modules)
        return weighed_models(self.models, self.weights, self.config, in_parts)

    def _manifest(self, records: Mapping[str, str]) -> StageManifest:
        paths = (*self.models, *([self.base] if self.base else []), self.inputs.companions)
        described = (each.described_files() for each in self.inputs.checkpoints)
        files = self.inputs.stored_files.union(*described)
        fingerprints = input_fingerprints([folder_of(path) for path in paths], files)
        if self.slices:
            fingerprints["slices"] = describe_slices(self.slices)
        for module in self.modules:
            fingerprints[f"modules.{module.name}"] = module_digest(module)
        if self.inputs.vocabulary:
            fingerprints["vocabulary"] = self.inputs.vocabulary.digest
        if self.inputs.chat_template is not None:
            fingerprints["chat_template"] = fingerprint(self.inputs.chat_template)
        if self.run:
            fingerprints["run"] = fingerprint(to_plain(self.run))
        fingerprints |= method_fingerprint(self.config)
        fingerprints |= {name: fingerprint(text) for name, text in records.items()}
        return stage_manifest("merge", same_bytes(self.config), fingerprints)


def prepare_merge(  # noqa: PLR0913
    models: Sequence[Location],
    weights: Sequence[float],
    base: Location | None,
    config: MergeConfig,
    slices: Sequence[Slice] = (),
    companions: Location | None = None,
    run: RunFacts | None = None,
    modules: Sequence["Module"] = (),
    to_memory: bool = False,
) -> PreparedMerge:
    """Checks everything that headers and configs tell, before a byte is written.

    Args:
        models: K checkpoint directories with the same tensors, or LoRA adapters on the base.
        weights: K numbers, used as they are.
        base: the checkpoint they started from, for methods that need it.
        config: method and engine options.
        slices: as in ``read_inputs``.
        companions: as in ``read_inputs``.
        run: the run whose branches the models are, for the model card.
        modules: as in ``read_modules``, instead of slices; ``models`` are all of theirs.
        to_memory: as in ``read_inputs``.

    Raises:
        InputError: see ``read_inputs``, ``read_modules`` and ``fit_memory``.
    """
    if modules:
        from merit_fast.merge.engine.modules import read_modules

        inputs = read_modules(modules, companions or models[0])
    else:
        inputs = read_inputs(models, weights, base, config, slices, companions, to_memory=to_memory)
    config = replace(config, chunk_kib=fit_memory(inputs, config))
    return PreparedMerge(
        tuple(models), tuple(weights), base, config, inputs, tuple(slices), run, tuple(modules)
    )
