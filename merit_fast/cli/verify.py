"""The command `verify`: hashes a run, one output of a run, or a model with checksums."""

import json
from pathlib import Path

from merit_fast.errors import InputError
from merit_fast.manifests.io import STAGE_FILE
from merit_fast.manifests.ledger import LEDGER_FILE, Ledger, adopt, read_ledger
from merit_fast.manifests.state import OutputState, check_output


def verify_command(directory: str, as_json: bool) -> None:
    """Compares every file below a directory with its recorded hash and prints the result.

    The records are those of run.json for a run or an output of one, of stage.json for another
    output, and of the index for a model without one.

    Raises:
        InputError: a file is absent, surplus or damaged, or nothing records the files' hashes.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a directory")
    sums = _recorded(folder)
    if sums is None:
        from merit_fast.merge.write.verified import verify_checksums

        sums = verify_checksums(folder)
    if as_json:
        print(json.dumps({"verified": directory, "files": sums}))
    else:
        print(f"{directory}: {len(sums)} files agree with their checksums")


def _recorded(folder: Path) -> dict[str, str] | None:
    """File -> hash of a run or an output of ours; None for any other directory."""
    if (folder / LEDGER_FILE).exists():
        ledger = read_ledger(folder)
        sums: dict[str, str] = {}
        for name in ledger.outputs:
            if (folder / name).exists():  # a replaced output may be gone
                checked = _check(folder, name, ledger)
                sums |= {f"{name}/{file}": digest for file, digest in checked.items()}
        if not sums:
            raise InputError(f"{folder / LEDGER_FILE}: outputs: names no output that is there")
        return sums
    if not (folder / STAGE_FILE).exists():
        return None
    resolved = folder.resolve()
    for root in list(resolved.parents)[:3]:
        if (root / LEDGER_FILE).exists():
            name = resolved.relative_to(root).as_posix()
            ledger = read_ledger(root)
            if name in ledger.outputs or name in ledger.old:
                return _check(root, name, ledger)
    if not adopt(folder).files.keys() - {STAGE_FILE}:
        return None  # written before outputs recorded their files, or sent to a store
    return _check(resolved.parent, resolved.name, Ledger())


def _check(root: Path, name: str, ledger: Ledger) -> dict[str, str]:
    state: OutputState = check_output(root, name, None, ledger, whole=True)
    if not state.is_current or state.record is None:
        raise InputError(f"{root}/{state.detail or f'{name}: {state.state}'}")
    return {file: digest for file, (_, _, digest) in state.record.files.items()}
