"""Measures students, teachers and image folders. The last printed line is one JSON object; every result is also appended to out/eval.jsonl.

    python eval.py out/dmd2-mnist                                     # a run's student, as it was trained: steps, sampler and teacher of distill.json
    python eval.py out/*-mnist --compare --sort fd                    # students and their teacher: one table, one picture, log curves; again: free
    python eval.py out/*-mnist --compare --teacher-nfe 1,2,4,8,16,50 --heun    # with all baselines
    python eval.py --teacher mnist --nfe 1,2,4,8,16,50 --cfg 1,1.5,2  # a teacher alone, all combinations
    python eval.py --images A --ref-images B --inception pt_inception-2015-12-05-6726825d.pth     # FID of two folders; --teacher mnist: its protocol
    python eval.py out/dmd2-cifar --inception FILE --ref cifar10-32x32.npz --n 50000 --seeds 3    # FID against EDM's reference file
    python eval.py out/flowmap-mnist --compare --best-of 8            # the student previews 8 noises per image, the teacher gets the best one
    torchrun --nproc_per_node=8 eval.py ... --samples 50000           # the same numbers: image i depends on (--seed, i), not on batch or processes

Metrics. A teacher folder brings its own protocol (a small classifier's features): `fd`, never called FID. `fid` is printed only for the public
Inception weights, given by path: TF1 resize, uint8, float64 statistics. kid: 100 subsets of 1,000 images (fewer if there are fewer), not times 1000.
precision, recall, density, coverage: k = 3, against as many reference images as samples, the first of a fixed shuffle.
agreement: share of samples whose label the classifier finds; image i has label i % classes. Toy teachers: energy distance, sliced Wasserstein
distance, smallest and largest share of a mode, share of points within 3 standard deviations of their mode.
A run of nct.py: metrics of images whose conditions are those of other samples of its generator; `control`: does it obey (common/adapters.py, obedience).
`passes` counts network passes per image: guidance doubles them, Heun nearly. Distances fall with n: compare only equal n. Gaps below 1-2 % are noise.
The object is the result itself, or {"results": [...]} if there are several. With --seeds metrics are means; `min` and `all` hold the rest.
--compare: common/compare.py says what its columns mean and what makes two runs one row.
"""

import argparse
import datetime
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common import fid, metrics
from common.distributed import init_processes, on_all_ranks
from common.errors import UserError, launch
from common.features import ClassifierExtractor
from common.files import ROOT, git_revision
from common.flags import parse_size
from common.report import dumps, hardware
from common.routed import ByLabel
from common.sampling import TEACHER_NFE, teacher_sample
from common.teachers.load import load_teacher
from common.teachers.students import network_of, read_student, sampler_of
from controls.measure import control_error, control_summary
from tools.compare import Book, add_flags, check, close, teacher_steps
from tools.measure import (
    InceptionExtractor,
    bar_interval,
    count_nfe,
    draw_rows,
    folder_features,
    hash_weights,
    latency,
    list_images,
    similarity,
    table,
)


