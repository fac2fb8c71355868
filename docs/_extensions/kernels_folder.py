"""Griffe extension that adds merit_fast.kernels to the API reference.

The folder has no __init__.py on purpose (its name belongs to another top-level package), and
griffe skips such folders inside a regular package.
"""

from pathlib import Path
from typing import Any

import griffe


class KernelsFolder(griffe.Extension):
    """Adds the module merit_fast.kernels with one submodule per file or family."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Adds the folder after griffe has loaded the package around it."""
        if pkg.path == "merit_fast":
            folder = Path(pkg.filepath).parent / "kernels"
            _add_module(pkg, loader, folder / "__init__.py", "")
            for file in sorted(folder.glob("*.py")):
                _add_module(pkg["kernels"], loader, file, file.read_text(encoding="utf-8"))
            for file in sorted(folder.glob("*/__init__.py")):
                _add_family(pkg["kernels"], loader, file)


def _add_family(kernels: griffe.Module, loader: griffe.GriffeLoader, init: Path) -> None:
    _add_module(kernels, loader, init, init.read_text(encoding="utf-8"))
    for file in sorted(init.parent.glob("*.py")):
        if file != init:
            family = kernels[init.parent.name]
            _add_module(family, loader, file, file.read_text(encoding="utf-8"))


def _add_module(parent: griffe.Module, loader: griffe.GriffeLoader, file: Path, code: str) -> None:
    name = file.parent.name if file.name == "__init__.py" else file.stem
    module = griffe.visit(
        name,
        filepath=file,
        code=code,
        extensions=loader.extensions,
        parent=parent,
        docstring_parser=loader.docstring_parser,
        docstring_options=loader.docstring_options,
        lines_collection=loader.lines_collection,
        modules_collection=loader.modules_collection,
    )
    parent.set_member(name, module)
