"""Reading runs, and writing the gallery and the study; what a browser makes of them is in test_gallery_browser."""

import base64
import functools
import json
import re
import struct
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from launch_scripts import gallery
from launch_scripts.gallery_page import model_viewer as model_viewer_module
from launch_scripts.gallery_page.build import MANIFEST, STATIC, key_file, write_gallery, write_study
from launch_scripts.gallery_page.model_viewer import SCRIPT, VERSION, ModelViewer, model_viewer
from launch_scripts.gallery_page.runs import MAX_POINTS, read_glb_header, read_runs
from tests.launch_scripts.gallery_runs import METHODS, PROMPTS, add_results, make_comparison, make_glb, make_run

VIEWER = ModelViewer(b"/* the viewer */", b"Apache License")


def data_of(folder):
    text = (folder / "data.js").read_text()
    return json.loads(re.fullmatch(r"const [A-Z]+ = (.*);\n", text)[1])


def glb_with(nodes):
    text = json.dumps({"asset": {"version": "2.0"}, "nodes": nodes}).encode()
    text += b" " * (-len(text) % 4)
    return struct.pack("<4sII I4s", b"glTF", 2, 20 + len(text), len(text), b"JSON") + text


# ---- reading


def test_a_folder_that_is_no_run_and_holds_none_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"empty: found no configs/parsed.yaml.*wanted a run"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(ValueError, match="missing: found nothing, wanted the folder of a run"):
        read_runs([tmp_path / "missing"])
    with pytest.raises(ValueError, match="file: found a file"):
        read_runs([tmp_path / "file"])


def test_a_bare_run_is_read(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "a", glb=b"")])
    assert (run.prompt, run.mesh, run.method) == (PROMPTS[0], "builtin:bunny", "fantasia3d-pocket-pgc")
    assert run.glb is run.video is run.sheet is run.still is run.seconds is run.steps is None and run.statistics == {}
    assert "no export" in run.problem and "no checkpoint" in run.problem


def test_a_run_with_a_checkpoint_says_how_to_export(tmp_path):
    folder = make_run(tmp_path / "a b", glb=b"")
    (folder / "ckpts").mkdir()
    (folder / "ckpts" / "last.ckpt").touch()
    (run,) = read_runs([folder])
    config, checkpoint = folder / "configs/parsed.yaml", folder / "ckpts/last.ckpt"
    assert run.problem == f"no export; run: python launch_scripts/launch.py --config '{config}' --export 'resume={checkpoint}'"


def test_runs_are_found_at_any_depth_once_and_in_the_order_of_the_folders(tmp_path):
    for name in ("study/run10", "study/run9", "deep/er/run1"):
        make_run(tmp_path / name, prompt=name)
    found = read_runs([tmp_path / "study", tmp_path / "deep", tmp_path / "study" / "run9"])
    assert [run.prompt for run in found] == ["study/run9", "study/run10", "deep/er/run1"]


def test_the_newest_results_count(tmp_path):
    folder = make_run(tmp_path / "a", step=9)
    later = folder / "save" / "it100-export"
    later.mkdir()
    (later / "model.glb").write_bytes(make_glb())
    add_results(folder, step=9)
    (folder / "save" / "it100-test.gif").write_bytes(b"film")
    (run,) = read_runs([folder])
    assert run.glb == later / "model.glb" and run.steps == 100
    assert run.sheet.name == "it9-test-sheet.png" and run.still.parent.name == "it9-test" and run.video.name == "it9-test.mp4"


def test_the_record_goes_before_the_settings(tmp_path):
    record = {"label": "x", "seconds": 3.5, "method": "+pgc", "prompt": "a fox", "mesh": "fox.obj"}
    (run,) = read_runs([make_run(tmp_path / "a", record=record)])
    assert (run.seconds, run.method, run.prompt, run.mesh) == (3.5, "+pgc", "a fox", "fox.obj")


@pytest.mark.parametrize("record", [[], {"seconds": "3"}, {"method": 5}])
def test_a_record_that_makes_no_sense_is_named(tmp_path, record):
    with pytest.raises(ValueError, match=r"record\.json: .*found .*wanted"):
        read_runs([make_run(tmp_path / "a", record=record)])


