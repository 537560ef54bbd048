"""Shapes from prompts with the bundled models, from a sphere: the geometry stage with PGC and without, and shape and texture together.

    python launch_scripts/shape_prompts.py [--workers 2] [--only vase] [--studies geometry joint] [--rerun] [key=value ...]

Every run is an ordinary launcher run in outputs/shape-prompts/; finished ones are skipped, and those with other settings are replaced with
--rerun only. Writes contact sheets and shapes.json: of each run its seconds, and of its shape the loose pieces and how much of the surface
they are.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "custom")]

from launch_scripts.studies import Job, StudyError, prompt_override, run_all, shipped, views  # noqa: E402

RUNS = ROOT / "outputs" / "shape-prompts"
SHAPES = ("vase", "cube", "bottle", "bowl", "mug", "teapot", "bunny", "torus")
TEXTURED = ("a zebra vase", "a red brick cube", "a lava bowl", "a leopard bunny")
VIEWS = 4
OFF = ("system.guidance.pgc.enabled=false",)
STUDIES = {
    "geometry": ("fantasia3d-geometry-pocket-pgc", [f"a {shape}" for shape in SHAPES], {"PGC": (), "off": OFF}),
    "joint": ("fantasia3d-joint-pocket-pgc", list(TEXTURED), {"PGC": (), "without normals": ("system.loss.lambda_normal_sds=0",)}),
}


def job(study: str, prompt: str, variant: str, more: Sequence[str]) -> Job:
    config, _, variants = STUDIES[study]
    overrides = (prompt_override(prompt), *variants[variant], f"data.n_test_views={VIEWS}", f"system.contact_sheet_views={VIEWS}")
    label = f"{study} {prompt} {variant}"
    return Job(label, RUNS / label.replace(" ", "_"), shipped(config), (*overrides, "trainer.val_check_interval=null", *more))


def pieces(done: Job) -> dict[str, float]:
    """Number of connected pieces of the run's final surface, and the share of the area that is not in the largest."""
    import numpy as np
    import trimesh
    from omegaconf import OmegaConf

    import threestudio_pgc.modules  # noqa: F401
    from threestudio_pgc.host import find
    from threestudio_pgc.standalone.base import load_module_weights

    config = OmegaConf.load(done.folder / "configs" / "parsed.yaml").system
    geometry = find(config.geometry_type)(config.geometry)
    geometry.load_state_dict(load_module_weights(str(done.folder / "ckpts" / "last.ckpt"), module_name="geometry")[0])
    mesh = geometry.export_mesh()
    solid = trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)
    groups = trimesh.graph.connected_components(solid.face_adjacency, nodes=np.arange(len(solid.faces)), min_len=1)
    areas = sorted((float(solid.area_faces[group].sum()) for group in groups), reverse=True)
    return {"pieces": len(areas), "loose": 1 - areas[0] / sum(areas)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="prompts that contain this text")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--rerun", action="store_true", help="replace runs that were made with other settings")
    parser.add_argument("--output", type=Path, default=RUNS, help="folder of the contact sheets")
    args, overrides = parser.parse_known_args()

    from threestudio_pgc.export.pictures import contact_sheet, save_png

    table = {}
    for study in args.studies:
        _, prompts, variants = STUDIES[study]
        prompts = [prompt for prompt in prompts if args.only in prompt]
        jobs = {(prompt, variant): job(study, prompt, variant, overrides) for variant in variants for prompt in prompts}
        try:
            records = run_all(list(jobs.values()), ["none"] * args.workers, rerun=args.rerun)
        except StudyError as error:
            sys.exit(f"error: {error}")
        failed = {one.label for one, record in zip(jobs.values(), records) if "error" in record}
        for variant in variants:
            done = [prompt for prompt in prompts if jobs[prompt, variant].label not in failed]
            if not done:
                continue
            pictures, labels = [], []
            for prompt in done:
                for index, view in enumerate(views(jobs[prompt, variant], VIEWS)):
                    # a view is two pictures side by side: normals and clay, or colours and normals
                    pictures += [view[:, view.shape[0] :]] if study == "geometry" else [view[:, : view.shape[0]], view[:, view.shape[0] :]]
                    labels += [f"{prompt} {90 * index}\N{DEGREE SIGN}"] + [""] * (study == "joint")
            path = args.output / f"shapes-{study}-{variant.replace(' ', '-').lower()}.png"
            print(f"{study}, {variant}: {save_png(path, contact_sheet(pictures, columns=2 * VIEWS, labels=labels))}")
            for prompt in done:
                finished = jobs[prompt, variant]
                table[finished.label] = finished.record | pieces(finished)
                found = table[finished.label]
                print(f"  {finished.label}: {found['pieces']} piece(s), {found['loose']:.1%} of the surface loose")
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / "shapes.json").write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
