"""--prompts FILE -> list of prompts. What is no list of prompts is refused by name."""

import codecs
import csv
import io
import json
import re
from pathlib import Path

from common.errors import UserError, did_you_mean, require
from data.image_folder import LONGEST

COLUMNS = ("prompt", "prompts", "text", "texts", "caption", "captions")  # in capitals as well
LISTS = ("prompts", "captions", "texts", "annotations", "data")  # in a JSON object
LARGEST = 2**30  # bytes
ONE_LINE = 300  # characters; text encoders of Stable Diffusion read about 300
BYTE_ORDER_MARKS = (  # that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
ADVICE = {  # files of prompts that must be converted first
    ".parquet": "expected text; write it with pandas: read_parquet(FILE).to_csv('prompts.csv')",
    ".arrow": "expected text; write it with datasets: Dataset.from_file(FILE).to_csv('p.csv')",
    ".xlsx": "expected text; save the sheet as CSV",
    ".gz": "expected text; gunzip it first",
    ".zip": "expected text; unzip it first",
}
OTHER_KINDS = {  # how files begin that are text, but no list of prompts
    r"\s*<(!doctype|html|head|body|\?xml|svg)\b": "HTML or XML",
    r"version https://git-lfs\.github\.com": "a pointer of Git LFS (git lfs pull fetches the file)",
    r"#!": "a script",
    r"%PDF|\{\\rtf": "a document",
    r"%YAML|---\s*[\r\n]": "YAML",
    r"(import|from) \w+(\.\w+)*( import .*)?[\r\n]+(import|from|def|class|#)": "Python code",
}


def read_prompts(path):
    """--prompts FILE or FILE:COLUMN -> list of str, without empty ones.

    .jsonl: on each line a string, or an object with a COLUMN. .json: a list of these. .csv, .tsv:
    the COLUMN of a table with a header. Any other text: one prompt a line. COLUMN is one of COLUMNS
    unless it is named. Where a value is a list of strings, each of them is a prompt. UTF-8, or
    UTF-16 and UTF-32 with a byte order mark.

    UserError, with the line where there is one: not readable, another kind of file, no prompt in
    it, a prompt that is too long.
    """
    path, column = split_column(str(path))
    flag = f"--prompts {path}"
    content = read_bytes(flag, path)
    text = decode(flag, path, content)
    refuse_other_kinds(flag, text)
    suffix = Path(path).suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        pairs = read_json_lines(flag, text, column)
    elif suffix == ".json":
        pairs = read_json_list(flag, text, column)
    elif suffix in (".csv", ".tsv"):
        pairs = read_table(flag, text, suffix, column)
    else:
        require(
            column is None,
            f"{flag}:{column}: a column needs a file .csv, .tsv, .json or .jsonl",
        )
        pairs = read_lines(flag, text)
    prompts = [check_prompt(flag, where, prompt) for where, prompt in pairs]
    prompts = [prompt for prompt in prompts if prompt]
    require(prompts, f"{flag}: expected prompts, found an empty file")
    return prompts


def split_column(path):
    """FILE:COLUMN -> FILE, COLUMN (None if there is no colon, or if a file has one in its name)."""
    name, colon, column = path.rpartition(":")
    if not colon or not name or Path(path).exists():
        return path, None
    return name, column


def read_bytes(flag, path):
    try:
        size = Path(path).stat().st_size
        require(
            size <= LARGEST,
            f"{flag}: expected at most {LARGEST} bytes of text, found {size}",
        )
        return Path(path).read_bytes()
    except (OSError, ValueError) as e:  # ValueError: a name with a zero byte
        raise UserError(f"{flag}: {getattr(e, 'strerror', None) or e}") from None


def decode(flag, path, content):
    """Text of a file, without its byte order mark."""
    advice = ADVICE.get(Path(path).suffix.lower())
    require(advice is None, f"{flag}: {advice}")
    marked = [pair for pair in BYTE_ORDER_MARKS if content.startswith(pair[0])]
    mark, encoding = marked[0] if marked else (b"", "utf-8")
    if not marked:
        require(
            b"\0" not in content,
            f"{flag}: expected text, found zero bytes: a binary file, or UTF-16 without a byte "
            "order mark",
        )
    try:
        return content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as e:
        before = content[len(mark) :][: e.start].decode(encoding, "ignore")
        line = len(re.findall(r"\r\n|\r|\n", before)) + 1
        bad = content[len(mark) + e.start]
        raise UserError(
            f"{flag}: line {line}: expected {encoding.upper()} text, found the byte 0x{bad:02x}; "
            "for Western European text: iconv -f LATIN1 -t UTF-8"
        ) from None


def refuse_other_kinds(flag, text):
    start = text[:2000]
    for pattern, kind in OTHER_KINDS.items():
        require(
            not re.match(pattern, start, re.IGNORECASE),
            f"{flag}: expected prompts, found {kind}",
        )
    control = re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]", start)
    require(control is None, f"{flag}: expected text, found control characters: a binary file")


# ---- kinds of files; each returns pairs (where, prompt) ------------------------------------------


