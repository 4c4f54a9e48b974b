"""Measures students, teachers and image folders.

The last printed line is one JSON object: the result, or {"results": [...]} if there are several.
Every result is also appended to out/eval.jsonl.

Usage:
    # a run's student, with the steps, sampler and teacher of its training
    python eval.py out/dmd2-mnist
    # the student of a checkpoint: its iterations, or the best of --eval-every
    python eval.py out/dmd2-mnist --it 500
    # students and their teacher: a table, a picture, log curves; repeated, it costs nothing
    python eval.py out/*-mnist --compare --sort fd
    python eval.py out/*-mnist --compare --teacher-nfe 1,2,4,8,16,50 --heun
    # a teacher alone, all combinations
    python eval.py --teacher mnist --nfe 1,2,4,8,16,50 --cfg 1,1.5,2
    # the student previews 8 noises per image, the teacher gets the best one
    python eval.py out/flowmap-mnist --compare --best-of 8
    # FID of two folders (with --teacher mnist instead of --inception: its protocol)
    python eval.py --images A --ref-images B --inception pt_inception-2015-12-05-6726825d.pth
    # FID against EDM's reference file
    python eval.py out/dmd2-cifar --inception FILE --ref cifar10-32x32.npz --n 50000 --seeds 3
    # text to image: scores by models of transformers, folders or hub names (docs/evaluate.md)
    python eval.py out/dmd2-sdxl --prompts coco.txt --clip CLIP --pickscore PICK --hps HPS
    python eval.py out/dmd2-sdxl --dino DINOV2 --ref-images PHOTOS --per-prompt 8
    python eval.py --images A --prompts coco.txt --clip CLIP
    # the same numbers on 8 GPUs: image i depends on (--seed, i), not on batch or processes
    torchrun --nproc_per_node=8 eval.py out/dmd2-mnist --samples 50000

Metrics of images:
    fd         Frechet distance in the features of the classifier that a teacher brings
    fid        the same with the public Inception weights, given by path: TF1 resize, uint8, float64
    kid        mean of 100 subsets of 1,000 images (fewer if there are fewer), not times 1000
    precision, recall, density, coverage
               k = 3, against as many reference images as samples, the first of a fixed shuffle
    agreement  share of samples whose label the classifier finds; image i has label i % classes
    similarity (--per-prompt) mean cosine of the features of two images of one label or prompt
    vendi      (--per-prompt) effective number of different images of one label or prompt
    clip_score, pickscore, hps
               (--clip, --pickscore, --hps) of an image and its prompt, means; tools/scores.py
    control    (nct.py) how well images follow conditions of other samples (controls/measure.py)
Metrics of videos, beside those of their frames:
    motion, flicker      mean change of a pixel from frame to frame; what of it returns at once
    frame_similarity     mean cosine of the features of consecutive frames (--dino, --inception)
Metrics of points (toy teachers), against the exact mixture:
    energy_distance, sliced_wasserstein
    mode_min, mode_max   smallest and largest share of a mode
    near_mode            share of points within 3 standard deviations of their mode
`passes` counts network passes per image: guidance doubles them, Heun nearly. Distances fall with n:
compare equal n only. Differences below 1-2 % are noise. With --seeds, metrics are means; `min` and
`all` have the rest. The columns of --compare are explained in tools/compare.py.
"""

import training.interrupt  # noqa: F401  # isort: skip

import argparse
import contextlib
import math
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from common import fid, metrics
from common.distributed import bar_interval, gather_rows, init_processes, on_rank0
from common.errors import UserError, launch, require
from common.features import ClassifierExtractor
from common.files import ROOT, git_revision
from common.sampling import TEACHER_NFE, generate
from common.teachers.load import load_teacher
from common.teachers.prompt_files import read_prompts
from controls.measure import control_error, control_summary
from data.image_file import describe_notes
from tools import compare
from tools.cache import ResultCache, cache_settings, kept_samples
from tools.inception import InceptionExtractor
from tools.measure import (
    Squared,
    alikeness,
    count_nfe,
    folder_features,
    hash_weights,
    latency,
    list_images,
)
from tools.pictures import sample_rows, save_numbered
from tools.rows import make_rows
from tools.scores import KEYS, DinoExtractor, NoFeatures, Scores
from tools.video import FrameExtractor, frames_of, temporal_metrics
from training.flags import (
    Help,
    add_negative_prompt,
    add_teacher_lora,
    flag_name,
    head_and_usage,
    parse_size,
)
from training.folder import utc_now
from training.report import dumps, hardware, save_grid

