"""Finished students, found by what their folder says: the network, and the sampler of its script.

A student's distill.json names its method, which is the name of a script. That script's `sample` is
the sampler, and its `load_student`, if it has one, loads the network. Scripts are looked for beside
common/ and in the folders of PYTHONPATH, never in the student's own folder: it may be somebody
else's.
"""

import ast
import functools
import importlib.util
import inspect
import os
import re
import sys
from pathlib import Path

import torch

from common.checkpoint import check_tensors, iterations_of, list_checkpoints, read_newest
from common.errors import UserError, did_you_mean, first_line, require
from common.files import ROOT, read_json
from common.routed import Routed
from common.schema import OBJECT, TEXT, check, integer
from common.teachers.load import load_model
from common.teachers.teacher_lora import RECORDS, check_records

RECORD = dict(  # what all methods keep in distill.json
    method=TEXT, teacher=TEXT, nfe=integer(1, 1000), sampler=OBJECT, model=OBJECT
)


def read_student(folder):
    """Folder of a run, or its student/ -> folder of the weights, its checked distill.json."""
    folder = Path(folder)
    found = "a file" if folder.exists() else "nothing"
    require(folder.is_dir(), f"{folder}: expected the folder of a run, found {found}")
    home = folder / "student" if (folder / "student").is_dir() else folder
    path = home / "distill.json"
    if not path.is_file():
        hint = "no student/distill.json, so the run has not ended yet or is none"
        if checkpoints := list_checkpoints(folder):
            newest = iterations_of(checkpoints[-1])
            hint = "no student/distill.json: the run has not ended yet (its checkpoints have "
            hint += f"students too: --it {newest}, or python -m tools.export {folder}, which makes "
            hint += f"{folder / f'student-{newest}'})"
        if (home / "teacher.json").is_file():
            hint = "a teacher (give it as --teacher)"
        raise UserError(f"{folder}: expected a student of this project, found {hint}")
    info = read_json(path, "student")
    check(info, f"{path}: ", required=RECORD, optional=dict(teacher_lora=RECORDS))
    return home, info


# ---- the script of a student ---------------------------------------------------------------------


def script_folders():
    """Where scripts are looked for: next to common/, then in the folders of PYTHONPATH."""
    extra = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    return [ROOT, *(Path(p).resolve() for p in extra)]


def functions_of(path):
    """Names of the functions that a Python file defines, without running it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return set()
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def known_scripts():
    """Names of the scripts with a function `sample`."""
    paths = [path for folder in script_folders() for path in sorted(folder.glob("*.py"))]
    return [path.stem for path in paths if "sample" in functions_of(path)]


def script_of(home, info):
    """Module of the student's script. UserError: there is none, or it has no `sample`."""
    name = info["method"]
    where = f"{home / 'distill.json'}: method {name[:80]!r}"
    path = None
    if re.fullmatch(r"[A-Za-z_]\w*", name):
        paths = [folder / f"{name}.py" for folder in script_folders()]
        path = next((p for p in paths if p.is_file()), None)
    if path is None:
        folders = ", ".join(map(str, script_folders()))
        raise UserError(
            f"{where}: expected its script {name[:80]}.py in {folders} (PYTHONPATH adds folders), "
            f"found none{did_you_mean(name, known_scripts())}"
        )
    require("sample" in functions_of(path), f"{where}: {path} has no function `sample`")
    return import_script(name, path)


def import_script(name, path):
    module = sys.modules.get(name)
    if module is not None and Path(getattr(module, "__file__", None) or "").resolve() == path:
        return module
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def sampler_of(home, info):
    """`sample` of the student's script. Arguments in the record that do not fit it: UserError."""
    script = script_of(home, info)
    where = f"{home / 'distill.json'}: sampler"
    try:
        inspect.signature(script.sample).bind(None, None, None, 1, None, **info["sampler"])
    except TypeError as e:
        raise UserError(f"{where}: does not fit {info['method']}.sample: {e}") from None

    @functools.wraps(script.sample)
    def sample(*args, **kwargs):
        try:
            return script.sample(*args, **kwargs)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as e:
            # values in the record of another kind than the method's own
            raise UserError(
                f"{where}: {info['method']}.sample fails with {str(kwargs)[:100]}: "
                f"{type(e).__name__}: {first_line(e)[:100]}"
            ) from e

    return sample


# ---- its network ---------------------------------------------------------------------------------


