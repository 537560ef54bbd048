"""A known base colour under two lights."""

import pytest

from launch_scripts.show_light import main, run


def test_a_missing_mesh_is_refused(tmp_path, capsys):
    assert main(["--mesh", str(tmp_path / "no.obj"), "--out", str(tmp_path)]) == 2
    assert "--mesh:" in capsys.readouterr().err


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    from launch_scripts.show_light import build_parser

    folder = tmp_path_factory.mktemp("light")
    return run(build_parser().parse_args(["--out", str(folder), "--size", "64", "--steps", "200"]))


def test_a_sheet_of_truth_and_both_materials_is_written(measured):
    from PIL import Image

    sheet, _ = measured
    with Image.open(sheet) as picture:
        assert picture.width > 3 * 64 and picture.height > 3 * 64


def test_light_does_not_bake_into_the_base_colour_of_a_material_that_knows_it(measured):
    """Both explain what they were shown; only the material has the colour right, and so its look in another light."""
    _, psnr = measured
    material, alone = psnr["material"], psnr["colour alone"]
    assert min(material["fitted light"], alone["fitted light"]) > 20
    assert material["base colour"] > alone["base colour"] + 3
    assert material["another light"] > alone["another light"] + 3