HEADINGS = {  # of the table without --compare
    "name": "name",
    "nfe": "NFE",
    "passes": "passes",
    "cfg": "cfg",
    **{key: compare.HEADINGS[key] for key in metrics.METRICS if key != "kid_std"},
    "distinct": "distinct",
    "nonfinite": "not finite",
    "images_per_s": "images/s",
}


# ---- flags ---------------------------------------------------------------------------------------


def parse_args(argv=None):
    usage = "python eval.py [RUN ...] [--flag value ...]"
    head, commands = head_and_usage(__doc__)
    p = argparse.ArgumentParser(
        description=f"{head}\n\nWhat the metrics mean: the top of eval.py, docs/evaluate.md.",
        epilog=commands,
        usage=usage,
        formatter_class=Help,
        allow_abbrev=False,
    )
    p.error = lambda message: p.exit(2, f"eval.py: {message} (--help lists the flags)\n")
    p.add_argument("runs", nargs="*", help="folders of runs, or their student/")
    p.add_argument("--it", help="measure the student of this checkpoint: its iterations, or best")

    # models
    add = p.add_argument_group("models").add_argument
    add("--teacher", help="a name or folder; with runs: instead of the teacher of distill.json")
    add_teacher_lora(add)
    add(
        "--nfe",
        help=f"numbers of steps, 1,2,4: of students [as trained], of a teacher [{TEACHER_NFE}]",
    )
    add(
        "--cfg",
        help="guidance scales w of teacher rows [of the students' training, else 1]",
    )
    add_negative_prompt(add)
    add("--heun", action="store_true", help="Heun's method for teacher rows; --compare: as well")
    add(
        "--prompts",
        help="prompts [of the training]; --images: their prompts in order, again from the first",
    )
    add("--cache-prompts", help="folder for their embeddings [out/prompts]")
    add("--size", type=parse_size, help="pixels: SIDE or HEIGHTxWIDTH [the pipeline's]")
    add("--frames", type=int, help="frames of a video [the pipeline's]")

    # other things to measure
    add = p.add_argument_group("other rows").add_argument
    add("--images", help="measure the images of this folder instead of a model")
    add("--compare", action="store_true", help="also the teacher; one table and one picture")
    add(
        "--teacher-nfe",
        help=f"numbers of steps of the teacher [{TEACHER_NFE}; --compare: 50 and students']",
    )
    add(
        "--best-of",
        type=int,
        help="also the teacher, from the best of N noises in the preview of a student (flowmap: it "
        "pairs noise and image); the classifier chooses, so agreement and fd are biased",
    )

    # the metrics
    add = p.add_argument_group("metrics").add_argument
    add("--inception", help="weight file: FID instead of the teacher's protocol; needs a reference")
    add("--force-inception", action="store_true", help="accept other weights; the metric is fd")
    add(
        "--resize",
        choices=["tf1", "clean"],
        help="to Inception's size: tf1 (EDM, SiD, DMD2), clean (COCO) [tf1]",
    )
    add("--ref", help="reference: .npz of mu and sigma, as EDM's; only FID")
    add("--ref-images", help="reference: folder of images, at their own size")
    add("--save-ref", metavar="FILE", help="keep the statistics of --ref-images, for --ref")
    add(
        "--square",
        type=int,
        metavar="SIDE",
        help="crop samples and references to the middle square and resize it (Lanczos) before they "
        "are measured; COCO of DMD2 and SiD: 256",
    )
    add(
        "--as-stored",
        action="store_true",
        help="read images as pytorch-fid does, not as a viewer shows them",
    )
    add(
        "--n",
        "--samples",
        type=int,
        help="samples [5000; videos: 64; --images: all]; under torchrun: --samples",
    )
    add(
        "--per-prompt",
        type=int,
        help="also similarity and vendi, N images of 8 labels or prompts [--dino: 8]",
    )
    add("--seed", type=int, default=0, help="of the samples' noise")
    add("--seeds", type=int, default=1, help="number of sampling seeds: --seed, --seed + 1, ...")
    add("--latency", action="store_true", help="also the time of sampling, at batch 1 and --batch")

    # models of transformers: folders, or names on the hub
    add = p.add_argument_group("models for scores and features, DIR or hub name").add_argument
    add("--clip", metavar="DIR", help="CLIP model: clip_score of images and prompts")
    add("--clip-prefix", metavar="TEXT", help="before each prompt for --clip, as 'A photo depicts'")
    add("--pickscore", metavar="DIR", help="PickScore's CLIP model: pickscore")
    add("--hps", metavar="DIR", help="CLIP ViT-H-14 and HPS_v2.1_compressed.pt in one folder: hps")
    add("--dino", metavar="DIR", help="DINOv2: its features instead of the teacher's protocol")

    # devices
    add = p.add_argument_group("device").add_argument
    add("--batch", type=int, help="samples per pass and process [250; videos: 1]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="of the network passes; auto is bf16 on CUDA",
    )

    # output
    add = p.add_argument_group("output").add_argument
    add("--out", help="file to which results are appended [out/eval.jsonl]")
    add(
        "--save-images",
        help="new folder for the samples, 000000.png, ...; videos: animated WebP",
    )
    add(
        "--grid",
        help="picture, 20 samples a row; videos: 4, .webp or .gif [compare.png]",
    )
    compare.add_flags(p.add_argument_group("--compare"))

    args = p.parse_args(argv)
    args.out = args.out or str(ROOT / "out" / "eval.jsonl")
    args.nfe = parse_list("--nfe", args.nfe, int, 1, 1000)
    args.cfg = parse_list("--cfg", args.cfg, float, 0)
    args.teacher_nfe = parse_list("--teacher-nfe", args.teacher_nfe, int, 1, 1000)
    check_args(args)
    args.left_out = []
    args.grid_given = args.grid is not None
    if args.compare:
        if args.it is None:
            args.runs, args.left_out = compare.split_unfinished(args.runs)
        args.grid = args.grid or str(Path(args.out).parent / "compare.png")
    return args


