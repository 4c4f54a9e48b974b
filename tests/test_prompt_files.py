"""common/teachers/prompt_files.py: files of prompts as people have them."""

import json
import re

import pytest

from common.errors import UserError
from common.teachers.prompt_files import ADVICE, read_prompts

WANTED = ["a red heart", "Füße, 日本", "a dog"]
LINES = "a red heart\nFüße, 日本\na dog\n"


def table(delimiter, header, *rows):
    return "\n".join(delimiter.join(row) for row in [header, *rows]) + "\n"


CSV = table(",", ["id", "prompt"], ["1", "a red heart"], ["2", '"Füße, 日本"'], ["3", "a dog"])
RIGHT = {
    "plain": ("p.txt", LINES.encode()),
    "without a suffix": ("prompts", LINES.encode()),
    "of another name": ("prompts.2026-11", LINES.encode()),
    "byte order mark": ("p.txt", LINES.encode("utf-8-sig")),
    "UTF-16, little end": ("p.txt", b"\xff\xfe" + LINES.encode("utf-16-le")),
    "UTF-16, big end": ("p.txt", b"\xfe\xff" + LINES.encode("utf-16-be")),
    "UTF-32": ("p.txt", LINES.encode("utf-32")),
    "joined by cat": ("p.txt", b"a red heart\n" + "\ufeffFüße, 日本\na dog".encode()),
    "CR LF": ("p.txt", LINES.replace("\n", "\r\n").encode()),
    "CR": ("p.txt", LINES.replace("\n", "\r").encode()),
    "no newline at the end": ("p.txt", LINES.strip().encode()),
    "blank lines and spaces": ("p.txt", LINES.replace("\n", "  \n\n \t\n").encode()),
    "jsonl of strings": ("p.jsonl", "\n".join(map(json.dumps, WANTED)).encode()),
    "jsonl of objects": (
        "p.jsonl",
        "\r\n".join(json.dumps(dict(seed=1, caption=text)) for text in WANTED).encode("utf-8-sig"),
    ),
    "jsonl, blank lines": ("p.JSONL", "\n\n".join(map(json.dumps, WANTED)).encode()),
    "several captions": (
        "p.jsonl",
        b'{"text": ["a red heart", "F\\u00fc\\u00dfe, \\u65e5\\u672c"]}\n{"text": "a dog"}\n',
    ),
    "json list": ("p.json", json.dumps(WANTED).encode("utf-16")),
    "json, empty ones": ("p.json", json.dumps([WANTED[0], None, "", *WANTED[1:]]).encode()),
    "json list of objects": ("p.json", json.dumps([dict(Prompt=text) for text in WANTED]).encode()),
    "COCO's captions": (
        "p.json",
        json.dumps(dict(info={}, annotations=[dict(id=1, caption=t) for t in WANTED])).encode(),
    ),
    "objects by name": (
        "p.json",
        json.dumps({f"{i}": dict(category="x", prompt=t) for i, t in enumerate(WANTED)}).encode(),
    ),
    "csv": ("p.csv", CSV.encode()),
    "csv with a byte order mark": ("p.csv", CSV.encode("utf-8-sig")),
    "csv, CR LF": ("p.csv", CSV.replace("\n", "\r\n").encode()),
    "csv with semicolons": (
        "p.csv",
        table(";", ["id", "TEXT"], ["1", WANTED[0]], ["2", WANTED[1]], ["3", WANTED[2]]).encode(),
    ),
    "csv, blank rows": ("p.csv", CSV.replace("\n", "\n,\n\n").encode()),
    "csv of one column": (
        "p.csv",
        b"caption\n"
        + CSV.split("\n", 1)[1]
        .encode()
        .replace(b"1,", b"")
        .replace(b"2,", b"")
        .replace(b"3,", b""),
    ),
    "tsv": (
        "p.tsv",
        table("\t", ["Prompt", "Category"], *[[text, "x"] for text in WANTED]).encode(),
    ),
}


