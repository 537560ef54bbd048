import numpy as np
import pytest

from threestudio_pgc.export.files import ExportError
from threestudio_pgc.export.obj import write_obj

VERTICES = np.array([[0, 0, 0], [0.1, 0, 0], [448262.123456, 0.7, 1 / 3]])
FACES = np.array([[0, 1, 2], [2, 1, 0]])
NORMALS = np.array([[0, 0, 1.0], [0, 1, 0], [0.6, 0.8, 0]])
UVS = np.array([[0, 0], [1 / 3, 0.25], [1, 1], [0.1, 0.2]], np.float32)
UV_FACES = np.array([[0, 1, 2], [3, 1, 0]])
PICTURES = {"map_Kd": "a.b.png", "map_Pr": "a.b_roughness.png"}


def parse_obj(path):
    """Rows of an OBJ by their keyword, numbers as float64, faces as (F, 3, 3) zero-based v/vt/vn."""
    rows = {}
    for line in path.read_text().splitlines():
        keyword, *values = line.split()
        rows.setdefault(keyword, []).append(values)
    numbers = {keyword: np.array(rows.get(keyword, []), np.float64) for keyword in ("v", "vt", "vn")}
    faces = np.array([[corner.split("/") for corner in face] for face in rows.get("f", [])], np.int64) - 1
    return numbers, faces, rows


def write(path):
    return write_obj(path, VERTICES, FACES, NORMALS, UVS, UV_FACES, PICTURES)


def test_no_faces_writes_a_file_that_can_be_parsed(tmp_path):
    none = np.zeros((0, 3))
    path = write_obj(tmp_path / "a.obj", none, none.astype(int), none, none[:, :2], none.astype(int), {})["obj"]
    numbers, faces, _ = parse_obj(path)
    assert len(numbers["v"]) == len(faces) == 0


def test_numbers_survive(tmp_path):
    numbers, faces, _ = parse_obj(write(tmp_path / "a.obj")["obj"])
    np.testing.assert_allclose(numbers["v"], VERTICES, rtol=1e-11, atol=0)
    assert np.array_equal(numbers["v"].astype(np.float32), VERTICES.astype(np.float32))
    assert np.array_equal(numbers["vt"].astype(np.float32), UVS)
    np.testing.assert_allclose(numbers["vn"], NORMALS, atol=1e-6)
    assert np.array_equal(faces, np.stack([FACES, UV_FACES, FACES], -1))


def test_files_refer_to_each_other(tmp_path):
    written = write(tmp_path / "a.b.obj")
    assert {key: path.name for key, path in written.items()} == {"obj": "a.b.obj", "mtl": "a.b.mtl"}
    _, _, rows = parse_obj(written["obj"])
    material = dict(line.split(maxsplit=1) for line in written["mtl"].read_text().splitlines())
    assert rows["mtllib"] == [["a.b.mtl"]] and rows["usemtl"] == [[material["newmtl"]]]
    assert {keyword: material[keyword] for keyword in PICTURES} == PICTURES


def test_material_is_opaque_and_matte_for_every_reader(tmp_path):
    material = dict(line.split(maxsplit=1) for line in write(tmp_path / "a.obj")["mtl"].read_text().splitlines())
    assert "Tr" not in material and float(material["d"]) == 1
    assert material["Kd"] == "1 1 1" and material["Ks"] == "0 0 0"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="file/a.mtl: cannot be written"):
        write(tmp_path / "file" / "a.obj")