def numbers(flag, text, kind, low, high=math.inf):
    """'1,2,4' -> [1, 2, 4]; None stays None."""
    try:
        values = None if text is None else [kind(v) for v in text.split(",")]
    except ValueError:
        values = [math.nan]
    if values is not None and not all(low <= v <= high and math.isfinite(v) for v in values):
        raise UserError(
            f"{flag} {text}: expected numbers from {low}{f' to {high}' if high < math.inf else ''}, separated by commas"
        )
    return values


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "runs", nargs="*", help="folders of runs (or their student/): weights and distill.json"
    )
    what, how, out = (
        p.add_argument_group("what"),
        p.add_argument_group("how"),
        p.add_argument_group("output"),
    )
    what.add_argument(
        "--teacher",
        help="toy, toy-cond, mnist or a teacher folder; with runs: instead of the teacher that distill.json names",
    )
    what.add_argument(
        "--nfe",
        help="list; steps of the student (default: as trained) or of a teacher alone (default 16)",
    )
    what.add_argument(
        "--cfg",
        help="list; guidance of teacher rows, u + w (c - u). Default: 1 for a teacher alone, else that of the first student's training",
    )
    what.add_argument(
        "--heun",
        action="store_true",
        help="teacher rows by Heun's method, two passes per step except the last; --compare: beside Euler's",
    )
    what.add_argument(
        "--prompts",
        help="text-to-image: file of prompts, one per line; default: those of the training",
    )
    what.add_argument("--cache-prompts", help="folder for their embeddings; default out/prompts")
    what.add_argument(
        "--size",
        type=parse_size,
        help="pixels along a side, or HEIGHTxWIDTH, if other than what the teacher was built for (pipelines)",
    )
    what.add_argument(
        "--frames",
        type=int,
        help="frames of a video, if other than what the teacher's pipeline makes by default",
    )
    what.add_argument("--images", help="measure this folder instead of a model")
    what.add_argument(
        "--compare",
        action="store_true",
        help="measure the teacher too, draw all rows with the same noise and labels; seeds of one setting are one row",
    )
    what.add_argument(
        "--teacher-nfe",
        help=f"list; steps of the teacher's rows. Default: {TEACHER_NFE}; --compare: 50 and those of the students",
    )
    what.add_argument(
        "--best-of",
        type=int,
        help="adds rows of the teacher whose noise is the best of this many under a student's preview (flowmap keeps noise and "
        "image paired). What the verifier measures is flattered: here `agreement`, and fd in the classifier's features",
    )
    what.add_argument(
        "--verifier",
        choices=["classifier"],
        help="of --best-of; classifier (default): log-probability of the label, the teacher folder's classifier",
    )
    how.add_argument(
        "--inception",
        help="weights pt_inception-2015-12-05-6726825d.pth: FID instead of the teacher's protocol; needs --ref or --ref-images",
    )
    how.add_argument(
        "--force-inception",
        action="store_true",
        help="accept weights with another hash; the metric is then called fd",
    )
    how.add_argument(
        "--resize",
        choices=["tf1", "clean"],
        help="to Inception's 299 pixels: tf1 (default; EDM, ADM, SiD, DMD2) or clean (PIL bicubic; COCO)",
    )
    how.add_argument(
        "--ref",
        help="reference statistics: .npz with mu and sigma, as EDM publishes them; gives no KID, precision or recall",
    )
    how.add_argument(
        "--ref-images", help="reference images: a folder, at their own size, subfolders included"
    )
    how.add_argument(
        "--n",
        "--samples",
        type=int,
        help="samples, default 5000; with --images: the first n files by name, default all. torchrun takes --n for its own: use --samples",
    )
    how.add_argument(
        "--per-prompt",
        type=int,
        help="also this many images for each of the first 8 prompts or labels: `similarity`, mean cosine of the features of "
        "two of them. The higher, the less diverse; the teacher's is the scale",
    )
    how.add_argument("--seed", type=int, default=0)
    how.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="number of sampling seeds: --seed, --seed + 1, ...; mean, minimum and all values are given",
    )
    how.add_argument(
        "--batch",
        type=int,
        default=250,
        help="samples per pass and process; changes time and memory only",
    )
    how.add_argument("--device", default="auto", help="auto, cpu or cuda")
    how.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="of the network passes; auto: bf16 on CUDA",
    )
    out.add_argument(
        "--out",
        default=str(ROOT / "out" / "eval.jsonl"),
        help="file to which each result is appended as a line",
    )
    out.add_argument(
        "--save-images",
        help="new folder for the samples as PNG, 000000.png...; several rows or seeds: one subfolder each",
    )
    out.add_argument(
        "--grid",
        help="PNG with a captioned row of 20 samples per result, the teacher's first; --compare: default out/compare.png",
    )
    add_flags(p.add_argument_group("--compare"))
    out.add_argument(
        "--latency",
        action="store_true",
        help="time of sampling and decoding at batch 1 and --batch, median after two warm-up calls",
    )

    p.error = lambda message: p.exit(2, f"eval.py: {message} (--help lists the flags)\n")
    args = p.parse_args(argv)
    args.nfe, args.cfg = (
        numbers("--nfe", args.nfe, int, 1, 1000),
        numbers("--cfg", args.cfg, float, 0),
    )
    args.teacher_nfe = numbers("--teacher-nfe", args.teacher_nfe, int, 1, 1000)
    for name, low in dict(
        n=8, seeds=1, batch=1, seed=0, best_of=2, per_prompt=2
    ).items():  # 8: k = 3 neighbours and a covariance need some
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise UserError(
                f"--{name.replace('_', '-')}: expected at least {low}, found {getattr(args, name)}"
            )
    of_models = (
        "--nfe",
        "--cfg",
        "--heun",
        "--compare",
        "--best-of",
        "--save-images",
        "--grid",
        "--latency",
        "--per-prompt",
    )
    models_only = [f for f in of_models if getattr(args, f[2:].replace("-", "_"))]
    pictures = args.compare or args.grid or args.best_of
    for wrong, message in (
        (
            not (args.runs or args.teacher or args.images),
            "expected the folder of a run, --teacher NAME or --images FOLDER, found none of them",
        ),
        (
            args.images and (args.runs or models_only),
            f"--images measures a folder, {' '.join(args.runs + models_only)} a model: leave one out",
        ),
        (
            args.images and not (args.inception or args.teacher),
            "--images: needs --inception FILE (FID) or --teacher NAME (its classifier)",
        ),
        (
            args.ref and args.ref_images,
            "--ref and --ref-images contradict each other: choose one reference",
        ),
        (
            args.inception and not (args.ref or args.ref_images),
            "--inception: needs a reference, --ref FILE.npz or --ref-images FOLDER",
        ),
        (
            (args.resize or args.force_inception) and not args.inception,
            "--resize and --force-inception mean something only with --inception FILE",
        ),
        (
            args.teacher_nfe and not (args.runs and pictures),
            "--teacher-nfe: only beside run folders, with --compare, --grid or --best-of",
        ),
        (
            args.runs and (args.cfg or args.heun) and not pictures,
            "--cfg and --heun are for teacher rows, a student's guidance is trained in: add --compare",
        ),
        (
            args.best_of and not args.runs,
            "--best-of: expected folders of runs, whose students preview the teacher's noises",
        ),
        (args.verifier and not args.best_of, "--verifier: means something only with --best-of"),
        (
            args.compare and not args.runs,
            "--compare: expected folders of runs; a teacher alone takes several --nfe and --cfg as they are",
        ),
    ):
        if wrong:
            raise UserError(message)
    check(args)
    return args


