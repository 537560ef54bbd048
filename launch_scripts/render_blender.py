"""Studio pictures of exported assets with Blender's Cycles: stills, turntables, and a group photograph in rows.

    python launch_scripts/render_blender.py chair.glb --output chair.png
    python launch_scripts/render_blender.py chair.glb lamp.glb --output turntables --mode turntable --frames 120
    python launch_scripts/render_blender.py theirs/*.glb ours/*.glb --output figure.png --mode group --rows 2

The Python needs bpy: in an environment of Python 3.11, `pip install -r requirements-blender.txt`. An installed Blender 5 does as well:

    blender --background --python launch_scripts/render_blender.py -- chair.glb --output chair.png

Assets are centred and scaled into [-0.8, 0.8]^3, and cameras are ours: z is up, azimuth 0 stands on +x and grows towards +y, the focal
length is in image heights. With --flat a picture shows the base colours alone and overlays those of our own renderer.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

with contextlib.suppress(ImportError):  # it comes with bpy
    import numpy as np
try:
    import bpy
    from mathutils import Matrix
except ImportError as error:  # arguments are checked, and help is given, without it
    bpy, BPY_ERROR = None, error

NO_BPY = (
    "Blender's bpy cannot be imported ({reason}). Its 5.0 wheels are for Python 3.11 (this is {version}): "
    "`python3.11 -m venv blender-env`, `blender-env/bin/pip install -r requirements-blender.txt`, and run this script with "
    "blender-env/bin/python"
)

SUFFIXES = (".glb", ".gltf", ".obj")
LIGHT_SUFFIXES = {".hdr": b"#?", ".exr": b"\x76\x2f\x31\x01"}  # what such files begin with
VIEW_TRANSFORMS = {"standard": "Standard", "agx": "AgX", "khronos": "Khronos PBR Neutral"}
EXTENT = 0.8  # largest |coordinate| of an asset, as scene.mesh.normalize's
FPS = 25  # as export.pictures.write_video's
GROUP_ASPECT = (1.5, 2.0)  # of a group picture whose width is left to the script
MARGIN = 0.09  # of a group picture's half size that stays empty at least
GAP = 0.3  # between neighbours in a group, in units of the assets' half extent of 0.8
FAINT = 0.03  # opacity of a shadow on an invisible floor that is left out: the denoiser leaves as much along the picture's edge
CLEARANCE = 0.02  # image heights between an asset and the one behind it

# The quarter turn that export.gltf gives the node of a mesh whose own up is z.
Z_UP_NODE = (-(0.5**0.5), 0.0, 0.0, 0.5**0.5)

# The studio's area lights, as seen from the camera: degrees to the right of it, elevation in degrees, size as a share of the distance, and
# the radiance of a white surface that faces it.
STUDIO_LIGHTS = {
    "key": (-48.0, 48.0, 0.75, 0.75),
    "fill": (58.0, 22.0, 1.1, 0.13),
    "rim": (155.0, 42.0, 0.5, 0.4),
    "top": (0.0, 85.0, 0.9, 0.22),
}
STUDIO_AMBIENT = 0.2  # radiance from everywhere
PAPER = (0.86, 0.86, 0.86)  # reflectance of the backdrop and the steps


class RenderError(ValueError):
    """An argument or a file cannot be used; the message says which, what was found and what is wanted."""


# ---- arguments


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="render_blender", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", nargs="+", type=Path, metavar="ASSET", help=f"{', '.join(SUFFIXES)} files")
    parser.add_argument("--output", type=Path, required=True, help="a folder; or a .png file, of one asset or a group")
    parser.add_argument("--mode", choices=("still", "turntable", "group"), default="still", help="default %(default)s")
    parser.add_argument("--rows", type=int, default=2, help="of a group, the first assets in the top one (default %(default)s)")
    parser.add_argument("--frames", type=int, default=60, help="of a turntable (default %(default)s)")
    parser.add_argument("--elevation", type=float, help="degrees (default 15, of a group 20)")
    parser.add_argument("--azimuth", type=float, default=0.0, help="degrees; of a turntable's first frame (default %(default)s)")
    parser.add_argument("--distance", type=float, default=2.25, help="of the camera from the origin; not for a group (default %(default)s)")
    parser.add_argument("--focal", type=float, help="focal length in image heights (default 1, of a group 4)")
    parser.add_argument("--resolution", default="1024", metavar="N|WxH", help="a group's N is its height (default %(default)s)")
    parser.add_argument("--samples", type=int, default=64, help="per pixel (default %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="default %(default)s")
    parser.add_argument("--light", default="studio", metavar="studio|FILE", help="or an equirectangular .hdr or .exr (default %(default)s)")
    parser.add_argument("--light-rotation", type=float, default=0.0, metavar="DEG", help="about z, counter-clockwise seen from above")
    parser.add_argument("--light-strength", type=float, default=1.0, metavar="S", help="factor on the light (default %(default)s)")
    parser.add_argument(
        "--background",
        choices=("white", "transparent", "light"),
        help="light: the studio's backdrop, or the picture of --light (default white, of a group light)",
    )
    parser.add_argument("--view", choices=tuple(VIEW_TRANSFORMS), default="khronos", help="from light to display (default %(default)s)")
    parser.add_argument("--obj-up", choices=("z", "y"), default="z", help="axis that is up in .obj files (default %(default)s)")
    parser.add_argument("--flat", action="store_true", help="base colours as they are, without light or view transform")
    return parser


def check(args: argparse.Namespace) -> argparse.Namespace:
    """Check everything that can be checked without Blender, and fill in the defaults that depend on the mode.

    `size` (width, height) is added; it is None for the width of a group that depends on its assets.

    Raises:
        RenderError: see there.
        OSError: the output cannot be written.
    """
    group = args.mode == "group"
    defaults = {"elevation": 20.0 if group else 15.0, "focal": 4.0 if group else 1.0, "background": "light" if group else "white"}
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.flat and args.background == "light":
        args.background = "white"  # there is none
    ranges = {"rows": (1, 8), "frames": (1, 9999), "samples": (1, 65536), "elevation": (-89.9, 89.9), "distance": (0.1, 100.0)}
    ranges |= {"focal": (0.1, 100.0), "light_strength": (0.0, 1e6), "azimuth": (-1e6, 1e6), "light_rotation": (-1e6, 1e6)}
    for key, (low, high) in ranges.items():
        if not low <= getattr(args, key) <= high:
            raise RenderError(f"--{key.replace('_', '-')}: found {getattr(args, key):g}, wanted {low:g} to {high:g}")
    sizes = re.fullmatch(r"(\d+)(?:x(\d+))?", args.resolution)
    numbers = [int(number) for number in sizes.groups() if number] if sizes else [0]
    if not all(8 <= number <= 16384 for number in numbers):
        raise RenderError(f"--resolution: found {args.resolution!r}, wanted N or WIDTHxHEIGHT, each 8 to 16384")
    args.size = (numbers[0] if len(numbers) == 2 or not group else None, numbers[-1])
    if args.mode == "turntable" and args.background != "transparent" and any(number % 2 for number in args.size):
        raise RenderError(f"--resolution: found {args.resolution!r}, wanted even numbers, which a film needs")
    if group and len(args.assets) < args.rows:
        raise RenderError(f"--rows: found {args.rows} for {len(args.assets)} assets, wanted at most one an asset")
    if group and args.elevation < 5:
        raise RenderError(f"--elevation: found {args.elevation:g}, wanted 5 at least for a group, which stands on a floor")
    pictures = [picture_path(args, name).resolve() for name in output_names(args.assets)]
    for asset in args.assets:
        for file in asset_files(asset):
            if file.resolve() in pictures:
                raise RenderError(f"--output: {file} belongs to {asset} and would be overwritten, wanted another folder or name")
    if args.light != "studio":
        check_light(Path(args.light))
    check_output(args)
    return args


def asset_files(path: Path) -> list[Path]:
    """The asset's file and those it refers to, as far as they are there. Raises RenderError if it cannot be a mesh."""
    if path.suffix.lower() not in SUFFIXES:
        raise RenderError(f"{path}: found a {path.suffix or 'nameless'} file, wanted {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise RenderError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    if path.suffix.lower() == ".obj":
        return _obj_files(path)
    document = _gltf_document(path)
    if not document.get("meshes"):
        raise RenderError(f"{path}: has no meshes, wanted at least one")
    parts = [*document.get("buffers", []), *document.get("images", [])]
    names = [part["uri"] for part in parts if "uri" in part and not part["uri"].startswith("data:")]
    from urllib.parse import unquote

    files = [path.parent / unquote(name) for name in names]
    for file in files:
        if not file.is_file():
            raise RenderError(f"{path}: refers to {file.name}, which is not there")
    return [path, *files]


def _gltf_document(path: Path) -> dict:
    """The JSON of a .gltf or .glb."""
    data = path.read_bytes()
    if path.suffix.lower() == ".glb":
        if data[:4] != b"glTF" or len(data) < 20:
            raise RenderError(f"{path}: found no glTF header, wanted a binary glTF file")
        version, length, json_length, kind = struct.unpack("<III4s", data[4:20])
        if version != 2:
            raise RenderError(f"{path}: found glTF {version}, wanted version 2")
        if length > len(data):
            raise RenderError(f"{path}: is cut short, found {len(data)} of {length} bytes")
        if kind != b"JSON":
            raise RenderError(f"{path}: found no JSON chunk, wanted a binary glTF file")
        data = data[20 : 20 + json_length]
    try:
        document = json.loads(data)
    except ValueError as error:
        raise RenderError(f"{path}: cannot be read as glTF ({error})") from error
    if not isinstance(document, dict) or "asset" not in document:
        raise RenderError(f"{path}: found JSON without 'asset', wanted glTF")
    return document


def _obj_files(path: Path) -> list[Path]:
    lines = path.read_bytes().splitlines()
    if not any(line.startswith(b"f ") for line in lines):
        raise RenderError(f"{path}: has no faces, wanted at least one")
    files = [path]
    for line in lines:
        if line.startswith(b"mtllib "):
            files.append(path.parent / os.fsdecode(line[7:].strip()))
    for library in [file for file in files[1:] if file.is_file()]:
        maps = [line.split() for line in library.read_bytes().splitlines() if line.strip().startswith((b"map_", b"norm"))]
        files += [library.parent / os.fsdecode(words[-1]) for words in maps if len(words) > 1]
    return [file for file in files if file.is_file()]


def check_light(path: Path) -> None:
    """Raises RenderError if the file cannot be a picture of light."""
    suffix = path.suffix.lower()
    if suffix not in LIGHT_SUFFIXES:
        raise RenderError(f"--light: found {str(path)!r}, wanted studio, or a {' or '.join(LIGHT_SUFFIXES)} file")
    if not path.is_file():
        raise RenderError(f"--light: {path}: no such file")
    with open(path, "rb") as file:
        if not file.read(4).startswith(LIGHT_SUFFIXES[suffix]):
            raise RenderError(f"--light: {path}: found no {suffix} header")


def check_output(args: argparse.Namespace) -> None:
    """Make the output's folder and try to write there."""
    to_file = args.output.suffix.lower() == ".png"
    if args.output.suffix and not to_file and not args.output.is_dir():
        raise RenderError(f"--output: found {str(args.output)!r}, wanted a folder or a .png file")
    if to_file and (args.mode == "turntable" or (args.mode == "still" and len(args.assets) > 1)):
        raise RenderError(f"--output: found {str(args.output)!r}, wanted a folder, since there are several pictures")
    folder = args.output.parent if to_file else args.output
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def picture_path(args: argparse.Namespace, name: str) -> Path:
    """Where the picture goes that shows the asset of this name, or the group."""
    if args.output.suffix.lower() == ".png":
        return args.output
    return args.output / ("group.png" if args.mode == "group" else f"{name}.png")


def output_names(assets: list[Path]) -> list[str]:
    """A name for each asset: its file's, with a number where one comes twice."""
    stems = [asset.stem for asset in assets]
    names: list[str] = []
    for index, stem in enumerate(stems):
        count = stems[:index].count(stem)
        name = stem
        while count and (name in names or name in stems):
            count += 1
            name = f"{stem}-{count}"
        names.append(name)
    return names


# ---- the scene


def new_scene(args: argparse.Namespace, width: int, height: int):
    """An empty scene with the settings of the picture; returns it."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene = bpy.context.scene
    scene.render.engine = "CYCLES"
    scene.render.resolution_x, scene.render.resolution_y, scene.render.resolution_percentage = width, height, 100
    for name in scene.render.bl_rna.properties.keys():
        if name.startswith("use_stamp"):  # pictures of the same settings are to be the same file, and tell nothing of the machine
            setattr(scene.render, name, False)
    scene.display_settings.display_device = "sRGB"
    scene.view_settings.view_transform = VIEW_TRANSFORMS["standard" if args.flat else args.view]
    scene.view_settings.look = "None"
    scene.render.dither_intensity = 0.0 if args.flat else 1.0
    scene.render.film_transparent = args.background != "light"
    image = scene.render.image_settings
    image.media_type, image.file_format, image.color_mode, image.color_depth = "IMAGE", "PNG", "RGBA", "8"
    if args.background == "light":
        image.color_mode = "RGB"
    cycles = scene.cycles
    cycles.samples, cycles.seed, cycles.use_animated_seed = args.samples, 0, False
    cycles.max_bounces, cycles.caustics_reflective, cycles.caustics_refractive = 6, False, False
    cycles.use_adaptive_sampling = cycles.use_denoising = not args.flat
    if args.flat:
        cycles.pixel_filter_type = "BOX"  # the share of the pixel, as our renderer's silhouettes
    else:
        with contextlib.suppress(TypeError), quiet():  # a build without it has another
            cycles.denoiser = "OPENIMAGEDENOISE"
    with quiet():
        set_device(scene, args.device)
    camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    camera.data.sensor_fit, camera.data.sensor_height, camera.data.lens = "VERTICAL", 24.0, 24.0 * args.focal
    camera.data.clip_start, camera.data.clip_end = 0.01, 10_000.0
    scene.collection.objects.link(camera)
    scene.camera = camera
    scene.world = bpy.data.worlds.new("light")
    _world_node(scene.world, "BACKGROUND").inputs["Strength"].default_value = 0.0
    return scene


def set_device(scene, choice: str) -> None:
    """Render on a GPU if there is one and it is wanted. Raises RenderError if it is wanted and there is none."""
    scene.cycles.device = "CPU"
    if choice == "cpu":
        return
    preferences = bpy.context.preferences.addons["cycles"].preferences
    for kind in ("OPTIX", "CUDA", "HIP", "METAL", "ONEAPI"):
        try:
            devices = preferences.get_devices_for_type(kind)
        except (TypeError, ValueError):  # not in this build
            continue
        if devices:
            preferences.compute_device_type = kind
            for device in devices:
                device.use = device.type == kind
            scene.cycles.device = "GPU"
            return
    if choice == "gpu":
        raise RenderError("--device: Cycles finds no GPU, wanted one; cpu or auto renders without")


def _world_node(world, kind: str):
    return next(node for node in world.node_tree.nodes if node.type == kind)


def camera_axes(elevation: float, azimuth: float) -> np.ndarray:
    """Columns (3, 3): right, up, back, of a camera at these degrees that looks at the origin; as scene.cameras.look_at_cameras."""
    e, a = math.radians(elevation), math.radians(azimuth)
    back = np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
    right = np.array([-math.sin(a), math.cos(a), 0.0])
    return np.stack([right, np.cross(back, right), back], axis=1)


def place_camera(camera, axes: np.ndarray, position: np.ndarray) -> None:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = axes, position
    camera.matrix_world = Matrix(matrix.tolist())


# ---- assets


class Asset:
    """An imported file: an empty that carries its objects, and the vertices (V, 3) as they stand before the empty moves them."""

    def __init__(self, path: Path, obj_up: str):
        before = set(bpy.data.objects)
        try:
            with quiet():
                turn = _import(path, obj_up)
        except RuntimeError as error:  # what Blender's operators raise
            raise RenderError(f"{path}: Blender cannot read it ({str(error).strip().splitlines()[-1]})") from error
        objects = []
        for item in set(bpy.data.objects) - before:
            if item.type in ("CAMERA", "LIGHT"):
                bpy.data.objects.remove(item)
            else:
                objects.append(item)
        self.meshes = sorted((item for item in objects if item.type == "MESH" and item.users_scene), key=lambda item: item.name)
        self.holder = bpy.data.objects.new(path.stem, None)
        bpy.context.scene.collection.objects.link(self.holder)
        for item in objects:
            if item.parent is None:
                item.parent = self.holder
                item.matrix_parent_inverse = Matrix()
        self.holder.matrix_world = turn
        points = self._points()
        low, high = points.min(axis=0, initial=np.inf), points.max(axis=0, initial=-np.inf)
        half = float((high - low).max()) / 2
        if not (half > 0 and math.isfinite(half)):
            raise RenderError(f"{path}: has no faces or no extent, wanted a mesh")
        self.normalized = Matrix.Scale(EXTENT / half, 4) @ Matrix.Translation(-(low + high) / 2) @ turn
        self.points = (points - (low + high) / 2) * (EXTENT / half)
        self.place()

    def place(self, azimuth: float = 0.0, position=(0.0, 0.0, 0.0)) -> np.ndarray:
        """Turn the asset to be seen from `azimuth` degrees and move its centre; returns its vertices (V, 3) then."""
        turn = Matrix.Rotation(math.radians(-azimuth), 4, "Z")
        self.holder.matrix_world = Matrix.Translation(position) @ turn @ self.normalized
        return self.points @ np.array(turn)[:3, :3].T + np.asarray(position)

    def _points(self) -> np.ndarray:
        """World positions of all vertices."""
        graph = bpy.context.evaluated_depsgraph_get()
        found = [np.zeros((0, 3))]
        for item in self.meshes:
            evaluated = item.evaluated_get(graph)
            mesh = evaluated.to_mesh()
            if len(mesh.polygons):
                points = np.empty(3 * len(mesh.vertices), np.float32)
                mesh.vertices.foreach_get("co", points)
                matrix = np.array(evaluated.matrix_world)
                found.append(points.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3])
            evaluated.to_mesh_clear()
        return np.concatenate(found)

    def make_flat(self) -> None:
        """Make every material emit its base colour."""
        for item in self.meshes:
            if not item.data.materials:
                item.data.materials.append(bpy.data.materials.new("grey"))
            for material in item.data.materials:
                if material is not None:
                    _make_flat(material)


def _import(path: Path, obj_up: str):
    """Import a file; returns the turn that brings it from Blender's frame to ours."""
    front = Matrix.Rotation(math.pi / 2, 4, "Z")  # glTF's front, which Blender puts at -y, to +x, as scene.mesh.load_mesh does
    if path.suffix.lower() == ".obj":
        up = {"z": ("Y", "Z"), "y": ("NEGATIVE_Z", "Y")}[obj_up]
        bpy.ops.wm.obj_import(filepath=str(path.absolute()), forward_axis=up[0], up_axis=up[1])
        return Matrix() if obj_up == "z" else front
    bpy.ops.import_scene.gltf(filepath=str(path.absolute()), loglevel=50)
    return Matrix() if stands_z_up(_gltf_document(path)) else front


def stands_z_up(document: dict) -> bool:
    """Whether a glTF file's meshes keep z up, turned upright by their nodes, as ours do: Blender shows their own coordinates."""
    rotations = [node.get("rotation", [0, 0, 0, 1]) for node in document.get("nodes", []) if "mesh" in node]
    return all(all(abs(a - b) < 1e-6 for a, b in zip(rotation, Z_UP_NODE)) for rotation in rotations)


def _make_flat(material) -> None:
    tree = material.node_tree
    surface = next((node for node in tree.nodes if node.type == "BSDF_PRINCIPLED"), None)
    if surface is None:
        return  # glTF's unlit materials are imported as emission
    emission = tree.nodes.new("ShaderNodeEmission")
    base = surface.inputs["Base Color"]
    if base.is_linked:
        tree.links.new(base.links[0].from_socket, emission.inputs["Color"])
    else:
        emission.inputs["Color"].default_value = base.default_value
    output = next(node for node in tree.nodes if node.type == "OUTPUT_MATERIAL" and node.is_active_output)
    tree.links.new(emission.outputs["Emission"], output.inputs["Surface"])


# ---- light and floor


class Studio:
    """Light and floor. Nothing of it exists in flat pictures."""

    def __init__(self, scene, args: argparse.Namespace, floor: float, radius: float, centre=(0.0, 0.0, 0.0)):
        """floor: its height. radius: of what is to be lit, around `centre`."""
        self.holder = bpy.data.objects.new("studio", None)
        scene.collection.objects.link(self.holder)
        self.turns = args.light == "studio"
        if args.flat:
            return
        if self.turns:
            self._lamps(scene, args, radius, centre)
        else:
            picture_light(scene.world, args)
        if args.background == "light" and self.turns:
            self.add(scene, _sweep(floor, radius), catcher=False)
        elif args.light == "studio" or args.mode == "group":
            self.add(scene, _plane(floor, 40 * radius), catcher=True)

    def face(self, azimuth: float) -> None:
        """Turn lamps and backdrop along with the camera, so that it is the object that seems to turn."""
        self.holder.rotation_euler = (0.0, 0.0, math.radians(azimuth) if self.turns else 0.0)

    def add(self, scene, mesh, catcher: bool):
        """A piece of paper; a catcher shows nothing but the shadows on it."""
        item = bpy.data.objects.new(mesh.name, mesh)
        mesh.materials.append(_paper())
        item.is_shadow_catcher = catcher
        item.parent = self.holder
        scene.collection.objects.link(item)
        return item

    def _lamps(self, scene, args: argparse.Namespace, radius: float, centre) -> None:
        background = _world_node(scene.world, "BACKGROUND")
        background.inputs["Strength"].default_value = STUDIO_AMBIENT * args.light_strength
        background.inputs["Color"].default_value = (1.0, 1.0, 1.0, 1.0)
        distance = 4.0 * radius
        for name, (right, elevation, size, radiance) in STUDIO_LIGHTS.items():
            lamp = bpy.data.objects.new(name, bpy.data.lights.new(name, "AREA"))
            lamp.data.shape, lamp.data.size = "DISK", size * distance
            # A lamp of power P and area A sends out P / (pi A); from afar that is P / (pi d^2) on a surface that faces it.
            lamp.data.energy = args.light_strength * radiance * math.pi**2 * distance**2
            axes = camera_axes(elevation, right + args.light_rotation)  # a lamp, as a camera, looks along -z
            matrix = np.eye(4)
            matrix[:3, :3], matrix[:3, 3] = axes, axes[:, 2] * distance + np.asarray(centre)
            lamp.visible_camera = False
            lamp.parent = self.holder
            lamp.matrix_local = Matrix(matrix.tolist())
            scene.collection.objects.link(lamp)


def picture_light(world, args: argparse.Namespace) -> None:
    """Light the world with an equirectangular picture: its centre column is +x, azimuths grow to the left."""
    tree = world.node_tree
    picture = tree.nodes.new("ShaderNodeTexEnvironment")
    try:
        picture.image = bpy.data.images.load(str(Path(args.light).absolute()))
    except RuntimeError as error:
        raise RenderError(f"--light: {args.light}: Blender cannot read it ({str(error).strip()})") from error
    if not picture.image.size[0]:
        raise RenderError(f"--light: {args.light}: Blender finds no picture in it")
    coordinates, mapping = tree.nodes.new("ShaderNodeTexCoord"), tree.nodes.new("ShaderNodeMapping")
    # The mapping turns the direction that is looked up, so the light turns the other way.
    mapping.inputs["Rotation"].default_value = (0.0, 0.0, -math.radians(args.light_rotation))
    tree.links.new(coordinates.outputs["Generated"], mapping.inputs["Vector"])
    tree.links.new(mapping.outputs["Vector"], picture.inputs["Vector"])
    background = _world_node(world, "BACKGROUND")
    tree.links.new(picture.outputs["Color"], background.inputs["Color"])
    background.inputs["Strength"].default_value = args.light_strength


def _paper():
    material = bpy.data.materials.get("paper") or bpy.data.materials.new("paper")
    surface = next(node for node in material.node_tree.nodes if node.type == "BSDF_PRINCIPLED")
    surface.inputs["Base Color"].default_value = (*PAPER, 1.0)
    surface.inputs["Roughness"].default_value = 1.0
    surface.inputs["Specular IOR Level"].default_value = 0.0
    return material


def _plane(height: float, half: float):
    mesh = bpy.data.meshes.new("floor")
    corners = [(x * half, y * half, height) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    mesh.from_pydata(corners, [], [(0, 1, 2, 3)])
    return mesh


def _sweep(floor: float, radius: float):
    """Paper that lies on the floor and bends up behind, for a camera on the +x side."""
    depth, bend, top, half = 3.5 * radius, 3.0 * radius, 30.0 * radius, 60.0 * radius
    profile = [(60.0 * radius, floor), (-depth, floor)]
    for angle in np.linspace(0.0, math.pi / 2, 33)[1:]:
        profile.append((-depth - bend * math.sin(angle), floor + bend * (1 - math.cos(angle))))
    profile.append((profile[-1][0], floor + top))
    mesh = bpy.data.meshes.new("backdrop")
    rows = [(x, side * half, z) for x, z in profile for side in (-1, 1)]
    mesh.from_pydata(rows, [], [(2 * i, 2 * i + 1, 2 * i + 3, 2 * i + 2) for i in range(len(profile) - 1)])
    mesh.polygons.foreach_set("use_smooth", [True] * len(mesh.polygons))
    return mesh


def _step(front: float, back: float, half: float, bottom: float, top: float):
    """A box from x = back to front; its edges are rounded by a modifier, since light shows no sharp ones."""
    mesh = bpy.data.meshes.new("step")
    corners = [(x, y, z) for z in (bottom, top) for x, y in ((back, -half), (front, -half), (front, half), (back, half))]
    sides = [(i, (i + 1) % 4, (i + 1) % 4 + 4, i + 4) for i in range(4)]
    mesh.from_pydata(corners, [], [(3, 2, 1, 0), (4, 5, 6, 7), *sides])
    return mesh


# ---- group


def frame_group(points: np.ndarray, axes: np.ndarray, focal: float, aspect: float) -> np.ndarray:
    """Position (3,) of the camera nearest to the points that sees all of them with a margin, looking along -axes[:, 2].

    A point at (r, u, b) in the camera's axes is seen if |r - r0| <= (D - b) t, with t the slope of the picture's edge, and alike for u.
    """
    local = points @ axes
    slopes = np.array([aspect, 1.0]) * 0.5 / focal * (1 - MARGIN)
    high = (local[:, :2] + local[:, 2:] * slopes).max(axis=0)
    low = (local[:, :2] - local[:, 2:] * slopes).min(axis=0)
    distance = float(((high - low) / (2 * slopes)).max())
    return axes @ np.array([*(high + low) / 2, distance])


def project(points: np.ndarray, axes: np.ndarray, position: np.ndarray, focal: float) -> np.ndarray:
    """Image coordinates (N, 2) in image heights from the centre, right and up."""
    local = (points - position) @ axes
    return focal * local[:, :2] / -local[:, 2:]


def hidden(front: list[np.ndarray], back: list[np.ndarray]) -> float:
    """How far, in image heights, the row in front reaches into the pictures (N, 2) of the row behind, at worst; negative is a gap."""
    worst = -math.inf
    for near in front:
        for far in back:
            if near[:, 0].min() < far[:, 0].max() and far[:, 0].min() < near[:, 0].max():
                worst = max(worst, float(near[:, 1].max() - far[:, 1].min()))
    return worst


def arrange(assets: list[Asset], rows: int, azimuth: float, elevation: float, focal: float, size: tuple) -> dict:
    """Stand the assets in rows, the first row behind and on the highest step.

    Returns:
        points: the vertices (V, 3) of each asset as it stands; axes, position, width: of the camera and the picture;
        steps: (front edge, back edge, top) of each row, from the front one, which stands on the floor at 0.
    """
    columns = math.ceil(len(assets) / rows)
    grid = [assets[row * columns : (row + 1) * columns] for row in range(rows)][::-1]  # from the front
    grid = [row for row in grid if row]
    turned = [[asset.place(azimuth) for asset in row] for row in grid]
    extents = [[points.max(axis=0) - points.min(axis=0) for points in row] for row in turned]
    # Columns are as wide as their widest, so that what belongs together stands one behind the other.
    widths = [max(row[column][1] for row in extents if column < len(row)) for column in range(max(map(len, extents)))]
    depths = [max(extent[0] for extent in row) for row in extents]
    gap = GAP * EXTENT
    middles = [-sum(depths[:row]) - depths[row] / 2 - 2 * gap * row for row in range(len(grid))]
    axes, tops = camera_axes(elevation, 0.0), [0.0] * len(grid)

    def stand() -> list[list[np.ndarray]]:
        result = []
        for row, (members, shapes) in enumerate(zip(grid, turned)):
            used = widths[: len(members)]
            left = -(sum(used) + gap * (len(used) - 1)) / 2
            placed = []
            for column, (asset, shape) in enumerate(zip(members, shapes)):
                low, high = shape.min(axis=0), shape.max(axis=0)
                y = left + sum(used[:column]) + gap * column + used[column] / 2
                place = np.array([middles[row], y, tops[row]]) - np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]])
                placed.append(asset.place(azimuth, tuple(place)))
            result.append(placed)
        return result

    for _ in range(6):  # a step moves the camera, which moves what it sees; a few rounds settle it
        placed = stand()
        everything = np.concatenate([points for row in placed for points in row])
        across = everything @ axes
        natural = float(np.ptp(across[:, 0]) / np.ptp(across[:, 1]))
        width = size[0] or 2 * round(size[1] * min(max(natural, GROUP_ASPECT[0]), GROUP_ASPECT[1]) / 2)
        position = frame_group(everything, axes, focal, width / size[1])
        seen = [[project(points, axes, position, focal) for points in row] for row in placed]
        distance = float(((position - everything.mean(axis=0)) @ axes)[2])
        raised, settled = 0.0, True
        for row in range(1, len(grid)):
            lacking = hidden(seen[row - 1], seen[row]) + CLEARANCE
            rise = max(tops[row] - tops[row - 1] + lacking * distance / focal / axes[2, 1], 0.0) - (tops[row] - tops[row - 1])
            raised += rise
            tops[row] += raised
            settled = settled and abs(rise) < 0.01
        if settled:
            break
    steps = [(middles[row] + depths[row] / 2 + gap, middles[row] - depths[row] / 2 - gap, tops[row]) for row in range(len(grid))]
    return {"points": everything, "axes": axes, "position": position, "width": width, "steps": steps}


