"""Studio pictures with Blender: what is refused before it starts, and, where a Python with bpy is at hand, what the pictures show.

PGC_BLENDER_PYTHON names that Python; without it, the tests' own is tried.
"""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from launch_scripts import render_blender
from threestudio_pgc.export.textured_mesh import export_textured_mesh
from threestudio_pgc.scene.cameras import fovy_from_focal, look_at_cameras
from threestudio_pgc.scene.environment import EnvironmentLight
from threestudio_pgc.scene.gbuffer import composite, render_gbuffer
from threestudio_pgc.scene.hdr import builtin_light_path, encode_hdr, read_hdr
from threestudio_pgc.scene.mesh import TriangleMesh, load_mesh, normalize
from threestudio_pgc.scene.raster import make_rasterizer
from threestudio_pgc.scene.shading import shade, to_linear, tone_map

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch_scripts" / "render_blender.py"
CUBE = """v -1 -1 -1
v 1 -1 -1
v 1 1 -1
v -1 1 -1
v -1 -1 1
v 1 -1 1
v 1 1 1
v -1 1 1
f 4 3 2 1
f 5 6 7 8
f 1 2 6 5
f 2 3 7 6
f 3 4 8 7
f 4 1 5 8
"""
CAMERA = {"elevation": 20.0, "azimuth": 35.0, "distance": 2.4, "focal": 1.1}
SIZE = 256


@pytest.fixture
def cube(tmp_path):
    path = tmp_path / "cube.obj"
    path.write_text(CUBE)
    return path


def glb(document, *, version=2, missing=0):
    """A GLB's bytes, `missing` short of what its header says."""
    text = json.dumps(document).encode() if isinstance(document, dict) else document
    return struct.pack("<4sIII4s", b"glTF", version, 20 + len(text) + missing, len(text), b"JSON") + text