# ---- rows: what is sampled ----------------------------------------------------------------------------------------------------------------
# A row is a dict: model, sampler(model, z, cond, noise), its teacher, facts for the result, caption of its picture, folder of its weights, and whether
# it is measured or only drawn.


def load_student(folder, args, teachers):
    """-> student, its method's `sample`, the checked distill.json, its teacher. teachers: those loaded so far, by name."""
    home, info = read_student(folder)
    sample = sampler_of(home, info)
    name = args.teacher or info["teacher"]
    try:
        teachers[name] = teacher = teachers.get(name) or load_teacher(
            name, text=text_of(args, info)
        )
    except UserError as e:
        raise UserError(
            f"{folder}: its teacher: {e}" + ("" if args.teacher else " (--teacher overrides it)")
        ) from None
    return network_of(folder, home, info, teacher, name), sample, info, teacher, name


def text_of(args, info=None):
    """Prompts, size, frames and guidance for a pipeline: of the flags, else those that the student was trained with."""
    trained = info["flags"] if info and isinstance(info.get("flags"), dict) else {}
    kinds = dict(prompts=str, size=(int, list), frames=int, embedded_guidance=(int, float))
    old = {k: trained[k] if isinstance(trained.get(k), kind) else None for k, kind in kinds.items()}
    size = args.size or (
        None
        if isinstance(old["size"], list) and list(map(type, old["size"])) != [int, int]
        else old["size"]
    )
    return dict(
        prompts=args.prompts or old["prompts"],
        size=size,
        frames=args.frames or old["frames"],
        guidance=old["embedded_guidance"],
        cache=args.cache_prompts,
    )  # never the student's cache: its folder may be somebody else's, and this one is written to


def teacher_row(teacher, name, nfe, cfg, heun, measured=True):
    facts = dict(
        name=f"teacher {Path(name).name}", method="teacher", teacher=name, nfe=nfe, cfg=cfg
    ) | (dict(heun=True) if heun else {})
    return dict(
        model=teacher,
        teacher=teacher,
        facts=facts,
        measured=measured,
        folder=teacher.folder,
        sampler=lambda m, z, c, noise: teacher_sample(m, z, c, nfe, cfg, heun),
        caption=f"teacher, {'Heun, ' * heun}{nfe} step{'s' * (nfe > 1)}, w = {cfg:g}",
    )