def parse_list(flag, text, kind, low, high=math.inf):
    """'1,2,4' -> [1, 2, 4]; None stays None."""
    if text is None:
        return None
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(low <= value <= high and math.isfinite(value) for value in values):
        limit = "" if high == math.inf else f" to {high}"
        raise UserError(f"{flag} {text}: expected numbers from {low}{limit}, separated by commas")
    return values


def check_args(args):
    """Refuses flags that contradict each other or have no effect."""
    # three neighbours and a covariance need some samples
    least = dict(n=8, seeds=1, batch=1, seed=0, best_of=2, per_prompt=2, square=8)
    for name, low in least.items():
        value = getattr(args, name)
        ok = value is None or value >= low
        require(ok, f"{flag_name(name)}: expected at least {low}, found {value}")

    require(
        args.runs or args.teacher or args.images,
        "expected the folder of a run, --teacher NAME or --images FOLDER, found none of them",
    )
    if args.images:
        flags = ("--nfe", "--cfg", "--heun", "--compare", "--best-of", "--save-images", "--grid")
        flags += ("--latency", "--per-prompt", "--teacher-lora", "--negative-prompt")
        value = lambda flag: getattr(args, flag[2:].replace("-", "_"))
        given = [flag for flag in flags if value(flag) not in (None, False)]
        models = " ".join(args.runs + given)
        require(not models, f"--images measures a folder, {models} a model: leave one out")
        require(
            args.inception or args.teacher or args.dino or wants_scores(args),
            "--images: needs --inception FILE (FID), --teacher NAME (its classifier), --dino DIR, "
            "or --clip DIR and others of its kind",
        )
        require(
            args.prompts or not wants_scores(args),
            "--clip, --pickscore and --hps with --images: expected --prompts FILE",
        )
        require(
            args.ref or args.ref_images or not args.dino,
            "--dino with --images: needs a reference, --ref FILE.npz or --ref-images FOLDER",
        )
    require(
        args.clip or args.clip_prefix is None, "--clip-prefix means something only with --clip DIR"
    )
    if args.dino:
        require(
            not args.inception,
            "--inception and --dino: expected one kind of features; --save-images keeps the "
            "samples, --images measures them again",
        )
        if not (args.ref or args.ref_images):
            args.per_prompt = args.per_prompt or 8
    if args.ref:
        require(
            not args.ref_images,
            "--ref and --ref-images contradict each other: choose one reference",
        )
    if args.inception:
        require(
            args.ref or args.ref_images,
            "--inception: needs a reference, --ref FILE.npz or --ref-images FOLDER",
        )
    if args.resize or args.force_inception:
        require(
            args.inception,
            "--resize and --force-inception mean something only with --inception FILE",
        )
    if args.as_stored:
        require(
            args.images or args.ref_images,
            "--as-stored means something only with --images FOLDER or --ref-images FOLDER",
        )
    if args.save_ref:
        require(args.ref_images, "--save-ref means something only with --ref-images FOLDER")
    if args.square:
        require(
            args.inception or args.dino or wants_scores(args),
            "--square: needs --inception, --dino or a score; a teacher's classifier has its own "
            "size",
        )
    teacher_rows = args.compare or args.grid or args.best_of
    if args.teacher_nfe:
        require(
            args.runs and teacher_rows,
            "--teacher-nfe: only with run folders, and --compare, --grid or --best-of",
        )
    if args.runs and (args.cfg or args.heun or args.negative_prompt is not None):
        require(
            teacher_rows,
            "--cfg, --heun and --negative-prompt are for teacher rows, a student's guidance is "
            "trained in: add --compare",
        )
    require(args.runs or args.it is None, "--it: expected the folder of a run before it")
    if args.best_of:
        require(
            args.runs,
            "--best-of: expected folders of runs, whose students preview the teacher's noises",
        )
    if args.compare:
        require(
            args.runs,
            "--compare: expected folders of runs; "
            "a teacher alone takes several --nfe and --cfg as they are",
        )
    compare.check_flags(args)


