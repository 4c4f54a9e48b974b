"""Images from a student or a teacher, for prompts or labels.

Usage:
    python sample.py out/dmd2-emoji "red heart" "a rocket" --n 4      # -> sample.png
    python sample.py out/dmd2-mnist --labels 3 7 --n 8 --seed 5
    python sample.py out/dmd2-emoji --prompts prompts.txt --dir pictures
    python sample.py out/dmd2-mnist --it 500                          # of a checkpoint, or: best
    python sample.py out/nct-mnist-edges --control drawing.png --labels 3
    python sample.py out/dmd2-flux-kontext --image photo.png "make it night"
    python sample.py --teacher emoji "red heart" --nfe 16 --cfg 3.5

In Python:
    from sample import load
    images = load("out/dmd2-emoji")(["red heart"], seed=0)            # list of PIL images

The noise of a picture depends on its seed only: --seed S --n N makes those of S, ..., S + N - 1,
the same with any batch and beside any other prompts. Metrics are in eval.py.
"""

if __name__ == "__main__":  # not in a program that imports `load`
    import training.interrupt  # noqa: F401

import argparse
import functools
import re
from pathlib import Path
from types import SimpleNamespace

import torch

from common.distributed import init_processes
from common.errors import UserError, did_you_mean, launch, require
from common.files import require_writable
from common.rng import PerImageNoise
from common.sampling import TEACHER_NFE
from common.teachers.kind import ADAPTER_KINDS, FROM_IMAGE, teacher_kind
from common.teachers.load import load_teacher
from common.teachers.prompt_files import read_prompts
from common.teachers.prompts import embed_prompts
from common.teachers.students import read_student
from controls.controlled import Controlled
from data.image_file import read_image
from tools.export import export_temporary
from tools.pictures import captioned
from tools.rows import load_student, prompt_kwargs, student_row, teacher_row
from tools.video import save_animation
from training.flags import NOT_GUIDED, Help, add_negative_prompt, add_teacher_lora, parse_size
from training.report import to_image

POINTS = 4000  # of a toy's picture
LABELLED = ("toy-cond", "mnist", "dit", "edm-cifar10", "default")  # kinds of teachers, with others


def parse_args(argv=None):
    usage = "python sample.py [RUN] [PROMPT ...] [--flag value ...]"
    p = argparse.ArgumentParser(
        description=__doc__, usage=usage, formatter_class=Help, allow_abbrev=False
    )
    p.error = lambda message: p.exit(2, f"sample.py: {message} (--help lists the flags)\n")
    p.add_argument("words", nargs="*", metavar="RUN PROMPT", help="folder of a run, then prompts")
    add = p.add_argument_group("model").add_argument
    add("--teacher", help="a teacher itself; after RUN: instead of the teacher of its training")
    add_teacher_lora(add)
    add("--it", help="checkpoint of RUN: its iterations, or best [the finished student]")
    add("--nfe", type=int, help=f"steps [as trained; {TEACHER_NFE} of a teacher]")
    add("--cfg", type=float, help="guidance scale w of a teacher, u + w (c - u)")
    add_negative_prompt(add)
    add("--size", type=parse_size, help="pixels: SIDE or HEIGHTxWIDTH [the pipeline's]")
    add = p.add_argument_group("images").add_argument
    add("--prompts", metavar="FILE", help="file of prompts, besides those of the command line")
    add("--labels", nargs="+", metavar="LABEL", help="numbers or names of classes [the first 10]")
    add("--control", metavar="FILE", help="image from which nct.py's condition is made")
    add("--image", metavar="FILE", help="source image, of a teacher that takes one")
    add("--n", type=int, default=1, help="images of each prompt or label")
    add("--seed", type=int, default=0, help="of the first of them")
    add = p.add_argument_group("output").add_argument
    add(
        "--out",
        metavar="FILE",
        help="PNG of all images with captions [sample.png]; of videos animated as .webp "
        "[sample.webp] or .gif, the middle frames as .png",
    )
    add("--dir", help="folder for one PNG an image, PROMPT-seedS.png; of videos animated .webp")
    add = p.add_argument_group("device").add_argument
    add("--batch", type=int, default=8, help="images per pass")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="of network passes")
    add("--cache-prompts", metavar="DIR", help="folder for embeddings [out/prompts]")

    args = p.parse_args(argv)
    args.run = None
    if args.words and (not args.teacher or Path(args.words[0]).is_dir()):
        args.run, *args.words = args.words
    require(args.run or args.teacher, "expected the folder of a run or --teacher NAME, found none")
    for name in ("n", "batch", "nfe"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name}: expected at least 1, found {value}")
    require(0 <= args.seed < 2**31, f"--seed: expected a number >= 0, found {args.seed}")
    require(not (args.labels and args.words), "--labels and prompts: expected one of them")
    check_outputs(args)
    return args


def check_outputs(args):
    """UserError for places that cannot be written, before anything is sampled."""
    if args.dir:
        require_writable("--dir", args.dir)
    if args.out:
        out = Path(args.out)
        require_writable("--out", out.parent)
        require(not out.is_dir(), f"--out {out}: expected the name of a file, found a folder")


