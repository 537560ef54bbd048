"""A gallery of runs to look at side by side, and the paper's preference study on the same models.

    python launch_scripts/gallery.py outputs/comparison                          # outputs/gallery/index.html
    python launch_scripts/gallery.py outputs/comparison --study --seed 1         # outputs/study/study.html
    python launch_scripts/gallery.py tally study-*.json --gallery outputs/study  # picks, percentages, intervals

RUN_DIR is a run of launch.py or a folder that holds runs. One row per prompt and mesh, one column per method. What is written is a folder
of static files: open its page by double click, or put it on any web server. Nothing is fetched when it is viewed; when it is made, the
<model-viewer> element comes from the npm registry, once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch_scripts.gallery_page.build import key_file, write_gallery, write_study
from launch_scripts.gallery_page.model_viewer import VERSION, model_viewer
from launch_scripts.gallery_page.runs import read_runs
from launch_scripts.gallery_page.tally import spelled, tally

GALLERY, STUDY = Path("outputs/gallery"), Path("outputs/study")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", type=Path, help=f"folder to write; default {GALLERY}, or {STUDY} with --study")
    parser.add_argument("--title", help="of the page; participants of a study see it too")
    parser.add_argument("--study", action="store_true", help="write the blind preference study in place of the gallery")
    parser.add_argument("--seed", type=int, default=0, help="of the orders in which a study shows the methods")
    parser.add_argument("--model-viewer", type=Path, metavar="FILE", help=f"model-viewer-umd.min.js; default: version {VERSION}, fetched")
    return parser


def build_tally_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gallery.py tally", description="Count the picks of a study made with --study.")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json", help="as participants saved them")
    parser.add_argument("--gallery", type=Path, default=STUDY, help=f"the study's folder, its key beside it; default {STUDY}")
    return parser


def make(args: argparse.Namespace) -> None:
    runs = read_runs(args.runs)
    viewer = model_viewer(args.model_viewer)
    if args.study:
        output = args.output or STUDY
        page = write_study(runs, output, args.title or "Which one is best?", args.seed, viewer)
        print(f"Study: {page}")
        print(f"Key: {key_file(output)}; it tells which method is which: do not publish it, the tally needs it")
        return
    for run in runs:
        if run.problem:
            print(f"{run.folder}: {run.problem}", file=sys.stderr)
    print(f"Gallery: {write_gallery(runs, args.output or GALLERY, args.title or 'Gallery', viewer)}")


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 an argument is wrong or something it names."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["tally"]:
            args = build_tally_parser().parse_args(arguments[1:])
            print(spelled(tally(args.results, args.gallery)))
        else:
            make(build_parser().parse_args(arguments))
    except ValueError as error:
        print(f"gallery: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
