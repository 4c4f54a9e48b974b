"""Reads this repository's Python files: imports, docstrings, comments, functions."""

import ast
import functools
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = ["common", "controls", "data", "dryrun", "recipes", "tools", "training"]


def module_name(path):
    """common/teachers/load.py -> common.teachers.load"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def source_files():
    """{module name: path} of everything but the tests."""
    paths = list(ROOT.glob("*.py"))
    for folder in FOLDERS:
        paths += (ROOT / folder).rglob("*.py")
    return {module_name(path): path for path in sorted(paths)}


def parse(path):
    return ast.parse(path.read_text(), str(path))


def imported_names(path, inside_functions=True):
    """Dotted names of all imports in a file, also of those inside functions.

    `from common import schedules` gives both common and common.schedules.
    """
    names = set()
    tree = parse(path)
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def import_graph():
    """{module: set of modules of this repository that it imports}."""
    files = source_files()
    return {name: imported_names(path) & set(files) for name, path in files.items()}


def find_circle(graph):
    """-> list of modules that import each other in a circle, or None."""
    done = set()

    def visit(module, path):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for imported in sorted(graph[module]):
            circle = visit(imported, [*path, module])
            if circle:
                return circle
        done.add(module)
        return None

    for module in sorted(graph):
        circle = visit(module, [])
        if circle:
            return circle
    return None


def closure(graph, starts):
    """All modules that are imported from `starts`, directly or through others; starts included."""
    found = set()
    waiting = list(starts)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += graph[module]
    return found


def docstring_equations(path):
    """Numbers at the ends of the lines of a script's docstring, in their order."""
    doc = ast.get_docstring(parse(path))
    return [int(n) for n in re.findall(r"\((\d+)\)$", doc, re.M)]


def comments(path):
    """[(line of code before the comment, text of the comment)]; "" where the line has no code."""
    found = []
    text = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            code = token.line[: token.start[1]].strip()
            found.append((code, token.string.lstrip("# ")))
    return found


@functools.cache
def functions(path):
    """{name: node} of a file's functions and classes, without docstrings, for comparison."""
    found = {}
    for node in parse(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = without_docstrings(node)
    return found


def without_docstrings(node):
    for part in ast.walk(node):
        if (
            isinstance(part, (ast.FunctionDef, ast.ClassDef))
            and ast.get_docstring(part) is not None
        ):
            part.body = part.body[1:]
    return node