def wants_scores(args):
    return any(getattr(args, flag) for flag in KEYS)


# ---- measuring -----------------------------------------------------------------------------------


class Evaluation:
    """What all measurements share: flags, processes, device, features and references."""

    def __init__(self, args):
        self.args = args
        self.rank, self.world, self.device, self.dtype = init_processes(args)
        self.extractors = {}
        self.scores = Scores(args, self.device) if wants_scores(args) else None

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def extractor(self, teacher):
        """Features and reference for images of a teacher's students; None for points of a toy."""
        shared = self.args.inception or self.args.dino
        if not shared and teacher is not None and teacher.adapter == "toy":
            return None
        key = (shared or teacher, teacher is not None and teacher.video)
        if key not in self.extractors:
            self.extractors[key] = self.make_extractor(teacher)
        return self.extractors[key]

    def make_extractor(self, teacher):
        args = self.args
        is_video = teacher is not None and teacher.video
        if args.inception:
            resize = args.resize or "tf1"
            extractor = InceptionExtractor(
                args.inception, self.device, resize, args.force_inception
            )
        elif args.dino:
            extractor = DinoExtractor(args.dino, self.device)
        elif (self.scores or is_video) and not (teacher and teacher.evaluation):
            extractor = NoFeatures(self.device)
        else:
            extractor = ClassifierExtractor(teacher)
        if args.square and (args.inception or args.dino):
            extractor = Squared(extractor, args.square)
        if is_video:
            extractor = FrameExtractor(extractor)
        if args.as_stored:
            extractor.protocol += "-as-stored"
        if args.ref:
            extractor.set_reference(load_reference(args.ref, extractor), Path(args.ref).name)
        elif args.ref_images:
            notes = Counter()
            files = list_images("--ref-images", args.ref_images, notes=notes)
            features, _ = self.folder_features("--ref-images", files, notes, extractor)
            stats = fid.Stats(extractor.dims)
            stats.update(features)
            mu, sigma = stats.mean_cov()
            name = f"{Path(args.ref_images).name}:{stats.n}"
            extractor.set_reference(dict(mu=mu, sigma=sigma, n=stats.n), name, features)
            if args.save_ref:
                on_rank0(lambda: self.save_reference(mu, sigma, stats.n, extractor.protocol))
        return extractor

    def save_reference(self, *stats):
        path = Path(self.args.save_ref)
        with writable("--save-ref", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fid.save_stats(path, *stats)

    # ---- image folders

    def folder_features(self, flag, files, notes, extractor, keep=None):
        """Features [n, D] and hashes [n] of image files. Says the notes, and what was converted."""
        options = (self.args.batch, self.rank, self.world, self.args.as_stored, keep)
        features, hashes, read_notes = folder_features(files, extractor, *options)
        notes.update(read_notes)
        if notes:
            self.say(f"{flag}: {len(files)} images{describe_notes(notes)}")
        if read_notes and self.args.inception:
            self.say("note: pytorch-fid does not convert them; --as-stored reads as it does")
        return features, hashes

    def measure_folder(self):
        """--images -> its result."""
        args = self.args
        args.batch = args.batch or 250
        notes = Counter()
        files = list_images("--images", args.images, args.n, notes)
        teacher = load_teacher(args.teacher, self.device) if args.teacher else None
        shared = args.inception or args.dino
        if not shared and teacher is not None and teacher.adapter == "toy":
            raise UserError(
                f"--teacher {args.teacher}: its samples are points; for images give a teacher of "
                "images, or --inception FILE"
            )
        on_rank0(lambda: check_outputs(args))
        extractor = self.extractor(teacher)
        lossy = (".jpg", ".jpeg", ".jfif", ".webp", ".avif")
        if any(path.suffix.lower() in lossy for path in files):
            self.say(
                "note: JPEG, WebP or AVIF among --images; lossy compression alone can move these "
                "distances more than methods do"
            )
        start = time.time()
        scored = []
        keep = self.scorer(read_prompts(args.prompts), scored) if self.scores else None
        features, hashes = self.folder_features("--images", files, notes, extractor, keep)
        found = on_rank0(lambda: metrics.distances(extractor, features))
        name = Path(args.images).resolve().name
        result = dict(
            name=name,
            images=args.images,
            teacher=args.teacher,
            protocol=extractor.describe(len(files), f"images={name}"),
            **found,
            n=len(files),
            distinct=len(hashes.unique()),
        )
        result |= self.score_results(scored, result)
        return self.finish(result, extractor, start)

    # ---- scores

    def scorer(self, prompts, scored):
        """Function (indices, images) that appends their scores to the list `scored`."""

        def keep(indices, images):
            texts = [prompts[i % len(prompts)] for i in indices.tolist()]
            if images.ndim == 4:
                scored.append(self.scores(images, texts))
                return
            frames = images.shape[2]
            texts = [text for text in texts for _ in range(frames)]
            values = self.scores(frames_of(images), texts)
            scored.append(values.unflatten(0, (-1, frames)).mean(1))

        return keep

    def score_results(self, scored, result):
        """Entries of a result of n images: the means of the scores of all processes."""
        if not scored:
            return {}
        values = gather_rows(torch.cat(scored), result["n"], self.rank, self.world)
        protocol = f"{result['protocol']}; {self.scores.protocol()}"
        return self.scores.means(values) | dict(protocol=protocol)

    # ---- models

    def measure_rows(self):
        """Students and teachers -> results; with --compare or --grid the picture too."""
        args = self.args
        rows = make_rows(args, self.dtype)
        is_video = any(row.teacher.video for row in rows)
        args.n = args.n or (64 if is_video else 5000)
        args.batch = args.batch or (1 if is_video else 250)
        if is_video and args.compare and not args.grid_given:
            args.grid = str(Path(args.grid).with_suffix(".webp"))
        for row in rows:
            row.teacher.to(self.device)
        on_rank0(lambda: check_outputs(args))
        for row in rows:
            require(
                not self.scores or row.teacher.prompts is not None,
                "--clip, --pickscore and --hps: expected a text-to-image teacher, found "
                f"{row.facts['teacher']}",
            )
        for row in rows:  # reads references, so that mistakes show before the first sample
            extractor = self.extractor(row.teacher)
            require(
                not args.per_prompt or extractor is None or extractor.dims,
                f"--per-prompt: {row.facts['teacher']} brings no features: expected --dino DIR",
            )
        cache = ResultCache(args.cache or Path(args.out).parent / "measured")
        if args.compare:
            on_rank0(cache.make_folder)

        measured = [row for row in rows if row.measured]
        results, earlier = [], []
        for i, row in enumerate(measured):
            settings = cache_settings(args, self.dtype, self.extractor(row.teacher), self.scores)
            result = None
            if args.compare and not (args.fresh or args.save_images or args.latency):
                result = on_rank0(lambda: cache.load(row, settings))
            if result is not None:
                earlier.append(result["revision"])
            else:
                images = self.images_folder(row, i if len(measured) > 1 else None)
                result = self.measure_row(row, images)
                if args.compare and self.rank == 0:
                    cache.store(row, result, settings)
            results.append(result)

        if self.rank == 0 and args.compare:
            compare.write_comparison(args, list(zip(measured, results)), earlier, self.say)
        elif self.rank == 0 and args.grid:
            self.draw(rows)
        return results

    def images_folder(self, row, index):
        """Folder of --save-images for a row; index: its number, if there are several rows."""
        if not self.args.save_images:
            return None
        folder = Path(self.args.save_images)
        if index is None:
            return folder
        name = row.facts["name"].replace(" ", "-")
        return folder / f"{index:02d}-{name}-nfe{row.facts['nfe']}"

    def measure_row(self, row, images_folder):
        """Metrics of one row over the seeds -> its result. Sets row.samples for --compare."""
        args = self.args
        start = time.time()
        row.model.to(self.device)
        extractor = self.extractor(row.teacher)
        seeds = [args.seed + i for i in range(args.seeds)]
        values = []
        for seed in seeds:
            folder = images_folder
            if folder and len(seeds) > 1:
                folder = folder / f"seed{seed}"
            values.append(self.measure_seed(row, extractor, seed, folder))
        result = join_seeds(values, seeds)
        if args.per_prompt:
            settings = (args.per_prompt, args.seed, args.batch, self.rank, self.world)
            result |= alikeness(row.sampler, row.model, extractor, *settings)
        if row.facts["method"] == "nct":
            n = min(args.n, 2000)
            result["control"] = on_rank0(lambda: control_error(row.model, n, args.seed, args.batch))
            self.say(f"{row.caption}: {control_summary(result['control'])}")
        passes = count_nfe(row.cost_sampler, row.model)
        result = dict(row.facts, passes=passes, seeds=seeds, **result)
        result["weights"] = hash_weights(row.folder)
        if args.latency:  # on one process while the others wait
            result["latency"] = on_rank0(lambda: latency(row.cost_sampler, row.model, args.batch))
            for batch, times in result["latency"].items():
                self.say(
                    f"{row.caption}: batch {batch}: {times['ms_per_image']} ms per image, "
                    f"{times['images_per_s']} images/s"
                )
        return self.finish(result, extractor, start)

    def measure_seed(self, row, extractor, seed, images_folder):
        """Metrics of the samples of one seed. Those of the first seed go to row.samples."""
        args = self.args
        rank, world = self.rank, self.world
        if images_folder:
            images_folder.mkdir(parents=True, exist_ok=True)
        limit = kept_samples(row.teacher, args.n, world)
        kept, scored, temporal = [], [], []
        score = self.scorer(row.teacher.prompts, scored) if self.scores else None

        def keep(index, images):
            if score:
                score(index, images)
            if row.teacher.video:
                temporal.append(temporal_metrics(images))
            if images_folder:
                save_numbered(images_folder, index, images)
            if args.compare and seed == args.seed:
                kept.append(images[index < limit].cpu())

        bar = tqdm(
            total=len(range(rank, args.n, world)),
            desc=f"{row.caption}, seed {seed}",
            disable=rank > 0,
            mininterval=bar_interval(),
        )
        with bar:
            result = metrics.evaluate(
                row.sampler,
                row.model,
                row.teacher,
                args.n,
                seed,
                args.batch,
                rank,
                world,
                extractor,
                bar.update,
                keep,
            )
        if kept:
            row.samples = gather_rows(torch.cat(kept), limit, rank, world)
        for name in temporal[0] if temporal else ():
            values = torch.cat([part[name] for part in temporal]).cpu()
            result[name] = gather_rows(values, args.n, rank, world).mean().item()
        return result | self.score_results(scored, result)

    def finish(self, result, extractor, start):
        """Adds the circumstances, prints notes, appends the result to --out."""
        result |= dict(
            dtype=str(self.dtype).removeprefix("torch."),
            hardware=hardware(self.device),
            threads=torch.get_num_threads(),
            world=self.world,
            seconds=round(time.time() - start, 1),
            torch=torch.__version__,
            revision=git_revision(),
            date=utc_now(),
        )
        if extractor and extractor.reference and result["n"] <= extractor.dims:
            self.say(
                f"note: {result['n']} images for {extractor.dims} features give a singular "
                "covariance: good for a smoke test only"
            )
        if self.rank == 0:
            with open(self.args.out, "a") as f:
                f.write(dumps(result) + "\n")
        return result

    def draw(self, rows):
        """--grid: 20 samples of every row, or a density of points, from the same noise."""
        args = self.args
        pictures = []
        for row in rows:
            model = row.model.to(self.device)
            n, batch = (4 if row.teacher.video else 20), args.batch
            if row.teacher.adapter == "toy":
                n, batch = 4000, max(args.batch, 1000)
            samples = [x for _, _, x in generate(row.sampler, model, n, args.seed, batch)]
            show = model.decode if row.teacher.video else model.to_pictures
            pictures.append((row.caption, show(torch.cat(samples)).cpu()))
        if any(row.teacher.video for row in rows):
            sample_rows(args.grid, pictures)
        else:
            save_grid(args.grid, pictures)
        self.say(f"picture: {args.grid}")


def load_reference(path, extractor):
    try:
        stats = fid.load_stats(path)
    except UserError as e:
        raise UserError(f"--ref {e}") from None
    if len(stats["mu"]) != extractor.dims:
        raise UserError(
            f"--ref {path}: expected statistics of {extractor.dims} features "
            f"({extractor.protocol}), found {len(stats['mu'])}"
        )
    found = stats["protocol"]  # None in EDM's and ADM's files
    require(
        found in (None, extractor.protocol),
        f"--ref {path}: expected statistics of {extractor.protocol}, found those of {found}",
    )
    return stats


def join_seeds(results, seeds):
    """Results of several seeds as one: means, and the minimum and all values of each metric."""
    result = dict(results[0], distinct=min(r["distinct"] for r in results))
    del result["seed"]
    if len(seeds) == 1:
        return result
    every = {key: [r[key] for r in results] for key in metrics.METRICS if key in result}
    result |= {key: sum(values) / len(values) for key, values in every.items()}
    result["min"] = {key: min(values) for key, values in every.items()}
    result["all"] = every
    first, last = f"seed={seeds[0]}", f"seed={seeds[0]}-{seeds[-1]}"
    result["protocol"] = result["protocol"].replace(first, last)
    return result


# ---- output --------------------------------------------------------------------------------------


def check_outputs(args):
    """Tries every place that will be written, before the first sample."""
    outputs = {"--out": args.out, "--grid": args.grid, "--save-ref": args.save_ref}
    for flag, path in outputs.items():
        if path:
            with writable(flag, path):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                is_new = not Path(path).exists()
                open(path, "ab").close()
                if is_new:
                    Path(path).unlink()
    if args.save_images:
        folder = Path(args.save_images)
        with writable("--save-images", folder):
            folder.mkdir(parents=True, exist_ok=True)
            is_empty = not any(folder.iterdir())
        require(
            is_empty,
            f"--save-images {folder}: expected a new or empty folder, since old files would be "
            "taken for samples; found files in it",
        )


@contextlib.contextmanager
def writable(flag, path):
    try:
        yield
    except OSError as e:
        raise UserError(
            f"{flag} {path}: expected a place that can be written, found: {e.strerror}"
        ) from None


def main(argv=None):
    args = parse_args(argv)
    evaluation = Evaluation(args)
    results = [evaluation.measure_folder()] if args.images else evaluation.measure_rows()
    if not args.compare:
        rows = [dict(result, each=result.get("all", {})) for result in results]
        protocols = dict.fromkeys(result["protocol"] for result in results)
        table = compare.markdown(rows, HEADINGS)
        evaluation.say("\n".join(["", table, *protocols]))
    evaluation.say(dumps(results[0] if len(results) == 1 else dict(results=results)))


if __name__ == "__main__":
    launch(main)
