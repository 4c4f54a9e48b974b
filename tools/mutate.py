"""Wrong changes in a script, one at a time: which of them do its own tests not see?

    python -m tools.mutate dmd2.py                    # every change, with tests/test_dmd2.py
    python -m tools.mutate dmd2.py --list             # only lists the changes
    python -m tools.mutate dmd2.py --only 12 40-45    # some of them, by number
    python -m tools.mutate mine.py --tests tests/test_mine.py

For who copies a script for a new idea: a change that survives is a mistake that nobody would be
told about. Each change is made on the syntax tree of a function of the script: a sign turned, a
term or a factor left out, a detach or a no_grad removed, two arguments swapped, an index made 0, a
condition made true or false, a flag replaced by a constant, another network or the other level
called, a keyword of a call dropped. Parsing of flags and messages are left alone.

Every change is tried in a copy of the repository, with a time limit. A survivor that computes the
same as the script may be listed with its reason in tests/equivalent_mutants.txt, which is then not
counted.
"""

import argparse
import ast
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers  # noqa: F401  imported here once, not by every process that runs the tests
import pytest
import scipy.linalg  # noqa: F401
import torch
import transformers  # noqa: F401
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = ROOT / "tests" / "equivalent_mutants.txt"

ORACLE = "test_whole_iterations_by_hand"  # of every script; it sees most changes
PACKAGES = ("common", "controls", "data", "dryrun", "tools", "training")
LEFT_ALONE = {"parse_args", "check_args"}  # functions about flags: messages, not the method
NOT_METHOD = {"require", "print", "warn", "print_summary", "load_teacher", "Report", "Parser"}
# names that are easily taken for each other: one is put in the place of the other in calls
TWINS = [
    ("student", "teacher"),
    ("student", "fake"),
    ("real", "fake"),
    ("opt_g", "opt_c"),
    ("cond", "cond_real"),
    ("student_ddp", "student"),
    ("critic_ddp", "critic"),
    ("target_net", "student"),
    ("alpha", "sigma"),
]


@dataclass(frozen=True)
class Mutant:
    """A wrong change: the source between two offsets is replaced."""

    start: int
    end: int
    text: str
    kind: str
    line: int
    function: str
    which: str = ""  # of several with the same description, " (2 of 3)"

    def apply(self, source):
        return source[: self.start] + self.text + source[self.end :]

    def describe(self, source):
        """One line: what stands there now, and what is put in its place."""
        old = " ".join(source[self.start : self.end].split())
        new = " ".join(self.text.split())
        return f"{self.function}: {self.kind}: {old} -> {new}{self.which}"


