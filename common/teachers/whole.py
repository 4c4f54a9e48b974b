"""A student's folder: of a pipeline's student, a whole pipeline that plain diffusers loads.

DiffusionPipeline.from_pretrained(folder) finds there:

    model_index.json          the teacher's, with another scheduler
    unet/, transformer/       the student's network; of a LoRA a link to the teacher's
    scheduler/                a scheduler whose configuration holds the grid of the student's steps
    vae/, text_encoder/, ...  the teacher's, as one link for each file
    README.md                 the card: the lines that load it (common/teachers/card.py)
    comfyui.json              a workflow, where ComfyUI has the student's sampler (comfyui.py)
    distill.json              what this repository needs to sample it

A LoRA lies beside, as pytorch_lora_weights.safetensors, and the LoRAs of its teacher
(--teacher-lora) in teacher_lora/. New inputs of a student are folded into its
network (bake.py); what restores them is in a small file next to it, for this repository's samplers.

Students that plain diffusers cannot sample, and those whose teacher is no pipeline, are a network's
folder: config.json and weights, or one such folder for each expert.
"""

import os
import shutil
from pathlib import Path

import torch

from common.files import ROOT, read_json, sync_folder, write_folder, write_json
from common.lora import FILE
from common.model import EXTRAS
from common.routed import ByLevel, Routed
from common.teachers.bake import UNBAKED_LORA, bake
from common.teachers.card import PROMPT, make_card, make_metadata
from common.teachers.comfyui import WORKFLOW, find_comfyui, make_workflow
from common.teachers.hub import HUB, is_hub_name
from common.teachers.kind import EMBEDDED
from common.teachers.pipeline import Pipeline
from common.teachers.plain import NotPlain, find_plain, find_plain_of_sizes, trace
from common.teachers.teacher_lora import file_in_student, merge
from common.teachers.weights import NAME, OTHER_FORMATS, find_weights

INDEX = "model_index.json"
RECORD = "distill.json"
OWN = ("*.json", "*.safetensors", "README.md")  # what a student's folder holds, besides links
ABSENT = [None, None]


# ---- contents ------------------------------------------------------------------------------------


def student_files(student, teacher, sample, sampler, nfe):
    """-> files of a student's folder as `Model.files`, and two entries of its distill.json.

    teacher: the pipeline's Model. sample, sampler, nfe: the method's sampler, its further arguments
    and its steps. The entries are `model`, for the loader, and `plain`: how plain diffusers samples
    it (plain.py), a `reason` why it cannot, or None for teachers that are no pipelines with text.
    """
    if not getattr(student, "takes_prompts", False):
        return student.files(), dict(model=student.config(), plain=None)
    try:
        return whole_files(student, teacher, sample, sampler, nfe)
    except NotPlain as e:
        files = student.files()
        if student.lora and EXTRAS in files:  # load_lora_weights would take half of it
            files[UNBAKED_LORA] = files.pop(FILE)
        return files, dict(model=student.config(), plain=dict(reason=str(e)))


def whole_files(student, teacher, sample, sampler, nfe):
    """`student_files` of a student that plain diffusers can sample. NotPlain for others."""
    experts, parts = networks_of(student)
    find_trace = lambda: trace(student, sample, sampler, nfe)
    sizes = experts[0].sizes
    if sizes:
        traces = [find_trace() for _ in sizes.each()]
        found = traces[0]
        plain, calls = find_plain_of_sizes(experts[0], traces)
        fixed = all(other.times == found.times for other in traces)
        if experts[0].extras and not fixed:
            raise NotPlain("its new inputs are folded in for the steps of one size")
    else:
        found = find_trace()
        plain = find_plain(experts[0], found)
    if plain is None:
        raise NotPlain("no scheduler of diffusers has its steps")
    index = read_json(Path(teacher.folder) / INDEX)
    scheduler = plain["scheduler"]
    index["_class_name"] = experts[0].pipeline  # an older folder may have an older name
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    for part in parts:
        index[part] = index[parts[0]]
    index |= dict.fromkeys(experts[0].guiders, ABSENT)
    if len(parts) > 1:
        index["boundary_ratio"] = boundary(found)

    files = {}
    entries = []
    for i, (expert, part) in enumerate(zip(experts, parts)):
        own = expert.files()
        if expert.extras:
            steps = [step for step in found.steps if step["expert"] == i]
            # an expert of no step has inputs that no sample depends on
            baked, unbaked = bake(expert, steps) if steps else (expert.network_files(), {})
            own |= baked | unbaked
        entry = expert.config()
        home = part
        if expert.lora:  # the network is the teacher's
            home = f"expert-{i}" if len(parts) > 1 else ""
        else:
            own = expert.without_guidance(own)
        if home:
            entry["folder"] = home
        entries.append(entry)
        files |= {str(Path(home) / name): contents for name, contents in own.items()}
    files |= {"scheduler/scheduler_config.json": scheduler, INDEX: index}
    files |= experts[0].further_files()

    model = entries[0]
    if isinstance(student, ByLevel):
        model = dict(student.config(), experts=entries)
    options = experts[0].call_options()
    plain = dict(plain, scheduler=scheduler["_class_name"], call=plain["call"] | options)
    if sizes:
        plain["sizes"] = [
            calls[i] | experts[0].call_options() | dict(zip(("height", "width"), sizes.sizes[i]))
            for i in sizes.each()
        ]
    plain["pipeline"] = experts[0].pipeline
    plain["times"] = found.times
    plain["stochastic"] = found.stochastic
    plain["networks"] = parts
    settings = find_comfyui(experts[0], found)
    is_small = experts[0].copied_share is not None  # ComfyUI knows networks by their sizes
    if settings is not None and not is_small:
        changed = [user_lora.changes_text for user_lora in teacher.loras]
        plain["comfyui"] = settings | (dict(text_loras=changed) if changed else {})
    return files, dict(model=model, plain=plain)


