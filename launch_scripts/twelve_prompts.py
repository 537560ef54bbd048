"""Twelve prompts on four meshes with the bundled model, each with PGC, without, and with the control: the pictures in docs/.

    python launch_scripts/twelve_prompts.py [--workers 2] [--only brick] [key=value ...]

The control scales each view's gradient by its RMS and clips nothing; without it, "clipping helps" could mean "equal scale helps". Every
run is an ordinary launcher run in outputs/twelve-prompts/; finished ones are skipped, so the script can be stopped and called again.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "custom"))

RUNS = ROOT / "outputs" / "twelve-prompts"
PAIRS = [
    ("a red brick bunny", "bunny"),
    ("a zebra bunny", "bunny"),
    ("a purple bunny with white polka dots", "bunny"),
    ("a wooden teapot", "teapot"),
    ("a golden teapot", "teapot"),
    ("a lava teapot", "teapot"),
    ("a blue and white checkered vase", "vase"),
    ("a giraffe vase", "vase"),
    ("a mossy stone vase", "vase"),
    ("a red and white striped knot", "knot"),
    ("a leopard knot", "knot"),
    ("a rainbow knot", "knot"),
]
VARIANTS = {
    "PGC": [],
    "off": ["system.guidance.pgc.enabled=false"],
    "view RMS": ["system.guidance.pgc.rule=view-rms"],
}
VIEWS = 4


def run(pair: tuple[str, str], variant: str, overrides: list[str]) -> dict:
    """One launcher run, unless it is there already; returns what is known of it."""
    prompt, mesh = pair
    tag = f"{prompt}-{variant}".replace(" ", "_")
    folder = RUNS / tag
    record = folder / "record.json"
    if record.is_file():
        return json.loads(record.read_text())
    command = [sys.executable, "launch_scripts/launch.py", "--config", "configs/fantasia3d-pocket-pgc.yaml", "--gpu", "none", "--train"]
    command += ["exp_root_dir=outputs", "name=twelve-prompts", f"tag={tag}", "use_timestamp=false"]
    command += [f"system.geometry.mesh=builtin:{mesh}", f'system.prompt_processor.prompt="{prompt}"', *VARIANTS[variant]]
    command += [f"data.n_test_views={VIEWS}", f"system.contact_sheet_views={VIEWS}", "trainer.val_check_interval=null", *overrides]
    begun = time.perf_counter()
    # One thread each: the runs share the cores better than torch's thread pools would.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"prompt": prompt, "mesh": mesh, "variant": variant, "error": (done.stderr or done.stdout)[-400:]}
    found = {"prompt": prompt, "mesh": mesh, "variant": variant, "seconds": time.perf_counter() - begun}
    record.write_text(json.dumps(found))
    return found


def views(prompt: str, variant: str) -> list:
    """The run's evaluation views, in the order of azimuth."""
    import numpy as np
    from PIL import Image

    (folder,) = (RUNS / f"{prompt}-{variant}".replace(" ", "_") / "save").glob("it*-test")
    return [np.asarray(Image.open(folder / f"{index}.png").convert("RGB"), dtype=np.float32) / 255 for index in range(VIEWS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="prompts that contain this text")
    parser.add_argument("--output", type=Path, default=RUNS, help="folder of the contact sheets")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args, overrides = parser.parse_known_args()
    pairs = [pair for pair in PAIRS if args.only in pair[0]]
    if not pairs:
        sys.exit(f"--only: found {args.only!r}, wanted part of one of: {', '.join(prompt for prompt, _ in PAIRS)}")

    from threestudio_pgc.export.pictures import contact_sheet, save_png

    jobs = [(pair, variant) for variant in args.variants for pair in pairs]
    records = []
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        futures = [pool.submit(run, pair, variant, overrides) for pair, variant in jobs]
        for count, future in enumerate(concurrent.futures.as_completed(futures), 1):
            record = future.result()
            records.append(record)
            outcome = f"failed: {record['error']}" if "error" in record else f"{record['seconds']:.0f} s"
            print(f"[{count}/{len(jobs)}] {record['prompt']}, {record['variant']}: {outcome}", flush=True)
    done = [pair for pair in pairs if not any("error" in record for record in records if record["prompt"] == pair[0])]
    for variant in args.variants:
        pictures = [picture for prompt, _ in done for picture in views(prompt, variant)]
        labels = [f"{prompt} {90 * index}°" for prompt, _ in done for index in range(VIEWS)]
        path = save_png(args.output / f"{variant.replace(' ', '-').lower()}.png", contact_sheet(pictures, columns=2 * VIEWS, labels=labels))
        print(f"{variant}: {path}")
    if done and len(args.variants) == len(VARIANTS):
        beside = [views(prompt, variant)[mesh == "bunny"] for prompt, mesh in done for variant in VARIANTS]
        labels = [f"{prompt}: {variant}" for prompt, _ in done for variant in VARIANTS]
        print(f"side by side: {save_png(args.output / 'side-by-side.png', contact_sheet(beside, columns=6, labels=labels))}")
    if "PGC" in args.variants and done:
        front = [views(prompt, "PGC")[mesh == "bunny"] for prompt, mesh in done]  # the bunny's best side is its flank
        print(f"teaser: {save_png(args.output / 'teaser.png', contact_sheet(front, columns=6))}")
    if any("error" in record for record in records):
        sys.exit(1)


if __name__ == "__main__":
    main()