def names_of(function):
    """Arguments of a function and names that it assigns."""
    arguments = {a.arg for a in ast.walk(function) if isinstance(a, ast.arg)}
    stored = {
        n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    return arguments | stored


class Finder(ast.NodeVisitor):
    """Collects the wrong changes of a script. constants: {flag: default} for ignored flags."""

    def __init__(self, source, constants):
        self.source = source
        self.constants = constants
        self.line_starts = [0]
        for line in source.splitlines(keepends=True):
            self.line_starts.append(self.line_starts[-1] + len(line.encode()))
        self.bytes = source.encode()
        self.functions = []  # that the node is in
        self.names = set()  # known there
        self.found = []

    # ---- source text

    def span(self, node):
        """Offsets of a node in the text. ast counts columns in bytes."""
        start = self.line_starts[node.lineno - 1] + node.col_offset
        end = self.line_starts[node.end_lineno - 1] + node.end_col_offset
        return len(self.bytes[:start].decode()), len(self.bytes[:end].decode())

    def text(self, node):
        start, end = self.span(node)
        return self.source[start:end]

    def add(self, node, kind, text):
        """text in the place of node, in brackets where the place might need them."""
        start, end = self.span(node)
        if text != self.source[start:end]:
            function = ".".join(self.functions)
            self.found.append(Mutant(start, end, text, kind, node.lineno, function))

    def numbered(self):
        """What was found, in the order of the lines; equal descriptions differ by their number."""
        found = sorted(set(self.found), key=lambda m: (m.start, m.end, m.text))
        total = Counter(m.describe(self.source) for m in found)
        count = Counter()
        for i, mutant in enumerate(found):
            name = mutant.describe(self.source)
            count[name] += 1
            if total[name] > 1:
                found[i] = replace(mutant, which=f" ({count[name]} of {total[name]})")
        return found

    # ---- where

    def visit_FunctionDef(self, node):
        if node.name in LEFT_ALONE:
            return
        self.functions.append(node.name)
        outside, self.names = self.names, self.names | names_of(node)
        for decorator in node.decorator_list:
            if self.text(decorator) == "torch.no_grad()":
                self.add(decorator, "graph kept", "torch.enable_grad()")
        for statement in node.body:
            self.visit(statement)
        self.functions.pop()
        self.names = outside

    def visit_ClassDef(self, node):
        self.functions.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self.functions.pop()

    def visit(self, node):
        inside = self.functions or isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
        if inside:
            super().visit(node)

    def visit_Raise(self, node):
        pass

    def visit_Assert(self, node):
        pass

    def visit_JoinedStr(self, node):
        pass

    # ---- what

    def visit_BinOp(self, node):
        left, right = f"({self.text(node.left)})", f"({self.text(node.right)})"
        numbers = not any(isinstance(n, (ast.List, ast.JoinedStr)) for n in (node.left, node.right))
        if isinstance(node.op, ast.Add) and numbers:
            self.add(node, "sign", f"({left} - {right})")
            self.add(node, "dropped term", left)
        elif isinstance(node.op, ast.Sub):
            self.add(node, "sign", f"({left} + {right})")
            self.add(node, "dropped term", left)
        elif isinstance(node.op, ast.Mult) and numbers:
            self.add(node, "dropped factor", left)
            self.add(node, "dropped factor", right)
        elif isinstance(node.op, (ast.Div, ast.Pow)):
            self.add(node, "dropped factor", left)
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self.add(node, "sign", f"({self.text(node.operand)})")
        if isinstance(node.op, ast.Not):
            self.add(node, "condition turned", f"bool({self.text(node.operand)})")
        self.generic_visit(node)

    def visit_AugAssign(self, node):
        if isinstance(node.op, ast.Add) and not isinstance(node.value, ast.List):
            target = self.text(node.target)
            self.add(node, "sign", f"{target} -= {self.text(node.value)}")
        self.generic_visit(node)

    def visit_With(self, node):
        for item in node.items:
            call = item.context_expr
            if self.text(call) == "torch.no_grad()":
                self.add(call, "graph kept", "torch.enable_grad()")
            else:
                self.visit(call)
        for statement in node.body:
            self.visit(statement)

    def visit_If(self, node):
        if not any(isinstance(statement, ast.Raise) for statement in node.body):
            self.conditions(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node):
        self.conditions(node.test)
        self.generic_visit(node)

    def conditions(self, test):
        self.add(test, "condition true", "True")
        self.add(test, "condition false", "False")
        if isinstance(test, ast.BoolOp):
            for value in test.values:
                self.add(test, "dropped condition", f"({self.text(value)})")

    def visit_Compare(self, node):
        swap = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!="}
        operator = swap.get(type(node.ops[0]))
        if operator and len(node.ops) == 1:
            left, right = self.text(node.left), self.text(node.comparators[0])
            self.add(node, "comparison", f"{left} {operator} {right}")
        self.generic_visit(node)

    def visit_Subscript(self, node):
        if isinstance(node.slice, (ast.Name, ast.BinOp)) and isinstance(node.ctx, ast.Load):
            self.add(node.slice, "constant index", "0")
        self.generic_visit(node)

    def visit_Attribute(self, node):
        if isinstance(node.value, ast.Name) and node.value.id == "args":
            if node.attr in self.constants and isinstance(node.ctx, ast.Load):
                self.add(node, "ignored flag", repr(self.constants[node.attr]))
        self.generic_visit(node)

    def visit_Call(self, node):
        name = self.text(node.func)
        if name.split(".")[-1] in NOT_METHOD:
            return
        if name.endswith(".detach") and not node.args:
            self.add(node, "graph kept", self.text(node.func.value))
        if name.split(".")[-1] in ("requires_grad_", "set_grad_enabled", "clip", "clamp"):
            self.dropped_call(node)
        self.swapped(node)
        for keyword in node.keywords:
            self.dropped_keyword(node, keyword)
        self.other_names(node)
        self.generic_visit(node)

    def dropped_call(self, node):
        if isinstance(node.func, ast.Attribute):
            self.add(node, "dropped call", self.text(node.func.value))

    def swapped(self, node):
        """Two neighbouring arguments swapped."""
        for a, b in zip(node.args, node.args[1:], strict=False):
            if isinstance(a, ast.Starred) or isinstance(b, ast.Starred):
                continue
            if self.text(a) == self.text(b):
                continue
            start, end = self.span(a)[0], self.span(b)[1]
            text = f"{self.text(b)}, {self.text(a)}"
            function = ".".join(self.functions)
            self.found.append(Mutant(start, end, text, "swapped", a.lineno, function))

    def dropped_keyword(self, node, keyword):
        if keyword.arg is None or self.text(node.func) == "dict":
            return
        arguments = [self.text(a) for a in node.args]
        arguments += [self.text(k) for k in node.keywords if k is not keyword]
        self.add(node, f"dropped {keyword.arg}", f"{self.text(node.func)}({', '.join(arguments)})")

    def other_names(self, node):
        """Another network or another level in the place of the right one."""
        places = [n for n in [node.func, *node.args] if isinstance(n, ast.Name)]
        for place in places:
            for twins in TWINS:
                if place.id in twins:
                    other = twins[1 - twins.index(place.id)]
                    if other in self.names:
                        self.add(place, "other name", other)


def mutants(source, constants=None):
    """Wrong changes of a script's source that are still Python, in the order of the lines."""
    finder = Finder(source, constants or {})
    finder.visit(ast.parse(source))
    kept = {}
    for mutant in finder.numbered():
        changed = mutant.apply(source)
        try:
            tree = ast.dump(ast.parse(changed))
        except SyntaxError:  # e.g. a generator expression without its brackets
            continue
        kept.setdefault(tree, mutant)
    return list(kept.values())


def flag_defaults(script):
    """{flag: default} of numbers and switches of a script, as its toy preset has them."""
    code = "import json, sys; import {} as s; a = s.parse_args(['--teacher', 'toy']); "
    code += "print(json.dumps({{k: v for k, v in vars(a).items() if isinstance(v, (int, float))}}))"
    command = [sys.executable, "-c", code.format(script.stem)]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)


