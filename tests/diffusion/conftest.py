import pytest

from tests.diffusion.tiny import build_tiny_controlnet, build_tiny_sdxl


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """Folder of a tiny SDXL pipeline."""
    return build_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="session")
def tiny_controlnet(tmp_path_factory):
    return build_tiny_controlnet(tmp_path_factory.mktemp("tiny") / "controlnet")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reached for the network would pass or fail with the weather."""
    import socket

    def refuse(*args, **kwargs):
        raise OSError("network is closed in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
