"""Every path of this repository that a comment, a docstring or a page names exists."""

import ast
import io
import re
import tokenize

from support.paths import ROOT

TOPS = ("bench", "csrc", "docs", "kernels", "merit_fast", "tests")
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(TOPS)})/[\w./*<>{{}},-]*")
CSRC_FILE = re.compile(r"(?<![\w./*])\w+\.(?:inl|cpp|h|cu)\b")
CODE = (".py", ".cpp", ".h", ".inl", ".cu")


def files(*suffixes):
    for top in TOPS:
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix in suffixes and "merit_fast/kernels/" not in path.as_posix():
                yield path


PROSE = [*files(".md"), *sorted(ROOT.glob("*.md"))]


def comments_of(path):
    """Comments and docstrings of a source file; the whole text of any other file."""
    text = path.read_text()
    if path.suffix not in CODE:
        return text
    if path.suffix != ".py":
        return "\n".join(re.findall(r"//(.*)", text))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    parts = [token.string for token in tokens if token.type == tokenize.COMMENT]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented):
            parts.append(ast.get_docstring(node) or "")
    return "\n".join(parts)


def paths_in(text):
    """Named paths as patterns of glob: a placeholder in angle brackets stands for any name."""
    for match in PATH.findall(text):
        yield re.sub(r"<[^>]*>", "*", match).rstrip(".,-/")


def exists(pattern):
    """``a.{b, c}`` names two files."""
    if braces := re.search(r"\{([^}]*)\}", pattern):
        start, stop = braces.span()
        return all(exists(pattern[:start] + name + pattern[stop:]) for name in braces[1].split(","))
    return any(ROOT.glob(pattern))


def test_named_paths_exist():
    missing = {
        str(path.relative_to(ROOT)): gone
        for path in (*files(*CODE), *PROSE)
        if (gone := {p for p in paths_in(comments_of(path)) if not exists(p)})
    }
    assert not missing


def test_files_that_csrc_names_without_a_folder_exist():
    names = {path.name for path in (ROOT / "csrc").rglob("*")}
    names |= {path.name for path in (ROOT / "tests" / "support").rglob("*")}
    for path in files(".cpp", ".h", ".inl", ".cu"):
        missing = set(CSRC_FILE.findall(comments_of(path))) - names
        assert not missing, path


def test_a_path_that_is_gone_is_noticed():
    text = "see kernels/average/_deltas.py, csrc/<family>/bindings.cpp and tests/support/paths.py."
    assert [exists(pattern) for pattern in paths_in(text)] == [False, True, True]
