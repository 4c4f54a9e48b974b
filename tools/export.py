"""Writes a student's folder from a checkpoint of a run, also of one that was stopped or is running.

A checkpoint holds the files of its student (the average, where the run has one), so no GPU is
needed, and the run is not disturbed. The student of a pipeline becomes a pipeline that plain
diffusers loads (common/teachers/whole.py). The parts that it has in common with its teacher are
links to the teacher's files; --copy copies them, for a folder that is moved to another machine.

Usage:
    python -m tools.export out/dmd2-mnist                     # the newest checkpoint
    python -m tools.export out/dmd2-mnist --it 500            # -> out/dmd2-mnist/student-500/
    python -m tools.export out/dmd2-mnist --it best --to mine # the best of --eval-every's
    python -m tools.export out/dmd2-emoji --copy --to mine    # without links, to be uploaded
    python -m tools.export out/dmd2-sdxl --merge-teacher-lora # one LoRA file with the teacher's
    python -m tools.export out/dmd2-sdxl --comfyui mine       # weights in one file, a workflow
"""

import argparse
import atexit
import shutil
import tempfile
from pathlib import Path

import torch

from common.checkpoint import (
    best_checkpoint,
    iterations_of,
    list_checkpoints,
    read_checkpoint,
)
from common.errors import UserError, describe, launch, require
from common.files import WEIGHTS, is_local_name, read_json, save_one_file, write_json
from common.lora import FILE
from common.schema import check
from common.teachers.card import PROMPT, make_metadata
from common.teachers.comfyui import make_workflow, student_name
from common.teachers.load import PIPELINES
from common.teachers.teacher_lora import RECORDS, loras_of_student
from common.teachers.unet import IGNORED_INPUT
from common.teachers.whole import (
    INDEX,
    RECORD,
    describe_plain,
    is_lora,
    merge_loras,
    pipeline_folder,
    read_metrics,
    write_student,
)
from training.flags import add_teacher_lora


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        prog="tools.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("run", help="folder of a run")
    p.add_argument("--it", help="iterations of the checkpoint, or best [the newest]")
    p.add_argument("--to", help="folder of the student [RUN/student-<iterations>]")
    p.add_argument("--copy", action="store_true", help="copies of the teacher's files, not links")
    add_teacher_lora(p.add_argument)
    p.add_argument(
        "--merge-teacher-lora",
        action="store_true",
        help="one LoRA file that contains those of the teacher",
    )
    p.add_argument(
        "--comfyui", metavar="FOLDER", help="write files for ComfyUI there, and nothing else"
    )
    return p.parse_args(argv)


def find_checkpoint(run, it=None):
    """Path of a run's checkpoint. it: its iterations, "best", or None for the newest. UserError."""
    run = Path(run)
    paths = {iterations_of(path): path for path in list_checkpoints(run)}
    require(paths, f"{run}: expected the folder of a run with checkpoints, found none in it")
    if it is None:
        return paths[max(paths)]
    if it == "best":
        path = best_checkpoint(run)
        found = "none of its checkpoints was evaluated (--eval-every N)"
        require(path is not None, f"--it best: expected an evaluated checkpoint of {run}, {found}")
        return path
    found = ", ".join(map(str, paths))
    ok = str(it).isdigit() and int(it) in paths
    require(ok, f"--it {it}: expected a checkpoint of {run}: {found} or best")
    return paths[int(it)]