def student_row(folder, student, sample, info, teacher, name, nfe):
    # a list of steps belongs to the number it was trained with; for another number the method's own rule makes the grid
    sampler = {k: v for k, v in info["sampler"].items() if k != "steps" or nfe == info["nfe"]}
    home = Path(folder).resolve()
    home = home.parent if home.name == "student" else home
    row = dict(
        model=student,
        teacher=teacher,
        facts=dict(
            name=home.name, method=info["method"], teacher=name, nfe=nfe, cfg=info.get("cfg")
        ),
        measured=True,
        folder=student.folder,
        sampler=lambda m, z, c, noise: sample(m, z, c, nfe, noise, **sampler),
        caption=f"{home.name}, {nfe} step{'s' * (nfe > 1)}",
        info=info,
        run=home,
    )
    if (
        info["method"] == "nct"
    ):  # its cost is that with a condition at hand; to measure it one is made of another sample
        row["cost"] = lambda m, z, c, noise: sample(
            m, z, c, nfe, noise, c=m.control.blank(len(z), z.device)
        )
    return row


def best_row(row, n, nfe, cfg, heun):
    """The teacher from the noise that looks best of n when the student of `row` previews them; the first candidate is the noise of the plain rows."""
    teacher, preview, extractors = row["teacher"], row["sampler"], []

    def sampler(m, z, cond, noise):
        if not extractors:
            extractors.append(
                ClassifierExtractor(teacher)
            )  # on the teacher's device, known only now
        best = score = None
        for i in range(n):
            z = noise() if i else z
            logits = extractors[0](m.decode(preview(m.experts[1], z, cond, noise)))[1]
            wanted = extractors[0].classes(cond["labels"].cpu())
            if (wanted < 0).any():
                raise UserError(
                    f"--best-of: expected prompts of the teacher's own, whose class the classifier knows, found {teacher.prompts[cond['labels'][wanted < 0][0]]!r}"
                )
            now = logits.log_softmax(1).gather(1, wanted[:, None])[:, 0]
            better = now > score if i else torch.ones_like(now, dtype=torch.bool)
            score = torch.where(better, now, score) if i else now
            best = (
                torch.where(better.to(z.device).view(-1, *[1] * (z.ndim - 1)), z, best) if i else z
            )
        return teacher_sample(m.experts[0], best, cond, nfe, cfg, heun)

    facts = dict(
        row["facts"],
        name=f"teacher best-of-{n} {row['facts']['name']}",
        nfe=nfe,
        cfg=cfg,
        best_of=n,
        verifier="classifier",
    )
    facts |= dict(heun=True) if heun else {}
    both = ByLabel(
        [teacher, row["model"]], [0] * teacher.classes
    )  # answers as the teacher; the passes of both are counted
    return dict(
        model=both,
        teacher=teacher,
        facts=facts,
        measured=True,
        folder=row["folder"],
        sampler=sampler,
        caption=f"teacher, {nfe} step{'s' * (nfe > 1)}, w = {cfg:g}, best of {n} noises by {row['facts']['name']}",
    )


def make_rows(args, dtype):
    """Loads everything on the CPU, so that a mistake in the last folder shows before the first sample is made."""
    if not args.runs:
        teacher = load_teacher(args.teacher, text=text_of(args))
        rows = [
            teacher_row(teacher, args.teacher, n, w, args.heun)
            for n in args.nfe or [TEACHER_NFE]
            for w in args.cfg or [1.0]
        ]
    else:
        teachers = {}
        loaded = [(folder, *load_student(folder, args, teachers)) for folder in args.runs]
        rows = [student_row(*one, nfe) for one in loaded for nfe in args.nfe or [one[3]["nfe"]]]
        if args.compare or args.grid or args.best_of:
            if len(teachers) > 1:
                raise UserError(
                    f"--compare, --grid and --best-of: expected students of one teacher, found {', '.join(teachers)}"
                )
            name, teacher = next(iter(teachers.items()))
            cfgs = args.cfg or list(
                dict.fromkeys(
                    one[3].get("cfg") or 1.0 for one in loaded[: None if args.compare else 1]
                )
            )
            steps = (
                teacher_steps(args, [row["facts"]["nfe"] for row in rows])
                if args.compare
                else [(n, args.heun) for n in args.teacher_nfe or [TEACHER_NFE]]
            )
            grid = [(n, w, heun) for n, heun in steps for w in cfgs]
            best = (
                [best_row(row, args.best_of, *g) for row in rows for g in grid]
                if args.best_of
                else []
            )
            rows = [teacher_row(teacher, name, *g, args.compare) for g in grid] + rows + best
    for row in rows:
        row["model"].dtype = dtype
        if row["teacher"].video:
            raise UserError(
                f"{row['facts']['teacher']}: expected a teacher of images, which is all that can be measured here, found one of videos; samples/ has frames"
            )
        if args.best_of and row["teacher"].adapter == "toy":
            raise UserError(
                "--best-of: the verifier is the classifier of a teacher of images; the toy has none"
            )
        if row["teacher"].adapter == "toy" and (
            args.save_images
            or args.inception
            or args.ref
            or args.ref_images
            or args.per_prompt
            or args.n > 20000
        ):
            raise UserError(
                "toy: its samples are points, measured against the exact mixture: --save-images, --inception, --ref, --ref-images, --per-prompt need images, "
                "and --n goes to 20000 (all pairs are compared)"
            )
    return rows