# ---- pictures


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Blender's own reports, printed from C and from Python, go nowhere."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def write_picture(scene, path: Path, args: argparse.Namespace) -> None:
    """Render to a PNG file that appears when it is whole. Raises OSError if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".render-", dir=path.parent) as folder:
        temporary = Path(folder) / "picture.png"
        scene.render.filepath = str(temporary)
        with quiet():
            bpy.ops.render.render(write_still=True)
        if not temporary.is_file():
            raise OSError(f"{path}: Blender wrote no picture")
        if args.background != "light":
            _finish(temporary, args.background == "white", floor=not args.flat)
        os.replace(temporary, path)


def _finish(path: Path, onto_white: bool, floor: bool) -> None:
    """Rewrite a transparent PNG: without the floor's FAINT shadows, and laid onto white if asked, in display colours, so that white is 255
    whatever the view transform."""
    image = bpy.data.images.load(str(path))
    image.alpha_mode = "CHANNEL_PACKED"  # values as the file has them
    width, height = image.size
    pixels = np.empty(4 * width * height, np.float32)
    image.pixels.foreach_get(pixels)
    pixels = pixels.reshape(-1, 4)
    if floor:
        pixels[:, 3] = ((pixels[:, 3] - FAINT) / (1 - FAINT)).clip(0, 1)
    if onto_white:
        pixels[:, :3] = pixels[:, :3] * pixels[:, 3:] + 1 - pixels[:, 3:]
        pixels[:, 3] = 1
    result = bpy.data.images.new("finished", width, height, alpha=not onto_white)
    result.alpha_mode = "CHANNEL_PACKED"
    result.pixels.foreach_set(pixels.ravel())
    result.filepath_raw, result.file_format = str(path), "PNG"
    result.save()
    for used in (image, result):
        bpy.data.images.remove(used)


def write_film(frames: list[Path], path: Path, width: int, height: int) -> bool:
    """Write the frames as an H.264 film with Blender's own FFmpeg; False if it has none."""
    if not bpy.app.build_options.codec_ffmpeg:
        return False
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene = bpy.context.scene
    scene.view_settings.view_transform = "Standard"  # the frames are display colours already
    scene.render.resolution_x, scene.render.resolution_y, scene.render.resolution_percentage = width, height, 100
    scene.render.fps, scene.frame_start, scene.frame_end = FPS, 1, len(frames)
    strip = scene.sequence_editor_create().strips.new_image("frames", str(frames[0].absolute()), 1, 1, fit_method="ORIGINAL")
    for frame in frames[1:]:
        strip.elements.append(frame.name)
    image, film = scene.render.image_settings, scene.render.ffmpeg
    image.media_type, image.file_format, image.color_mode = "VIDEO", "FFMPEG", "RGB"
    film.format, film.codec, film.constant_rate_factor, film.audio_codec = "MPEG4", "H264", "HIGH", "NONE"
    with tempfile.TemporaryDirectory(prefix=".render-", dir=path.parent) as folder:
        temporary = Path(folder) / "film.mp4"
        scene.render.filepath = str(temporary)
        with quiet():
            bpy.ops.render.render(animation=True)
        if not temporary.is_file():
            raise OSError(f"{path}: Blender wrote no film")
        os.replace(temporary, path)
    return True