@pytest.mark.parametrize("name, content", RIGHT.values(), ids=RIGHT)
def test_files_that_are_read(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == WANTED


def test_a_line_break_in_a_cell(tmp_path):
    (tmp_path / "p.csv").write_text('prompt,n\n"two\nlines",1\nb,2\n')
    assert read_prompts(tmp_path / "p.csv") == ["two\nlines", "b"]


@pytest.mark.parametrize("suffix, delimiter", [("csv", ","), ("tsv", "\t")])
def test_a_named_column(suffix, delimiter, tmp_path):
    path = tmp_path / f"p.{suffix}"
    path.write_text(table(delimiter, ["prompt", "long one"], ["a", "b"], ["c", "d"]))
    assert read_prompts(path) == ["a", "c"]
    assert read_prompts(f"{path}:long one") == ["b", "d"]


@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_a_named_entry(name, tmp_path):
    line = json.dumps(dict(prompt="a", caption="b"))
    (tmp_path / name).write_text(f"[{line}]" if name == "p.json" else line)
    assert read_prompts(f"{tmp_path / name}:caption") == ["b"]


def test_a_file_with_a_colon_in_its_name(tmp_path):
    (tmp_path / "p:prompt").write_text("a\nb\n")
    assert read_prompts(tmp_path / "p:prompt") == ["a", "b"]


def test_prompts_that_look_like_something_else(tmp_path):
    """Lines that begin as JSON, tables, code or headings do are prompts all the same."""
    lines = ["[cat], a photo", "# a street", "a red heart, prompt, text", "<lora:x:1> a dog", "1"]
    lines += ["import from the sea", '"quoted"', "--- a line ---", "null"]
    for first in lines:
        others = [line for line in lines if line != first]
        (tmp_path / "p.txt").write_text("\n".join([first, *others]))
        assert read_prompts(tmp_path / "p.txt") == [first, *others]


def test_a_single_prompt(tmp_path):
    (tmp_path / "p.txt").write_text("a red heart\n")
    assert read_prompts(tmp_path / "p.txt") == ["a red heart"]


WRONG = {
    "empty": ("p.txt", b"", "found an empty file"),
    "blank": ("p.txt", b"\n \r\n\t\n", "found an empty file"),
    "only a byte order mark": ("p.txt", b"\xef\xbb\xbf", "found an empty file"),
    "latin-1": ("p.txt", "a\nb\nFüße\n".encode("latin-1"), "line 3: .*UTF-8.*0xfc.*iconv"),
    "latin-1, CR LF": ("p.txt", "a\r\nFüße".encode("latin-1"), "line 2: .*UTF-8"),
    "half a character": ("p.txt", b"\xff\xfea", "line 1: expected UTF-16-LE"),
    "UTF-16 without a mark": ("p.txt", "a\nb".encode("utf-16-le"), "UTF-16 without a byte order"),
    "binary": ("p.txt", bytes(range(256)), "zero bytes: a binary file"),
    "control characters": ("p.txt", b"a\n\x01\x02\n", "control characters"),
    "a control character further on": ("p.txt", b"a\n" * 2000 + b"\x01", "line 2001: .*x01"),
    "too long": ("p.txt", b"ok\n" + b"a" * 10_000_000, "line 2: .*at most 4000.* 10000000"),
    "one long line": ("p.txt", b"a red heart and a dog " * 20, "a single line of 439 characters"),
    "written-out line breaks": ("p.txt", rb"a dog\na cat", r"a single line .* \\n written out"),
    "HTML": ("p.txt", b"<!DOCTYPE html>\n<html>", "found HTML"),
    "HTML error": ("p.csv", b"\n<html><body>404</body></html>", "found HTML"),
    "XML": ("p.txt", b'<?xml version="1.0"?>\n<a/>', "found HTML or XML"),
    "LFS": ("p.txt", b"version https://git-lfs.github.com/spec/v1\noid x\n", "git lfs pull"),
    "script": ("p.txt", b"#!/bin/sh\nls\n", "found a script"),
    "code": ("p.txt", b"import os\nimport sys\nprint()\n", "found Python code"),
    "PDF": ("p.txt", b"%PDF-1.4\nx\ny", "a document"),
    "json named txt": ("p.txt", b'[\n"a",\n"b"\n]', "found JSON; name it"),
    "jsonl named txt": ("p.txt", b'{"prompt": "a"}\n{"prompt": "b"}\n', "found JSON; name it"),
    "csv named txt": ("p.txt", CSV.encode(), "found a table; name it .csv"),
    "tsv named txt": ("p.txt", b"Prompt\tCategory\na\tb\n", "found a table; name it .tsv"),
    "column of lines": ("p.txt:prompt", LINES.encode(), "a column needs a file .csv"),
    "jsonl, broken": ("p.jsonl", b'"a"\n{"text": \n', "line 2: expected a JSON value"),
    "jsonl, number": ("p.jsonl", b'"a"\n3\n', "line 2: expected a string, found '3'"),
    "jsonl, nested": ("p.jsonl", b'{"text": ["a", ["b"]]}\n', "line 1: expected a string"),
    "jsonl, no key": ("p.jsonl", b'{"url": "a", "size": 3}\n', "found 'url', 'size'; choose"),
    "jsonl, one without": (
        "p.jsonl",
        b'{"text": "a"}\n{"caption": "b"}',
        "line 2: expected an entry 'text', found 'caption'",
    ),
    "jsonl, two keys": ("p.jsonl", b'{"text": "a", "prompt": "b"}', "found 'text', 'prompt'; cho"),
    "jsonl, half a pair": ("p.jsonl", b'"\\ud800"\n', r"line 1: .*character '.ud800'"),
    "jsonl, zero": ("p.jsonl", b'"a\\u0000b"\n', r"line 1: .*character '.x00'"),
    "jsonl, deep": ("p.jsonl", b"[" * 100_000, "line 1: expected a JSON value"),
    "json, number": ("p.json", b"3", "expected a list of prompts, found int"),
    "json, lines": ("p.json", b'{"text": "a"}\n{"text": "b"}', "name it .jsonl"),
    "json, empty": ("p.json", b"[]", "found an empty file"),
    "json, an object": ("p.json", b'{"a": 1}', "expected a list of prompts, found dict"),
    "csv without a header": ("p.csv", b"a dog,1\na cat,2\n", "found 'a dog', '1'; choose"),
    "csv, two columns": ("p.csv", b"text,prompt\na,b\n", "found 'text', 'prompt'; choose"),
    "csv, no such column": ("p.csv:promt", b"id,prompt\n1,a\n", "expected one of.*did you mean"),
    "csv, short row": ("p.csv", b"id,prompt\n1,a\n2\n", "line 3: expected 2 columns, found 1"),
    "csv, comma": ("p.csv", b"id,prompt\n1,a, b\n", "line 2: expected 2 columns, found 3"),
    "csv, open quote": ("p.csv", b'id,prompt\n1,"a\n2,b\n', "line 3: expected a table"),
    "csv, only a header": ("p.csv", b"id,prompt\n", "found an empty file"),
    "csv, huge cell": ("p.csv", b"prompt\n" + b"a" * 200_000, "line 2: .*field larger"),
}


@pytest.mark.parametrize("name, content, says", WRONG.values(), ids=WRONG)
def test_files_that_are_refused(name, content, says, tmp_path):
    (tmp_path / name.split(":")[0]).write_bytes(content)
    with pytest.raises(UserError, match=f"--prompts .*{says}") as e:
        read_prompts(tmp_path / name)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("suffix", ADVICE)
def test_files_that_must_be_converted(suffix, tmp_path):
    (tmp_path / f"p{suffix}").write_bytes(b"PAR1\x00")
    with pytest.raises(UserError, match=re.escape(ADVICE[suffix])):
        read_prompts(tmp_path / f"p{suffix}")


@pytest.mark.parametrize("name, says", [("none.txt", "No such file"), (".", "Is a directory")])
def test_no_file(name, says, tmp_path):
    with pytest.raises(UserError, match=f"--prompts .*{says}"):
        read_prompts(tmp_path / name)


def test_a_name_that_no_file_can_have():
    with pytest.raises(UserError, match="--prompts"):
        read_prompts("a\0b")


def test_a_file_that_is_too_large(tmp_path):
    with open(tmp_path / "p.txt", "wb") as f:
        f.truncate(2**30 + 1)
    with pytest.raises(UserError, match="at most 1073741824 bytes"):
        read_prompts(tmp_path / "p.txt")
