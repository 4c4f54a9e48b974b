"""The rows of eval.py's table: which models are sampled, and how."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common.errors import UserError, require
from common.features import ClassifierExtractor
from common.routed import ByLabel
from common.sampling import TEACHER_NFE, teacher_sample
from common.teachers.load import load_teacher
from common.teachers.sizes import sizes_of
from common.teachers.students import network_of, read_student, sampler_of
from common.teachers.teacher_lora import loras_of_student, read_teacher_loras
from tools.export import export_temporary
from training.flags import NOT_GUIDED


@dataclass
class Row:
    model: torch.nn.Module
    teacher: torch.nn.Module  # brings the protocol of the metrics
    sampler: Callable  # (model, z, cond, noise) -> samples
    caption: str
    facts: dict  # name, method, teacher, nfe, cfg: the first keys of the result
    folder: Path  # of the weights
    measured: bool = True  # False: only drawn in the picture
    info: dict = field(default_factory=dict)  # a student's distill.json
    run: Path | None = None  # the folder of a student's run
    cost_sampler: Callable | None = None  # whose passes and time count, if not those of `sampler`
    samples: torch.Tensor | None = None  # the first ones, for --compare

    def __post_init__(self):
        self.cost_sampler = self.cost_sampler or self.sampler


def make_rows(args, dtype):
    """Rows of the flags, the teacher's first.

    All models are loaded, on the CPU, so that a mistake in the last folder shows before sampling.
    """
    rows = rows_of_runs(args) if args.runs else rows_of_teacher(args)
    for row in rows:
        row.model.dtype = dtype
        check_row(row, args)
    return rows


def rows_of_teacher(args):
    check_negative_prompt(args, args.cfg or [1.0])
    teacher = load_teacher(args.teacher, text=prompt_kwargs(args))
    return [
        teacher_row(teacher, args.teacher, nfe, cfg, args.heun)
        for nfe in args.nfe or [TEACHER_NFE]
        for cfg in args.cfg or [1.0]
    ]


def rows_of_runs(args):
    teachers = {}
    students = [load_student(folder, args, teachers) for folder in args.runs]
    rows = []
    for student in students:
        for nfe in args.nfe or [student.info["nfe"]]:
            rows.append(student_row(student, nfe))
    if not (args.compare or args.grid or args.best_of):
        return rows

    if len(teachers) > 1:
        raise UserError(
            "--compare, --grid and --best-of: expected students of one teacher, "
            f"found {', '.join(teachers)}"
        )
    teacher, name = students[0].teacher, students[0].teacher_name
    cfgs = args.cfg
    if cfgs is None:  # the guidance scales that the students were trained with
        trained = [student.info.get("cfg") or 1.0 for student in students]
        cfgs = list(dict.fromkeys(trained if args.compare else trained[:1]))
    check_negative_prompt(args, cfgs)
    samplers = [
        (nfe, cfg, heun)
        for nfe, heun in teacher_steps(args, [row.facts["nfe"] for row in rows])
        for cfg in cfgs
    ]
    teacher_rows = [teacher_row(teacher, name, *sampler) for sampler in samplers]
    for row in teacher_rows:
        row.measured = args.compare
    best_rows = []
    if args.best_of:
        for row in rows:
            best_rows += [best_row(row, args.best_of, *sampler) for sampler in samplers]
    return teacher_rows + rows + best_rows


def check_row(row, args):
    if row.teacher.adapter != "toy":
        return
    if args.best_of:
        raise UserError(
            "--best-of: the verifier is the classifier of a teacher of images; the toy has none"
        )
    needs_images = (args.save_images, args.inception, args.ref, args.ref_images, args.per_prompt)
    needs_images += (args.dino,)
    if any(needs_images) or (args.n or 0) > 20000:
        raise UserError(
            "toy: its samples are points, measured against the exact mixture: --save-images, "
            "--inception, --dino, --ref, --ref-images, --per-prompt need images, and --n goes to "
            "20000 (all pairs are compared)"
        )


# ---- teachers ------------------------------------------------------------------------------------


def check_negative_prompt(args, cfgs):
    """UserError if no row of a teacher uses it. cfgs: their guidance scales."""
    used = any(cfg != 1 for cfg in cfgs)
    require(
        args.negative_prompt is None or used,
        f"--negative-prompt: expected --cfg other than 1, {NOT_GUIDED}",
    )


def teacher_steps(args, student_nfes):
    """Steps of the teacher's rows, and whether they are Heun's: list of (nfe, heun)."""
    if not args.compare:
        return [(nfe, args.heun) for nfe in args.teacher_nfe or [TEACHER_NFE]]
    nfes = args.teacher_nfe or [50, *sorted(set(student_nfes) - {50}, reverse=True)]
    steps = [(nfe, False) for nfe in nfes]
    if args.heun:  # about as many evaluations as each Euler row: 2 nfe - 1
        half = dict.fromkeys((nfe + 1) // 2 for nfe in nfes)
        steps += [(nfe, True) for nfe in half if nfe > 1]
    return steps


def teacher_row(teacher, name, nfe, cfg, heun):
    title = f"teacher {Path(name).name}"
    facts = dict(name=title, method="teacher", teacher=name, nfe=nfe, cfg=cfg)
    facts |= lora_facts(teacher)
    if teacher.negative is not None and cfg != 1:
        facts["negative_prompt"] = teacher.negative
    kind = ""
    if heun:
        facts["heun"] = True
        kind = "Heun, "

    def sampler(model, z, cond, noise):
        return teacher_sample(model, z, cond, nfe, cfg, heun)

    caption = f"teacher, {kind}{steps_text(nfe)}, w = {cfg:g}"
    return Row(teacher, teacher, sampler, caption, facts, teacher.folder)


def lora_facts(teacher):
    """The entry of a result that names the LoRAs of --teacher-lora, if there are any."""
    records = [lora.record() for lora in teacher.loras]
    return dict(teacher_lora=records) if records else {}


def steps_text(nfe):
    return "1 step" if nfe == 1 else f"{nfe} steps"


# ---- students ------------------------------------------------------------------------------------


@dataclass
class Student:
    folder: str  # as the user gave it
    model: torch.nn.Module
    sample: Callable  # of its method
    info: dict  # distill.json
    teacher: torch.nn.Module
    teacher_name: str
    it: int | None = None  # of a checkpoint


def load_student(folder, args, teachers, device="cpu", dtype=torch.float32):
    """A student and its teacher. teachers: those loaded so far, by name and --teacher-lora; one is
    added.

    args: those of prompt_kwargs, and teacher; and `it`, the checkpoint
    whose student it is; None: the finished one.
    """
    source, it = export_temporary(folder, args.it) if args.it else (folder, None)
    home, info = read_student(source)
    sample = sampler_of(home, info)
    name = args.teacher or info["teacher"]
    loras = loras_of_student(home, info, args.teacher_lora)
    key = " with ".join([name, *(lora.name_of_content() for lora in loras)])
    if key not in teachers:
        text = prompt_kwargs(args, info, loras)
        try:
            teachers[key] = load_teacher(name, device, dtype, text=text)
        except UserError as e:
            hint = "" if args.teacher else " (--teacher overrides it)"
            raise UserError(f"{folder}: its teacher: {e}{hint}") from None
    model = network_of(folder, home, info, teachers[key], name)
    return Student(folder, model, sample, info, teachers[key], name, it)


def prompt_kwargs(args, info=None, loras=None):
    """Prompts, size, frames, guidance for a pipeline: the flags', else those of the training.

    args: prompts, negative_prompt, size, frames, cache_prompts, teacher_lora.

    loras: of a student's teacher; None: those of --teacher-lora.

    The cache of embeddings is written to, so it is never the one that distill.json names: the
    student may come from somebody else.
    """
    flags = (info or {}).get("flags")
    trained = flags if isinstance(flags, dict) else {}

    def of_type(key, *types):
        value = trained.get(key)
        return value if isinstance(value, types) else None

    sizes = sizes_of(trained.get("size"))  # of several, the first one
    negative = args.negative_prompt
    if negative is None:
        negative = of_type("negative_prompt", str)
    return dict(
        prompts=args.prompts or of_type("prompts", str),
        negative=negative,
        size=args.size or (sizes[0] if sizes else None),
        frames=args.frames or of_type("frames", int),
        guidance=of_type("embedded_guidance", int, float),
        cache=args.cache_prompts,
        edits=of_type("data", str),
        loras=(read_teacher_loras(args.teacher_lora) if loras is None else loras) or None,
    )


def student_row(student, nfe):
    info = student.info
    arguments = dict(info["sampler"])
    if nfe != info["nfe"]:
        # a list of steps has the length of the training's nfe; the method makes other grids
        arguments.pop("steps", None)

    def sampler(model, z, cond, noise):
        return student.sample(model, z, cond, nfe, noise, **arguments)

    run = Path(student.folder).resolve()
    if run.name == "student":
        run = run.parent
    name = f"{run.name} it {student.it}" if student.it else run.name
    facts = dict(
        name=name,
        method=info["method"],
        teacher=student.teacher_name,
        nfe=nfe,
        cfg=info.get("cfg"),
    )
    facts |= lora_facts(student.teacher)
    caption = f"{name}, {steps_text(nfe)}"
    row = Row(student.model, student.teacher, sampler, caption, facts, student.model.folder)
    row.info = info
    row.run = run
    if info["method"] == "nct":

        def with_given_condition(model, z, cond, noise):
            # `sampler` also makes the condition, from another sample of the generator
            c = model.control.blank(len(z), z.device)
            return student.sample(model, z, cond, nfe, noise, c=c)

        row.cost_sampler = with_given_condition
    return row


# ---- best of n -----------------------------------------------------------------------------------


def best_row(row, n, nfe, cfg, heun):
    """The teacher from the best of n noises per image, chosen by previews of a student's row."""
    facts = row.facts | dict(name=f"teacher best-of-{n} {row.facts['name']}", nfe=nfe, cfg=cfg)
    facts |= dict(best_of=n, verifier="classifier")
    if heun:
        facts["heun"] = True
    caption = f"teacher, {steps_text(nfe)}, w = {cfg:g}, best of {n} noises by {row.facts['name']}"
    # in one model, so that the passes of both are counted; all labels are the teacher's
    both = ByLabel([row.teacher, row.model], [0] * row.teacher.classes)
    sampler = BestOf(n, row, nfe, cfg, heun)
    return Row(both, row.teacher, sampler, caption, facts, row.folder)


