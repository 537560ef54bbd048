"""Convert a Zero123 checkpoint of the original code to a folder that pgc-zero123-guidance loads.

    python launch_scripts/convert_zero123.py zero123.ckpt OUT_FOLDER

Only files of tensors and plain containers are opened. The published .ckpt files mostly hold more, and are refused with a list of ready
folders.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "custom"))

from threestudio_pgc.diffusion.prior import PriorError
from threestudio_pgc.diffusion.zero123_checkpoint import convert_zero123_checkpoint


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the .ckpt file")
    parser.add_argument("out_folder", type=Path, help="folder to write, new or empty")
    options = parser.parse_args(arguments)
    try:
        folder = convert_zero123_checkpoint(options.checkpoint, options.out_folder)
    except PriorError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"written to {folder}: pretrained_model_name_or_path={folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
