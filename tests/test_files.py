"""common/files.py: files that are written whole or not at all, JSON."""

import json
import os

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
