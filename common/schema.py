"""Checks of JSON objects that somebody else may have written.

A schema has a kind for each field: (what is expected, in words; a test of the value).

    LORA = dict(rank=COUNT, targets=NAMES)
    check(info["lora"], f"{folder}: lora.", required=LORA)
    # UserError: out/s: lora.rank: expected an integer >= 1, found 'x'
"""

import math

from common.errors import UserError
from common.files import is_local_name


def check(value, where, required=None, optional=None):
    """-> value, if it is an object whose fields fit the schemas; else a UserError of one line.

    where: what stands in front of a field's name in the message. required, optional: schemas; an
    optional field may be absent. Fields that are in no schema are not checked.
    """
    if not isinstance(value, dict):
        found = type(value).__name__
        raise UserError(f"{where.rstrip(' .:')}: expected an object, found {found}")
    schema = dict(required or {})
    schema |= {name: kind for name, kind in (optional or {}).items() if name in value}
    for name, (expected, fits) in schema.items():
        field = value.get(name)
        if not fits(field):
            raise UserError(f"{where}{name}: expected {expected}, found {repr(field)[:80]}")
    return value


def is_number(value):
    """Is this a number in JSON? nan and inf are, true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)


# ---- kinds ---------------------------------------------------------------------------------------


def integer(low, high=math.inf):
    expected = f"an integer >= {low}" if high == math.inf else f"an integer from {low} to {high}"
    return expected, lambda value: is_integer(value) and low <= value <= high


def choice(*allowed):
    """A value that equals one of these."""
    return " or ".join(map(str, allowed)), lambda value: value in allowed


def list_of(words, kind, least=0):
    """A list of at least `least` values of a kind. words: for several of them, e.g. "numbers"."""
    _, fits = kind

    def test(value):
        return isinstance(value, list) and len(value) >= least and all(map(fits, value))

    return f"a list of {words}", test


def maybe(kind):
    """A kind that may also be null, or absent if it is required."""
    expected, fits = kind
    return expected, lambda value: value is None or fits(value)


TEXT = ("text", lambda value: isinstance(value, str))
OBJECT = ("an object", lambda value: isinstance(value, dict))
BOOLEAN = ("true or false", lambda value: isinstance(value, bool))
NUMBER = ("a number", is_number)
POSITIVE = ("a number > 0", lambda value: is_number(value) and 0 < value < math.inf)
COUNT = integer(1)
NAMES = list_of("names", TEXT, least=1)
LOCAL_FILE = ("a file in this folder", is_local_name)
