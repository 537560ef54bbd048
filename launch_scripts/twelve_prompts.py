"""Twelve prompts on four meshes with the bundled model, each with PGC, without, and with the control: the pictures in docs/.

    python launch_scripts/twelve_prompts.py [--workers 2] [--only brick] [--rerun] [key=value ...]

The control scales each view's gradient by its RMS and clips nothing; without it, "clipping helps" could mean "equal scale helps". Every
run is an ordinary launcher run in outputs/twelve-prompts/; finished ones are skipped, so the script can be stopped and called again, and
those with other settings are replaced with --rerun only.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "custom")]

from launch_scripts.studies import Job, StudyError, prompt_override, run_all, shipped, views  # noqa: E402

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


def job(pair: tuple[str, str], variant: str, more: Sequence[str] = ()) -> Job:
    prompt, mesh = pair
    overrides = (prompt_override(prompt), f"system.geometry.mesh=builtin:{mesh}", *VARIANTS[variant], f"data.n_test_views={VIEWS}")
    overrides += (f"system.contact_sheet_views={VIEWS}", "trainer.val_check_interval=null", *more)
    label = f"{prompt}-{variant}"
    return Job(label, RUNS / label.replace(" ", "_"), shipped("fantasia3d-pocket-pgc"), overrides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="prompts that contain this text")
    parser.add_argument("--output", type=Path, default=RUNS, help="folder of the contact sheets")
    parser.add_argument("--rerun", action="store_true", help="replace runs that were made with other settings")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args, overrides = parser.parse_known_args()
    pairs = [pair for pair in PAIRS if args.only in pair[0]]
    if not pairs:
        sys.exit(f"--only: found {args.only!r}, wanted part of one of: {', '.join(prompt for prompt, _ in PAIRS)}")

    from threestudio_pgc.export.pictures import contact_sheet, save_png

    jobs = [job(pair, variant, overrides) for variant in args.variants for pair in pairs]
    try:
        records = run_all(jobs, ["none"] * args.workers, rerun=args.rerun)
    except StudyError as error:
        sys.exit(f"error: {error}")
    failed = {one.label for one, record in zip(jobs, records) if "error" in record}
    done = [pair for pair in pairs if not any(job(pair, variant).label in failed for variant in args.variants)]

    def seen(pair: tuple[str, str], variant: str) -> list:
        return views(job(pair, variant), VIEWS)

    for variant in args.variants:
        pictures = [picture for pair in done for picture in seen(pair, variant)]
        labels = [f"{prompt} {90 * index}°" for prompt, _ in done for index in range(VIEWS)]
        path = save_png(args.output / f"{variant.replace(' ', '-').lower()}.png", contact_sheet(pictures, columns=2 * VIEWS, labels=labels))
        print(f"{variant}: {path}")
    if done and len(args.variants) == len(VARIANTS):
        beside = [seen(pair, variant)[pair[1] == "bunny"] for pair in done for variant in VARIANTS]
        labels = [f"{prompt}: {variant}" for prompt, _ in done for variant in VARIANTS]
        print(f"side by side: {save_png(args.output / 'side-by-side.png', contact_sheet(beside, columns=6, labels=labels))}")
    if "PGC" in args.variants and done:
        front = [seen(pair, "PGC")[pair[1] == "bunny"] for pair in done]  # the bunny's best side is its flank
        print(f"teaser: {save_png(args.output / 'teaser.png', contact_sheet(front, columns=6))}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