def read_student_files(path):
    """{path in the student's folder: contents} of a checkpoint, see common/files.py. UserError: the
    file is damaged, of an older version, or holds what no student has."""
    try:
        payload = read_checkpoint(path, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{path}: gone, the run has written newer ones; try again") from None
    except Exception as e:  # torch raises many kinds of errors for a damaged file
        raise UserError(f"{path}: not readable ({describe(e)})") from None
    files = payload.get("student") if isinstance(payload, dict) else None
    ok = isinstance(files, dict) and "distill.json" in files
    require(ok, f"{path}: expected a checkpoint that holds its student, found one without")
    for name, contents in files.items():
        ok = is_local_name(name) and isinstance(contents, dict)
        if ok and not name.endswith(".json"):
            ok = all(torch.is_tensor(v) for v in contents.values())
        require(ok, f"{path}: student: expected names and contents of files, found {name!r:.80}")
    return files


def export(
    run, it=None, to=None, copy=False, components=True, teacher_lora=None, merge_teacher_lora=False
):
    """Writes the student of a run's checkpoint. Arguments as on the command line -> its folder.

    components: with those of its teacher's pipeline, where the teacher is on this machine."""
    path = find_checkpoint(run, it)
    files = read_student_files(path)
    home = Path(to or Path(run) / f"student-{iterations_of(path)}")
    ours = (home / "distill.json").is_file() or not home.exists() or not any(home.iterdir())
    require(ours, f"--to {home}: expected a new or empty folder, or that of a student")
    record = files["distill.json"]
    teacher = pipeline_folder(record["teacher"]) if components and record.get("plain") else None
    loras = read_loras(record, home, teacher if INDEX in files else None, teacher_lora)
    if merge_teacher_lora:
        require_mergeable(run, files, teacher)
        files = merge_loras(files, loras, teacher)
    write_student(home, files, teacher, read_metrics(run), copy, loras)
    return home


def read_loras(record, home, teacher, texts):
    """TeacherLoras of a student, read. teacher: folder of its pipeline; None: it becomes no
    pipeline, and they are not needed.
    texts: --teacher-lora, or None for the files of the training."""
    check(record, "student: ", optional=dict(teacher_lora=RECORDS))
    if teacher is None:
        return []
    loras = loras_of_student(home, record, texts)
    index = read_json(teacher / INDEX)
    for lora in loras:
        lora.read(PIPELINES[index["_class_name"]], teacher)
    return loras


def require_mergeable(run, files, teacher):
    """UserError unless a student is a LoRA on a teacher with a LoRA, on this machine."""
    found = None
    if not is_lora(files):
        found = "one of whole weights, which contain it"
    elif not files[RECORD].get("teacher_lora"):
        found = "one whose teacher had none"
    elif teacher is None:
        found = f"no {files[RECORD]['teacher']} on this machine"
    elif INDEX not in files:
        found = "one that no pipeline of diffusers samples"
    require(
        found is None,
        f"--merge-teacher-lora: {run}: expected a LoRA student of a teacher with --teacher-lora, "
        f"found {found}",
    )


def export_for_comfyui(run, folder, it=None):
    """Writes a student for ComfyUI (docs/comfyui.md) -> paths: the weights of its network, or its
    LoRA, in one file, of two experts in two, and the workflow. UserError: ComfyUI cannot sample it.
    """
    files = read_student_files(find_checkpoint(run, it))
    record = files[RECORD]
    plain = record.get("plain") or {}
    require(
        "comfyui" in plain,
        f"--comfyui: {run}: expected a student that ComfyUI can sample, found none of those in "
        "docs/comfyui.md",
    )
    model = record["model"]
    experts = model.get("experts", [model])
    paths = []
    for i, expert in enumerate(experts):
        name = FILE if "lora" in expert else WEIGHTS
        tensors = dict(files[str(Path(expert.get("folder", "")) / name)])
        tensors.pop(IGNORED_INPUT, None)
        number = f"-{i}" if len(experts) > 1 else ""
        paths.append(Path(folder) / f"{student_name(record)}{number}.safetensors")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        save_one_file(paths[-1], tensors, make_metadata(record))
    paths.append(Path(folder) / f"{student_name(record)}.json")
    write_json(paths[-1], make_workflow(record, PROMPT))
    return paths


def export_temporary(run, it):
    """The same, into a folder that is deleted when the process ends -> it, and the number of
    iterations."""
    folder = tempfile.mkdtemp(prefix="student-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = find_checkpoint(run, it)
    iterations = iterations_of(path)
    return export(run, iterations, folder, components=False), iterations


def main():
    args = parse_args()
    if args.comfyui is not None:
        ok = not (args.to or args.copy or args.merge_teacher_lora)
        others = "--to, --copy and --merge-teacher-lora"
        require(ok, f"--comfyui: expected none of {others}, which are for the other folder")
        for path in export_for_comfyui(args.run, args.comfyui, args.it):
            print(f"ComfyUI: {path}")
        return
    options = dict(teacher_lora=args.teacher_lora, merge_teacher_lora=args.merge_teacher_lora)
    home = export(args.run, args.it, args.to, args.copy, **options)
    print(f"student: {home}")
    note = describe_plain(read_json(home / RECORD), (home / INDEX).is_file())
    if note:
        print(f"  {note}")


if __name__ == "__main__":
    launch(main)