@pytest.mark.parametrize("text", ["a: [", "- 1", "name: x"])
def test_settings_that_make_no_sense_are_named(tmp_path, text):
    folder = make_run(tmp_path / "a")
    (folder / "configs" / "parsed.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"parsed\.yaml: "):
        read_runs([folder])


def test_a_run_of_a_picture_is_called_by_the_picture(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "a", prompt="", data__image_path="load/images/dog.png")])
    assert run.prompt == "dog.png"


def test_runs_of_one_method_in_a_row_are_told_apart_by_their_settings_the_same_in_every_row(tmp_path):
    for prompt in ("x", "y"):
        make_run(tmp_path / f"{prompt}1", prompt=prompt)
        make_run(tmp_path / f"{prompt}2", prompt=prompt, system__pgc__enabled=False)
    make_run(tmp_path / "z", prompt="z")
    on, off = (f"fantasia3d-pocket-pgc (pgc.enabled={state})" for state in ("true", "false"))
    assert [run.method for run in read_runs([tmp_path])] == [on, off, on, off, on]


def test_runs_that_differ_in_nothing_are_numbered(tmp_path):
    for name in "abc":
        make_run(tmp_path / name)
    name = "fantasia3d-pocket-pgc"
    assert [run.method for run in read_runs([tmp_path])] == [name, f"{name} #2", f"{name} #3"]


def test_statistics_skip_what_is_missing_torn_or_not_finite(tmp_path):
    folder = make_run(tmp_path / "a")
    assert read_runs([folder])[0].statistics == {}
    add_results(folder)
    found = read_runs([folder])[0].statistics
    assert found == {"share_clipped": [(9, 0.25), (19, 0.5)], "norm_p50": [(9, 0.1), (19, 0.2), (29, 0.3)], "norm_max": [(9, 5), (29, 7)]}


def test_a_resumed_run_has_one_line_of_statistics_and_a_long_one_is_thinned(tmp_path):
    folder = make_run(tmp_path / "a")
    for version, steps, value in ((0, 1000, 1), (10, 5000, 3), (9, 3000, 2)):
        log = folder / "csv_logs" / f"version_{version}" / "metrics.csv"
        log.parent.mkdir(parents=True)
        first = {0: 0, 9: 500, 10: 2000}[version]
        log.write_text("step,train/norm_p50\n" + "".join(f"{step},{value}\n" for step in range(first, steps)))
    points = read_runs([folder])[0].statistics["norm_p50"]
    assert len(points) <= MAX_POINTS and points[-1] == (4999, 3)
    assert all(value == (1 if step < 500 else 2 if step < 2000 else 3) for step, value in points)


def test_a_broken_glb_is_an_empty_cell_that_says_why(tmp_path):
    whole = make_glb()
    for name, data, said in (
        ("a", b"glTF", "4 bytes"),
        ("b", b"OBJ!" + whole[4:], "magic b'OBJ!'"),
        ("c", whole[:-9], f"{len(whole) - 9} bytes"),
    ):
        (run,) = read_runs([make_run(tmp_path / name, glb=data)])
        assert run.glb is None and run.problem.startswith("broken export: ") and said in run.problem and "model.glb" in run.problem


def test_the_header_of_a_glb_is_its_json(tmp_path):
    (tmp_path / "a.glb").write_bytes(make_glb())
    assert read_glb_header(tmp_path / "a.glb")["asset"]["version"] == "2.0"


def test_the_front_is_where_training_stood_at_azimuth_0(tmp_path):
    upright = make_run(tmp_path / "y-up", glb=glb_with([{"mesh": 0}]))
    turned = make_run(tmp_path / "z-up", glb=glb_with([{"mesh": 0, "rotation": [-(0.5**0.5), 0, 0, 0.5**0.5]}]))
    assert [read_runs([folder])[0].front_degrees for folder in (upright, turned)] == [0, 90]


# ---- the gallery's folder


