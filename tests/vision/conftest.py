"""Tiny models that read images, saved once for all tests of this folder."""

import pytest
from support.vision.layouts import LAYOUTS
from support.vision.models import make_vision_model


@pytest.fixture(scope="session")
def vision_folders(tmp_path_factory):
    """Layout -> folder of its saved model and processor, made when it is first asked for."""
    root = tmp_path_factory.mktemp("vision")
    made = {}

    def folder(name):
        if name not in made:
            assert name in LAYOUTS
            make_vision_model(root / name, name)
            made[name] = root / name
        return made[name]

    return folder
