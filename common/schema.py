"""Checks of JSON objects that somebody else may have written.

A schema has an entry for each field: name = (what is expected, in words; a test of the value).

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
    """Is this a number of JSON? nan and inf are; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)


def is_list_of(fits, value):
    return isinstance(value, list) and all(fits(item) for item in value)


def is_names(value):
    return value != [] and is_list_of(lambda item: isinstance(item, str), value)


def integer(low, high=math.inf):
    """Kind of an integer from low to high."""
    expected = f"an integer >= {low}" if high == math.inf else f"an integer from {low} to {high}"
    return expected, lambda value: is_integer(value) and low <= value <= high


def choice(*allowed):
    """Kind of a value that equals one of these."""
    return " or ".join(map(str, allowed)), lambda value: value in allowed


TEXT = ("text", lambda value: isinstance(value, str))
OBJECT = ("an object", lambda value: isinstance(value, dict))
BOOLEAN = ("true or false", lambda value: isinstance(value, bool))
COUNT = integer(1)
POSITIVE = ("a number > 0", lambda value: is_number(value) and 0 < value < math.inf)
NOT_NEGATIVE = ("a number >= 0", lambda value: is_number(value) and 0 <= value < math.inf)
NAMES = ("a list of names", is_names)
NUMBERS = ("a list of numbers", lambda value: is_list_of(is_number, value))
LOCAL_FILE = ("a file in this folder", is_local_name)