def networks_of(student):
    """-> the Models of a student, and the names of their networks in its pipeline. NotPlain."""
    if not isinstance(student, (Pipeline, Routed)):
        raise NotPlain("the branch of nct.py is no part of a pipeline of diffusers")
    if not isinstance(student, Routed):
        return [student], [student.part]
    experts = list(student.experts)
    names = [student.part, student.second_network]
    if not isinstance(student, ByLevel) or any(isinstance(e, Routed) for e in experts):
        raise NotPlain("its students share the prompts; no pipeline of diffusers has such networks")
    if len(experts) > 2 or len(experts) == 2 and names[1] is None:
        raise NotPlain(f"its {len(experts)} experts: {student.pipeline} has no networks for them")
    return experts, names[: len(experts)]


def boundary(found):
    """The time from which on the first of two networks is used, between two steps. Wan's pipeline
    takes the first network at the boundary itself, a ByLevel the second."""
    first = min(step["t"] for step in found.steps if step["expert"] == 0)
    second = max((step["t"] for step in found.steps if step["expert"] == 1), default=0.0)
    return (first + second) / 2


# ---- writing -------------------------------------------------------------------------------------


def write_student(home, files, teacher=None, metrics=None, copy=False, loras=()):
    """Writes a student's folder and its card. files: `student_files` and distill.json, which is
    written last, so that a folder that is half written does not look finished.

    teacher: folder of its pipeline, for the parts that are not the student's; None: without them.
    metrics: contents of metrics.json, or None. copy: copies instead of links. loras: TeacherLoras
    of --teacher-lora, read.
    """
    home = Path(home)
    home.mkdir(parents=True, exist_ok=True)
    record = files[RECORD]
    index = files.get(INDEX)
    for name in (RECORD, INDEX):
        (home / name).unlink(missing_ok=True)
    remove_own(home)
    last = (INDEX, RECORD)
    others = {name: v for name, v in files.items() if name not in last}
    plain = record.get("plain") or {}
    if "comfyui" in plain and not plain.get("merged"):
        others[WORKFLOW] = make_workflow(record, PROMPT)
    write_folder(home, others, make_metadata(record))
    if index and teacher is not None:
        own = {Path(name).parts[0] for name in files} & index.keys()
        if is_lora(files) and not record["plain"].get("merged"):
            for i, lora in enumerate(loras):
                add_file(lora.path, home / file_in_student(i, lora.record()), copy)
        if not is_lora(files):
            own |= write_text_encoders(home, Path(teacher), loras)
        index = add_components(home, Path(teacher), dict(index), own, copy)
        write_json(home / INDEX, index)
    write_json(home / RECORD, record)
    write_card(home, teacher, metrics)


def write_text_encoders(home, teacher, loras):
    """The text encoders that --teacher-lora has changed, float32 -> their names."""
    loras = [lora for lora in loras if lora.changes_text]
    if not loras:
        return set()
    pipe = loras[0].cls.text_pipeline(teacher, torch.float32)
    names = set()
    for lora in loras:
        lora.add_to_text_encoders(pipe)
        names |= set(lora.parts()) - {lora.part}
    for name in names:
        getattr(pipe, name).save_pretrained(home / name)
    return names


def merge_loras(files, loras, teacher):
    """Files of a LoRA student whose LoRA file contains those of its teacher as well.

    The student's own one stays beside it, for the samplers of this repository.
    """
    merged = dict(files)
    for name, contents in files.items():
        path = Path(name)
        if path.name == FILE:
            merged.setdefault(str(path.with_name(UNBAKED_LORA)), contents)
            merged[name] = merge(contents, loras, teacher)
    record = files[RECORD]
    merged[RECORD] = dict(record, plain=dict(record["plain"], merged=True))
    return merged


