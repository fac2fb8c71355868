"""One Chromium and one set of reports for all tests of the report in a browser."""

import pytest
from support.report.chromium import Browser
from support.report.manifests import make_audit, make_evaluation, make_tuned, write
from support.report.pages import SPLITS

from merit_fast.manifests.io import read_manifest, write_manifest
from merit_fast.manifests.schemas import SplitManifest


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """One Chromium for the whole session; its tests are skipped where there is none."""
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def pages(tmp_path_factory):
    """name -> its report; the split is read back from the split.json next to it, as in a run."""
    folder = tmp_path_factory.mktemp("reports")
    files = {}
    for name, split in SPLITS.items():
        write_manifest(split, folder / f"{name}.json")
        read = read_manifest(SplitManifest, folder / f"{name}.json")
        files[name] = folder / f"{name}.html"
        write(
            files[name],
            read,
            make_evaluation(read),
            title=name,
            audit=make_audit(),
            tuned=make_tuned(),
        )
    return files
