"""The gradient laboratory: which route a latent gradient should take to the image, looked at on one's own prior and mesh.

`gradient_lab.py` is its command line. Everything is callable: `distil_image`, `distil_texture`, `fit_linear_maps`, `tails_work`, the judge.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "custom"))
