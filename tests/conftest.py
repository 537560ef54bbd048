"""Fixtures shared by all rooms: tiny random-weight models, saved once and loaded through the code a user runs."""

import os

import pytest

# Nothing in the suite may look for the model hub; a folder is always given.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """The last lines say whether the real threestudio was exercised (tests/host)."""
    yield
    root = os.environ.get("THREESTUDIO_ROOT")
    told = f"in a copy of THREESTUDIO_ROOT, {root}" if root else "THREESTUDIO_ROOT is not set: the real threestudio was not exercised"
    terminalreporter.write_line(f"tests/host: {told}", bold=True)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """Folder of a tiny SDXL pipeline with random weights."""
    from tests.diffusion.tiny import build_tiny_sdxl

    return build_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="session")
def tiny_controlnet(tmp_path_factory):
    """Folder of a tiny depth ControlNet for it."""
    from tests.diffusion.tiny import build_tiny_controlnet

    return build_tiny_controlnet(tmp_path_factory.mktemp("tiny") / "controlnet-depth")


@pytest.fixture(scope="session")
def tiny_models(tiny_sdxl, tiny_controlnet, tmp_path_factory):
    """Family -> (folder of a tiny pipeline, folder of a ControlNet for it or None); image size 32, latents 8 x 8."""
    from tests.diffusion.tiny import build_tiny_flux, build_tiny_sd, build_tiny_sd3, build_tiny_sd_controlnet
    from tests.diffusion.tiny_zero123 import build_tiny_zero123

    folder = tmp_path_factory.mktemp("families")
    return {
        "sdxl": (tiny_sdxl, tiny_controlnet),
        "sd": (build_tiny_sd(folder / "sd"), build_tiny_sd_controlnet(folder / "sd-controlnet-depth")),
        "sd-v": (build_tiny_sd(folder / "sd-v", prediction_type="v_prediction"), None),
        "sd3": (build_tiny_sd3(folder / "sd3"), None),
        "flux": (build_tiny_flux(folder / "flux"), None),
        "zero123": (build_tiny_zero123(folder / "zero123"), None),
    }
