"""The comparison run: what it refuses, and small studies with tiny models through real launchers."""

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import trimesh
from omegaconf import OmegaConf

from launch_scripts import compare
from launch_scripts.compare import FIGURES, choose_devices, make_gallery, make_jobs, read_list, read_methods, slugs, split, table
from launch_scripts.studies import StudyError, shipped

SCRIPT = Path(compare.__file__)
ROWS = "prompt,mesh\na zebra vase,builtin:vase\na lava knot,builtin:knot\n"


@pytest.fixture
def listed(tmp_path):
    """listed(text) -> path of a list that holds it."""

    def write(text, encoding="utf-8"):
        path = tmp_path / "list.csv"
        path.write_bytes(text.encode(encoding))
        return path

    return write


# --------------------------------------------------------------------------------------------------------------------- the list


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "found nothing, wanted a line of columns"),
        ("\n,\n", "found nothing"),
        ("prompt,mesh\n", "found no row below the columns"),
        ("text,mesh\na,b\n", "line 1: found columns text, mesh, wanted prompt among them"),
        ("prompt\tmesh\na\tb\n", "wanted prompt among them"),
        ("prompt,prompt\na,b\n", "line 1: found column 'prompt' 2 times"),
        ("prompt,mash\na,b\n", "line 1: no column 'mash'; did you mean 'mesh'?; others are full keys"),
        ("prompt,data.height,data.height\na,1,2\n", "'data.height' 2 times"),
        ("prompt,system.prompt_processor.prompt\na,b\n", "line 1: found system.prompt_processor.prompt, which is set by this script"),
        ("prompt,mesh\na vase,builtin:vase\n,builtin:vase\n", "line 3: found no prompt"),
        ("prompt,mesh\na vase,\n", "line 2: found no mesh"),
        ("prompt,mesh\na red, blue vase,builtin:vase\n", "line 2: found 3 cells, wanted 2; a prompt with a comma needs quotes"),
        ("prompt,mesh\na,builtin:vase\n\nb,builtin:vase\na,builtin:vase\n", "line 5: prompt and mesh are those of line 2"),
        ("prompt,mesh\na,x.obj\na,./x.obj\n", "line 3: prompt and mesh are those of line 2"),
        ('prompt,mesh\na,b\n"a,b\n', "line 3: unexpected end of data"),
    ],
)
def test_a_bad_list_is_refused_with_its_line(listed, text, wanted):
    with pytest.raises(StudyError) as error:
        read_list(listed(text))
    assert wanted in str(error.value) and str(error.value).startswith(str(listed(text)))


def test_a_list_that_cannot_be_read_is_refused(listed, tmp_path):
    with pytest.raises(StudyError, match=r"none.csv: cannot be read \(No such file"):
        read_list(tmp_path / "none.csv")
    with pytest.raises(StudyError, match="bytes that are not UTF-8"):
        read_list(listed("prompt\nein Kännchen\n", "latin-1"))


def test_spreadsheets_semicolons_marks_and_empty_lines_are_taken(listed):
    (row,) = read_list(listed("\ufeffprompt;mesh;data.eval_elevation_deg\r\n a vase, red ;builtin:vase;30\r\n;;\r\n"))
    assert (row.prompt, row.mesh, row.path, row.overrides) == (
        "a vase, red",
        "builtin:vase",
        "builtin:vase",
        ("data.eval_elevation_deg=30",),
    )


def test_meshes_are_relative_to_the_list_and_empty_cells_set_nothing(listed, tmp_path):
    (row,) = read_list(listed("prompt,mesh,system.geometry.up\na,meshes/x.obj,\n"))
    assert (row.mesh, row.path, row.overrides) == ("meshes/x.obj", str(tmp_path / "meshes" / "x.obj"), ())


def test_a_list_of_prompts_alone_sets_no_mesh(listed, tmp_path):
    rows = read_list(listed("prompt\na vase\n"))
    (job,) = make_jobs(rows, read_methods("pocket", "3"), tmp_path, [])
    assert job.folder == tmp_path / "a_vase" / "pocket"
    assert job.settings["system.geometry.mesh"] == "builtin:bunny"  # the configuration's


# ------------------------------------------------------------------------------------------------------------------ the methods


def test_nothing_splits_into_one_empty_part():
    assert split("", ",") == [""]


def test_commas_in_brackets_and_quotes_split_nothing():
    assert split("a=x;k=[1,2], b=y;t='a,]b' ,c", ",") == ["a=x;k=[1,2]", "b=y;t='a,]b'", "c"]


