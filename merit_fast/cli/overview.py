"""The help of ``merit-fast`` itself: commands in groups, an example of each, the nearest name."""

from collections.abc import Mapping

from merit_fast.cli.commands import COMMANDS, Command

EXAMPLES = {
    "init": "merit-fast init data/ --model BASE",
    "data": "merit-fast data my.yml --show 2",
    "run": "merit-fast run my.yml train.epochs=2",
    "unit": "merit-fast unit my.yml train/merit-0",
    "launch": "merit-fast launch my.yml --to slurm --gpus 8 --out jobs",
    "status": "merit-fast status my.yml",
    "clean": "merit-fast clean my.yml --dry-run",
    "sketch": "merit-fast sketch my.yml --examples 100",
    "split": "merit-fast split my.yml --groups 3",
    "advise": "merit-fast advise my.yml",
    "train": "merit-fast train my.yml --epochs 2",
    "merge": "merit-fast merge OUT --model A:0.3 --model B:0.7",
    "evaluate": "merit-fast evaluate my.yml --max-new-tokens 16",
    "report": "merit-fast report my.yml",
    "select": "merit-fast select my.yml --target facts --keep 5% --out picked.jsonl",
    "duplicates": "merit-fast duplicates my.yml --above 0.999",
    "outliers": "merit-fast outliers my.yml --keep 10",
    "extract-lora": "merit-fast extract-lora OUT --base BASE --model TUNED --rank 32",
    "export": "merit-fast export my.yml --format axolotl --out groups",
    "verify": "merit-fast verify OUT",
    "demo": "merit-fast demo --quick",
    "doctor": "merit-fast doctor --json",
}
_GROUPS = {
    "your data": ("init", "data"),
    "a run": ("run", "unit", "launch", "status", "clean"),
    "one stage of a run": ("sketch", "split", "advise", "train", "merge", "evaluate", "report"),
    "rows of a run (after sketch --store)": ("select", "duplicates", "outliers"),
    "other stacks": ("export",),
    "models and this machine": ("extract-lora", "verify", "demo", "doctor"),
}
_FIRST_STEPS = """\
examples:
  merit-fast init data/ --model BASE                 # writes data/merit.yml from the files in data/
  merit-fast run data/merit.yml                      # sketches, splits, trains, merges, reports
  merit-fast merge OUT --model A:0.3 --model B:0.7   # merges two checkpoints, without a run"""


def overview() -> str:
    """Every command with its purpose, by group, and the first steps."""
    lines = [
        "usage: merit-fast COMMAND ...",
        "",
        "Splits an instruction mixture along the conflicts of its gradients, trains a branch for",
        "each group, and merges the branches once.",
    ]
    for title, names in _grouped(COMMANDS).items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:<10} {COMMANDS[name].purpose}" for name in names]
    lines += [
        "",
        _FIRST_STEPS,
        "",
        "merit-fast COMMAND --help shows the options of a command, merit-fast --version the",
        "version. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted (the same command",
        "resumes the work).",
    ]
    return "\n".join(lines)


def nearest_command(name: str) -> str:
    """The rest of a message about an unknown command: the nearest one, or all of them."""
    import difflib

    close = difflib.get_close_matches(name, list(COMMANDS), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; commands: {', '.join(COMMANDS)}"


def _grouped(commands: Mapping[str, Command]) -> dict[str, list[str]]:
    groups = {
        title: [name for name in names if name in commands] for title, names in _GROUPS.items()
    }
    named = {name for names in groups.values() for name in names}
    others = [name for name in commands if name not in named]
    return groups | ({"others": others} if others else {})
