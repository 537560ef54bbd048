import errno
import os
import stat

import pytest

from threestudio_pgc.export.files import ExportError, atomic_path, require_space, write_bytes


def test_nothing_to_write_makes_an_empty_file(tmp_path):
    assert write_bytes(tmp_path / "new" / "folder" / "a.bin").read_bytes() == b""


def test_parts_follow_each_other_and_replace_what_was_there(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old and longer")
    assert write_bytes(path, b"12", b"345") == path
    assert path.read_bytes() == b"12345"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_written_file_has_ordinary_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    written = write_bytes(tmp_path / "a.bin", b"1")
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_write_the_system_refuses_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, limit_file_size):
    path = tmp_path / "mesh.glb"
    path.write_bytes(b"old")
    with limit_file_size(1000), pytest.raises(ExportError, match="mesh.glb: cannot be written .*; the file that was there is unchanged"):
        write_bytes(path, bytes(10_000))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["mesh.glb"]


def test_a_full_disk_noticed_at_the_last_moment_keeps_the_old_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "mesh.glb"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match="mesh.glb: cannot be written .No space left on device, .* MB free"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["mesh.glb"]


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "film.mp4") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_path_that_cannot_be_a_file_is_named(tmp_path):
    (tmp_path / "folder.glb").mkdir()
    with pytest.raises(ExportError, match="folder.glb: cannot be written .Is a directory"):
        write_bytes(tmp_path / "folder.glb", b"1")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ExportError, match="file/a.glb: cannot be written"):
        write_bytes(tmp_path / "file" / "a.glb", b"1")


def test_space_is_asked_of_the_nearest_folder_that_exists(tmp_path):
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(ExportError, match=r"not/yet: about 10{13} MB are needed, \d+ MB are free"):
        require_space(tmp_path / "not" / "yet", 10**18 * 10)