def test_rows_and_columns_stand_in_the_order_in_which_they_are_met(tmp_path):
    runs = read_runs([make_comparison(tmp_path / "runs")])
    page = write_gallery(runs, tmp_path / "out", "T", VIEWER)
    data = data_of(page.parent)
    assert data["title"] == "T" and data["methods"] == list(METHODS)
    assert [row["prompt"] for row in data["rows"]] == list(PROMPTS)
    assert data["rows"][0]["settings"] == [["system.pgc.enabled", ["false", "true", "false", "true"]]]
    cell = data["rows"][1]["cells"][2]
    assert (cell["seconds"], cell["steps"], cell["asset"]) == (12.5, 10, "002-03")
    assert cell["statistics"]["share_clipped"] == [[9, 0.25], [19, 0.5]] and "prompt: a brick vase" in cell["yaml"]
    for name in (cell["still"], cell["video"], cell["sheet"]):
        assert (tmp_path / "out" / name).stat().st_size


def test_a_model_comes_as_a_script_that_holds_its_bytes(tmp_path):
    runs = read_runs([make_run(tmp_path / "a")])
    write_gallery(runs, tmp_path / "out", "T", VIEWER)
    name, encoded = re.fullmatch(rb'receiveAsset\("(.*)","(.*)"\)\n', (tmp_path / "out/assets/001-01.js").read_bytes()).groups()
    assert name == b"001-01" and base64.b64decode(encoded, validate=True) == runs[0].glb.read_bytes()


def test_a_row_without_a_method_and_a_run_without_an_export_are_empty_cells(tmp_path, capsys):
    make_run(tmp_path / "a", prompt="x", record={"method": "one"})
    make_run(tmp_path / "b", prompt="y", record={"method": "two"}, glb=b"")
    runs = read_runs([tmp_path])
    data = data_of(write_gallery(runs, tmp_path / "out", "T", VIEWER).parent)
    assert data["rows"][0]["cells"][1] is None and data["rows"][1]["cells"][0] is None
    assert data["rows"][1]["cells"][1]["asset"] is None and "no export" in data["rows"][1]["cells"][1]["problem"]


def test_the_viewers_licence_goes_along(tmp_path):
    write_gallery(read_runs([make_run(tmp_path / "a")]), tmp_path / "out", "T", VIEWER)
    assert (tmp_path / "out" / SCRIPT).read_bytes() == VIEWER.script
    assert (tmp_path / "out" / "model-viewer-LICENSE.txt").read_bytes() == VIEWER.licence


def test_a_gallery_is_replaced_and_nothing_of_the_old_one_stays(tmp_path):
    make_run(tmp_path / "runs" / "a", prompt="x")
    make_run(tmp_path / "runs" / "b", prompt="y")
    write_gallery(read_runs([tmp_path / "runs"]), tmp_path / "out", "T", VIEWER)
    write_gallery(read_runs([tmp_path / "runs" / "a"]), tmp_path / "out", "T", VIEWER)
    assert [file.name for file in (tmp_path / "out" / "assets").iterdir()] == ["001-01.js"]
    assert not list(tmp_path.glob(".*partial"))


def test_a_folder_of_other_files_is_not_overwritten(tmp_path):
    runs = read_runs([make_run(tmp_path / "a")])
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"--output: found thesis.tex in .*out"):
        write_gallery(runs, out, "T", VIEWER)
    (out / "thesis.tex").rename(tmp_path / "thesis.tex")
    write_gallery(runs, out, "T", VIEWER)  # an empty folder is as good as none
    (tmp_path / "thesis.tex").rename(out / "assets" / "thesis.tex")
    with pytest.raises(ValueError, match=r"found assets/thesis.tex"):
        write_gallery(runs, out, "T", VIEWER)
    assert (out / "assets" / "thesis.tex").read_text() == "years of work" and (out / "index.html").is_file()
    with pytest.raises(ValueError, match="found a file at"):
        write_gallery(runs, out / "index.html", "T", VIEWER)


def test_a_run_cannot_be_overwritten_by_its_gallery(tmp_path):
    run = make_run(tmp_path / "a")
    with pytest.raises(ValueError, match="which no gallery put there"):
        write_gallery(read_runs([run]), run, "T", VIEWER)


def test_our_pages_name_no_other_host():
    for file in STATIC.iterdir():
        assert not re.search(r"https?:|//\w+\.\w+/|@import|url\(", file.read_text(encoding="utf-8")), file.name


# ---- the study's folder


