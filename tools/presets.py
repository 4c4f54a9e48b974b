"""The table of presets in docs/teachers.md, from the scripts.

python -m tools.presets            # prints it
python -m tools.presets --write    # puts it into docs/teachers.md
"""

import argparse
import importlib

from common.errors import launch
from common.files import ROOT, atomic

SCRIPTS = (
    "dmd2",
    "sid",
    "decoupled_dmd",
    "phased_dmd",
    "msd",
    "sana_sprint",
    "twinflow",
    "flowmap",
    "boot",
    "nct",
    "swiftbrush",
    "anyflow",
)
PAGE = ROOT / "docs" / "teachers.md"
FIRST, LAST = "<!-- presets: python -m tools.presets --write -->\n", "<!-- end of presets -->\n"
HEAD = "| kind | w | steps | rate | critic | batch | iterations | source |\n|" + "---|" * 8 + "\n"


def number(value):
    """As in the scripts, or a dash for a flag that the script does not have."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def cells(preset):
    """The main numbers of a preset and their source, as texts."""
    names = ("cfg", "nfe", "lr", "lr_fake", "batch", "iters")
    return [*(number(preset.get(name)) for name in names), preset["source"]]


def table(script):
    """Rows of one script; kinds with the same cells share a row."""
    kinds = {}
    for kind, preset in importlib.import_module(script).PRESETS.items():
        kinds.setdefault(tuple(cells(preset)), []).append(kind)
    rows = [[", ".join(names), *row] for row, names in kinds.items()]
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def section():
    return "\n".join(f"**{script}.py**\n\n{table(script)}" for script in SCRIPTS)


def main():
    p = argparse.ArgumentParser(prog="python -m tools.presets", description=__doc__)
    p.add_argument("--write", action="store_true", help="into docs/teachers.md")
    if not p.parse_args().write:
        print(section())
        return
    before, rest = PAGE.read_text().split(FIRST)
    after = rest.split(LAST)[1]
    with atomic(PAGE) as f:
        f.write(f"{before}{FIRST}\n{section()}\n{LAST}{after}".encode())


if __name__ == "__main__":
    launch(main)