@pytest.mark.parametrize("figure", FIGURES)
def test_the_papers_methods_are_configurations_that_can_be_run(listed, tmp_path, figure):
    methods = read_methods(",".join(FIGURES[figure]), figure)
    jobs = make_jobs(read_list(listed(ROWS)), methods, tmp_path, [])
    assert len(jobs) == 2 * len(methods) and len({job.folder for job in jobs}) == len(jobs)
    for job in jobs[: len(methods)]:
        settings = job.settings
        mesh = settings["system.geometry.mesh"] if figure == "3" else settings["system.geometry.shape_init"].removeprefix("mesh:")
        assert (mesh, settings["system.prompt_processor.prompt"]) == ("builtin:vase", "a zebra vase")
        assert settings["system.export_after_training"] is True
        assert settings["system.guidance.pgc.enabled"] is ("pgc" in job.about["method"] or job.about["method"].startswith("pocket+"))
        assert ("sdxl" in settings["system.guidance_type"]) is ("sdxl" in job.about["method"] or "pocket" in job.about["method"])
        assert (settings.get("system.loss.lambda_normal_sds") == 0) is job.about["method"].endswith("-nrm")


def test_a_method_of_ones_own_is_a_configuration_with_overrides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\n")
    named, filed = read_methods(f"soft=fantasia3d-pocket-pgc; system.guidance.pgc.threshold=0.3;data.focal_range=[1,2], mine={path}", "3")
    assert (named.name, named.config) == ("soft", shipped("fantasia3d-pocket-pgc"))
    assert named.overrides == ("system.guidance.pgc.threshold=0.3", "data.focal_range=[1,2]")
    assert (filed.name, filed.config, filed.overrides) == ("mine", path, ())


@pytest.mark.parametrize(
    ("methods", "wanted"),
    [
        ("", "no method ''; known: "),
        ("+sdlx", "no method '+sdlx'; did you mean '+sdxl'? known: fantasia3d, +pgc, "),
        ("pocket,+pgc,pocket", "found pocket twice"),
        ("a=fantasia3d-poket-pgc", "wanted LABEL=CONFIG, a YAML file or one of configs/; did you mean 'fantasia3d-pocket-pgc'?"),
        ("=fantasia3d-pocket-pgc", "wanted LABEL=CONFIG"),
        ("a=fantasia3d-pocket-pgc;seed", "--methods: a: found 'seed', wanted key=value"),
        ("a=fantasia3d-pocket-pgc;tag=x", "--methods: a: found tag, which is set by this script"),
        ("a=fantasia3d-pocket-pgc;data.focal_range=[1,2", "wanted every bracket and quote closed"),
    ],
)
def test_a_bad_method_is_refused(methods, wanted):
    with pytest.raises(StudyError) as error:
        read_methods(methods, "3")
    assert wanted in str(error.value)


def test_a_row_wins_over_its_method_and_the_command_line_over_both(listed, tmp_path):
    rows = read_list(listed("prompt,mesh,data.eval_elevation_deg\na,builtin:vase,30\n"))
    methods = read_methods("a=fantasia3d-pocket-pgc;data.eval_elevation_deg=20;seed=1", "3")
    (job,) = make_jobs(rows, methods, tmp_path, ["seed=2"])
    assert (job.settings["data.eval_elevation_deg"], job.settings["seed"]) == (30, 2)


def test_no_folders_for_no_names():
    assert slugs([]) == []


def test_folders_are_readable_and_never_shared():
    assert slugs(["+sdxl+pgc", "a zebra, big"]) == ["sdxl_pgc", "a_zebra_big"]
    names = ["a vase!", "a Vase", "+pgc", "pgc", "?", "gallery", "x" * 300, "x" * 301, "b"]
    folders = slugs(names, ["gallery"])
    assert len({folder.casefold() for folder in [*folders, "gallery"]}) == len(names) + 1
    assert folders[-1] == "b" and folders == slugs(names, ["gallery"]) and max(map(len, folders)) < 100 and all(folders)


# --------------------------------------------------------------------------------------------------------- refused before any run