def make_extractor(args, teacher, device, rank, world):
    """Features and the reference that the flags ask for: Inception, or the teacher's own protocol."""
    extractor = (
        InceptionExtractor(args.inception, device, args.resize or "tf1", args.force_inception)
        if args.inception
        else ClassifierExtractor(teacher)
    )
    if args.ref:
        try:
            stats = fid.load_stats(args.ref)
        except UserError as e:
            raise UserError(f"--ref {e}") from None
        if len(stats["mu"]) != extractor.dims:
            raise UserError(
                f"--ref {args.ref}: expected statistics of {extractor.dims} features ({extractor.protocol}), found {len(stats['mu'])}"
            )
        extractor.set_reference(stats, Path(args.ref).name)
    elif args.ref_images:
        real, _ = folder_features(
            list_images("--ref-images", args.ref_images), extractor, args.batch, rank, world
        )
        stats = fid.Stats(extractor.dims)
        stats.update(real)
        mu, sigma = stats.mean_cov()
        extractor.set_reference(
            dict(mu=mu, sigma=sigma, n=stats.n), f"{Path(args.ref_images).name}:{stats.n}", real
        )
    return extractor


def measure(row, args, folder, extractor, rank, world, take=None):
    """Metrics of one row, over the seeds -> result. folder: for PNG files, or None. take(seed, indices, uint8 images or points): sees every batch."""
    from PIL import Image

    values, seeds = [], [args.seed + s for s in range(args.seeds)]
    for seed in seeds:
        sub = folder / f"seed{seed}" if folder and len(seeds) > 1 else folder
        if sub:
            sub.mkdir(parents=True, exist_ok=True)

        def keep(index, images):
            if take:
                take(seed, index, images)
            for i, image in zip(
                index.tolist(), images.cpu().permute(0, 2, 3, 1).numpy() if sub else ()
            ):
                Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
                    sub / f"{i:06d}.png"
                )

        with tqdm(
            total=len(range(rank, args.n, world)),
            desc=f"{row['caption']}, seed {seed}",
            disable=rank > 0,
            mininterval=bar_interval(),
        ) as bar:
            values.append(
                metrics.evaluate(
                    row["sampler"],
                    row["model"],
                    row["teacher"],
                    args.n,
                    seed,
                    args.batch,
                    rank,
                    world,
                    extractor,
                    bar.update,
                    keep if sub or take else None,
                )
            )
    result = dict(values[0], distinct=min(v["distinct"] for v in values))
    del result["seed"]
    if len(seeds) > 1:
        every = {k: [v[k] for v in values] for k in metrics.METRICS if k in result}
        result |= {k: sum(v) / len(v) for k, v in every.items()} | dict(
            min={k: min(v) for k, v in every.items()}, all=every
        )
        result["protocol"] = result["protocol"].replace(
            f"seed={seeds[0]}", f"seed={seeds[0]}-{seeds[-1]}"
        )
    if args.per_prompt:
        result["similarity"] = similarity(
            row["sampler"],
            row["model"],
            extractor,
            args.per_prompt,
            args.seed,
            args.batch,
            rank,
            world,
        )
    if row["facts"]["method"] == "nct":
        result["control"] = on_all_ranks(
            lambda: (
                control_error(row["model"], min(args.n, 2000), args.seed, args.batch)
                if rank == 0
                else None
            ),
            world,
        )[0]
    return dict(
        row["facts"],
        passes=count_nfe(row.get("cost", row["sampler"]), row["model"]),
        seeds=seeds,
        **result,
    )


def measure_folder(files, args, extractor, rank, world):
    """The same for --images."""
    name = Path(args.images).resolve().name
    features, ids = folder_features(files, extractor, args.batch, rank, world)
    found = on_all_ranks(
        lambda: metrics.distances(extractor, features) if rank == 0 else None, world
    )[0]
    return dict(
        name=name,
        images=args.images,
        teacher=args.teacher,
        protocol=extractor.describe(len(files), f"images={name}"),
        **found,
        n=len(files),
        distinct=len(ids.unique()),
    )


