"""Jobs of a study: what they are called with, and when a run that is there already stands for one. Runs themselves: test_compare.py."""

import json

import pytest

from launch_scripts.studies import Job, StudyError, _last_error, assign, flat, prepare, prompt_override, run_all, shipped
from threestudio_pgc.standalone.config import load_config


def job(folder, *overrides, label="one", prompt="a zebra vase"):
    return Job(label, folder, shipped("fantasia3d-pocket-pgc"), (prompt_override(prompt), *overrides), {"method": "m"})


def leave_a_run(job, **record):
    """What a run leaves behind that matters here."""
    from omegaconf import OmegaConf

    config = load_config(job.config, cli_args=job.arguments)
    (job.folder / "configs").mkdir(parents=True)
    OmegaConf.save(config, job.folder / "configs" / "parsed.yaml", resolve=True)
    if record:
        job.write_record(**record)


def test_no_jobs_are_done_at_once():
    prepare([])
    assert run_all([], ["none"]) == []


def test_nothing_is_flat():
    assert flat({}) == {}
    assert flat({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


@pytest.mark.parametrize("prompt", ['a "golden" teapot', "half a \\ vase", "on", "12", "a: b # c", "ein Kännchen 🫖", "[a, b]", "a=b"])
def test_a_prompt_arrives_as_it_was_written(prompt, tmp_path):
    config = load_config(shipped("fantasia3d-pocket-pgc"), cli_args=job(tmp_path / "study" / "on", prompt=prompt).arguments)
    assert config.system.prompt_processor.prompt == prompt
    assert config.trial_dir == str(tmp_path / "study" / "on")


def test_a_mesh_path_arrives_as_it_was_written(tmp_path):
    override = assign("system.geometry.mesh", tmp_path / "my: mesh #1.obj")
    assert job(tmp_path / "a" / "b", override).settings["system.geometry.mesh"] == str(tmp_path / "my: mesh #1.obj")


def test_an_unknown_key_is_refused_by_run_and_name(tmp_path):
    with pytest.raises(StudyError, match="one: trainer.max_stepz: no such key; did you mean 'max_steps'"):
        prepare([job(tmp_path / "a" / "b", "trainer.max_stepz=1")])


def test_a_record_that_is_missing_cut_short_or_of_a_failure_finishes_nothing(tmp_path):
    one = job(tmp_path / "a" / "b")
    assert not one.finished
    one.write_record(seconds=1.0, error="no such file")
    assert one.record["method"] == "m" and not one.finished
    (one.folder / "record.json").write_text('{"label": "one", "sec')
    assert not one.finished
    one.write_record(seconds=1.0)
    assert one.finished


def test_a_finished_run_is_not_done_again_and_takes_its_new_place(tmp_path):
    leave_a_run(job(tmp_path / "a" / "b"), seconds=7.0)
    moved = Job("two", tmp_path / "a" / "b", shipped("fantasia3d-pocket-pgc"), (prompt_override("a zebra vase"),), {"method": "n"})
    assert run_all([moved], ["none"]) == [{"label": "two", "method": "n", "seconds": 7.0}]
    assert json.loads((moved.folder / "record.json").read_text())["method"] == "n"


def test_the_same_settings_elsewhere_are_the_same(tmp_path):
    leave_a_run(job(tmp_path / "a" / "b"))
    (tmp_path / "a").rename(tmp_path / "c")
    assert job(tmp_path / "c" / "b").changes() == []


def test_a_run_with_other_settings_is_refused_by_the_keys_that_differ(tmp_path):
    leave_a_run(job(tmp_path / "a" / "b"), seconds=7.0)
    with pytest.raises(StudyError, match=r"with other settings \(seed: found 0, wanted 3\); --rerun"):
        prepare([job(tmp_path / "a" / "b", "seed=3")])
    many = ["seed=3", "trainer.max_steps=1", "data.width=64", "data.height=64", "system.geometry.up=y"]
    with pytest.raises(StudyError, match="data.height: found 128, wanted 64; .* and 2 more keys"):
        prepare([job(tmp_path / "a" / "b", *many)])


def test_a_stopped_run_with_other_settings_is_refused_too(tmp_path):
    one = job(tmp_path / "a" / "b")
    leave_a_run(one)
    one.checkpoint.parent.mkdir()
    one.checkpoint.write_bytes(b"")
    with pytest.raises(StudyError, match="seed: found 0, wanted 3"):
        prepare([job(tmp_path / "a" / "b", "seed=3")])


def test_a_run_that_failed_before_its_first_checkpoint_is_in_nobodys_way(tmp_path):
    leave_a_run(job(tmp_path / "a" / "b"), seconds=1.0, error="no such model")
    prepare([job(tmp_path / "a" / "b", "seed=3")])


def test_rerun_removes_what_is_in_the_way_and_nothing_else(tmp_path):
    same, other = job(tmp_path / "a" / "same", label="same"), job(tmp_path / "a" / "other", label="other")
    for one in (same, other):
        leave_a_run(one, seconds=7.0)
    prepare([same, job(other.folder, "seed=3", label="other")], rerun=True)
    assert same.finished and not other.folder.exists()


def test_nothing_is_removed_if_another_job_is_refused(tmp_path):
    other = job(tmp_path / "a" / "other")
    leave_a_run(other, seconds=7.0)
    with pytest.raises(StudyError, match="no such key"):
        prepare([job(other.folder, "seed=3"), job(tmp_path / "a" / "bad", "sed=3")], rerun=True)
    assert other.finished


@pytest.mark.parametrize(
    ("told", "code", "wanted"),
    [
        (b"", 3, "exit code 3, and nothing said"),
        (b"step 1\nerror: no such mesh\nsee the manual\n", 1, "no such mesh"),
        (b"Traceback\n  File x\nKeyError: 'a'\n\n", 1, "KeyError: 'a'"),
        (b"step 1\rstep 2\n\xff", -9, "killed by SIGKILL; it said last: \N{REPLACEMENT CHARACTER}"),
    ],
)
def test_the_last_error_is_the_launchers_own_where_it_has_one(told, code, wanted):
    assert _last_error(told, code) == wanted