@pytest.mark.parametrize(
    ("rows", "arguments", "wanted"),
    [
        (
            ROWS,
            ["--methods", "pocket,odd=fantasia3d-pocket-pgc;system.guidance.pgc.treshold=1"],
            "odd: system.guidance.pgc.treshold: no such",
        ),
        (ROWS, ["--methods", "pocket", "trainer.max_stepz=1"], "trainer.max_stepz: no such key; did you mean 'max_steps'"),
        (ROWS, ["--methods", "pocket", "--fast"], "command line: found '--fast', wanted key=value"),
        (ROWS, ["--methods", "pocket", "exp_root_dir=x"], "command line: found exp_root_dir, which is set by this script"),
        ("prompt,mesh,system.geometry.upp\na,builtin:vase,y\n", ["--methods", "pocket"], "system.geometry.upp: no such key"),
        (ROWS + "a vase,none.obj\n", ["--methods", "pocket"], "list.csv line 4: mesh: "),
        (ROWS + "a vase,list.csv\n", ["--methods", "pocket"], "list.csv line 4: mesh: "),
        (ROWS + "a vase,builtin:vaze\n", ["--methods", "pocket"], "no such bundled mesh"),
        (ROWS, ["--methods", "pocket", "system.geometry.max_faces=10"], "list.csv line 2: mesh: builtin:vase: "),
        (ROWS, ["--methods", "pocket", "system.geometry_type=pgc-nothing"], "pocket: system.geometry_type: 'pgc-nothing'"),
        (ROWS, ["--methods", "pocket", "--only", "horse"], "found 'horse', wanted part of one of: a zebra vase, a lava knot"),
        (ROWS, ["--methods", "pocket", "--workers", "0"], "--workers: found 0"),
        (ROWS, ["--methods", "pocket", "--retries", "-1"], "--retries: found -1"),
    ],
)
def test_what_can_be_refused_is_refused_before_any_run(listed, tmp_path, capsys, rows, arguments, wanted):
    assert compare.main([str(listed(rows)), "--output", str(tmp_path / "out"), *arguments]) == 2
    told = capsys.readouterr()
    assert wanted in told.err and told.err.startswith("error: ") and told.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_devices_are_numbers_of_gpus_that_are_there(monkeypatch):
    for found in ("0,x", "1,1", "", "99"):
        with pytest.raises(StudyError, match="--devices: found"):
            choose_devices(found, None)
    assert choose_devices(None, 3) == ["none"] * 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_devices(None, None) == ["0"] and choose_devices("1,0", None) == ["1", "0"]
    with pytest.raises(StudyError, match="found 1,2, wanted numbers below 2"):
        choose_devices("1,2", None)


def test_the_table_has_a_line_a_row_and_says_what_was_not_run(listed):
    rows, methods = read_list(listed(ROWS)), read_methods("pocket,pocket+pgc", "3")
    records = [{"seconds": 12.34}, {"seconds": 1.0, "error": "x"}, {}, {"seconds": 3.0}]
    assert table(rows, methods, records) == [
        ["prompt", "mesh", "pocket", "pocket+pgc"],
        ["a zebra vase", "builtin:vase", "12.3", "failed"],
        ["a lava knot", "builtin:knot", "", "3.0"],
    ]


def test_a_gallery_that_cannot_be_made_is_only_warned_of(tmp_path, capfd):
    make_gallery([tmp_path], tmp_path / "gallery", study=False)
    assert f"warning: {tmp_path / 'gallery'} was not made, the runs are not affected; to try again:" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def tiny_config(tiny_sdxl, tiny_controlnet, tmp_path_factory):
    """The pocket configuration with tiny models and pictures, as a file."""
    folder = tmp_path_factory.mktemp("config")
    config = OmegaConf.load(shipped("fantasia3d-pocket-pgc"))
    config.data.update({"height": 32, "width": 32, "eval_height": 32, "eval_width": 32, "batch_size": 1, "n_test_views": 2})
    config.system.guidance.pretrained_model_name_or_path = str(tiny_sdxl)
    config.system.guidance.controlnet_name_or_path = str(tiny_controlnet)
    config.system.prompt_processor.cache_dir = str(folder / "prompts")
    config.system.exporter.texture_size = 64
    config.trainer.update({"max_steps": 3, "val_check_interval": None, "log_every_n_steps": 1})
    config.checkpoint.every_n_train_steps = 2
    OmegaConf.save(config, folder / "tiny.yaml")
    return folder / "tiny.yaml"


@pytest.fixture
def shapes(tmp_path):
    """ball.ply and box.obj, of few faces, beside the list."""
    (tmp_path / "meshes").mkdir()
    trimesh.creation.icosphere(subdivisions=2).export(tmp_path / "meshes" / "ball.ply")
    trimesh.creation.box().export(tmp_path / "meshes" / "box.obj")


