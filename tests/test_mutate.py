"""tools/mutate.py: the changes it makes, what it leaves alone, and that it tells survivors."""

import ast
import subprocess
import sys

import pytest
from helpers.runs import ROOT

from tools.mutate import EQUIVALENT, Finder, chosen, flag_defaults, mutants


def changes(body, **constants):
    """{kind: set of changed lines} of a function with this body."""
    source = (
        f"def f(x, r, cond, args):\n    # Grüße: an offset in bytes is not one in letters\n{body}"
    )
    found = {}
    for mutant in mutants(source, constants):
        line = mutant.apply(source).splitlines()[mutant.line - 1].strip()
        found.setdefault(mutant.kind, set()).add(line)
    return found


@pytest.mark.parametrize(
    "line, kind, expected",
    [
        ("return x - r", "sign", {"return ((x) + (r))"}),
        ("return x - r", "dropped term", {"return (x)"}),
        ("return x + r", "sign", {"return ((x) - (r))"}),
        ("return 0.5 * r", "dropped factor", {"return (0.5)", "return (r)"}),
        ("return -r", "sign", {"return (r)"}),
        ("return (x * r).detach()", "graph kept", {"return x * r"}),
        ("return x[r]", "constant index", {"return x[0]"}),
        ("return x if r else cond", "condition true", {"return x if True else cond"}),
        ("return x if r else cond", "condition false", {"return x if False else cond"}),
        ("return r == 2", "comparison", {"return r != 2"}),
        ("return r(x, cond)", "swapped", {"return r(cond, x)"}),
        ("return r(x, cfg=2)", "dropped cfg", {"return r(x)"}),
        ("return x.requires_grad_(False)", "dropped call", {"return x"}),
        ("return r * args.ratio", "ignored flag", {"return r * 5"}),
    ],
)
def test_each_kind_of_change(line, kind, expected):
    assert changes(f"    {line}\n", ratio=5)[kind] == expected


def test_no_grad_and_conditions_joined_by_and():
    found = changes("    with torch.no_grad():\n        if x and r:\n            x = r\n")
    assert found["graph kept"] == {"with torch.enable_grad():"}
    assert found["dropped condition"] == {"if (x):", "if (r):"}


def test_another_network_only_where_it_is_known():
    body = "    {}fake = r\n    return fake(x)\n"
    assert "other name" not in changes(body.format(""))
    assert "return student(x)" in changes(body.format("student = "))["other name"]


def test_messages_and_checks_of_flags_are_left_alone():
    assert changes("    require(x > r, f'--ratio: found {x - r}')\n    return x\n") == {}
    assert changes('    if x > 1:\n        raise ValueError("x")\n').keys() == {"comparison"}
    assert mutants("def parse_args(p):\n    return p.x - 1\n") == []
    assert mutants("N = 1000 - 1\n") == []


def test_every_change_is_python_and_none_is_made_twice():
    source = (ROOT / "dmd2.py").read_text()
    made = [mutant.apply(source) for mutant in mutants(source, dict(ratio=5))]
    assert len(made) > 200
    assert len(set(made)) == len(made)
    assert source not in made
    for text in made:
        compile(text, "dmd2.py", "exec")


def test_equal_changes_have_a_number():
    """One that computes the same, listed by its description, must not hide the others."""
    source = "def f(x, r):\n    x = r.detach()\n    return r.detach() + x\n"
    found = [m.describe(source) for m in mutants(source) if m.kind == "graph kept"]
    name = "f: graph kept: r.detach() -> r"
    assert found == [f"{name} (1 of 2)", f"{name} (2 of 2)"]
    assert len({m.describe(source) for m in mutants(source)}) == len(mutants(source))


def test_numbers_of_changes():
    assert chosen(["1", "3-5"], 9) == {1, 3, 4, 5}
    assert chosen(None, 3) == {0, 1, 2}


def test_listed_changes_exist_and_have_a_reason():
    """A line of equivalent_mutants.txt that names no change any more hides nothing, and goes."""
    lines = EQUIVALENT.read_text().splitlines()
    assert len(set(lines)) == len(lines)
    for name in sorted({line.split(": ")[0] for line in lines}):
        listed = [line.removeprefix(f"{name}: ") for line in lines if line.startswith(f"{name}: ")]
        flags = any("ignored flag" in line for line in listed)
        source = (ROOT / name).read_text()
        finder = Finder(source, flag_defaults(ROOT / name) if flags else {})
        finder.visit(ast.parse(source))
        known = {mutant.describe(source) for mutant in finder.numbered()}
        for line in listed:
            description, reason = line.split(" # ")
            assert description in known, f"{name}: {description}"
            assert reason


@pytest.mark.slow
def test_it_tells_which_changes_the_tests_do_not_see():
    """One test, which sees the sign of (5) but not the critic's loss."""
    source = (ROOT / "dmd2.py").read_text()
    made = [m.describe(source) for m in mutants(source)]
    seen = made.index("dm_loss: sign: x - g -> ((x) + (g))")
    unseen = made.index("gen_loss: sign: -logit_fake -> (logit_fake)")
    test = "tests/test_dmd2.py::test_eq05_autograd_of_the_loss_is_g_over_numel"
    command = [sys.executable, "-m", "tools.mutate", "dmd2.py", "--tests", test, "--only"]
    # numbers are counted with the flags of the preset, which come later in the file
    p = subprocess.run([*command, str(seen), str(unseen)], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 1, p.stderr
    assert "gen_loss: sign" in p.stdout
    assert "dm_loss" not in p.stdout
    assert "2 changes, 1 seen" in p.stdout
