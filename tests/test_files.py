"""common/files.py: files that are written whole or not at all, JSON."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import atomic, read_json, write_json


def test_a_crash_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic(path) as f:
        f.write(b"half of the new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.pt"]


def test_the_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"old")
    with atomic(path) as f:
        f.write(b"new")
        f.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x.pt"]


def refusing(monkeypatch, number, folders_only):
    """fsync fails: of folders only, or of everything."""
    fsync = os.fsync

    def refuse(descriptor):
        if not folders_only or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)


@pytest.mark.parametrize("folders_only", [True, False])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync(number, folders_only, tmp_path, monkeypatch):
    refusing(monkeypatch, number, folders_only)
    write_json(tmp_path / "x.json", dict(a=1))
    assert read_json(tmp_path / "x.json") == dict(a=1)
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_data_that_did_not_reach_the_disk(number, tmp_path, monkeypatch):
    refusing(monkeypatch, number, folders_only=False)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_json(tmp_path / "x.json", dict(a=1))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_opened(tmp_path, monkeypatch):
    """Written but not read; every folder on Windows."""
    real = os.open

    def refuse(path, *args, **kwargs):
        if Path(path) == tmp_path:
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    write_json(tmp_path / "x.json", dict(a=1))
    assert read_json(tmp_path / "x.json") == dict(a=1)


def test_json(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, dict(a=[1, None]))
    assert read_json(path) == dict(a=[1, None])
    with pytest.raises(TypeError):
        write_json(path, dict(a=object()))
    assert json.loads(path.read_text()) == dict(a=[1, None])


@pytest.mark.parametrize("text", ["", "{", "[]", "NaN", '"a"'])
def test_bad_json(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="x.json"):
        read_json(tmp_path / "x.json")