# ---- without bpy


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("none.glb", None, "no such file"),
        ("picture.png", b"", "found a .png file, wanted .glb, .gltf, .obj"),
        ("empty.glb", b"", "found no glTF header"),
        ("short.glb", glb({"asset": {}}, missing=9), "is cut short, found 33 of 42 bytes"),
        ("old.glb", glb({"asset": {}}, version=1), "found glTF 1, wanted version 2"),
        ("bad.glb", glb(b"{]"), "cannot be read as glTF"),
        ("other.gltf", b"[]", "found JSON without 'asset'"),
        ("lamp.gltf", b'{"asset": {}}', "has no meshes"),
        ("parts.gltf", b'{"asset": {}, "meshes": [{}], "buffers": [{"uri": "a%20b.bin"}]}', "refers to a b.bin, which is not there"),
        ("points.obj", b"v 0 0 0\n", "has no faces"),
    ],
)
def test_what_is_no_mesh_is_refused_by_name(tmp_path, capsys, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert render_blender.main([str(tmp_path / name), "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"render_blender: {tmp_path / name}: ") and told in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, told",
    [
        (["--resolution", "big"], "--resolution: found 'big', wanted N or WIDTHxHEIGHT"),
        (["--resolution", "64x4"], "--resolution: found '64x4'"),
        (["--resolution", "65", "--mode", "turntable"], "--resolution: found '65', wanted even numbers"),
        (["--samples", "0"], "--samples: found 0, wanted 1 to 65536"),
        (["--focal", "nan"], "--focal: found nan"),
        (["--distance", "-1"], "--distance: found -1"),
        (["--elevation", "90"], "--elevation: found 90"),
        (["--light-strength", "-1"], "--light-strength: found -1"),
        (["--mode", "group"], "--rows: found 2 for 1 assets"),
        (["--mode", "group", "--rows", "1", "--elevation", "0"], "--elevation: found 0, wanted 5 at least for a group"),
        (["--light", "sun"], "--light: found 'sun', wanted studio, or a .hdr or .exr file"),
        (["--light", "none.hdr"], "--light: none.hdr: no such file"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(tmp_path, cube, capsys, options, told):
    assert render_blender.main([str(cube), "--output", str(tmp_path / "out"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"render_blender: {told}")


def test_an_unknown_mode_is_refused(cube, capsys):
    with pytest.raises(SystemExit):
        render_blender.main([str(cube), "--output", "out", "--mode", "movie"])
    assert "--mode: invalid choice: 'movie'" in capsys.readouterr().err


def test_a_file_that_is_no_picture_of_light_is_refused(tmp_path, cube, capsys):
    (tmp_path / "light.hdr").write_bytes(b"text")
    assert render_blender.main([str(cube), "--output", str(tmp_path / "out"), "--light", str(tmp_path / "light.hdr")]) == 2
    assert "found no .hdr header" in capsys.readouterr().err


@pytest.mark.parametrize("output, more", [("a.png", ["--mode", "turntable"]), ("a.mp4", []), ("a.png", ["cube.obj"])])
def test_an_output_that_cannot_hold_the_pictures_is_refused(cube, capsys, monkeypatch, output, more):
    monkeypatch.chdir(cube.parent)
    assert render_blender.main(["--output", output, "cube.obj", *more]) == 2
    assert capsys.readouterr().err.startswith(f"render_blender: --output: found '{output}'")


def test_an_asset_s_own_picture_is_not_overwritten(cube, capsys):
    cube.write_text("mtllib cube.mtl\n" + CUBE)
    cube.with_suffix(".mtl").write_text("newmtl a\nmap_Kd cube.png\n")
    cube.with_suffix(".png").write_text("kept")
    for output in (cube.parent, cube.with_suffix(".png")):
        assert render_blender.main([str(cube), "--output", str(output)]) == 2
        assert "would be overwritten" in capsys.readouterr().err and cube.with_suffix(".png").read_text() == "kept"


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_code_1(tmp_path, cube, capsys):
    (tmp_path / "file").write_text("kept")
    assert render_blender.main([str(cube), "--output", str(tmp_path / "file")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("render_blender: --output: ") and (tmp_path / "file").read_text() == "kept"


def test_without_bpy_it_says_what_to_install(tmp_path, cube, capsys, monkeypatch):
    monkeypatch.setattr(render_blender, "bpy", None)
    monkeypatch.setattr(render_blender, "BPY_ERROR", "No module named 'bpy'", raising=False)
    assert render_blender.main([str(cube), "--output", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    for word in ("No module named 'bpy'", "Python 3.11", "-m venv", "pip install -r requirements-blender.txt"):
        assert word in line
    assert (ROOT / "requirements-blender.txt").read_text().splitlines()[1] == "bpy>=5,<6"


@pytest.mark.parametrize(
    "command, expected",
    [
        (["render_blender.py"], []),
        (["folder/render_blender.py", "a.glb", "--output", "b"], ["a.glb", "--output", "b"]),
        (["/usr/bin/blender", "--background", "--python", "render_blender.py"], []),
        (["Blender", "--background", "--python", "render_blender.py", "--", "a.glb", "--output", "b"], ["a.glb", "--output", "b"]),
    ],
)
def test_inside_blender_the_arguments_follow_two_dashes(monkeypatch, command, expected):
    monkeypatch.setattr(sys, "argv", command)
    assert render_blender.script_arguments() == expected


def test_it_does_without_torch_and_the_package():
    code = "import sys; import launch_scripts.render_blender; sys.exit(any(m in sys.modules for m in ('torch', 'threestudio_pgc')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_assets_of_the_same_name_get_numbers():
    assert render_blender.output_names([]) == []
    names = render_blender.output_names([Path("a/model.glb"), Path("b/model.glb"), Path("model-2.glb"), Path("c/model.obj")])
    assert len(set(names)) == 4 and names[0] == "model" and names[2] == "model-2"


def test_the_camera_is_ours():
    for elevation, azimuth in ((0.0, 0.0), (15.0, 90.0), (-10.0, 200.0)):
        expected = look_at_cameras(elevation, azimuth, 2.0, 1.0).c2w[0, :3, :3].numpy()
        np.testing.assert_allclose(render_blender.camera_axes(elevation, azimuth), expected, atol=1e-6)


def test_our_files_are_known_by_the_node_that_turns_them(tmp_path):
    for up in ("z", "y"):
        document = render_blender._gltf_document(export_lettered(tmp_path, up)["glb"])
        assert render_blender.stands_z_up(document) == (up == "z")
        document["nodes"][0]["rotation"] = [0, 0.6, 0, 0.8]
        assert not render_blender.stands_z_up(document)


def test_a_group_is_framed_as_closely_as_the_margin_allows():
    points = np.random.default_rng(0).normal(size=(500, 3)) * [1.0, 3.0, 0.5]
    axes = render_blender.camera_axes(20.0, 0.0)
    for aspect in (1.0, 2.0, 8.0):
        seen = render_blender.project(points, axes, render_blender.frame_group(points, axes, 2.0, aspect), 2.0)
        reach = np.abs(seen).max(axis=0) / [aspect / 2, 0.5]
        assert reach.max() == pytest.approx(1 - render_blender.MARGIN, abs=1e-9)
        np.testing.assert_allclose(seen.max(axis=0) + seen.min(axis=0), 0, atol=0.05)


def test_only_what_stands_in_front_of_something_hides_it():
    near, far = np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([[0.5, 0.7], [2.0, 3.0]])
    assert render_blender.hidden([near], [far]) == pytest.approx(0.3)
    assert render_blender.hidden([near], [far + [0, 1]]) == pytest.approx(-0.7)
    assert render_blender.hidden([near], [far + [1, 0]]) == -np.inf


# ---- with bpy


@pytest.fixture(scope="session")
def blender_python():
    """The Python that has bpy."""
    python = os.environ.get("PGC_BLENDER_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import bpy"], capture_output=True).returncode:
        pytest.skip("no bpy: set PGC_BLENDER_PYTHON to a Python that has it")
    return python


def render(python, *arguments):
    """Run the script; returns the lines it printed."""
    done = subprocess.run([python, str(SCRIPT), *map(str, arguments), "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def picture(path):
    return np.asarray(Image.open(path)).astype(np.float64) / 255


def psnr(a, b):
    return -10 * np.log10(np.square(a - b).mean())


def position_maps(points, normals):
    """Smooth colours of the stored frame, and a rough metal."""
    return {
        "base_color": 0.5 + 0.45 * torch.sin(4 * points),
        "roughness": 0.5 + 0.4 * points[:, :1],
        "metallic": 0.5 + 0.4 * points[:, 1:2],
    }


def lettered(folder, up):
    """The lettered plaque; with up "y", as read from a file in which it stands along y."""
    mesh = load_mesh("builtin:lettered")
    if up == "z":
        return normalize(mesh)
    lines = ["v {} {} {}".format(*row) for row in mesh.vertices[:, [1, 2, 0]].tolist()]  # x, the front, to z, and z to y
    lines += ["f {} {} {}".format(*row) for row in (mesh.faces + 1).tolist()]
    (folder / "y_up_input.obj").write_text("\n".join(lines))
    return normalize(load_mesh(folder / "y_up_input.obj", up="y"))


def export_lettered(folder, up, formats=("glb",)):
    return export_textured_mesh(lettered(folder, up), position_maps, folder, f"lettered-{up}", formats=formats, resolution=512, samples=1)


def ours(mesh: TriangleMesh):
    """Our own picture of the same colours (SIZE, SIZE, 3)."""
    angles = (CAMERA["elevation"], CAMERA["azimuth"], CAMERA["distance"])
    camera, rasterizer = look_at_cameras(*angles, fovy_from_focal(CAMERA["focal"])), make_rasterizer("cpu")
    gbuffer = render_gbuffer(mesh, camera, SIZE, SIZE, rasterizer)
    points = gbuffer.select(gbuffer.position)
    colors = position_maps(points, points)["base_color"]
    return composite(colors, gbuffer, torch.ones(1, SIZE, SIZE, 3), mesh, rasterizer)[0].double().numpy()


@pytest.fixture(scope="session")
def flat_pictures(blender_python, tmp_path_factory):
    """Flat pictures of the plaque from GLBs of either up and an OBJ, with ours."""
    folder, out = tmp_path_factory.mktemp("flat"), tmp_path_factory.mktemp("pictures")
    files = {"glb, z up": export_lettered(folder, "z", ("glb", "obj")), "glb, y up": export_lettered(folder, "y", ("glb", "obj"))}
    options = [f"--{key}={value}" for key, value in CAMERA.items()] + ["--flat", "--samples", "16", "--resolution", SIZE]
    render(blender_python, files["glb, z up"]["glb"], files["glb, y up"]["glb"], files["glb, z up"]["obj"], "--output", out, *options)
    render(blender_python, files["glb, y up"]["obj"], "--obj-up", "y", "--output", out / "obj-y.png", *options)
    names = {"glb, z up": "lettered-z", "glb, y up": "lettered-y", "obj, z up": "lettered-z-2", "obj, y up": "obj-y"}
    return {name: picture(out / f"{stem}.png") for name, stem in names.items()}, ours(lettered(folder, "z"))


@pytest.mark.parametrize("name", ["glb, z up", "glb, y up", "obj, z up", "obj, y up"])
def test_flat_pictures_overlay_ours_and_are_not_mirrored(flat_pictures, name):
    pictures, expected = flat_pictures
    found = psnr(pictures[name], expected)
    mirrored = psnr(pictures[name][:, ::-1], expected)
    print(f"{name}: PSNR {found:.1f} dB, of the mirror image {mirrored:.1f} dB")
    assert pictures[name].shape == (SIZE, SIZE, 3)
    assert found >= 28 and mirrored < found - 10


def test_a_lit_sphere_looks_as_our_material_does(blender_python, tmp_path):
    """Path tracing against the split sum, where no part of the surface shades another: a dielectric of changing roughness under the sky."""
    sphere = trimesh.creation.icosphere(subdivisions=4)
    mesh = normalize(TriangleMesh(torch.tensor(sphere.vertices, dtype=torch.float32), torch.tensor(sphere.faces)))

    def maps(points, normals):
        return {"base_color": 0.5 + 0.3 * torch.sin(4 * points), "roughness": 0.45 + 0.25 * torch.sin(5 * points[:, 2:])}

    path = export_textured_mesh(mesh, maps, tmp_path, "sphere", formats=("glb",), resolution=512)["glb"]
    options = [f"--{key}={value}" for key, value in CAMERA.items()] + ["--view", "standard", "--samples", "64", "--resolution", SIZE]
    render(blender_python, path, "--output", tmp_path / "lit.png", "--light", builtin_light_path("sky"), *options)
    angles = (CAMERA["elevation"], CAMERA["azimuth"], CAMERA["distance"])
    camera = look_at_cameras(*angles, fovy_from_focal(CAMERA["focal"]))
    gbuffer = render_gbuffer(mesh, camera, SIZE, SIZE, make_rasterizer("cpu"))
    points, normals = gbuffer.select(gbuffer.position), gbuffer.select(gbuffer.normal)
    view = torch.nn.functional.normalize(camera.positions - points, dim=-1)
    found, light = maps(points, normals), EnvironmentLight(read_hdr("builtin:sky"))
    metallic = torch.zeros_like(found["roughness"])
    lit = tone_map(shade(light, to_linear(found["base_color"]), found["roughness"], metallic, normals, view), "srgb").double().numpy()
    theirs = picture(tmp_path / "lit.png").reshape(-1, 3)[gbuffer.indices.numpy()]
    inside = gbuffer.select(gbuffer.opacity)[:, 0].numpy() > 0.99
    measured = psnr(theirs[inside], lit[inside])
    print(f"lit sphere: PSNR {measured:.1f} dB")
    assert measured >= 35


def test_roughness_and_metalness_reach_the_surface(blender_python, tmp_path):
    path = export_lettered(tmp_path, "z")["glb"]
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from launch_scripts.render_blender import *
bpy.ops.wm.read_factory_settings(use_empty=True)
asset = Asset(Path({str(path)!r}), "z")
tree = asset.meshes[0].data.materials[0].node_tree
print(*(link.from_socket.name + ">" + link.to_socket.name for link in tree.links), asset.points.min(), asset.points.max(), sep="|")
"""
    done = subprocess.run([blender_python, "-c", code], capture_output=True, text=True, check=True)
    *links, low, high = done.stdout.splitlines()[-1].split("|")
    assert {"Color>Base Color", "Green>Roughness", "Blue>Metallic"} <= set(links)
    assert max(-float(low), float(high)) == pytest.approx(0.8, abs=1e-5)


def test_a_lamp_at_the_picture_s_centre_stands_on_x_and_turns_counter_clockwise(blender_python, cube, tmp_path):
    light = torch.full((32, 64, 3), 0.02)
    light[12:20, 30:34] = 50.0
    (tmp_path / "lamp.hdr").write_bytes(encode_hdr(light))
    bright = {}
    for rotation in (0, 90):
        options = ["--light", tmp_path / "lamp.hdr", "--light-rotation", rotation, "--view", "standard", "--elevation", "20"]
        options += ["--azimuth", "45", "--resolution", "32", "--samples", "16", "--background", "transparent"]
        render(blender_python, cube, "--output", tmp_path / "lit.png", *options)
        seen = picture(tmp_path / "lit.png")
        middle = seen[14:20, :, :3].mean(axis=(0, 2))
        bright[rotation] = middle[8:15].mean(), middle[17:24].mean()  # from azimuth 45, +x is the left side and +y the right
        assert seen.shape == (32, 32, 4) and seen[0, 0, 3] == 0
    assert bright[0][0] > 2 * bright[0][1] and bright[90][1] > 2 * bright[90][0]


def test_a_turntable_goes_on_where_it_was_stopped(blender_python, cube, tmp_path):
    common = [cube, "--output", tmp_path / "out", "--mode", "turntable", "--frames", "3", "--resolution", "32"]
    lines = render(blender_python, *common, "--samples", "1")
    folder = tmp_path / "out" / "cube"
    frames = [folder / f"{index:04d}.png" for index in range(3)]
    assert {path.name for path in folder.iterdir()} == {"settings.json", *(frame.name for frame in frames)}
    assert sum("left" in line for line in lines) == 3 and (tmp_path / "out" / "cube.mp4").stat().st_size > 500
    assert (picture(frames[0])[0, 16] == 1).all() and (picture(frames[0]) != picture(frames[1])).any()
    frames[1].unlink()
    before = frames[0].stat().st_mtime_ns
    lines = render(blender_python, *common, "--samples", "1")
    assert lines[0] == "cube: 2 of 3 frames are there already" and frames[0].stat().st_mtime_ns == before and frames[1].exists()
    lines = render(blender_python, *common, "--samples", "2")
    assert "already" not in lines[0] and frames[0].stat().st_mtime_ns != before


def test_a_group_stands_in_the_order_of_the_arguments_and_none_hides_another(blender_python, tmp_path):
    colors = np.array([[0.9, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.9], [0.8, 0.8, 0.1]])
    paths = []
    for index, color in enumerate(colors):
        lines = CUBE.replace("v 1", "v 0.2") if index == 1 else CUBE  # one is slim
        (tmp_path / f"{index}.mtl").write_text("newmtl m\nKd {} {} {}\n".format(*color))
        paths.append(tmp_path / f"{index}.obj")
        paths[-1].write_text(f"mtllib {index}.mtl\nusemtl m\n{lines}")
    out = tmp_path / "group.png"
    render(blender_python, *paths, "--mode", "group", "--flat", "--resolution", "100", "--samples", "4", "--output", out)
    seen = picture(out)
    assert 150 <= seen.shape[1] <= 200 and (np.concatenate([seen[0], seen[-1], seen[:, 0], seen[:, -1]]) == 1).all()
    display = np.where(colors <= 0.0031308, 12.92 * colors, 1.055 * colors ** (1 / 2.4) - 0.055)
    close = [np.abs(seen - color).max(axis=-1) < 0.03 for color in display]
    rows, columns = zip(*((np.nonzero(mask)[0], np.nonzero(mask)[1]) for mask in close))
    for left, right in ((0, 1), (2, 3)):
        assert columns[left].max() < columns[right].min()
    for top, bottom in ((0, 2), (1, 3)):
        assert rows[top].max() < rows[bottom].min()


def test_blender_s_own_complaint_is_one_line(blender_python, tmp_path):
    path = tmp_path / "bad.glb"
    path.write_bytes(glb({"asset": {"version": "2.0"}, "meshes": [{"primitives": [{"attributes": {"POSITION": 7}}]}]}))
    done = subprocess.run([blender_python, str(SCRIPT), str(path), "--output", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"render_blender: {path}: ")