def network_of(folder, home, info, teacher, name):
    """The student's Model, frozen. UserError unless it is a student of this teacher."""
    load = getattr(script_of(home, info), "load_student", load_model)
    student = load(home, info["model"], teacher).requires_grad_(False)
    if student.lora:  # relative to the teacher's weights with the LoRA of its training
        check_records(f"{folder}", info.get("teacher_lora", []), teacher.loras)
    expected = (teacher.adapter, teacher.shape, teacher.classes)
    found = (student.adapter, student.shape, student.classes)
    if found != expected:
        raise UserError(
            f"{folder}: expected a student of {name}, {describe_kind(*expected)}, "
            f"found {describe_kind(*found)}"
        )
    return student


# ---- --start -------------------------------------------------------------------------------------


def start_from(folder, teacher, student, critic=None, say=print):
    """--start: a new run begins with the weights of a finished one, of any method.

    folder: of a run, or its student/. student: Model or Routed that takes the weights which that
    run has exported, its average if it kept one; experts of a student without experts there take
    the same. critic: Model that takes those of the run's critic, from its newest checkpoint; None
    for methods without. Heads, averages and optimisers begin anew. say(text): one line of what was
    loaded. UserError if the networks do not fit.
    """
    home, info = read_student(folder)
    loaded = network_of(f"--start {folder}", home, info, teacher, "this teacher")
    flags = info["flags"] if isinstance(info.get("flags"), dict) else {}
    check_adapters(folder, "student", student.lora, loaded.lora)
    load_start(folder, "student", student, loaded)
    line = f"student: {home}{' (average)' if flags.get('ema') else ''}"
    if critic is not None:
        if critic.lora:  # as for the student, see network_of
            check_records(f"--start {folder}", info.get("teacher_lora", []), teacher.loras)
        path, weights = read_critic(Path(folder))
        if path is not None:
            check_adapters(folder, "critic", critic.lora, flags.get("lora_fake"))
            load_state(folder, "critic", critic, weights)
        line += f", critic: {path or 'the teacher, none found there'}"
    say(f"  {'start':22s} {line}")


def load_start(folder, role, net, loaded):
    """Weights of one model into another; into each of its experts if the other has other ones."""
    routing = lambda model: isinstance(model, Routed) and (model.by, model.table)
    if isinstance(net, Routed) and routing(net) != routing(loaded):
        for expert in net.experts:
            load_start(folder, role, expert, loaded)
        return
    load_state(folder, role, net, loaded.state_dict())


def load_state(folder, role, net, weights):
    try:
        check_tensors(net.state_dict(), weights, "that run")
    except ValueError as e:
        raise UserError(f"--start {folder}: does not fit the {role} of these flags: {e}") from None
    net.load_state_dict(weights)


def check_adapters(folder, role, expected, found):
    """UserError unless both have LoRA adapters of the same kind: alpha shows in no shape."""
    kinds = []
    for spec in (expected, found):
        kind = "no adapters"
        if spec:
            kind = f"adapters of rank {spec['rank']}, alpha {spec['alpha']:g}"
        kinds.append(kind)
    require(
        kinds[0] == kinds[1],
        f"--start {folder}: does not fit the {role} of these flags: "
        f"expected {kinds[0]}, found {kinds[1]}",
    )


def read_critic(folder):
    """Path of the newest checkpoint of a run and the weights of its critic (flowmap: aux) without
    head; None and None if there is none, as for a student's folder."""
    warn = lambda text: None  # an older one will do
    path, payload, _ = read_newest(folder, mmap=True, warn=warn)
    state = payload.get("state") if isinstance(payload, dict) else None
    if not isinstance(state, dict):
        return None, None
    weights = state.get("critic", state.get("aux"))
    if weights is None:
        return None, None
    tensors = isinstance(weights, dict) and all(torch.is_tensor(w) for w in weights.values())
    require(tensors, f"--start {path}: expected the weights of a critic, found {type(weights)}")
    if any(name.startswith("fake.") for name in weights):  # beside a head
        prefix = "fake."
        weights = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    return path, weights


def describe_kind(adapter, shape, classes):
    return f"{adapter} {list(shape)} with {classes} classes"


def is_pipeline(folder):
    """Is this the folder of a pipeline, and not of a student, which may be one as well?"""
    folder = Path(folder)
    return (folder / "model_index.json").is_file() and not (folder / "distill.json").is_file()


def teacher_of(folder):
    """Name of the teacher of a finished student; of a pipeline's folder: itself; else None."""
    folder = Path(folder)
    if is_pipeline(folder):
        return str(folder)
    if not any((home / "distill.json").is_file() for home in (folder / "student", folder)):
        return None
    return read_student(folder)[1]["teacher"]
