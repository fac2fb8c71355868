"""Where an output may go: never over an input, nor over what is not ours."""

from collections.abc import Sequence

from merit_fast.errors import InputError
from merit_fast.manifests.io import STAGE_FILE
from merit_fast.merge.read.files import is_directory, is_weight_file
from merit_fast.merge.read.remote import Location, RemotePath


def check_paths(inputs: Sequence[Location], out: Location) -> None:
    """Raises InputError if an input is no model, or the output overlaps it or is not ours."""
    for path in inputs:
        if not is_directory(path) and not is_weight_file(path):
            raise InputError(f"{path}: is not a directory, nor a safetensors file")
        if path.resolve() == out.resolve():
            raise InputError(f"{out}: the output must not be one of the inputs")
        if out.resolve() in path.resolve().parents:
            raise InputError(f"{out}: the output must not hold the input {path}")
    if isinstance(out, RemotePath):
        from merit_fast.merge.write.upload import check_output

        check_output(out)
    elif out.exists() and not (out / STAGE_FILE).exists():
        raise InputError(
            f"{out}: exists and is not an output of merit-fast; remove it or choose another "
            "directory"
        )
