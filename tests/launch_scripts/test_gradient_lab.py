"""The command line from end to end, on a tiny random pipeline: every subcommand leaves a page with every panel, and refuses in one line."""

import base64
import io
import json
import re
import sys

import pytest
import torch
from PIL import Image

from launch_scripts import gradient_lab
from launch_scripts.lab.routes import ROUTES
from threestudio_pgc.diffusion.methods import METHODS
from threestudio_pgc.pixelgrad.linear_map import load_linear_map

from .browser import chromium, loaded_images


@pytest.fixture(scope="module", autouse=True)
def one_prompt_cache(tmp_path_factory):
    """As a user's second run finds it; not the repository's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def lab(tiny_sdxl, tmp_path_factory):
    """lab(subcommand, *arguments) -> folder of its page; runs once per set of arguments."""
    done = {}

    def run(*arguments):
        if arguments not in done:
            folder = tmp_path_factory.mktemp(arguments[0])
            everything = [*arguments, "--prior", str(tiny_sdxl), "--workers", "1", "--output", str(folder)]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["gradient_lab.py", *everything])
                assert gradient_lab.main(everything) == 0
            done[arguments] = folder
        return done[arguments]

    return run


IMAGE = ("image", "--prompt", "a zebra vase", "--steps", "2")
TEXTURE = ("texture", "--prompt", "a zebra vase", "--mesh", "builtin:vase", "--steps", "2", "--views", "1", "--preset", "pocket")
TEXTURE = (*TEXTURE, "--inject", "none", "image")
THRESHOLDS = ("thresholds", "--prompt", "a zebra vase", "--steps", "2", "--views", "1", "--preset", "pocket", "--thresholds", "0.01", "0.1")
OBJECTIVES = ("objectives", "--prompt", "a zebra vase", "--steps", "2", "--views", "1", "--preset", "pocket")
OBJECTIVES = (*OBJECTIVES, "--negative-prompt", "red", "--routes", "pgc-n", "vae")
TAILS = ("tails", "--prompt", "a zebra vase", "--timesteps", "20", "500", "--views", "2")
FIT = ("fit-linear", "--count", "20")
ALL = [IMAGE, TEXTURE, THRESHOLDS, OBJECTIVES, TAILS, FIT]


def embedded(page):
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in pictures]


@pytest.mark.parametrize("arguments", ALL, ids=[arguments[0] for arguments in ALL])
def test_every_subcommand_leaves_pictures_a_table_and_one_page(lab, arguments):
    folder = lab(*arguments)
    page = (folder / "index.html").read_text()
    pictures, files = embedded(page), sorted(folder.glob("*.png"))
    assert files and sorted(image.size for image in pictures) == sorted(Image.open(file).size for file in files)
    table = json.loads((folder / "table.json").read_text())
    assert table["rows"] and table["settings"]
    assert f"gradient_lab.py {arguments[0]}" in page, "the command that makes it again"
    titles = {"image": "Gradient routes, image", "texture": "Gradient routes, texture", "thresholds": "Threshold ablation"}
    titles |= {"objectives": "Distillation objectives"}
    titles |= {"tails": "Tails of the pixel gradient", "fit-linear": "Linear stand-in of the VAE"}
    assert f"<h1>{titles[arguments[0]]}" in page


@pytest.mark.skipif(chromium() is None, reason="needs Debian's chromium; apt-get install chromium")
@pytest.mark.parametrize("arguments", ALL, ids=[arguments[0] for arguments in ALL])
def test_a_browser_shows_every_panel(lab, arguments):
    folder = lab(*arguments)
    assert loaded_images(folder / "index.html") == len(list(folder.glob("*.png")))


def test_image_and_texture_have_every_route(lab):
    assert [row["route"] for row in json.loads((lab(*IMAGE) / "table.json").read_text())["rows"]] == list(ROUTES)
    rows = json.loads((lab(*TEXTURE) / "table.json").read_text())["rows"]
    spoilt = [f"{name} + image outliers" for name, route in ROUTES.items() if route.pullback == "vae"]
    assert [row["variant"] for row in rows] == [*ROUTES, *spoilt]
    assert {"view-rms", "view-rms + image outliers"} <= {row["variant"] for row in rows}, "the controls stand in every table"


def test_thresholds_have_their_controls_and_clip_less_the_higher_they_are(lab):
    rows = {row["variant"]: row for row in json.loads((lab(*THRESHOLDS) / "table.json").read_text())["rows"]}
    assert list(rows) == ["vae", "view-rms", "c=0.01", "c=0.1"]
    assert rows["c=0.01"]["share above c"] > rows["c=0.1"]["share above c"]


def test_objectives_are_compared_with_sds_along_the_same_route(lab):
    folder = lab(*OBJECTIVES)
    told = json.loads((folder / "table.json").read_text())
    rows = {row["variant"]: row for row in told["rows"]}
    assert list(rows) == [f"{name}, {route}" for route in ("vae", "pgc-n") for name in METHODS]
    for route in ("vae", "pgc-n"):
        sds = rows[f"sds, {route}"]
        assert "minus sds" not in sds and sds["time / sds"] == 1 and sds["seconds per step"] > 0
        csd = rows[f"csd, {route}"]
        assert csd["minus sds"]["mean"] == pytest.approx(csd["fidelity"]["mean"] - sds["fidelity"]["mean"])
        assert csd["time / sds"] == pytest.approx(csd["seconds per step"] / sds["seconds per step"])
        assert (folder / f"views-{route}-none.png").is_file()
    assert "minus raw" in rows["csd, pgc-n"] and "minus raw" not in rows["csd, vae"]
    assert told["settings"]["negative prompt"]["nfsd"] == "red"
    assert "csd none, " in told["settings"]["guidance_scale"] and "ism 7.5 (diffusers)" in told["settings"]["guidance_scale"]


def test_runs_of_sds_are_shared_by_texture_and_objectives(tiny_sdxl, tmp_path):
    runs = ["--prior", str(tiny_sdxl), "--runs", str(tmp_path / "runs"), "--prompt", "a zebra vase", "--steps", "1", "--views", "1"]
    runs = [*runs, "--preset", "pocket", "--routes", "vae"]
    assert gradient_lab.main(["texture", *runs, "--output", str(tmp_path / "texture")]) == 0
    (record,) = tmp_path.rglob("record.json")
    before = record.stat().st_mtime_ns
    assert gradient_lab.main(["objectives", "--objectives", "sds", *runs, "--output", str(tmp_path / "objectives")]) == 0
    assert list(tmp_path.rglob("record.json")) == [record] and record.stat().st_mtime_ns == before


@pytest.mark.parametrize("command", [IMAGE, TAILS])
def test_another_objective_is_another_run_and_another_gradient(lab, command):
    first, second = (json.loads((lab(*command, "--objective", name) / "table.json").read_text()) for name in ("sds", "csd"))
    key = "norm_p50" if command is IMAGE else "p50"
    assert len(first["rows"]) == len(second["rows"]) and first["rows"][1][key] != second["rows"][1][key]


def test_pages_and_runs_of_another_objective_have_their_own_names():
    from pathlib import Path
    from types import SimpleNamespace

    from launch_scripts.lab.report import default_folder, unit_prefix
    from launch_scripts.lab.routes import Objective

    names = [default_folder(SimpleNamespace(output=None, objective=name), "image", "a-vase").name for name in ("sds", "csd")]
    assert names == ["image-a-vase", "image-csd-a-vase"]
    assert default_folder(SimpleNamespace(output=Path("here"), objective="csd"), "image", "a-vase") == Path("here")
    assert [unit_prefix(Objective(method=name)) for name in ("sds", "csd")] == ["", "csd-"]


def test_guidance_is_the_objectives_own_where_none_is_given():
    from launch_scripts.lab.report import negative_of, objective_of
    from launch_scripts.lab.teacher import POCKET, Model

    def told(prior, method, *arguments):
        args = gradient_lab.build_parser().parse_args(["tails", "--prior", prior, "--t-range", "0.02", "0.5", *arguments])
        found = objective_of(args, Model(prior=prior), method)
        return found.guidance_scale, found.cfg, negative_of(args, Model(prior=prior), method)

    assert [told(POCKET, name)[:2] for name in ("sds", "bgt", "ism")] == [(30.0, "authors"), (30.0, "authors"), (7.5, "diffusers")]
    assert told("folder", "sds")[:2] == (100.0, "authors") and told("folder", "csd")[:2] == (None, "authors")
    assert told(POCKET, "ism", "--guidance-scale", "20", "--cfg", "authors")[:2] == (20.0, "authors")
    assert told(POCKET, "csd", "--guidance-scale", "20")[0] is None, "of several objectives, it has no scale to set"
    assert told(POCKET, "nfsd")[2] == "blurry, low quality" and told(POCKET, "sds")[2] == ""
    assert told("folder", "nfsd", "--negative-prompt", "ugly")[2] == told("folder", "sds", "--negative-prompt", "ugly")[2] == "ugly"


def test_other_kinds_of_priors_are_taken_or_refused_by_name(tiny_models, tmp_path, capsys):
    folder, controlnet = tiny_models["sd"]
    texture = ["texture", "--prompt", "a zebra vase", "--steps", "1", "--views", "1", "--preset", "pocket", "--routes", "vae", "latent"]
    texture = [*texture, "--workers", "1", "--output", str(tmp_path / "out")]
    assert gradient_lab.main([*texture, "--prior", str(folder), "--controlnet", str(controlnet)]) == 0
    capsys.readouterr()
    for family, more, wanted in (
        ("sdxl", ["--objective", "nfsd"], "--negative-prompt: found nothing, wanted what bad pictures look like: nfsd needs it"),
        ("zero123", [], "--prior: .* is a zero123 model, which takes a picture, not a prompt; wanted one of sd, sdxl, sd3, flux"),
        ("sd3", ["--controlnet", str(controlnet)], "--controlnet: found .*, wanted none: "),
    ):
        assert gradient_lab.main([*texture, "--prior", str(tiny_models[family][0]), *more]) == 2
        error = capsys.readouterr().err.strip()
        assert re.search(wanted, error) and len(error.splitlines()) == 1, error


def test_the_judge_speaks_where_it_knows_the_look(lab):
    rows = json.loads((lab(*TEXTURE) / "table.json").read_text())
    assert rows["judge"]["pattern"] >= 0.95 and rows["judge"]["colors"] >= 0.95
    assert all(0 <= row["fidelity"]["low"] <= row["fidelity"]["mean"] <= row["fidelity"]["high"] <= 1 for row in rows["rows"])


def test_tails_tell_before_from_after(lab):
    rows = {(row["t"], row["gradient"]): row for row in json.loads((lab(*TAILS) / "table.json").read_text())["rows"]}
    for t in (20, 500):
        assert rows[t, "raw"]["max"] >= rows[t, "raw"]["p99"] >= rows[t, "raw"]["p50"] > 0
        assert rows[t, "pgc-n"]["max"] <= max(0.1, rows[t, "raw"]["max"]) * (1 + 1e-5)
        assert rows[t, "pgc-n"]["max"] == pytest.approx(min(0.1, rows[t, "raw"]["max"]), rel=1e-4)


def test_several_priors_come_side_by_side(tiny_sdxl, tmp_path):
    from tests.diffusion.tiny import build_tiny_sdxl

    other = build_tiny_sdxl(tmp_path / "other", latent_channels=8, seed=3)
    call = ["tails", "--priors", str(tiny_sdxl), str(other), "--timesteps", "300", "--views", "2", "--output", str(tmp_path / "out")]
    assert gradient_lab.main([*call, "--workers", "1"]) == 0
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    medians = {row["prior"]: row["p50"] for row in rows if row["gradient"] == "raw"}
    assert set(medians) == {str(tiny_sdxl), str(other)} and len(set(medians.values())) == 2
    assert (tmp_path / "out" / "priors.png").is_file()


def test_a_fitted_map_is_what_route_linear_takes(lab, tiny_sdxl, tmp_path):
    file = lab(*FIT) / "linear-map.safetensors"
    assert load_linear_map(file).weight.shape == (4, 3)
    call = ["image", "--prompt", "a vase", "--routes", "linear", "--linear-map", str(file), "--steps", "1", "--prior", str(tiny_sdxl)]
    assert gradient_lab.main([*call, "--output", str(tmp_path), "--workers", "1"]) == 0


def test_a_folder_of_pictures_can_be_fitted(tiny_sdxl, tmp_path):
    torch.manual_seed(0)
    for index in range(8):
        Image.fromarray((torch.rand(40, 50, 3) * 255).byte().numpy()).save(tmp_path / f"{index}.png")
    call = ["fit-linear", "--images", str(tmp_path), "--prior", str(tiny_sdxl), "--output", str(tmp_path / "out")]
    assert gradient_lab.main(call) == 0
    assert json.loads((tmp_path / "out" / "table.json").read_text())["settings"]["count"] == 8


def test_finished_runs_are_not_done_again(lab, tiny_sdxl, capsys):
    folder = lab(*IMAGE)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("record.json")}
    assert gradient_lab.main([*IMAGE, "--prior", str(tiny_sdxl), "--workers", "1", "--output", str(folder)]) == 0
    assert len(before) == len(ROUTES) and before == {path: path.stat().st_mtime_ns for path in folder.rglob("record.json")}
    told = capsys.readouterr().out.splitlines()
    assert told[-2].startswith("Page: ") and told[-1].startswith("Table: ")


def test_a_picture_to_start_from(tiny_sdxl, tmp_path):
    Image.new("RGB", (70, 50), (255, 0, 0)).save(tmp_path / "red.png")
    call = ["image", "--prompt", "a vase", "--routes", "vae", "--start", str(tmp_path / "red.png"), "--steps", "1", "--lr", "1e-6"]
    assert gradient_lab.main([*call, "--prior", str(tiny_sdxl), "--output", str(tmp_path / "out")]) == 0
    result = Image.open(tmp_path / "out" / "runs" / "vae" / "result.png")
    assert result.size == (32, 32) and result.getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["image", "--prompt", "a vase", "--routes", "pgcn"], "--routes: found 'pgcn'"),
        (["image", "--prompt", "a vase", "--start", "no/such.png"], "--start: no/such.png cannot be read as a picture"),
        (["image", "--prompt", "a vase", "--linear-map", "no/such.safetensors"], "--linear-map: no/such.safetensors"),
        (["image", "--prompt", "a vase", "--linear-map", "paper"], "--linear-map: found a map to 4 latent channels, wanted 8"),
        (["image", "--prompt", "a vase", "--prior", "no/such/folder"], "--prior: no folder 'no/such/folder'"),
        (["image", "--prompt", "a vase", "--vae", "no/such/vae"], "--vae: no folder 'no/such/vae'"),
        (["image", "--prompt", "a vase", "--t-range", "0.5", "0.1"], "--t-range: found 0.5 0.1"),
        (["image", "--prompt", "a vase", "--objective", "cds"], "--objective: found 'cds', wanted one of sds, csd, .*did you mean"),
        (["objectives", "--prompt", "a vase", "--objectives", "sds", "dreamfusion"], "--objectives: found 'dreamfusion', wanted all"),
        (["objectives", "--prompt", "a vase", "--routes", "pgcn"], "--routes: found 'pgcn'"),
        (["image", "--prompt", "a vase", "--objective", "nfsd", "--negative-prompt", ""], "--negative-prompt: found nothing, .*nfsd"),
        (["thresholds", "--prompt", "a vase", "--objective", "csd", "--guidance-scale", "7"], "--guidance-scale: found 7, wanted none"),
        (["tails", "--objective", "nfsd", "--cfg", "authors"], "--cfg: found authors, wanted none"),
        (["texture", "--mesh", "builtin:bunny"], "--prompt: wanted it, or --pairs ten"),
        (["texture", "--prompt", "a vase", "--mesh", "no/such.obj"], "--mesh: .*no/such.obj"),
        (["texture", "--prompt", "a vase", "--preset", "refernce"], "--preset: .*did you mean 'reference'"),
        (["texture", "--prompt", "a vase", "--controlnet", "no/such/net"], "--controlnet: no folder 'no/such/net'"),
        (["thresholds", "--pairs", "ten", "--mesh", "builtin:vase"], "--mesh: found builtin:vase with --pairs"),
        (["tails", "--timesteps", "20", "1000"], "--timesteps: found 1000"),
        (["fit-linear", "--images", "no/such/folder"], "--images: no folder"),
        (["fit-linear", "--count", "4"], "--images: found 4 pictures, wanted at least 9"),
        (["fit-linear", "--count", "8"], "--images: found 8 pictures, wanted at least 9"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_loaded(arguments, told, capsys, tmp_path, monkeypatch):
    from threestudio_pgc.diffusion.vae_prior import VAEPrior

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded first")

    monkeypatch.setattr(VAEPrior, "from_pretrained", refuse)
    assert gradient_lab.main([*arguments, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(told, error) and len(error.splitlines()) == 1, error


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["image", "--prompt", "a vase", "--threshold", "0"], "--threshold: found 0, wanted a number greater than 0"),
        (["image", "--prompt", "a vase", "--threshold", "-1"], "--threshold"),
        (["image", "--prompt", "a vase", "--quantile", "1"], "--quantile: found 1, wanted a number between 0 and 1"),
        (["thresholds", "--prompt", "a vase", "--thresholds", "0.1", "nan"], "--thresholds: found nan"),
        (["tails", "--views", "0"], "--views: found 0, wanted at least 1"),
        (["texture", "--prompt", "a vase", "--inject", "everywhere"], "--inject"),
        ([], "SUBCOMMAND"),
    ],
)
def test_the_parser_names_the_argument(arguments, told, capsys):
    with pytest.raises(SystemExit) as refused:
        gradient_lab.main(arguments)
    assert refused.value.code == 2 and told in capsys.readouterr().err


def test_a_prior_without_a_vae_is_refused_by_name(tiny_sdxl, tmp_path, capsys):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_sdxl, broken, ignore=shutil.ignore_patterns("vae"))
    assert gradient_lab.main(["image", "--prompt", "a vase", "--prior", str(broken), "--output", str(tmp_path / "out")]) == 2
    assert re.search("--prior: no folder 'vae' in .*broken", capsys.readouterr().err)


def test_a_prior_without_text_encoders_is_refused_by_name(tiny_sdxl, tmp_path, capsys):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_sdxl, broken, ignore=shutil.ignore_patterns("text_encoder_2"))
    assert gradient_lab.main(["image", "--prompt", "a vase", "--prior", str(broken), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search("--prior: no folder 'text_encoder_2' in .*broken", error) and len(error.splitlines()) == 1


def test_names_of_files_stay_apart():
    from launch_scripts.lab.report import slug

    assert slug("A zebra/bunny, 2!") == "a-zebra-bunny-2"
    long = [slug("models/" + "x" * 80 + end) for end in ("a", "b")]
    assert long[0] != long[1] and max(map(len, long)) <= 60


def test_a_full_disk_loses_nothing_already_made(lab, tiny_sdxl, monkeypatch, capsys):
    from threestudio_pgc.export import files

    folder = lab(*IMAGE)
    page = (folder / "index.html").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    assert gradient_lab.main([*IMAGE, "--prior", str(tiny_sdxl), "--workers", "1", "--output", str(folder)]) == 1
    assert "No space left on device" in capsys.readouterr().err and (folder / "index.html").read_bytes() == page
