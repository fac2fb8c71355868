"""The places that state the version and the file contracts agree."""

import re

import yaml
from support.paths import ROOT

import merit_fast
from merit_fast.data.fingerprint import ENCODING_VERSION
from merit_fast.kernels.sketch import HASH_VERSION
from merit_fast.manifests.schemas import SCHEMA_VERSION

CONTRACTS = {"SCHEMA": SCHEMA_VERSION, "HASH": HASH_VERSION, "ENCODING": ENCODING_VERSION}


def first_release():
    """Version, date and text of the newest release section in CHANGELOG.md."""
    sections = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1:]
    released = next(text for text in sections if not text.startswith("Unreleased"))
    version, date = re.match(r"(\S+) - (\d{4}-\d{2}-\d{2})\n", released).groups()
    return version, date, released


def test_changelog_citation_and_package_name_one_version():
    version, date, _ = first_release()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert merit_fast.__version__ == version == citation["version"]
    assert str(citation["date-released"]) == date


def test_changelog_and_release_notes_name_the_versions_of_the_file_contracts():
    _, _, released = first_release()
    steps = (ROOT / "RELEASE.md").read_text()
    for name, version in CONTRACTS.items():
        assert re.search(rf"`{name}_VERSION`\) \| {version} \|", released), name
        assert f"`{name}_VERSION` = {version} |" in steps, name
