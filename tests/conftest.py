"""Fixtures shared by all rooms: tiny random-weight models, saved once and loaded through the code a user runs."""

import os

import pytest

# Nothing in the suite may look for the model hub; a folder is always given.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """Folder of a tiny SDXL pipeline with random weights."""
    from tests.diffusion.tiny import build_tiny_sdxl

    return build_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="session")
def tiny_controlnet(tmp_path_factory):
    """Folder of a tiny depth ControlNet for it."""
    from tests.diffusion.tiny import build_tiny_controlnet

    return build_tiny_controlnet(tmp_path_factory.mktemp("tiny") / "controlnet")
