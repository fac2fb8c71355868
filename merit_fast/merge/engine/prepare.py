"""Decisions before a merge writes: checked headers, the method's rules, the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import SHORT_NAMES
from merit_fast.kernels.lazy import np
from merit_fast.merge.combine.combination import Combination, combine
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.driver import gram_shard
from merit_fast.merge.engine.layout import OutputFile, OutputTensor, lay_out
from merit_fast.merge.engine.notes.absence import absence_notes, left_out_notes
from merit_fast.merge.engine.notes.counters import counter_notes
from merit_fast.merge.engine.notes.dtypes import words_of_entries, words_of_output
from merit_fast.merge.engine.plan import Plan, Rule, plan_merge
from merit_fast.merge.engine.quantise.choose import check_config, choose_forms, reads_codes
from merit_fast.merge.engine.quantise.forms import Forms, SameForms
from merit_fast.merge.read.adapters.tied import give_heads
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.companions import check_configs, list_companions
from merit_fast.merge.read.dcp.opening import check_names, companions_of
from merit_fast.merge.read.decoded import read_input
from merit_fast.merge.read.entries import TensorEntry, files_of
from merit_fast.merge.read.files import folder_of
from merit_fast.merge.read.names.common import in_common_names
from merit_fast.merge.read.remote import Location, as_location
from merit_fast.merge.read.slices import Slice, stack_layers
from merit_fast.merge.sizes import parse_bytes
from merit_fast.merge.vocabulary.match import OutputVocabulary, match_vocabularies
from merit_fast.merge.vocabulary.templates import checked_template
from merit_fast.progress import Progress
from merit_fast.records import record

if TYPE_CHECKING:
    from merit_fast.merge.engine.values import Array
    from merit_fast.merge.read.names.towers import Tower


@record
class Inputs:
    """Checked headers of a merge. ``companions``: the directory that gives config and tokenizer."""

    combination: Combination
    checkpoints: tuple[Checkpoint, ...]  # one per path of the combination
    files: tuple[OutputFile, ...]
    companions: Location
    dequantized: bool  # an input is quantised, and no tensor of the output
    models: tuple[Location, ...]
    base_dtypes: str  # of the base's float tensors, as ``dtypes``; "" without a base
    notes: tuple[str, ...]  # sentences about tensors that were renamed, filled or left out
    vocabulary: OutputVocabulary | None = None  # None: tokenizer and rows stay as they are
    chat_template: str | None = None  # None: the tokenizer's own
    forms: Forms | None = None  # chose the output's quantised tensors

    @property
    def tokenizer(self) -> Location:
        """The directory whose tokenizer the output gets."""
        return self.vocabulary.folder if self.vocabulary else self.companions

    def files_read(self) -> set[str]:
        """Names of the files next to the companions whose tensors are read."""
        return {file.name for file in self.stored_files if file.parent == self.companions}

    @cached_property
    def bytes_read(self) -> int:
        """Bytes read by one pass over all inputs."""
        return sum(entry.num_bytes for tensor in self._tensors for entry in tensor.inputs)

    @cached_property
    def stored_files(self) -> frozenset[Location]:
        """Every input file that holds a byte of the output's tensors."""
        made = self.vocabulary.made if self.vocabulary else None
        temporary = {made.file} if made else set()  # made of the others
        entries = (entry for tensor in self._tensors for entry in tensor.inputs)
        return frozenset(files_of(entries) - temporary)

    @property
    def _tensors(self) -> Iterator[OutputTensor]:
        return (tensor for file in self.files for tensor in file.tensors)

    @cached_property
    def dtypes(self) -> str:
        """The output's float dtypes in words such as "bf16", most common first."""
        return words_of_output(list(self._tensors))


