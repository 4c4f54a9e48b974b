"""What a script shows and leaves: sample grids, metrics, the exported student."""

import json
import math
import os
import platform
import shlex
import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from common.checkpoint import read_scores
from common.distributed import on_rank0
from common.files import atomic, write_json
from common.metrics import METRICS, evaluate, summary
from common.sampling import TEACHER_NFE, generate, teacher_sample
from common.teachers.whole import (
    describe_plain,
    read_metrics,
    student_files,
    write_card,
    write_student,
)
from training.alarm import compare, figures
from training.folder import flags_of, history, read_starts, utc_now


class Report:
    """Pictures, metrics and export of a run's student, as its average (`ema`) has it.

    sample: the method's sampler (student, z, cond, nfe, noise, **sampler) -> samples.
    sampler: its further arguments, kept in distill.json, so that others sample in the same way.
    """

    def __init__(self, run, teacher, ema, sample, sampler):
        self.run = run
        self.teacher = teacher
        self.ema = ema
        self.sample = sample
        self.sampler = sampler
        self.teacher_row = None
        self.teacher_figures = None
        self.sources = None  # of a teacher that takes an image

    def student_sampler(self, student, z, cond, noise):
        return self.sample(student, z, cond, self.run.args.nfe, noise, **self.sampler)

    def teacher_sampler(self, teacher, z, cond, noise):
        return teacher_sample(teacher, z, cond, TEACHER_NFE, self.run.args.cfg)

    def pictures(self, it):
        """samples/<it>.png: teacher and student, from the same noise and conditions."""
        run, teacher = self.run, self.teacher
        if not (run.is_main or run.args.shard):  # sharded networks need all processes
            return
        if self.teacher_row is None:
            self.teacher_row, self.teacher_figures = self.measure(teacher, self.teacher_sampler)
        student_row, student_figures = self.measure(self.ema.model, self.student_sampler)
        if run.is_main:
            run.note_pictures(compare(student_figures, self.teacher_figures))
            nfe = run.args.nfe
            steps = "1 step" if nfe == 1 else f"{nfe} steps"
            rows = self.source_row(len(student_row)) + [
                (f"teacher, {TEACHER_NFE} steps, w = {run.args.cfg}", self.teacher_row),
                (f"{run.method}, {steps}, iteration {it}", student_row),
            ]
            save_grid(run.out / "samples" / f"{it:08d}.png", rows, self.column_names(rows))

    def source_row(self, n):
        """The source images of n pictures, where the teacher takes an image: a list of one row."""
        if not getattr(self.teacher, "takes_image", False):
            return []
        if self.sources is None:
            rows = [i % self.conditions(n) for i in range(n)]
            self.sources = self.teacher.source_pictures(rows)
        return [("source", self.sources)]

    def column_names(self, rows):
        """Names of the pictures' classes, where the teacher has labels and knows their names."""
        names = self.teacher.evaluation.get("names", [])
        if not names or self.teacher.prompts is not None or len(names) != self.teacher.classes:
            return None  # of a text-to-image teacher they are the categories of its classifier
        n = len(rows[0][1])
        return [names[i % self.conditions(n)] for i in range(n)]

    def conditions(self, n):
        """Labels or prompts of n pictures: at least two pictures of each, whose distance tells
        whether the student still has variety."""
        return max(1, min(self.teacher.classes, n // 2))

    def draw(self, model, sampler):
        """Samples of a model as uint8 pictures [n, C, H, W]; points as one picture of them all."""
        return self.measure(model, sampler)[0]

    def measure(self, model, sampler):
        """The same, and the figures of these samples (training/alarm.py)."""
        n, batch = 20, 4000
        is_toy = self.teacher.adapter == "toy"
        if is_toy:
            n = 4000
        elif self.teacher.shape[-1] > 64 or self.teacher.prompts is not None:
            n, batch = 8, 2
        conditions, seed = self.conditions(n), self.run.args.seed
        parts = [x for _, _, x in generate(sampler, model, n, seed, batch, classes=conditions)]
        samples = torch.cat(parts)
        pictures = model.to_pictures(samples)
        return pictures, figures(samples if is_toy else pictures / 255, conditions)

    def evaluate(self, it, n):
        """Metrics of n samples, after `it` iterations: metrics.json and a line of eval.jsonl.
        Returns whether this is the best of the run's evaluations by --eval-every."""
        run, teacher, args = self.run, self.teacher, self.run.args
        if n and teacher.adapter != "toy" and not teacher.evaluation:
            run.print(
                f"{run.method}: this teacher brings no metric; samples/ has pictures, "
                "eval.py measures folders of images"
            )
            return False
        if not n:
            return False
        student = self.ema.model
        rank, world = run.rank, run.world
        result = evaluate(
            self.student_sampler, student, teacher, n, args.seed, rank=rank, world=world
        )
        facts = dict(method=run.method, teacher=args.teacher, it=it, nfe=args.nfe, cfg=args.cfg)
        if run.loras:
            facts["teacher_lora"] = [lora.record() for lora in run.loras]
        result = facts | dict(train_seconds=round(run.seconds)) | result
        if run.is_main:
            self.print_result(result)
        return on_rank0(lambda: self.write_result(it, result))

    def write_result(self, it, result):
        path = self.run.out / "eval.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        # lines of later iterations were undone by a resume; the last one may be half a line
        lines = [line for line in lines if iteration_of(line) < it]
        with atomic(path) as f:
            f.write("\n".join([*lines, dumps(result), ""]).encode())
        write_json(self.run.out / "metrics.json", json.loads(dumps(result)))
        scores = read_scores(self.run.out)
        return it in scores and scores[it] <= min(scores.values())

    def print_result(self, result):
        measured = self.teacher.evaluation.get("measured", [])  # of the teacher, as a scale
        for row in measured:
            self.run.print(summary(dict(row, method=f"teacher w={row['cfg']:g}")))
        self.run.print(summary(result))
        others = [row["n"] for row in measured if row.get("n", result["n"]) != result["n"]]
        if others:  # fewer samples estimate a larger distance, whatever the model
            self.run.print(
                f"  n differs, and fd falls as n grows; with the n of the teacher's lines: "
                f"python eval.py {self.run.out} --n {others[0]}"
            )
        for part in result.get("experts", []):
            name = f"  expert {part['expert']}"
            protocol = f"labels {part['labels']}, n={part['n']}"
            row = result | dict.fromkeys(METRICS) | part
            self.run.print(summary(dict(row, method=name, protocol=protocol)))

    def student_files(self, it):
        """The student after `it` iterations, {path in its folder: contents} (common/files.py):
        weights in diffusers' format, and last distill.json with all that sampling needs. To be
        called by all processes; the others than rank 0 get {}."""
        run = self.run
        if not (run.is_main or run.args.shard):
            return {}
        student = self.ema.model.unsharded()
        if not run.is_main:
            return {}
        files, entries = student_files(
            student, self.teacher, self.sample, self.sampler, run.args.nfe
        )
        record = dict(self.record(it), **entries)
        return files | {"distill.json": json.loads(json.dumps(record))}

    def record(self, it):
        """distill.json of the student after `it` iterations, without its network."""
        run, args = self.run, self.run.args
        flags = flags_of(dict(flags=vars(args), cwd=os.getcwd()))  # with absolute paths
        training = dict(
            seconds=round(run.seconds),
            iterations=it,
            images_seen=run.images_before(it),
            resumed=history(read_starts(run.out), it),
            batch=args.batch,
            command=shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
            world=run.world,
            dtype=str(run.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            hardware=hardware(run.device),
            date=utc_now(),
        )
        loras = {}
        if run.loras:
            loras["teacher_lora"] = [lora.record() for lora in run.loras]
        return loras | dict(
            method=run.method,
            teacher=flags["teacher"],
            nfe=args.nfe,
            cfg=args.cfg,
            sampler=self.sampler,
            flags=flags,
            seed=args.seed,
            revision=run.revision,
            torch=torch.__version__,
            training=run.record | training,
        )

    def export(self, it):
        """student/, after `it` iterations."""
        files = self.student_files(it)
        if not self.run.is_main:
            return
        home = self.run.out / "student"
        write_student(home, files, self.teacher_folder, loras=self.run.loras)
        self.run.print(f"student: {home}")
        note = describe_plain(files["distill.json"])
        if note:
            self.run.print(f"  {note}")

    @property
    def teacher_folder(self):
        """Of the teacher's pipeline; None where it is none."""
        return self.teacher.folder if getattr(self.teacher, "takes_prompts", False) else None

    def end(self, it):
        """After `it` iterations, the last: the student, a picture, metrics of --eval-n samples."""
        self.export(it)
        self.pictures(it)
        self.run.repeat_alarms()
        self.evaluate(it, self.run.args.eval_n)
        if self.run.is_main:  # now with the metrics
            write_card(self.run.out / "student", self.teacher_folder, read_metrics(self.run.out))


def iteration_of(line):
    """Iteration of a line of eval.jsonl; infinity if it is not one."""
    try:
        return float(json.loads(line)["it"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def save_grid(path, rows, names=None):
    """PNG of captioned rows of pictures. Small pictures are enlarged by whole pixels.

    rows: list of (caption, uint8 [n, C, H, W] with C 1 or 3). names: of the columns, drawn below.
    """
    padding, caption_height = 2, 14
    height, width = rows[0][1].shape[-2:]
    scale = max(1, 64 // width)
    height, width = height * scale, width * scale
    columns = max(len(pictures) for _, pictures in rows)
    row_height = height + caption_height + padding
    names = [split_name(name, width) for name in names or []]
    below = caption_height * max((len(lines) for lines in names), default=0)
    size = (columns * (width + padding) + padding, len(rows) * row_height + padding + below)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for r, (caption, pictures) in enumerate(rows):
        top = padding + r * row_height
        pen.text((padding, top), caption, fill="black")
        for i, picture in enumerate(pictures):
            image = to_image(picture).resize((width, height), Image.NEAREST)
            sheet.paste(image, (padding + i * (width + padding), top + caption_height))
    for i, lines in enumerate(names):
        place = (padding + i * (width + padding), len(rows) * row_height)
        pen.multiline_text(place, "\n".join(lines), fill="black", spacing=1)
    with atomic(path) as f:
        sheet.save(f, "PNG")


def to_image(pixels):
    """uint8 tensor [C, H, W], C 1 or 3 -> PIL image."""
    pixels = pixels.cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def split_name(name, width):
    """A name in at most two lines that fit below a picture of this width in pixels."""
    fits = width // 6  # letters of PIL's font
    return textwrap.wrap(name, fits, max_lines=2, placeholder="...") or [name[:fits]]


def hardware(device):
    """Name of the GPU or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def dumps(value):
    """One line of strict JSON: nan and infinities become null."""
    return json.dumps(finite(value), allow_nan=False)


def finite(value):
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