def single_scene(args: argparse.Namespace, path: Path):
    """A scene of one asset at the origin: scene, studio."""
    scene = new_scene(args, *args.size)
    asset = Asset(path, args.obj_up)
    if args.flat:
        asset.make_flat()
    floor = float(asset.points[:, 2].min())
    camera_height = args.distance * math.sin(math.radians(args.elevation))
    if camera_height < floor + 0.05:
        floor = -1000.0  # a floor would hide the asset from a camera below it
    return scene, Studio(scene, args, floor, 2 * EXTENT)


def look(scene, studio: Studio, args: argparse.Namespace, azimuth: float) -> None:
    axes = camera_axes(args.elevation, azimuth)
    place_camera(scene.camera, axes, axes[:, 2] * args.distance)
    studio.face(azimuth)


def render_stills(args: argparse.Namespace) -> None:
    for number, (asset, name) in enumerate(zip(args.assets, output_names(args.assets)), 1):
        path = picture_path(args, name)
        begin = time.monotonic()
        scene, studio = single_scene(args, asset)
        look(scene, studio, args, args.azimuth)
        write_picture(scene, path, args)
        print(f"{number}/{len(args.assets)}, {time.monotonic() - begin:.1f} s: {path}", flush=True)


def settings_of(args: argparse.Namespace, asset: Path) -> dict:
    """What a frame depends on, with the contents of files as digests."""
    names = ("frames", "elevation", "azimuth", "distance", "focal", "size", "samples", "light_rotation", "light_strength", "background")
    settings = {name: getattr(args, name) for name in (*names, "view", "obj_up", "flat")}
    files = asset_files(asset) + ([] if args.light == "studio" else [Path(args.light)])
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    lamps = {"studio": args.light == "studio", "blender": bpy.app.version_string}
    return json.loads(json.dumps(settings | lamps | {"files": digests}))  # as it is read back


