"""Files that take another's place: whole, or not at all."""

import os
import stat

import pytest

from objslot.models import files


def test_what_was_there_stays_until_all_is_written(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    seen = []

    def write(temporary):
        temporary.write_text("half")
        seen.append((path.read_text(), temporary.parent == tmp_path, temporary != path))
        temporary.write_text("new")

    files.write_whole(path, write)
    assert seen == [("old", True, True)]
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_half_way_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_whole(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_written_files_are_as_readable_as_any(tmp_path):
    (tmp_path / "plain").touch()
    files.write_whole(tmp_path / "file", lambda temporary: temporary.write_text("x"))
    modes = {stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("plain", "file")}
    assert len(modes) == 1