def equivalents(script):
    """{description: reason} of the changes of a script that compute the same."""
    known = {}
    if EQUIVALENT.exists():
        for line in EQUIVALENT.read_text().splitlines():
            if line.startswith(f"{script.name}: "):
                description, reason = line.removeprefix(f"{script.name}: ").split(" # ")
                known[description.strip()] = reason.strip()
    return known


def copy_repository(to):
    """The files that git tracks, and new ones that it does not ignore; assets are linked."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
        if (ROOT / name).is_file() and not name.startswith("assets/"):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    (to / "assets").symlink_to(ROOT / "assets")


def tests_pass(folder, tests, limit):
    """Whether the tests pass in this copy of the repository; not if they take `limit` seconds.

    In a process of its own, which has imported the libraries already.
    """
    child = os.fork()
    if child == 0:
        os.setsid()  # its own children end with it
        signal.alarm(limit)  # whose default action ends the process
        os.chdir(folder)
        sys.path[:0] = [str(folder), str(folder / "tests")]
        for name in [n for n in sys.modules if n.split(".")[0] in PACKAGES]:
            del sys.modules[name]
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        for test in tests:  # one after the other: the first ones see most changes, quickly
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", test])
            if code != 0:
                break
        os._exit(int(code))
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return status == 0


def pass_with(copy, script, source, tests, limit):
    """Whether the tests pass in a copy of `copy` with this source of the script."""
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "repository"
        shutil.copytree(copy, folder, symlinks=True, copy_function=os.link)
        (folder / script).unlink()
        (folder / script).write_text(source)
        return tests_pass(folder, tests, limit)


def chosen(numbers, count):
    """--only 3 10-12 -> {3, 10, 11, 12}; all without it."""
    if not numbers:
        return set(range(count))
    picked = set()
    for text in numbers:
        first, _, last = text.partition("-")
        picked |= set(range(int(first), int(last or first) + 1))
    return picked


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("script", type=Path)
    p.add_argument("--tests", nargs="+", help="test files or ids, in this order [its own]")
    p.add_argument("--list", action="store_true", help="list the changes, run nothing")
    p.add_argument("--only", nargs="+", metavar="N", help="numbers or ranges of changes to run")
    p.add_argument("--sample", type=int, metavar="N", help="run N changes drawn at random")
    p.add_argument("--seed", type=int, default=0, help="of --sample [0]")
    p.add_argument("--jobs", type=int, default=2, help="copies of the repository at work [2]")
    p.add_argument("--limit", type=int, default=300, help="seconds for the tests [300]")
    args = p.parse_args()
    torch.set_num_threads(1)
    script = ROOT / args.script.name
    if not script.exists():
        sys.exit(f"{args.script}: no such script in {ROOT}")

    source = script.read_text()
    made = mutants(source, flag_defaults(script))
    same = equivalents(script)
    if args.list:
        for i, mutant in enumerate(made):
            print(f"{i:4d} line {mutant.line}: {mutant.describe(source)}")
        return

    file = f"tests/test_{script.stem}.py"
    oracle = [f"{file}::{ORACLE}"] if ORACLE in (ROOT / file).read_text() else []
    tests = args.tests or [*oracle, file]
    numbers = chosen(args.only, len(made))
    if args.sample:
        rest = [i for i in sorted(numbers) if made[i].describe(source) not in same]
        numbers = random.Random(args.seed).sample(rest, min(args.sample, len(rest)))
    work = [i for i in sorted(numbers) if made[i].describe(source) not in same]
    with tempfile.TemporaryDirectory() as copy:
        copy_repository(Path(copy))
        # first without a change, which also leaves compiled modules for all other copies
        if not tests_pass(Path(copy), tests, args.limit):
            sys.exit(f"{' '.join(tests)}: fail without any change")

        def survives(i):
            changed = made[i].apply(source)
            alive = pass_with(copy, script.name, changed, tests, args.limit)
            if alive:
                print(f"{i:4d} line {made[i].line}: {made[i].describe(source)}", flush=True)
            return alive

        with ThreadPoolExecutor(args.jobs) as pool:
            results = pool.map(survives, work)
            survivors = sum(tqdm(results, script.name, len(work), disable=None))
    left_out = sum(made[i].describe(source) in same for i in numbers)
    print(
        f"{script.name}: {len(work)} changes, {len(work) - survivors} seen by "
        f"{tests[-1]}, {survivors} not; {left_out} that compute the same left out"
    )
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
