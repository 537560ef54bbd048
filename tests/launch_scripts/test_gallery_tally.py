"""The tally of a study: counting, intervals, and results that do not belong."""

import json

import pytest

from launch_scripts import gallery
from launch_scripts.gallery_page.build import STUDY_FORMAT, key_file
from launch_scripts.gallery_page.tally import spelled, tally, wilson

PROMPTS = [f"prompt {index}" for index in range(12)]
METHODS = ["plain", "plain+pgc", "sdxl", "sdxl+pgc"]
STUDY = "0123456789ab"


def asset(row, column):
    return f"asset-{row}-{column}"


@pytest.fixture
def study(tmp_path):
    """The key of a study of 12 prompts and 4 methods; returns the study's folder."""
    assets = {asset(row, column): [row, column] for row in range(len(PROMPTS)) for column in range(len(METHODS))}
    key = {"format": STUDY_FORMAT + " key", "study": STUDY, "prompts": PROMPTS, "methods": METHODS, "assets": assets}
    key_file(tmp_path / "study").write_text(json.dumps(key))
    return tmp_path / "study"


def result_file(folder, name, columns, **changes):
    """columns: the method picked for each prompt."""
    picks = [{"row": row, "pick": asset(row, column)} for row, column in enumerate(columns)]
    result = {"format": STUDY_FORMAT + " result", "study": STUDY, "participant": name, "seed": 0, "picks": picks} | changes
    file = folder.parent / f"study-{name}.json"
    file.write_text(json.dumps(result))
    return file


def test_wilsons_interval_of_nothing_and_of_all():
    assert wilson(0, 10) == pytest.approx((0, 0.27754), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((0.72246, 1), abs=1e-5)
    assert wilson(1, 2) == pytest.approx((0.09453, 0.90547), abs=1e-5)


def test_wilsons_interval_by_hand():
    """The paper's 84.44 % and 5 % of 180 picks, worked out on paper with z = 1.96."""
    assert wilson(152, 180) == pytest.approx((0.78436, 0.89013), abs=2e-4)
    assert wilson(9, 180) == pytest.approx((0.02653, 0.09228), abs=2e-4)


def test_the_papers_study_gives_the_papers_percentages(study):
    """15 people, 180 picks: 152, 19 and 9; sdxl without clipping none."""
    all_picks = [3] * 152 + [1] * 19 + [0] * 9
    files = [result_file(study, f"person{index}", all_picks[12 * index : 12 * index + 12]) for index in range(15)]
    found = tally(files, study)
    assert (found.study, found.people, found.picks) == (STUDY, 15, 180)
    assert [(share.method, share.picks) for share in found.shares] == [("sdxl+pgc", 152), ("plain+pgc", 19), ("plain", 9), ("sdxl", 0)]
    assert [round(100 * share.share, 2) for share in found.shares] == [84.44, 10.56, 5.0, 0.0]
    assert found.shares[0].low == pytest.approx(0.7844, abs=1e-4)


def test_the_table_has_every_method_and_says_what_the_intervals_assume(study):
    text = spelled(tally([result_file(study, "one", [3] * 12)], study))
    assert "1 person, 12 picks" in text and "picks as independent" in text
    assert "sdxl+pgc      12  100.00%  75.75% to 100.00%" in text
    assert "plain          0    0.00%  0.00% to 24.25%" in text


def test_a_result_of_another_study_is_refused_by_name(study):
    file = result_file(study, "one", [0] * 12, study="ffffffffffff")
    with pytest.raises(ValueError, match=f"study-one.json: study: found 'ffffffffffff', wanted '{STUDY}'"):
        tally([file], study)


def test_a_participant_counts_once(study):
    file = result_file(study, "one", [0] * 12)
    copy = file.with_name("copy.json")
    copy.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="copy.json: found participant one, who is in .*study-one.json already"):
        tally([file, copy], study)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "other"}, "format: found 'other'"),
        ({"participant": None}, "participant: found None"),
        ({"picks": None}, "picks: found None"),
        ({"picks": [{"row": 0}]}, "picks: found"),
        ({"picks": []}, "picks: found 0 for 0 prompts, wanted one for each of 12"),
        ({"picks": [{"pick": asset(0, 0)}] * 12}, "picks: found 12 for 1 prompts"),
        ({"picks": [{"pick": "sdxl+pgc"}]}, "picks: found 'sdxl\\+pgc', wanted models"),
    ],
)
def test_a_malformed_result_is_refused_by_name(study, changes, said):
    file = result_file(study, "one", [0] * 12, **changes)
    with pytest.raises(ValueError, match=f"study-one.json: {said}"):
        tally([file], study)


@pytest.mark.parametrize("text", ["", "[]", '{"format"', "\xff\xfe"])
def test_a_file_that_is_no_result_is_refused_by_name(study, text):
    file = study.parent / "x.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="x.json: "):
        tally([file], study)
    with pytest.raises(ValueError, match="missing.json: cannot be read"):
        tally([study.parent / "missing.json"], study)


def test_without_a_key_the_error_says_which_folder_is_wanted(tmp_path):
    with pytest.raises(ValueError, match="--gallery: found no .*elsewhere-key.json, wanted the folder"):
        tally([tmp_path / "x.json"], tmp_path / "elsewhere")


def test_the_command_prints_the_table(study, capsys):
    file = result_file(study, "one", [1] * 12)
    assert gallery.main(["tally", str(file), "--gallery", str(study)]) == 0
    assert "plain+pgc     12  100.00%" in capsys.readouterr().out
    assert gallery.main(["tally", str(file), str(file), "--gallery", str(study)]) == 2
    assert capsys.readouterr().err.startswith("gallery: ")
