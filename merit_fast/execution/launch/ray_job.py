"""``--to ray``: the command that runs the driver as a job of a Ray cluster."""

import json
import re
import shlex
from typing import Any

from merit_fast.errors import InputError
from merit_fast.execution.launch.job import Launch, bash_file, heading, run_words

_CHANGED = re.compile(r'["$`\\\n]')  # by older versions of ray job submit


def ray_files(launch: Launch) -> dict[str, str]:
    """The script, by its name.

    Raises:
        InputError: a name holds characters that some versions of ``ray job submit`` change.
    """
    words = run_words(launch, "ray")
    if launch.gpus:
        words += ["--unit-gpus", str(launch.gpus)]
    for text in (launch.folder, *words):
        if _CHANGED.search(text):
            rule = "must have no double quote, dollar sign, backquote, backslash or line break"
            raise InputError(f"command line: --to ray: a path or value {rule}, got {text!r}")
    entry = f"cd {shlex.quote(launch.folder)} && exec {shlex.join(words)}"
    entry = entry.replace("'\"'\"'", r"'\''")  # the form that every version passes on
    options = launch.options
    environment: dict[str, Any] = {}
    if options.install:
        environment["pip"] = [options.install]
    if options.image:
        environment["image_uri"] = options.image
    submit = ["ray", "job", "submit"]
    if environment:
        submit += ["--runtime-env-json", json.dumps(environment)]
    who = "the driver's node" if options.scratch else "every node"
    lines = [
        f"# RAY_API_SERVER_ADDRESS names the cluster; {who} sees the folder below.",
        f"{shlex.join(submit)} -- bash -c \\",
        f"    {shlex.quote(entry)}",
    ]
    return {"submit.sh": bash_file(heading(launch, "Runs the driver of a run on Ray."), lines)}
