"""Run an experiment without threestudio, with the same command line:

python launch_scripts/launch.py --config configs/X.yaml --train|--validate|--test|--export [--gpu 0[,1]|none] [--verbose] key=value ...
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "custom"))

from threestudio_pgc.standalone.launcher import main

if __name__ == "__main__":
    sys.exit(main(load_parts=lambda: importlib.import_module("threestudio_pgc.modules")))
