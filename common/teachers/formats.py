"""What the JSON files of teachers and students may hold. The files may be somebody else's."""

import inspect
import os

from common.errors import UserError, did_you_mean
from common.files import read_json
from common.metrics import METRICS
from common.schema import (
    BOOLEAN,
    COUNT,
    LOCAL_FILE,
    NAMES,
    NUMBER,
    OBJECT,
    POSITIVE,
    TEXT,
    check,
    choice,
    integer,
    is_number,
    list_of,
    maybe,
)

# "model" of teacher.json and distill.json, of a network in our own format.
MODEL = dict(
    schedule=OBJECT,  # common/schedules.py checks its fields
    prediction=TEXT,
    shape=list_of("integers >= 1", COUNT),
    classes=integer(0),
    sigma_data=POSITIVE,
    adapted=maybe(choice(["dense"], ["dense", "qk_norm"])),  # DiT.adapt
    labelled=maybe(BOOLEAN),  # the toy
    time_scale=maybe(POSITIVE),  # EDM's UNet
)

# "model" and its "lora", of a student whose weights are its teacher's with adapters.
LORA = dict(rank=COUNT, targets=NAMES)

# "model" of several experts.
ROUTED = dict(
    experts=list_of("models", OBJECT, least=1),
    by=choice("level", "label"),
    table=list_of("numbers", NUMBER),
)

CONVENTION = choice("sit", "repa")  # of SiT's network

# "model" of a teacher.json beside a SiT checkpoint (common/teachers/imagenet.py).
SIT = dict(
    weights=LOCAL_FILE,
    vae=maybe(LOCAL_FILE),  # or a name on the hub
    convention=maybe(CONVENTION),
    heads=maybe(COUNT),
)


def is_result(value):
    """Is this a row of measured results that training/report.py can print?"""
    return (
        isinstance(value, dict)
        and isinstance(value.get("protocol"), str)
        and is_number(value.get("nfe"))
        and is_number(value.get("cfg"))
        and all(value.get(name) is None or is_number(value[name]) for name in METRICS)
    )


# "evaluation" of teacher.json: how samples of this teacher are measured. All fields are optional.
EVALUATION = dict(
    protocol=TEXT,
    classifier=LOCAL_FILE,
    reference=LOCAL_FILE,
    images=LOCAL_FILE,
    labels=LOCAL_FILE,
    names=NAMES,
    kinds=NAMES,
    groups=list_of("integers >= 0", integer(0)),
    stages=integer(1, 5),
    measured=list_of("results", ("a result", is_result)),
)


def check_evaluation(path, value):
    """-> value, "evaluation" of the teacher.json at `path`, which a run needs only at its end."""
    where = f"--teacher {path}: evaluation."
    check(value, where, optional=EVALUATION)
    groups = value.get("groups", [])
    kinds = value.get("kinds", [])
    names = value.get("names", [])
    if "groups" in value:
        if len(groups) != len(kinds) or any(group >= len(names) for group in groups):
            raise UserError(
                f"{where}groups: expected, for each of {len(kinds)} kinds, the number of one of "
                f"{len(names)} names, found {str(groups)[:80]}"
            )
    return value


def check_routed(folder, info, nested):
    """Checks the "model" of several experts, except what needs the experts themselves."""
    check(info, f"{folder}: ", required=ROUTED)
    experts, table = info["experts"], info["table"]
    if nested and any(expert.get("adapter") == "routed" for expert in experts):
        raise UserError(f"{folder}: experts: expected a list of models, found experts of experts")
    if info["by"] == "level":  # falling borders between the experts
        fits = len(table) == len(experts) - 1 and table == sorted(table, reverse=True)
    else:  # the expert's number for each label
        fits = all(isinstance(i, int) and 0 <= i < len(experts) for i in table)
    if not fits:
        raise wrong_route(folder, info)


def wrong_route(folder, info):
    return UserError(
        f"{folder}: expected by and table that route to {len(info['experts'])} experts of one "
        f"shape, found {info['by']!r}, {str(info['table'])[:80]}"
    )


def read_index(name, folder, pipelines):
    """-> contents of a pipeline's model_index.json.

    pipelines: {name of the diffusers class: teacher class}.
    UserError if the pipeline is none of them, or if a component that is loaded is not a class of
    diffusers or transformers: diffusers imports what model_index.json names, also from files of the
    folder. Components that are never loaded, such as a safety checker, may be anything.
    """
    index = read_json(folder / "model_index.json", "--teacher")
    found = index.get("_class_name")
    if found not in list(pipelines):  # a list, since the value may be unhashable
        raise UserError(
            f"--teacher {name}: expected one of the pipelines {', '.join(pipelines)}, "
            f"found {found!r}{did_you_mean(found, pipelines)}"
        )
    for part in loaded_components(pipelines[found], index):
        value = index.get(part, [None, None])
        if is_component(part, value) and not is_safe_component(folder / part, value):
            raise UserError(
                f"--teacher {name}: {part}: expected a component of diffusers or transformers, "
                f"found {value}; code of a folder is never run"
            )
    for part in (*pipelines[found].networks(index), "vae", "scheduler"):
        if index.get(part, [None, None]) in (None, [None, None]):
            raise UserError(
                f"--teacher {name}: model_index.json: {part}: expected a component of diffusers, "
                "found none"
            )
    for part in pipelines[found].without:  # diffusers takes its first entry, also of no list
        if part in index and not isinstance(index[part], list):
            raise UserError(
                f"--teacher {name}: model_index.json: {part}: expected [library, class], or "
                f"[null, null] for none, found {index[part]!r}"
            )
    return index


def loaded_components(cls, index):
    """Names of the components of a pipeline that its teacher class loads, itself or by diffusers.

    diffusers loads what the pipeline's constructor takes, and ignores other entries of the index.
    """
    import diffusers

    taken = inspect.signature(getattr(diffusers, cls.pipeline).__init__).parameters
    skipped = set(cls.without) - set(cls.networks(index))
    return [part for part in taken if part != "self" and part not in skipped]


def is_component(part, value):
    """Does diffusers take this entry for [library, class]? It does for anything of length two."""
    if part.startswith("_") or value == [None, None]:
        return False
    if isinstance(value, list):
        return True
    return isinstance(value, (str, dict)) and len(value) == 2 and part != "id2label"


def is_safe_component(folder, value):
    """Is this entry a class of diffusers or transformers that loads without code of the folder?"""
    if not isinstance(value, list) or len(value) != 2:
        return False
    library, kind = value
    if library not in ("diffusers", "transformers") or not isinstance(kind, str):
        return False
    if library == "transformers" and kind.startswith("Auto"):
        return False  # these classes look for code in the folder
    # Older versions of diffusers would run this file.
    return not os.path.exists(folder / f"{library}.py")