def write_card(home, teacher, metrics):
    """README.md of a student's folder. Arguments as of write_student."""
    path = Path(home) / INDEX
    index = read_json(path) if path.is_file() else None
    card = make_card(read_json(Path(home) / RECORD), index, teacher, metrics)
    write_folder(home, {"README.md": card})


def is_lora(files):
    return any(Path(name).name == FILE for name in files)


def remove_own(home):
    """What an earlier student has left in the folder: its files, links, and empty folders."""
    if not home.is_dir():
        return
    paths = {path for pattern in OWN for path in home.rglob(pattern) if path.is_file()}
    paths |= {path for path in home.rglob("*") if path.is_symlink()}
    for path in paths:
        path.unlink()
    for path in sorted(home.rglob("*"), reverse=True):  # subfolders before their folder
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def add_components(home, teacher, index, own, copy):
    """Links or copies the teacher's components other than the folders `own` and the scheduler.

    -> index without the components that the teacher's folder lacks, such as a safety checker.
    """
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or name in (*own, "scheduler"):
            continue
        source = teacher / name
        if name == "transformer_2" and not source.is_dir():
            source = teacher / "transformer"  # the first network serves twice
        if value == ABSENT or not source.is_dir():
            index[name] = ABSENT
            continue
        add_component(source, home / name, copy)
    return index


def add_component(source, target, copy):
    """The files of one component that are loaded, under the names without a variant (fp16)."""
    names = {}
    weights = None
    if any(NAME.fullmatch(path.name) for path in source.glob("*")):
        weights = find_weights(source, source)
        mark = f".{weights.variant}" if weights.variant else ""
        names = {name: name.replace(mark, "", 1) for name in weights.names}
    for path in sorted(source.rglob("*")):
        name = str(path.relative_to(source))
        is_weights = NAME.fullmatch(path.name) or path.suffix in OTHER_FORMATS
        if path.is_file() and not is_weights and ".index." not in path.name:
            names[name] = name
    for name, new_name in names.items():
        add_file(source / name, target / new_name, copy)
    if weights and len(weights.names) > 1:
        write_shard_index(source, target, weights, names)


def write_shard_index(source, target, weights, names):
    """The index of weights in several files, with the names that the files have in `target`."""
    kind = "bin" if weights.pickled else "safetensors"
    mark = f".{weights.variant}" if weights.variant else ""
    for path in source.glob(f"*.{kind}.index{mark}.json"):
        table = read_json(path)
        table["weight_map"] = {k: names[v] for k, v in table["weight_map"].items()}
        write_json(target / path.name.replace(mark, "", 1), table)


def add_file(source, target, copy):
    """A link to a file, or a copy of it, under its name only when it is complete. Where the file
    system has no links, it is a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    tmp = target.with_name(f"{target.name}.{os.urandom(4).hex()}.tmp")
    source = Path(os.path.abspath(source))
    try:
        if copy:
            shutil.copyfile(source, tmp)
        else:
            try:
                tmp.symlink_to(source)
            except (OSError, NotImplementedError):
                shutil.copyfile(source, tmp)
        os.replace(tmp, target)
        sync_folder(target.parent)
    finally:
        tmp.unlink(missing_ok=True)


def read_metrics(run):
    """Contents of a run's metrics.json, None if there is none."""
    path = Path(run) / "metrics.json"
    return read_json(path) if path.is_file() else None


def pipeline_folder(name):
    """Folder of a teacher's pipeline on this machine; None: it is not here, or is no pipeline."""
    folder = ROOT / "assets" / EMBEDDED[name] if name in EMBEDDED else Path(name)
    if not folder.is_dir():
        if name not in HUB and not is_hub_name(name):
            return None
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(HUB.get(name, name), local_files_only=True))
        except LocalEntryNotFoundError:
            return None
    return folder if (folder / INDEX).is_file() else None


def describe_plain(record, complete=True):
    """A line on how plain diffusers samples a student, "" if there is nothing to be said.

    complete: its folder has the teacher's components.
    """
    plain = record.get("plain")
    if not plain:
        return ""
    if "reason" in plain:
        return f"not for plain diffusers ({plain['reason']}): sample.py samples it"
    if not complete:
        return (
            f"teacher {record['teacher']} is not on this machine: without its components the "
            "folder is no pipeline; sample.py and eval.py load it"
        )
    call = plain["call"]
    if "nearly" in plain:
        return (
            "its steps are rounded to thousandths, those of its scheduler are not: samples of "
            f"plain diffusers differ by about {plain['nearly']:.0e} from those of sample.py"
        )
    if "num_inference_steps" in call and "noise" not in call:
        return ""
    needed = [name for name in ("timesteps", "sigmas", "noise") if name in call]
    names = " and ".join(needed).replace("noise", "latents")
    return (
        f"its {record['nfe']} steps are in no scheduler's configuration: pipe(...) needs {names}, "
        "as in the README.md there"
    )