def read_lines(flag, text):
    """One prompt a line. Lines end with LF, CR LF or CR."""
    lines = re.split(r"\r\n|\r|\n", text)
    filled = [line.strip() for line in lines if line.strip()]
    if filled:
        refuse_tables(flag, filled)
    if len(filled) == 1:
        escaped = "\\n" in filled[0]
        require(
            not escaped and len(filled[0]) <= ONE_LINE,
            f"{flag}: expected one prompt per line, found a single line of {len(filled[0])} "
            + ("characters, with \\n written out" if escaped else "characters"),
        )
    return [(f"line {i}: ", line) for i, line in enumerate(lines, 1)]


def refuse_tables(flag, lines):
    """UserError for JSON or a table in a file whose name says that it has one prompt a line."""
    first = lines[0]
    is_json = first in ("[", "{") or isinstance(parse(first), (dict, list))
    require(not is_json, f"{flag}: found JSON; name it .jsonl (one value a line) or .json")
    for suffix, delimiter in ((".tsv", "\t"), (".csv", ",")):
        names = [name.strip().strip('"').lower() for name in first.split(delimiter)]
        is_header = len(names) > 1 and any(name in COLUMNS for name in names)
        is_header = is_header and all(re.fullmatch(r"[\w .-]{0,40}", name) for name in names)
        counts = {line.count(delimiter) >= len(names) - 1 for line in lines[1:20]}
        require(not is_header or counts != {True}, f"{flag}: found a table; name it {suffix}")


def parse(text):
    """JSON value, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_json_lines(flag, text, column):
    pairs = []
    column_of = ColumnChoice(flag, column)
    for i, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if not line.strip():
            continue
        where = f"line {i}: "
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{flag}: {where}expected a JSON value, found {line[:60]!r}") from None
        pairs += column_of.texts(where, value)
    return pairs


def read_json_list(flag, text, column):
    """A list, an object that holds a list under one of LISTS, or an object of objects by name."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        hint = "; name it .jsonl if each line is a value" if parse(text.split("\n")[0]) else ""
        raise UserError(f"{flag}: expected JSON, found: {e}{hint}") from None
    if isinstance(value, dict):
        lists = [value[name] for name in LISTS if isinstance(value.get(name), list)]
        if lists:
            value = lists[0]
        elif value and all(isinstance(entry, dict) for entry in value.values()):
            value = list(value.values())
    require(
        isinstance(value, list),
        f"{flag}: expected a list of prompts, found {type(value).__name__}",
    )
    column_of = ColumnChoice(flag, column)
    pairs = []
    for i, entry in enumerate(value, 1):
        pairs += column_of.texts(f"entry {i}: ", entry)
    return pairs


def read_table(flag, text, suffix, column):
    """The column of a table whose first row names the columns."""
    first = text.split("\n", 1)[0]
    delimiter = "\t" if suffix == ".tsv" else ","
    if suffix == ".csv" and "," not in first and (";" in first or "\t" in first):
        delimiter = ";" if ";" in first else "\t"  # a European spreadsheet; a table by its content
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    pairs, names, index = [], None, None
    try:
        for row in rows:
            where = f"line {rows.line_num}: "
            if not any(cell.strip() for cell in row):
                continue
            if names is None:
                names = [name.strip() for name in row]
                index = names.index(choose_column(flag, names, column))
                continue
            require(
                len(row) == len(names),
                f"{flag}: {where}expected {len(names)} columns, found {len(row)}",
            )
            pairs.append((where, row[index]))
    except csv.Error as e:
        raise UserError(
            f"{flag}: line {rows.line_num}: expected a table with {delimiter!r} between the "
            f"columns, found: {e}"
        ) from None
    return pairs


# ---- columns and prompts -------------------------------------------------------------------------


def choose_column(flag, names, column):
    """Which of the names of columns holds the prompts."""
    shown = ", ".join(map(repr, names[:20]))
    if column is not None:
        require(
            column in names,
            f"{flag}:{column}: expected one of the columns {shown}{did_you_mean(column, names)}",
        )
        return column
    known = [name for name in names if name.lower() in COLUMNS]
    require(
        len(known) == 1,
        f"{flag}: expected one column prompt, text or caption, found "
        f"{shown if not known else ', '.join(map(repr, known))}; choose with --prompts FILE:COLUMN",
    )
    return known[0]


class ColumnChoice:
    """Texts of JSON values. The first object decides which of its entries holds the prompts."""

    def __init__(self, flag, column):
        self.flag = flag
        self.wanted = column
        self.column = None

    def texts(self, where, value):
        """Pairs (where, text) of a string, a list of strings, or an object with one of these."""
        if isinstance(value, dict):
            if self.column is None:
                self.column = choose_column(self.flag, list(value), self.wanted)
            require(
                self.column in value,
                f"{self.flag}: {where}expected an entry {self.column!r}, "
                f"found {', '.join(map(repr, list(value)[:20]))}",
            )
            value = value[self.column]
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            require(
                text is None or isinstance(text, str),
                f"{self.flag}: {where}expected a string, found {str(text)[:60]!r}",
            )
        return [(where, text or "") for text in texts]


def check_prompt(flag, where, text):
    """A prompt without white space around it. UserError: too long, characters that are no text."""
    text = text.strip().strip("\ufeff").strip()  # files with byte order marks, joined by cat
    require(
        len(text) <= LONGEST,
        f"{flag}: {where}expected a prompt of at most {LONGEST} characters, found {len(text)}",
    )
    strange = re.search(r"[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]", text)
    require(
        strange is None,
        f"{flag}: {where}expected text, found the character {strange and strange[0]!a}",
    )
    return text
