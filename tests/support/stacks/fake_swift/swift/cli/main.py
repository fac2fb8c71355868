"""``python -m swift.cli.main sft CONFIG`` saves a checkpoint, as ms-swift does."""

import sys
from pathlib import Path

import yaml
from support.stacks.fake_trainer import main

if __name__ == "__main__":
    _, command, file = sys.argv
    assert command == "sft"
    values = yaml.safe_load(Path(file).read_text())
    sys.exit(main(Path(values["model"]), Path(values["output_dir"]), "in-checkpoint"))