def test_a_study_names_no_method_anywhere(tmp_path):
    runs = read_runs([make_comparison(tmp_path / "runs", methods=("maple", "maple+birch", "cedar", "cedar+birch"))])
    page = write_study(runs, tmp_path / "out", "Which?", 0, VIEWER)
    for file in page.parent.rglob("*"):
        text = file.name.encode() + (file.read_bytes() if file.is_file() else b"")
        text += b"".join(base64.b64decode(part) for part in re.findall(rb'","([A-Za-z0-9+/=]*)"\)', text))
        assert not re.search(rb"maple|birch|cedar", text, re.I), file
    assert key_file(tmp_path / "out") == tmp_path / "out-key.json" and "cedar+birch" in key_file(tmp_path / "out").read_text()


def test_a_studys_options_stand_in_no_order_of_methods(tmp_path):
    runs = read_runs([make_comparison(tmp_path / "runs")])
    page = write_study(runs, tmp_path / "out", "Which?", 0, VIEWER)
    key = json.loads(key_file(tmp_path / "out").read_text())
    orders = []
    for r, row in enumerate(data_of(page.parent)["rows"]):
        names = [option["asset"] for option in row["options"]]
        assert names == sorted(names) and {key["assets"][name][0] for name in names} == {r}
        orders.append([key["assets"][name][1] for name in names])
    assert len({tuple(order) for order in orders}) > 1
    assert key["prompts"] == list(PROMPTS) and key["methods"] == list(METHODS)


def test_a_study_is_the_same_when_made_again_and_another_when_a_model_is(tmp_path):
    comparison = make_comparison(tmp_path / "runs")
    first = data_of(write_study(read_runs([comparison]), tmp_path / "one", "T", 0, VIEWER).parent)
    assert data_of(write_study(read_runs([comparison]), tmp_path / "two", "T", 0, VIEWER).parent) == first
    assert data_of(write_study(read_runs([comparison]), tmp_path / "one", "T", 5, VIEWER).parent)["study"] == first["study"]
    (comparison / "1-1" / "save" / "it10-export" / "model.glb").write_bytes(make_glb((1, 2, 3)))
    assert data_of(write_study(read_runs([comparison]), tmp_path / "three", "T", 0, VIEWER).parent)["study"] != first["study"]
    with pytest.raises(ValueError, match=rf"one-key\.json: found the key of study {first['study']}"):
        write_study(read_runs([comparison]), tmp_path / "one", "T", 0, VIEWER)
    assert data_of(tmp_path / "one")["study"] == first["study"]


def test_a_study_wants_two_methods_and_each_for_every_prompt(tmp_path):
    with pytest.raises(ValueError, match="--study: found one method, 'm'"):
        write_study(read_runs([make_run(tmp_path / "a", record={"method": "m"})]), tmp_path / "out", "T", 0, VIEWER)
    make_run(tmp_path / "runs/a", record={"method": "m"})
    make_run(tmp_path / "runs/b", record={"method": "n"}, glb=b"")
    with pytest.raises(ValueError, match="--study: for 'a zebra bunny' and method 'n' found in .*no export"):
        write_study(read_runs([tmp_path / "runs"]), tmp_path / "out", "T", 0, VIEWER)
    make_run(tmp_path / "more/c", prompt="x", record={"method": "m"})
    with pytest.raises(ValueError, match="--study: for 'x' and method 'n' found no run"):
        write_study(read_runs([tmp_path / "more", make_comparison(tmp_path / "all", methods=("m", "n"))]), tmp_path / "out", "T", 0, VIEWER)
    assert not (tmp_path / "out").exists() and not key_file(tmp_path / "out").exists()


def test_the_mesh_is_told_only_where_a_prompt_stands_in_several_rows(tmp_path):
    for mesh in ("builtin:bunny", "shapes/vase.obj"):
        for method in "mn":
            make_run(tmp_path / "runs" / f"{mesh[-3:]}{method}", prompt="gold", record={"method": method, "mesh": mesh})
    data = data_of(write_study(read_runs([tmp_path / "runs"]), tmp_path / "out", "T", 0, VIEWER).parent)
    assert sorted(row["prompt"] for row in data["rows"]) == ["gold (bunny)", "gold (vase)"]