def prepare_frames(folder: Path, settings: dict) -> None:
    """Keep the frames of an earlier run with the same settings, remove those of others."""
    note = folder / "settings.json"
    try:
        found = json.loads(note.read_text())
    except (OSError, ValueError):
        found = None
    if found == settings:
        return
    for frame in folder.glob("[0-9][0-9][0-9][0-9].png"):
        frame.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(settings, indent=2) + "\n")


def render_turntables(args: argparse.Namespace) -> None:
    for asset, name in zip(args.assets, output_names(args.assets)):
        folder = args.output / name
        settings = settings_of(args, asset)
        prepare_frames(folder, settings)
        frames = [folder / f"{index:04d}.png" for index in range(args.frames)]
        missing = [index for index, frame in enumerate(frames) if not frame.is_file()]
        if len(missing) < len(frames):
            print(f"{name}: {len(frames) - len(missing)} of {len(frames)} frames are there already", flush=True)
        if missing:
            scene, studio = single_scene(args, asset)
        begin = time.monotonic()
        for done, index in enumerate(missing, 1):
            look(scene, studio, args, args.azimuth + 360.0 * index / args.frames)
            write_picture(scene, frames[index], args)
            each = (time.monotonic() - begin) / done
            minutes, seconds = divmod(round(each * (len(missing) - done)), 60)
            print(f"{name}: frame {index + 1}/{args.frames}, {each:.1f} s a frame, {minutes:02d}:{seconds:02d} left", flush=True)
        film = args.output / f"{name}.mp4"
        if args.background == "transparent":
            print(f"{name}: {folder} (no film, which cannot be transparent)")
        elif write_film(frames, film, *args.size):
            print(f"{name}: {film}")
        else:
            print(f"{name}: {folder} (no film: this Blender has no FFmpeg)")