class BestOf:
    """Sampler of the model (teacher, student) of `best_row`.

    The verifier's score is the log-probability of the label in the teacher's classifier.
    """

    def __init__(self, n, row, nfe, cfg, heun):
        self.n = n
        self.preview = row.sampler
        self.teacher = row.teacher
        self.settings = (nfe, cfg, heun)
        self.extractor = None

    def __call__(self, model, z, cond, noise):
        teacher, student = model.experts
        best = z  # the first candidate is the noise of the other rows
        best_score = self.score(student, z, cond, noise)
        for _ in range(self.n - 1):
            z = noise()
            score = self.score(student, z, cond, noise)
            better = score > best_score
            best_score = torch.where(better, score, best_score)
            best = torch.where(better.to(z.device).view(-1, *[1] * (z.ndim - 1)), z, best)
        return teacher_sample(teacher, best, cond, *self.settings)

    def score(self, student, z, cond, noise):
        """Score of each noise, [B], on the CPU."""
        if self.extractor is None:  # the teacher has been moved to its device by now
            self.extractor = ClassifierExtractor(self.teacher)
        images = self.teacher.decode(self.preview(student, z, cond, noise))
        _, logits = self.extractor(images)
        labels = cond["labels"].cpu()
        expected = self.extractor.classes(labels)
        if (expected < 0).any():
            prompt = self.teacher.prompts[labels[expected < 0][0]]
            raise UserError(
                "--best-of: expected prompts of the teacher's own, whose class the classifier "
                f"knows, found {prompt!r}"
            )
        return logits.log_softmax(1).gather(1, expected[:, None])[:, 0]
