"""Finished students of any method, found by what their folder says: eval.py measures them, nct.py builds on them."""

import functools
import importlib
import inspect
from pathlib import Path

from common.errors import UserError, did_you_mean, first_line
from common.files import read_json
from common.teachers.load import load_model

METHODS = (
    "sid",
    "dmd2",
    "decoupled_dmd",
    "phased_dmd",
    "sana_sprint",
    "twinflow",
    "flowmap",
    "boot",
    "nct",
    "msd",
)  # the only modules ever imported by name


def read_student(folder):
    """-> folder of the weights, the checked distill.json. folder: of a run, or its student/."""
    home = Path(folder) / "student" if (Path(folder) / "student").is_dir() else Path(folder)
    if not Path(folder).is_dir():
        raise UserError(
            f"{folder}: expected the folder of a run, found {'a file' if Path(folder).exists() else 'nothing'}"
        )
    if not (home / "distill.json").is_file():
        hint = (
            "a teacher (give it as --teacher)"
            if (home / "teacher.json").is_file()
            else "no student/distill.json, so the run has not ended yet or is none"
        )
        raise UserError(f"{folder}: expected a student of this project, found {hint}")
    info, where = read_json(home / "distill.json", "student"), home / "distill.json"
    for key, kind in dict(method=str, teacher=str, nfe=int, sampler=dict, model=dict).items():
        if not isinstance(info.get(key), kind) or (key == "nfe" and not 1 <= info["nfe"] <= 1000):
            expected = dict(str="a name", int="an integer from 1 to 1000", dict="an object")[
                kind.__name__
            ]
            raise UserError(f"{where}: {key}: expected {expected}, found {info.get(key)!r}")
    if info["method"] not in METHODS:
        raise UserError(
            f"{where}: method: expected one of {', '.join(METHODS)}, found {info['method']!r}{did_you_mean(info['method'], METHODS)}"
        )
    return home, info


def sampler_of(home, info):
    """`sample` of the student's method."""
    where = home / "distill.json"
    try:
        sample = importlib.import_module(info["method"]).sample
    except ModuleNotFoundError as e:
        if e.name != info["method"]:
            raise
        raise UserError(
            f"{where}: method {info['method']}: its script {info['method']}.py is not here"
        ) from None
    try:
        inspect.signature(sample).bind(None, None, None, 1, None, **info["sampler"])
    except TypeError as e:
        raise UserError(f"{where}: sampler: does not fit {info['method']}.sample: {e}") from None

    @functools.wraps(sample)
    def checked(*args, **given):
        try:
            return sample(*args, **given)
        except (
            TypeError,
            ValueError,
            KeyError,
            IndexError,
            AttributeError,
        ) as e:  # values of another kind than the method's own
            raise UserError(
                f"{where}: sampler: {info['method']}.sample cannot do it with {str(given)[:100]}: {type(e).__name__}: {first_line(e)[:100]}"
            ) from e

    return checked


def network_of(folder, home, info, teacher, name):
    """The student's Model, frozen, if it is one of this teacher."""
    student = load_model(home, info["model"], teacher).requires_grad_(False)
    if (student.adapter, student.shape, student.classes) != (
        teacher.adapter,
        teacher.shape,
        teacher.classes,
    ):
        raise UserError(
            f"{folder}: expected a student of {name}, {teacher.adapter} {list(teacher.shape)} with {teacher.classes} classes, "
            f"found {student.adapter} {list(student.shape)} with {student.classes}"
        )
    return student


def teacher_of(folder):
    """Name of the teacher that a finished student was trained with; of a pipeline's folder: itself. None if the folder is neither."""
    if (Path(folder) / "model_index.json").is_file():
        return str(folder)
    if not any((Path(folder) / sub / "distill.json").is_file() for sub in ("student", "")):
        return None
    return read_student(folder)[1]["teacher"]
