"""Each script from the command line learns the 2-D mixture, and the bound is one that a broken loss fails."""

from pathlib import Path

import pytest
from cases import BOUND, EXPERT, FLAGS, LOOSE, SHORT, TOY, needs

from common.files import read_json

ROOT = Path(__file__).resolve().parent.parent


def passes(result, bound=BOUND[0]):
    experts = all(e["energy_distance"] < EXPERT for e in result.get("experts", []))
    return result["energy_distance"] < bound and result["mode_min"] > BOUND[1] and experts


@pytest.mark.parametrize(
    "script", ["dmd2", *[pytest.param(s, marks=pytest.mark.slow) for s in SHORT if s != "dmd2"]]
)
def test_toy(script, scripts, tmp_path):
    more = []
    if needs(f"{script}.py"):  # a generator that is worth controlling
        scripts.run(
            "dmd2.py",
            "--teacher",
            "toy",
            "--iters",
            SHORT["dmd2"],
            "--sample-every",
            0,
            "--eval-n",
            0,
            "--out",
            tmp_path / "generator",
        )
        more = ["--generator", tmp_path / "generator"]
    scripts.run(
        f"{script}.py",
        "--teacher",
        TOY.get(script, "toy"),
        *more,
        "--iters",
        SHORT[script],
        "--sample-every",
        0,
        "--out",
        tmp_path,
    )
    assert passes(read_json(tmp_path / "metrics.json")), read_json(tmp_path / "metrics.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, flags",
    [(s, f) for s in FLAGS for f in FLAGS[s]],
    ids=lambda v: v if isinstance(v, str) else "".join(map(str, v)) or "preset",
)
def test_toy_preset(script, flags, scripts, tmp_path):
    p = scripts.run(f"{script}.py", "--teacher", TOY.get(script, "toy"), *flags, "--out", tmp_path)
    result = read_json(tmp_path / "metrics.json")
    assert passes(result, LOOSE.get((script, " ".join(map(str, flags))), BOUND[0])), result
    assert (
        flags or p.cpu < 120
    )  # one thread, and a slower machine than the 90 seconds are meant for


BROKEN = {
    "sign": (
        "import dmd2; right = dmd2.dm_gradient; dmd2.dm_gradient = lambda *a: (lambda g, *rest: (-g, *rest))(*right(*a))",
        [],
    ),
    "critic": (
        "import dmd2",
        ["--lr-fake", 0],
    ),  # mu_fake stays what it was: the student runs into one mode and is never called back
    "teacher": (
        "import dmd2; right = dmd2.dm_gradient; dmd2.dm_gradient = lambda x, x_t, a, s, c, real, fake, w: right(x, x_t, a, s, c, fake, fake, w)",
        [],
    ),
}


@pytest.mark.parametrize("iters", [300, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", BROKEN)
def test_broken_dmd2_fails_the_bound(what, iters, scripts, tmp_path):
    """Not only not there yet: as far off as at the start, or further."""
    change, flags = BROKEN[what]
    driver = tmp_path / "driver.py"
    driver.write_text(f"{change}\nfrom common.run import launch\nlaunch(dmd2.main)\n")
    scripts.run(
        driver,
        "--teacher",
        "toy",
        "--iters",
        iters,
        "--sample-every",
        0,
        "--eval-n",
        2000,
        *flags,
        "--out",
        tmp_path / "run",
    )
    result = read_json(tmp_path / "run" / "metrics.json")
    assert not passes(result) and result["energy_distance"] > 0.3, result