# ---- model-viewer


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry on this machine that serves `folder`; the cache is empty."""
    folder = tmp_path / "registry"
    (folder / "@google/model-viewer/-").mkdir(parents=True)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield folder / "@google/model-viewer/-"
    server.shutdown()
    server.server_close()


def tarball(script=b"typeof exports"):
    import io
    import tarfile

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, data in ((f"package/dist/{SCRIPT}", script), ("package/LICENSE", b"Apache")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def test_without_a_network_and_a_cache_the_error_says_what_to_do(registry):
    with pytest.raises(ValueError) as error:
        model_viewer()
    for said in ("cannot be fetched", f"npm pack @google/model-viewer@{VERSION}", "cache/threestudio_pgc", "--model-viewer"):
        assert said in str(error.value)


def test_a_package_that_is_not_the_pinned_one_is_refused(registry, tmp_path):
    (registry / f"model-viewer-{VERSION}.tgz").write_bytes(tarball())
    with pytest.raises(ValueError, match="bytes of sha512 .*wanted " + re.escape(model_viewer_module.SHA512)):
        model_viewer()
    assert not (tmp_path / "cache").exists()


def test_the_package_is_fetched_once_and_a_damaged_cache_is_fetched_again(registry, tmp_path, monkeypatch):
    import hashlib

    data = tarball()
    monkeypatch.setattr(model_viewer_module, "SHA512", base64.b64encode(hashlib.sha512(data).digest()).decode())
    served = registry / f"model-viewer-{VERSION}.tgz"
    served.write_bytes(data)
    assert model_viewer() == ModelViewer(b"typeof exports", b"Apache")
    served.unlink()
    assert model_viewer().licence == b"Apache"
    (cached,) = (tmp_path / "cache" / "threestudio_pgc").iterdir()
    cached.write_bytes(data[:-1])
    served.write_bytes(data)
    assert model_viewer().licence == b"Apache" and cached.read_bytes() == data


def test_a_local_viewer_wants_its_licence(tmp_path):
    file = tmp_path / "package" / "dist" / SCRIPT
    with pytest.raises(ValueError, match="--model-viewer: found no file"):
        model_viewer(file)
    file.parent.mkdir(parents=True)
    file.write_text("import {a} from 'b'; model-viewer")
    with pytest.raises(ValueError, match="--model-viewer: found another kind of file"):
        model_viewer(file)
    file.write_text('!function(){"object"==typeof exports}; "model-viewer"')
    with pytest.raises(ValueError, match="--model-viewer: found no LICENSE"):
        model_viewer(file)
    (tmp_path / "package" / "LICENSE").write_text("Apache")
    assert model_viewer(file) == ModelViewer(file.read_bytes(), b"Apache")


# ---- the command line


@pytest.fixture
def local_viewer(tmp_path):
    file = tmp_path / SCRIPT
    file.write_text("typeof exports model-viewer")
    (tmp_path / "LICENSE").write_text("Apache")
    return str(file)


def test_the_command_says_where_the_page_is_and_what_has_no_export(tmp_path, local_viewer, capsys):
    make_run(tmp_path / "runs/a")
    make_run(tmp_path / "runs/b", prompt="x", glb=b"")
    assert gallery.main([str(tmp_path / "runs"), "--output", str(tmp_path / "out"), "--model-viewer", local_viewer]) == 0
    said = capsys.readouterr()
    assert said.out == f"Gallery: {tmp_path / 'out' / 'index.html'}\n"
    assert f"{tmp_path / 'runs/b'}: no export" in said.err
    assert (tmp_path / "out" / MANIFEST).is_file()


def test_the_command_makes_a_study_and_says_where_its_key_is(tmp_path, local_viewer, capsys):
    arguments = [str(make_comparison(tmp_path / "runs")), "--study", "--seed", "3", "--output", str(tmp_path / "out")]
    assert gallery.main([*arguments, "--model-viewer", local_viewer]) == 0
    said = capsys.readouterr().out
    assert f"Study: {tmp_path / 'out' / 'study.html'}\n" in said and "out-key.json" in said and data_of(tmp_path / "out")["seed"] == 3


def test_the_command_refuses_bad_input_in_one_line(tmp_path, local_viewer, capsys):
    (tmp_path / "empty").mkdir()
    assert gallery.main([str(tmp_path / "empty"), "--model-viewer", local_viewer]) == 2
    assert re.fullmatch(r"gallery: .*empty: found no configs/parsed.yaml.*\n", capsys.readouterr().err)
