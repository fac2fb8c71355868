"""The ledger of one configured run: reads and writes run.json, and tells each output's state."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError
from merit_fast.manifests.hashes import HashCache
from merit_fast.manifests.io import STAGE_FILE, StageManifest, fingerprint, read_manifest
from merit_fast.manifests.ledger import (
    LEDGER_FILE,
    OLD_BRANCHES,
    UNITS_FOLDER,
    Ledger,
    OutputRecord,
    adopt,
    open_ledger,
    record_of,
    update_ledger,
    with_old,
    with_output,
)
from merit_fast.manifests.state import OutputState, check_output
from merit_fast.options.parser import to_plain
from merit_fast.pipeline.config import RunConfig
from merit_fast.sketch.config import SketchConfig

_NO_RESULT = ("output", "threads")  # keys of a config that change no result


class Records:
    """The outputs of the run at ``root`` as its ledger knows them.

    ``whole``: hash every file of an output the first time that it is checked.
    """

    def __init__(self, root: Path, whole: bool = False) -> None:
        self.root = root
        self.whole = whole
        self.partial: set[str] = set()  # outputs of which only JSON files are needed here
        self._hashed: set[str] = set()  # outputs whose every file this object has hashed
        ledger, self.problem = open_ledger(root)
        self.hashes = HashCache(ledger.inputs, whole)

    def name(self, path: Path) -> str:
        """An output's path below the root, as the ledger names it."""
        return path.relative_to(self.root).as_posix()

    def ledger(self) -> Ledger:
        """The ledger as it is now; other processes of the run write it too."""
        return open_ledger(self.root)[0]

    def check(self, path: Path, fingerprint: str | None, keep: bool = False) -> OutputState:
        """The state of an output.

        Args:
            path: the output.
            fingerprint: the one it must have; None: any.
            keep: write a record that is new, or has new mtimes, into the ledger.
        """
        name = self.name(path)
        ledger = self.ledger()
        whole = self.whole and name not in self._hashed
        is_partial = name in self.partial
        state = check_output(self.root, name, fingerprint, ledger, whole, is_partial)
        if not state.is_current:
            return state
        self._hashed.add(name)
        known = ledger.old if name.startswith(OLD_BRANCHES) else ledger.outputs
        if keep and not is_partial and state.record is not None and state.record != known.get(name):
            self._put(name, state.record)
        return state

    def add(self, path: Path, seconds: float | None) -> None:
        """Records an output that has just been finished; ``seconds`` of work: None: not known."""
        manifest = read_manifest(StageManifest, path / STAGE_FILE)
        files = {
            name: (size, (path / name).stat().st_mtime_ns, digest)
            for name, (size, digest) in manifest.files.items()
        }
        seconds = None if seconds is None else round(seconds, 3)
        record = record_of(manifest, adopt(path).files | files, seconds)
        self._put(self.name(path), record)
        self._hashed.add(self.name(path))

    def remove(self, name: str) -> None:
        """Removes the record of an output that is gone."""
        update_ledger(
            self.root, lambda ledger: with_old(with_output(ledger, name, None), name, None)
        )

    def keep_hashes(self) -> None:
        """Writes hashes of input files that this run has computed into the ledger."""
        fresh = self.hashes.fresh
        if fresh:
            update_ledger(
                self.root, lambda ledger: replace(ledger, inputs={**ledger.inputs, **fresh})
            )
            self.hashes.fresh = {}

    def put_in_force(
        self, split: str, branches: Mapping[str, Sequence[tuple[str, str]]], command: str
    ) -> None:
        """Records the split in force, and each arm's branches with their fingerprints."""
        planned = {arm: tuple(pairs) for arm, pairs in branches.items()}
        update_ledger(
            self.root,
            lambda ledger: replace(ledger, split=split, branches=planned, command=command),
        )

    def _put(self, name: str, record: OutputRecord) -> None:
        if name.startswith(f"{UNITS_FOLDER}/"):
            return
        put = with_old if name.startswith(OLD_BRANCHES) else with_output

        def change(ledger: Ledger) -> Ledger:
            known = [*ledger.outputs.values(), *ledger.old.values()]
            times = [r.seconds for r in known if r.fingerprint == record.fingerprint]
            seconds = record.seconds or next((time for time in times if time is not None), None)
            return put(ledger, name, replace(record, seconds=seconds))

        update_ledger(self.root, change)

    def problem_note(self) -> str:
        """Why run.json is written again; "" if it is not."""
        if not self.problem:
            return ""
        return f"{self.problem}; {LEDGER_FILE} is written again from the outputs"


def old_place(root: Path, name: str, fingerprint: str) -> Path:
    """The place of a replaced branch ``branches/NAME`` with this fingerprint."""
    return root / OLD_BRANCHES / f"{Path(name).name}-{fingerprint[:12]}"


def sketch_in_force(
    folder: Path, config: SketchConfig, manifest_of: Callable[[SketchConfig], StageManifest]
) -> StageManifest:
    """The manifest of a sketch; that of the finished one if it differs in having stored rows only.

    Args:
        folder: the sketch stage's output.
        config: of the run; with a store the output must have it too.
        manifest_of: returns the manifest of a config.
    """
    expected = manifest_of(config)
    try:
        found = read_manifest(StageManifest, folder / STAGE_FILE)
    except InputError:  # no sketch is there
        return expected
    if config.store or not found.config.get("store"):
        return expected
    width = found.config.get("store_dim", SketchConfig.store_dim)
    stored = manifest_of(replace(config, store=True, store_dim=width))
    return stored if stored.fingerprint == found.fingerprint else expected


def config_fingerprint(config: RunConfig) -> str:
    """A digest that two processes share if they may work in one output."""
    plain = {key: value for key, value in to_plain(config).items() if key not in _NO_RESULT}
    plain["model"] = _absolute(plain["model"])
    for dataset in plain["mixture"]:
        for key in ("path", "eval_path", "media"):
            if key in dataset:
                dataset[key] = _absolute(dataset[key])
    return fingerprint(plain)


def _absolute(path: Any) -> Any:
    return str(Path(path).resolve()) if isinstance(path, str) and Path(path).exists() else path
