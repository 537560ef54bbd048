"""Data, models and training of the bundled "pocket" diffusion model (see `launch_scripts/train_pocket.py`)."""
