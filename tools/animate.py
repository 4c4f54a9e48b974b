"""The sample grids of a run as one animated picture, which shows how the student changes.

python dmd2.py --sample-every 10 --out out/grids           # a grid in samples/ every 10 iterations
python -m tools.animate out/grids                          # -> out/grids/samples.webp, all of them
python -m tools.animate out/grids --its 1 10 30 100 300 900 --out FILE.webp       # or .gif

All grids of a run have the same noise and labels or prompts.
"""

import argparse
from pathlib import Path

from PIL import Image

from common.errors import UserError, launch, require
from tools.video import is_animated, save_animation

SECONDS = 1.2  # of a grid; the last one is shown three times as long


def grids_of(folder):
    """{iteration: path} of the grids of a run, in their order."""
    paths = sorted((Path(folder) / "samples").glob("[0-9]" * 8 + ".png"))
    if not paths:
        raise UserError(
            f"{folder}/samples: expected sample grids of a run, 00000100.png, found none"
        )
    return {int(path.stem): path for path in paths}


def main(argv=None):
    p = argparse.ArgumentParser(
        prog="python -m tools.animate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", help="folder of a run")
    p.add_argument("--its", type=int, nargs="+", metavar="N", help="iterations [all with a grid]")
    p.add_argument("--out", help=".webp or .gif [samples.webp in the folder of the run]")
    args = p.parse_args(argv)

    out = Path(args.out or Path(args.run) / "samples.webp")
    require(is_animated(out), f"--out {out}: expected a name that ends with .webp or .gif")
    grids = grids_of(args.run)
    for it in args.its or []:
        found = f"found those of {', '.join(map(str, grids))}"
        require(it in grids, f"--its {it}: expected an iteration with a sample grid, {found}")
    frames = [Image.open(grids[it]).convert("RGB") for it in args.its or grids]
    durations = [SECONDS] * len(frames)
    durations[-1] *= 3
    save_animation(out, frames, durations)
    print(out)


if __name__ == "__main__":
    launch(main)