def render_group(args: argparse.Namespace) -> None:
    path = picture_path(args, "")
    begin = time.monotonic()
    scene = new_scene(args, 8, 8)
    assets = [Asset(asset, args.obj_up) for asset in args.assets]
    group = arrange(assets, args.rows, args.azimuth, args.elevation, args.focal, args.size)
    scene.render.resolution_x, scene.render.resolution_y = group["width"], args.size[1]
    place_camera(scene.camera, group["axes"], group["position"])
    points = group["points"]
    centre = (points.min(axis=0) + points.max(axis=0)) / 2
    radius = float(np.linalg.norm(points - centre, axis=1).max())
    studio = Studio(scene, args, 0.0, radius, tuple(centre))
    catcher = not (args.background == "light" and studio.turns)
    for front, back, top in group["steps"][1:]:
        if not args.flat and top > 0.01:
            step = studio.add(scene, _step(front, back - 60 * radius * catcher, 60 * radius, -0.1, top), catcher)
            bevel = step.modifiers.new("rounded", "BEVEL")
            bevel.width, bevel.segments = 0.04, 5
    for asset in assets:
        if args.flat:
            asset.make_flat()
    print(f"assets: {len(assets)}, rows: {args.rows}, pixels: {group['width']}x{args.size[1]}", flush=True)
    write_picture(scene, path, args)
    print(f"{time.monotonic() - begin:.1f} s: {path}")


def script_arguments() -> list[str]:
    """The command line, or what stands after -- where Blender itself runs the script."""
    if not Path(sys.argv[0]).name.lower().startswith("blender"):
        return sys.argv[1:]
    return sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 bpy is missing or the pictures cannot be written, 2 an argument is wrong."""
    args = build_parser().parse_args(script_arguments() if arguments is None else arguments)
    try:
        check(args)
        if bpy is None:
            version = ".".join(map(str, sys.version_info[:2]))
            print(f"render_blender: {NO_BPY.format(reason=BPY_ERROR, version=version)}", file=sys.stderr)
            return 1
        {"still": render_stills, "turntable": render_turntables, "group": render_group}[args.mode](args)
    except RenderError as error:
        print(f"render_blender: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"render_blender: --output: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
