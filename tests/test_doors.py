"""The house's doors: which room may import which. Read from the source, so that a lazy import inside a function counts too."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "custom" / "threestudio_pgc"

# Room -> rooms it may import. What is not listed here may be imported by nobody but the launch scripts and the tests.
ALLOWED = {
    "pixelgrad": set(),
    "diffusion": {"pixelgrad"},
    "scene": {"pixelgrad"},
    "export": {"scene"},
    "standalone": set(),
    "host": {"standalone"},
    "modules": {"pixelgrad", "diffusion", "scene", "export", "host"},
}
# Libraries of the host, which the method and its rooms must run without.
HOST_LIBRARIES = {"threestudio", "pytorch_lightning", "lightning", "omegaconf"}
PIXELGRAD_LIBRARIES = {"torch", "safetensors"}


def files(room):
    single = PACKAGE / f"{room}.py"
    return [single] if single.is_file() else sorted((PACKAGE / room).rglob("*.py"))


def imports(path):
    """(our room or None, top-level library or None) of every import in a file."""
    inside = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield None, name.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield None, node.module.split(".")[0]
                continue
            base = list(inside[: len(inside) - node.level])
            full = base + (node.module.split(".") if node.module else [])
            if full:
                yield full[0], None
            else:
                for name in node.names:
                    yield name.name, None


def test_every_room_is_known():
    found = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    found |= {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert found == set(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_no_arrow_runs_the_other_way(room):
    for path in files(room):
        for ours, library in imports(path):
            assert ours is None or ours == room or ours in ALLOWED[room], f"{path.relative_to(PACKAGE)} imports {ours}"
            assert library != "threestudio_pgc", f"{path.relative_to(PACKAGE)}: wanted a relative import"
            if room in ("pixelgrad", "diffusion", "scene", "export"):
                assert library not in HOST_LIBRARIES, f"{path.relative_to(PACKAGE)} imports {library}"


def test_pixelgrad_needs_torch_only():
    import sys

    for path in files("pixelgrad"):
        for _, library in imports(path):
            assert library is None or library in PIXELGRAD_LIBRARIES or library in sys.stdlib_module_names, f"{path.name} imports {library}"


def test_one_file_imports_nvdiffrast():
    users = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if "nvdiffrast" in {lib for _, lib in imports(path)}]
    assert users == ["scene/raster/nvdiffrast.py"]


def test_importing_the_package_costs_nothing():
    import subprocess
    import sys

    code = "import sys; import threestudio_pgc; print([m for m in ('torch', 'diffusers', 'pytorch_lightning') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