class Sampler:
    """A student or teacher to be called. See `load`."""

    def __init__(self, row, options):
        self.model = row.model
        self.teacher = row.teacher
        self.sampler = row.sampler
        self.name = row.caption
        self.options = options
        self.is_toy = self.teacher.adapter == "toy"
        self.is_video = self.teacher.video
        self.image = None  # path of the source image
        self.rows = {}  # prompt -> its row in the teacher's embeddings
        if self.teacher.prompts is not None:
            prompts = getattr(self.teacher, "image_prompts", self.teacher.prompts)
            self.rows = {prompt: i for i, prompt in enumerate(prompts)}

    @torch.no_grad()
    def __call__(self, what=None, n=1, seed=0, batch=8):
        """what: list of prompts, or of labels (numbers or names; None: the first 10) -> list of PIL
        images, n for each in order, of the seeds seed, ..., seed + n - 1. A toy's points are one
        image; each video is the list of its frames."""
        found = self.find(what)
        if self.is_toy:
            n, batch = max(POINTS // len(found), 1), POINTS
        rows = [row for row, _ in found for _ in range(n)]
        seeds = [seed + i for i in range(n)] * len(found)
        parts = []
        for i in range(0, len(rows), batch):
            device = self.model.device
            noise = PerImageNoise(0, seeds[i : i + batch], device)
            noise = functools.partial(noise, *self.model.shape)
            cond = self.teacher.encode(torch.tensor(rows[i : i + batch]))
            x = self.sampler(self.model, noise(), cond, noise)
            show = self.model.decode if self.is_video else self.model.to_pictures
            parts.append(x if self.is_toy else show(x).cpu())
        if self.is_video:
            videos = torch.cat(parts).transpose(1, 2)
            return [[to_image(frame) for frame in video] for video in videos]
        if self.is_toy:
            parts = [self.model.to_pictures(torch.cat(parts))]
        return [to_image(picture) for picture in torch.cat(parts)]

    def find(self, what=None):
        """Prompts or labels -> list of (number, caption). UserError: not known to the teacher."""
        if self.teacher.prompts is not None:
            require(what, f"{self.name}: expected prompts, found none")
            prompts = list(what)
            if self.teacher.takes_image:
                prompts = self.teacher.with_source(prompts, self.image)
            self.embed([prompt for prompt in dict.fromkeys(prompts) if prompt not in self.rows])
            return [(self.rows[prompt], text) for prompt, text in zip(prompts, what)]
        names = self.teacher.class_names()  # several of each class
        label_of = {name: label for label, synonyms in enumerate(names) for name in synonyms}
        classes = self.teacher.classes
        found = []
        for word in range(min(classes, 10)) if what is None else what:
            label = str(label_of.get(word, word))
            require(
                label.isdigit() and int(label) < max(classes, 1),
                f"--labels {word}: expected a number from 0 to {classes - 1}, or a class's name"
                f"{did_you_mean(word, label_of)}",
            )
            label = int(label)
            found.append((label, names[label][0] if names else f"label {label}"))
        return found or [(0, self.name)]

    def embed(self, prompts):
        """Adds prompts to the teacher's embeddings."""
        if not prompts:
            return
        teacher = getattr(self.teacher, "experts", [self.teacher])[0]
        require(
            not self.options.fixed_prompts,
            f"{prompts[0]!r}: expected a prompt of the training: the students of this run share "
            "its prompts among them",
        )
        kind = (type(teacher), teacher.folder, prompts, teacher.device, teacher.dtype)
        how = (self.options.cache_prompts, print, teacher.loras)
        first = teacher.table.append(embed_prompts(*kind, *how))
        self.rows |= {prompt: first + i for i, prompt in enumerate(prompts)}


def load(
    run=None,
    teacher=None,
    prompts=None,
    it=None,
    nfe=None,
    cfg=None,
    control=None,
    size=None,
    cache_prompts=None,
    device="auto",
    dtype="auto",
    teacher_lora=None,
    negative_prompt=None,
    image=None,
):
    """A student (run: its folder) or a teacher -> Sampler, which makes images when it is called.

    Arguments are the flags of the same names; prompts: the first ones, list of str; teacher_lora:
    list of FILE or FILE:SCALE.
    """
    _, _, device, dtype = init_processes(SimpleNamespace(device=device, dtype=dtype))
    source = run
    if run is not None:
        for flag, value in {"--cfg": cfg, "--negative-prompt": negative_prompt}.items():
            trained = "the guidance of a student is trained in"
            require(value is None, f"{flag}: expected a teacher; {trained}")
        source = export_temporary(run, it)[0] if it else run
        info = read_student(source)[1]
        teacher = teacher or info["teacher"]
    text = takes_prompts(teacher)
    require(text or not prompts, f"prompts: expected --labels, which --teacher {teacher} takes")
    require(
        run is not None or cfg is not None or not text,
        f"--cfg: expected the guidance scale of --teacher {teacher} (1 for none), found none",
    )
    require(
        run is not None or negative_prompt is None or cfg != 1,
        f"--negative-prompt: expected --cfg other than 1, {NOT_GUIDED}",
    )
    options = SimpleNamespace(teacher=teacher, size=size, cache_prompts=cache_prompts)
    options.negative_prompt = negative_prompt
    options.frames = options.it = None
    options.teacher_lora = teacher_lora
    options.prompts = list(prompts or [""]) if text else None
    takes_image = teacher_kind(teacher)[0] in FROM_IMAGE
    if takes_image:
        require(
            image is not None,
            f"--image FILE: expected the image that --teacher {teacher} takes, found none",
        )
        options.prompts = [(prompt, image) for prompt in options.prompts]
    else:
        require(
            image is None,
            f"--image {image}: expected a teacher that takes an image ({', '.join(FROM_IMAGE)}), "
            f"found {teacher}",
        )
    options.fixed_prompts = False
    if run is None:
        model = load_teacher(teacher, device, dtype, text=prompt_kwargs(options))
        row = teacher_row(model, teacher, nfe or TEACHER_NFE, 1.0 if cfg is None else cfg, False)
    else:
        if text and info["model"].get("by") == "label":  # each student has some of the prompts
            options.prompts, options.fixed_prompts = None, True
        student = load_student(source, options, {}, device, dtype)
        row = student_row(student, nfe or info["nfe"])
        row.caption = f"{Path(run).resolve().name}{f' it {it}' if it else ''}"
    row.model.to(device)
    row.model.dtype = dtype
    if isinstance(row.model, Controlled):
        row.sampler = with_control(student, control)
    else:
        require(control is None, f"--control {control}: expected a student of nct.py, found none")
    sampler = Sampler(row, options)
    sampler.image = image
    return sampler


def takes_prompts(teacher):
    """Whether --teacher is a text-to-image pipeline."""
    return teacher_kind(teacher)[0] not in (*ADAPTER_KINDS.values(), *LABELLED)


def with_control(student, file):
    """Sampler of nct.py's student whose condition is made from an image file."""
    model = student.model
    name = model.control.name
    if model.adapter == "toy":
        require(file is None, f"--control {file}: expected images, found points")
        return lambda model, z, cond, noise: student.sample(model, z, cond, 1, noise)
    require(
        file is not None,
        f"--control FILE: expected an image from which the condition ({name}) is made, found none",
    )
    channels, *size = model.image_shape
    try:
        image = read_image(file, channels, tuple(size))
    except (OSError, ValueError) as e:
        raise UserError(f"--control {file}: expected an image, found: {e}") from None
    x = model.encode_images(image[None].to(model.device))
    c = model.control(x, torch.full((1, 4), 0.5, device=model.device))

    def sampler(model, z, cond, noise):
        return student.sample(model, z, cond, 1, noise, c=c.expand(len(z), *c.shape[1:]))

    return sampler


def file_names(captions, seeds, suffix=".png"):
    """A name for each image: its caption in plain letters, and its seed; all different."""
    names = []
    for caption, seed in zip(captions, seeds):
        slug = re.sub(r"[^\w.]+", "-", caption.lower()).strip("-.")[:60] or "image"
        name = f"{slug}-seed{seed}"
        same = sum(other == name or other.startswith(f"{name}_") for other in names)
        names.append(f"{name}_{same + 1}" if same else name)
    return [f"{name}{suffix}" for name in names]


def main(argv=None):
    args = parse_args(argv)
    what = args.labels or args.words + (read_prompts(args.prompts) if args.prompts else [])
    names = ("it", "nfe", "cfg", "control", "size", "cache_prompts", "device", "dtype")
    names += ("teacher_lora", "negative_prompt", "image")
    options = {name: getattr(args, name) for name in names}
    sampler = load(args.run, args.teacher, None if args.labels else what, **options)
    found = sampler.find(what or None)
    images = sampler(what or None, args.n, args.seed, args.batch)

    captions = [caption for _, caption in found for _ in range(args.n)]
    seeds = [args.seed + i for i in range(args.n)] * len(found)
    if sampler.is_toy:
        captions, seeds = [sampler.name], [args.seed]
    if args.dir:
        Path(args.dir).mkdir(parents=True, exist_ok=True)
        names = file_names(captions, seeds, ".webp" if sampler.is_video else ".png")
        for name, image in zip(names, images):
            if sampler.is_video:
                save_animation(Path(args.dir) / name, image)
            else:
                image.save(Path(args.dir) / name)
        print(f"{len(images)} {'videos' if sampler.is_video else 'images'}: {args.dir}")
    if args.out or not args.dir:
        out = args.out or ("sample.webp" if sampler.is_video else "sample.png")
        notes = [f"seed {seed}" for seed in seeds]
        captioned(out, images, captions, notes, columns=args.n if args.n > 1 else 5)
        print(f"{sampler.name}: {out}")


if __name__ == "__main__":
    launch(main)
