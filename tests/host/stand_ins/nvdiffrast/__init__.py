"""Stand-in for nvdiffrast on a CPU; see `torch.py`."""
