import pytest


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reached for the network would pass or fail with the weather."""
    import socket

    def refuse(*args, **kwargs):
        raise OSError("network is closed in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