def read_table(output):
    with open(output / "table.csv", newline="") as file:
        return list(csv.reader(file))


def ends(output):
    """Of every run, when its record was last written."""
    return {path.parent.relative_to(output): path.stat().st_mtime_ns for path in sorted(output.glob("*/*/record.json"))}


def test_a_study_of_two_prompts_and_two_methods_ends_and_goes_on(tiny_config, shapes, listed, tmp_path, capfd):
    """One run fails, at first; called again, only that one is run."""
    output = tmp_path / "out"
    rows = "prompt,mesh\na zebra ball,meshes/ball.ply\na lava box,meshes/box.obj\n"
    arguments = [str(listed(rows)), "--methods", f"off={tiny_config};system.guidance.pgc.enabled=false,on={tiny_config}", "--no-gallery"]
    arguments += ["--workers", "2", "--output", str(output)]
    blocked = output / "box_a_lava_box" / "on"
    blocked.mkdir(parents=True)
    (blocked / "save").write_text("in the way of the folder of pictures")

    assert compare.main(arguments) == 1
    told = capfd.readouterr()
    assert "[4/4] " in told.out and "a lava box (meshes/box.obj): on: failed: " in told.out
    assert "failed: a lava box (meshes/box.obj): on: " in told.err and f"log: {blocked / 'log.txt'}" in told.err
    assert (blocked / "log.txt").read_text().count("$ ") == 2  # tried again once
    lines = read_table(output)
    assert lines[0] == ["prompt", "mesh", "off", "on"] and lines[2][:2] == ["a lava box", "meshes/box.obj"] and lines[2][3] == "failed"
    assert all(float(cell) > 0 for cell in (*lines[1][2:], lines[2][2]))
    for name in ("ball_a_zebra_ball/off", "ball_a_zebra_ball/on", "box_a_lava_box/off"):
        assert (output / name / "save" / "it3-export" / "model.glb").stat().st_size > 0
        assert (output / name / "save" / "it3-test.mp4").stat().st_size > 0
    before = ends(output)

    (blocked / "save").unlink()
    assert compare.main(arguments) == 0
    told = capfd.readouterr()
    assert "3 of 4 runs are there already" in told.out and "[4/4] a lava box (meshes/box.obj): on: " in told.out
    assert "failed" not in [cell for line in read_table(output) for cell in line]
    after = ends(output)
    assert {name for name in after if after[name] != before.get(name)} == {Path("box_a_lava_box/on")}
    record = OmegaConf.to_container(OmegaConf.load(blocked / "record.json"))
    assert record.pop("seconds") > 0
    assert record == {
        "label": "a lava box (meshes/box.obj): on",
        "method": "on",
        "prompt": "a lava box",
        "mesh": "meshes/box.obj",
        "order": 3,
    }

    assert compare.main([*arguments, "--only", "lava", "seed=1"]) == 2
    assert "seed: found 0, wanted 1); --rerun" in capfd.readouterr().err
    assert ends(output) == after


def test_ctrl_c_saves_checkpoints_and_the_same_command_goes_on_from_them(tiny_config, shapes, listed, tmp_path):
    output = tmp_path / "out"
    arguments = [str(listed("prompt,mesh\na zebra ball,meshes/ball.ply\n")), "--methods", f"on={tiny_config}", "--no-gallery"]
    arguments += ["--workers", "1", "--output", str(output), "trainer.max_steps=160", "checkpoint.every_n_train_steps=20"]
    run = output / "ball_a_zebra_ball" / "on"
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # these tests may run where Ctrl-C is ignored
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments], **pipes, **heard)
    deadline = time.monotonic() + 120
    while not (run / "ckpts" / "last.ckpt").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=120)[0]
    assert process.returncode == 130, told
    assert "to go on, call the same command again" in told and "Traceback" not in told
    done = torch.load(run / "ckpts" / "last.ckpt", weights_only=True)["global_step"]
    assert 20 <= done < 160 and not list(run.glob("save/*export"))
    stopped = OmegaConf.load(run / "record.json")
    assert stopped.error == "interrupted"

    assert compare.main(arguments) == 0
    with open(run / "csv_logs" / "version_1" / "metrics.csv", newline="") as file:
        steps = {int(line["step"]) for line in csv.DictReader(file)}
    assert (min(steps), max(steps)) == (done, 159)
    assert OmegaConf.load(run / "record.json").seconds > stopped.seconds
    assert (run / "save" / "it160-export" / "model.glb").is_file()