def read_inputs(
    models: Sequence[Location],
    weights: Sequence[float],
    base: Location | None,
    config: MergeConfig,
    slices: Sequence[Slice] = (),
    companions: Location | None = None,
    tower: Tower | None = None,
    to_memory: bool = False,
) -> Inputs:
    """Reads and checks all headers and configs; no data.

    Args:
        slices: of these models and the base, to be stacked; (): the models as they are.
        companions: as in ``in_common_names``.
        tower: the only part of the models that counts; its donor gives the names.
        to_memory: whether the output is a model in memory, which is not quantised.

    Raises:
        InputError: see ``combine``, ``read_input``, ``check_configs``, ``match_vocabularies``,
            ``checked_template``, ``stack_layers`` and ``lay_out``.
    """
    matched = _match(models, base, config, companions, tower, any_depth=bool(slices))
    checkpoints = [*matched.models]
    base_checkpoint = matched.base
    everyone = matched.everyone
    layers = None
    if slices:
        by_path = {checkpoint.path: checkpoint for checkpoint in everyone}
        checkpoints, base_checkpoint, layers = stack_layers(slices, by_path)
        models = [checkpoint.path for checkpoint in checkpoints]
        base = base_checkpoint.path if base_checkpoint else None
    names = {name for checkpoint in checkpoints for name in checkpoint.tensors}
    combination = combine(models, weights, base, config, names, layers)
    if len(combination.paths) > len(models) and base_checkpoint:
        checkpoints.append(base_checkpoint)
    shard_bytes = parse_bytes("shard_size", config.shard_size) if config.shard_size else None
    dtype = SHORT_NAMES.get(config.dtype) if config.dtype else None
    forms = None if to_memory else choose_forms(config, combination, everyone, matched.companions)
    files = lay_out(
        checkpoints, base_checkpoint, dtype, config.missing, shard_bytes, len(models), forms
    )
    giver = None if slices else matched.giver
    absent = absence_notes(checkpoints[: len(models)], giver, files, config.missing)
    list_companions(matched.companions)
    is_written = any(tensor.is_quantised for file in files for tensor in file.tensors)
    if is_written and isinstance(forms, SameForms):
        check_config(everyone, matched.companions)
    return Inputs(
        combination,
        tuple(checkpoints),
        files,
        matched.companions,
        not is_written and reads_codes(files),
        tuple(models),
        words_of_entries(base_checkpoint.tensors.values()) if base_checkpoint else "",
        (*matched.notes(config), *absent, *counter_notes(files)),
        matched.vocabulary,
        matched.template,
        forms,
    )


@record
class _Matched:
    """Models whose tensors have common names and, for each token, a common row."""

    models: list[Checkpoint]
    base: Checkpoint | None
    companions: Location
    vocabulary: OutputVocabulary | None
    template: str | None

    @property
    def everyone(self) -> list[Checkpoint]:
        return [*self.models, *([self.base] if self.base else [])]

    @property
    def giver(self) -> Checkpoint | None:
        """The checkpoint that gives config.json."""
        found = (each for each in self.everyone if folder_of(each.path) == self.companions)
        return next(found, None)

    def notes(self, config: MergeConfig) -> list[str]:
        """Sentences about tensors that were renamed or left out while the models were read."""
        of_models = [note for each in self.everyone for note in each.notes]
        left_out = left_out_notes(self.everyone, config.form == "distcp")
        return [*dict.fromkeys(of_models), *left_out]


def _match(
    models: Sequence[Location],
    base: Location | None,
    config: MergeConfig,
    companions: Location | None,
    tower: Tower | None,
    *,
    any_depth: bool,
) -> _Matched:
    """Reads all headers, then matches names, heads and vocabularies; see ``read_inputs``."""
    given = as_location(config.config_from) if config.config_from else None
    how = (config.unscaled_fp8, config.subtree)
    start = read_input(base, None, *how, given) if base else None
    read = [read_input(path, start, *how, given or base) for path in models]
    everyone = give_heads([*read, *([start] if start else [])])
    check_configs(everyone, any_depth=any_depth)
    chosen = companions or companions_of(everyone, given)
    start = everyone[-1] if start else None
    everyone, companions = in_common_names(everyone, start, chosen, tower.donor if tower else None)
    if config.form != "distcp":
        check_names(everyone, companions, config.subtree)
    start = everyone[-1] if start else None
    matched = match_vocabularies(
        everyone[: len(models)], start, config.tokenizer_options, chosen, companions
    )
    vocabulary = matched.output
    if vocabulary:
        from merit_fast.merge.vocabulary.write import check_files

        check_files(companions, vocabulary)
    tokenizer = vocabulary.folder if vocabulary else companions
    template = checked_template(config.chat_template, models, tokenizer)
    checkpoints = list(matched.models)
    start = matched.base
    if tower:
        checkpoints = [tower.of(each) for each in checkpoints]
        start = tower.of(start) if start else None
    return _Matched(checkpoints, start, companions, vocabulary, template)


def make_plan(inputs: Inputs, config: MergeConfig, progress: Progress) -> Plan:
    """The plan with every tensor's rule. Methods that need Gram matrices read all inputs once.

    Raises:
        InputError: a value is not finite and the method needs lengths; see ``gram_shard``.
    """
    if inputs.vocabulary and inputs.vocabulary.made:
        from merit_fast.merge.engine.made_rows import write_made

        write_made(inputs.vocabulary.made)
    combination = inputs.combination
    from_gram = combination.from_gram
    if from_gram is None:
        return plan_merge(inputs.files, combination.rule)
    grams: dict[str, Array] = {}
    plan = plan_merge(inputs.files)
    with progress.task("compare models", plan.num_elements, "parameters") as task:
        for shard in plan.shards:
            grams |= gram_shard(
                shard, config, combination.gram_from_base, lambda count: task.advance(count)
            )
    for name, gram in grams.items():
        if not np.isfinite(gram).all():
            raise InputError(
                f"{combination.paths[0]}: {name}: must be finite here and in the other models"
            )

    def rule(entry: TensorEntry) -> Rule:
        return from_gram(entry.name, grams[entry.name])

    return plan_merge(inputs.files, rule)