def open_outputs(args):
    """Every place that will be written, tried before the first sample."""
    for flag, path in (
        ("--out", args.out),
        ("--grid", args.grid),
        ("--save-images", args.save_images),
    ):
        try:
            if path:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            if path and flag == "--save-images":
                Path(path).mkdir(exist_ok=True)
                if next(Path(path).iterdir(), None):
                    raise UserError(
                        f"{flag} {path}: expected a new or empty folder, since old files would be taken for samples; found files in it"
                    )
            elif path:
                new = not Path(path).exists()
                open(path, "ab").close()
                if new:
                    Path(path).unlink()
        except OSError as e:
            raise UserError(
                f"{flag} {path}: expected a place that can be written, found: {e.strerror}"
            ) from None


def main(argv=None):
    args = parse_args(argv)
    rank, world, device, dtype = init_processes(args)
    say = lambda *text: print(*text, flush=True) if rank == 0 else None
    files = list_images("--images", args.images, args.n) if args.images else None
    args.n = args.n or (len(files) if files else 5000)
    args.grid = args.grid or (str(Path(args.out).parent / "compare.png") if args.compare else None)
    rows = [] if files else make_rows(args, dtype)
    teachers = [row["teacher"].to(device) for row in rows] or [
        load_teacher(args.teacher, device) if args.teacher else None
    ]
    if files and not args.inception and teachers[0].adapter == "toy":
        raise UserError(
            f"--teacher {args.teacher}: its samples are points; for images give a teacher of images, or --inception FILE"
        )
    on_all_ranks(lambda: open_outputs(args) if rank == 0 else None, world)
    extractors = {}  # by teacher; Inception serves all
    for teacher in teachers:
        key = "inception" if args.inception else teacher
        if key not in extractors and (files or teacher.adapter != "toy"):
            extractors[key] = make_extractor(args, teacher, device, rank, world)
    extractor_of = lambda teacher: extractors.get("inception" if args.inception else teacher)
    if files and any(f.suffix.lower() in (".jpg", ".jpeg", ".webp") for f in files):
        say(
            "note: JPEG or WebP among --images; lossy compression alone can move these distances more than methods do"
        )

    measured, results = [row for row in rows if row["measured"]] or [None], []
    book = Book(args, rank, world) if args.compare else None
    for i, row in enumerate(measured):
        start, extractor = time.time(), extractor_of(row["teacher"] if row else teachers[0])
        if book and (known := book.find(row, extractor, dtype)):
            results.append(known)
            continue
        if row is None:
            result = measure_folder(files, args, extractor, rank, world)
        else:
            row["model"].to(device)
            slug = (
                f"{i:02d}-{row['facts']['name'].replace(' ', '-')}-nfe{row['facts']['nfe']}"
                if len(measured) > 1
                else ""
            )
            result = measure(
                row,
                args,
                Path(args.save_images) / slug if args.save_images else None,
                extractor,
                rank,
                world,
                book.take if book else None,
            )
            result["weights"] = hash_weights(row["folder"])
            if args.latency:  # on one process while the others wait
                result["latency"] = on_all_ranks(
                    lambda: (
                        latency(row.get("cost", row["sampler"]), row["model"], args.batch)
                        if rank == 0
                        else None
                    ),
                    world,
                )[0]
        result |= dict(
            dtype=str(dtype)[6:],
            hardware=hardware(device),
            threads=torch.get_num_threads(),
            world=world,
            seconds=round(time.time() - start, 1),
            torch=torch.__version__,
            revision=git_revision(),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        results.append(result)
        if book:
            book.add(row, result)
        if rank == 0:
            with open(args.out, "a") as f:
                f.write(dumps(result) + "\n")
        if extractor and result["n"] <= extractor.dims:
            say(
                f"note: {result['n']} images for {extractor.dims} features give a singular covariance: good for a smoke test only"
            )
        if "control" in result:
            say(f"{row['caption']}: {control_summary(result['control'])}")
        if "latency" in result:
            for b, t in result["latency"].items():
                say(
                    f"{row['caption']}: batch {b}: {t['ms_per_image']} ms per image, {t['images_per_s']} images/s"
                )
    if rank == 0 and book:
        close(book, measured, results, say)
    elif rank == 0 and args.grid:
        draw_rows(args.grid, rows, args, device)
    if not book:
        say("\n" + table(results) + "\n" + "\n".join(dict.fromkeys(r["protocol"] for r in results)))
    say(dumps(results[0] if len(results) == 1 else dict(results=results)))


if __name__ == "__main__":
    launch(main)
