"""Rules of form: where equations stand, who imports whom, which copies must stay equal."""

import ast
import re
import sys
from collections import Counter, defaultdict

import pytest
from helpers.cases import SCRIPTS
from helpers.source import (
    ROOT,
    closure,
    comments,
    docstring_equations,
    find_circle,
    functions,
    import_graph,
    imported_names,
    parse,
    source_files,
)

# Functions and classes that several scripts copy. The copies are the same text, so that `diff` of
# two scripts shows only what the methods do differently. A change of one is a change of all.
FAMILIES = {
    "Head": ["dmd2", "decoupled_dmd", "msd"],
    "group_norm": ["dmd2", "decoupled_dmd", "msd", "sana_sprint"],
    "Critic": ["dmd2", "decoupled_dmd", "msd"],
    "step_indices": ["dmd2", "decoupled_dmd"],
    "backward_simulation": ["dmd2", "decoupled_dmd"],
    "parse_times": ["sid", "twinflow"],
    "sample": ["dmd2", "decoupled_dmd"],
    "dm_gradient": ["dmd2", "phased_dmd", "msd", "anyflow"],
    "end_time": ["twinflow", "anyflow"],
    "dm_loss": ["dmd2", "decoupled_dmd", "phased_dmd", "msd"],
    "fake_loss": ["dmd2", "decoupled_dmd", "phased_dmd", "msd"],
    "gen_loss": ["dmd2", "decoupled_dmd", "msd"],
    "cls_loss": ["dmd2", "decoupled_dmd", "msd"],
    "spread_rows": ["flowmap", "boot"],
}


def script_path(script):
    return ROOT / f"{script}.py"


# ---- equations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_equations_are_numbered_in_order(script):
    numbers = docstring_equations(script_path(script))
    assert numbers, "expected equations with a number at the end of their line"
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_equation_is_beside_its_code(script):
    """A comment such as `# (4)` on the line that computes the equation."""
    beside = set()
    for code, comment in comments(script_path(script)):
        if code:
            beside.update(int(n) for n in re.findall(r"\((\d+)\)", comment))
    missing = set(docstring_equations(script_path(script))) - beside
    assert not missing, f"{script}.py: no line of code has the number of {sorted(missing)}"


def equations_named_by_tests(script):
    """Numbers in the names (test_eq04_..., test_eq04_to_eq10_...) and docstrings, such as "(4)", of
    the tests in tests/test_<script>.py."""
    found = set()
    for node in ast.walk(parse(ROOT / "tests" / f"test_{script}.py")):
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
            continue
        found.update(int(n) for n in re.findall(r"eq(\d+)", node.name))
        for first, last in re.findall(r"eq(\d+)_to_eq(\d+)", node.name):
            found.update(range(int(first), int(last) + 1))
        found.update(int(n) for n in re.findall(r"\((\d+)\)", ast.get_docstring(node) or ""))
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_equation_has_a_test(script):
    missing = set(docstring_equations(script_path(script))) - equations_named_by_tests(script)
    assert not missing, f"tests/test_{script}.py: no test names equation {sorted(missing)}"


# ---- names ---------------------------------------------------------------------------------------

OBJECTS = ("run", "teacher", "student", "critic", "schedule", "draw", "images", "ema", "report")


def names_in_main(script):
    """run.loop, teacher.copy, ...: attributes of what all scripts name alike."""
    (main,) = (
        node
        for node in parse(script_path(script)).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    )
    found = set()
    for node in ast.walk(main):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in OBJECTS:
                found.add(f"{node.value.id}.{node.attr}")
    return found


def test_names_that_several_scripts_use_are_explained():
    """In README or in the tables of CONTRIBUTING.md, in backticks."""
    used = Counter(name for script in SCRIPTS for name in names_in_main(script))
    shared = {name for name, count in used.items() if count >= 3}
    assert {"run.loop", "teacher.copy", "ema.update"} <= shared
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    explained = set(re.findall(r"[a-z]+\.\w+", " ".join(re.findall(r"`([^`\n]+)`", text))))
    assert shared - explained == set()


# ---- imports -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports_of_a_script(script):
    """torch, the standard library, common/, data/ and training/; nct also controls/. Never another
    script."""
    allowed = {"torch", "common", "data", "training"} | set(sys.stdlib_module_names)
    if script == "nct":
        allowed.add("controls")
    found = {name.split(".")[0] for name in imported_names(script_path(script))}
    assert found <= allowed, f"{script}.py imports {sorted(found - allowed)}"


def test_no_import_circles():
    """Imports inside functions count too: they hide a circle and do not remove it."""
    circle = find_circle(import_graph())
    assert circle is None, " -> ".join(circle)


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}}
    assert find_circle(graph) == ["b", "c", "b"]


# Packages that the scripts use, and what each may import. dryrun/ only inside functions, when a dry
# run is made.
LAYERS = {
    "common": {"common", "data", "dryrun"},
    "controls": {"common", "controls"},
    "data": {"common", "data"},
    "dryrun": {"common", "data", "dryrun", "training"},
    "training": {"common", "data", "dryrun", "training"},
}


@pytest.mark.parametrize("package", LAYERS)
def test_imports_of_a_package(package):
    for module, imported in import_graph().items():
        if module.startswith(f"{package}."):
            others = {name.split(".")[0] for name in imported} - LAYERS[package]
            assert not others, f"{module} imports {sorted(others)}"


def test_data_imports_no_networks():
    """Images are read without them: of common/ only errors, files and random numbers."""
    for module, imported in import_graph().items():
        if module.startswith("data."):
            used = {name for name in imported if name.startswith("common.")}
            assert used <= {"common.errors", "common.files", "common.rng"}, module


def test_a_dry_run_is_imported_only_where_one_is_made():
    """Other runs never load it: its imports stand inside functions."""
    for module, path in source_files().items():
        if module.startswith(("common.", "training.")):
            names = {name.split(".")[0] for name in imported_names(path, inside_functions=False)}
            assert "dryrun" not in names, f"{module} imports dryrun outside of a function"


@pytest.mark.parametrize("package", ["common", "data", "training"])
def test_packages_have_only_what_training_imports(package):
    """What only eval.py, tools/ or recipes/ need stands there."""
    needed = closure(import_graph(), SCRIPTS)
    files = [name for name in source_files() if name.startswith(f"{package}.")]
    unused = [name for name in files if name not in needed]
    assert not unused, f"no training script imports {unused}"


# ---- copies --------------------------------------------------------------------------------------


def code_of(script, name):
    """Source of a function or class, without docstrings, comments and line breaks."""
    found = functions(script_path(script))
    return ast.unparse(found[name]) if name in found else None


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_are_equal(name):
    """Docstrings and comments may differ."""
    first, *others = FAMILIES[name]
    expected = code_of(first, name)
    assert expected is not None, f"{first}.py has no {name}"
    for script in others:
        assert code_of(script, name) == expected, f"{name} of {script}.py and of {first}.py"


def test_all_equal_copies_are_listed():
    """So that they stay equal when one of them is changed."""
    names = {name for script in SCRIPTS for name in functions(script_path(script))}
    unlisted = []
    for name in sorted(names):
        scripts_by_code = defaultdict(list)
        for script in SCRIPTS:
            scripts_by_code[code_of(script, name)].append(script)
        scripts_by_code.pop(None, None)
        for scripts in scripts_by_code.values():
            if len(scripts) > 1 and not set(scripts) <= set(FAMILIES.get(name, [])):
                unlisted.append((name, scripts))
    assert not unlisted, f"FAMILIES: expected also {unlisted}"
