"""Samples of a model, and what they are worth: used by the scripts at the end of a run and by eval.py. Distances themselves: common/fid.py, common/toy.py."""
import copy
import datetime
import hashlib
import json
import math
import platform
import shlex
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tqdm import tqdm

from common import fid
from common.data import SUFFIXES, load_images
from common.run import ImageNoise, UserError, atomic, read_json, save_grid, write_json
from common.toy import energy_distance, mode_shares, sliced_wasserstein

DISTANCES = ("fid", "fd", "kid", "energy_distance", "sliced_wasserstein")  # lower is better
TEACHER_NFE = 16  # Euler steps of the teacher row in sample grids
METRICS = ("fid", "fd", "kid", "kid_std", "precision", "recall", "density", "coverage", "similarity", "agreement", "agreement_kind", "energy_distance",
           "sliced_wasserstein", "mode_min", "mode_max", "near_mode")


@torch.no_grad()
def teacher_sample(teacher, z, cond, nfe, cfg=1.0, heun=False):
    """Deterministic sampler of the probability-flow ODE from pure noise to data on the teacher's own schedule: first order (Euler for flow, DDIM for
    VP and EDM: the same step x_s = alpha_s x0 + sigma_s eps), or Heun on the same grid (two calls per step, one in the last). nfe counts steps of the
    first-order sampler; guidance doubles the cost of each. z [B, *shape] unit noise -> x [B, *shape]."""
    s = teacher.schedule
    if s.unit_norm:  # VP: evenly spaced indices, then the clean end
        times = torch.linspace(s.t_max, 0, nfe + 1, dtype=torch.float64)[:-1]
    elif s.config["name"] == "edm":  # EDM eq. (5)
        times = s.grid(max(nfe, 2)).flip(0)[:nfe]
    else:
        times = s.grid(nfe).flip(0)
    alpha, sigma = [*s.alpha(times), torch.tensor(1.0)], [*s.sigma(times), torch.tensor(0.0)]
    x = z.double() * (1.0 if s.unit_norm else sigma[0])
    step = lambda x, x0, i: alpha[i + 1] * x0 + sigma[i + 1] / sigma[i] * (x - alpha[i] * x0)
    for i in range(nfe):
        x0 = teacher.guided(x.to(z.dtype), alpha[i], sigma[i], cond, cfg).double()
        y = step(x, x0, i)
        if heun and i < nfe - 1:  # the mean of x0 at both ends: second order, as Heun's rule on the velocity
            x0 = (x0 + teacher.guided(y.to(z.dtype), alpha[i + 1], sigma[i + 1], cond, cfg).double()) / 2
            y = step(x, x0, i)
        x = y
    return x.to(z.dtype)


class Extractor:
    """Features and label logits of images under a teacher's own protocol (its classifier), with the reference statistics of its data."""

    metric, dims = "fd", 64  # never called FID: the network is not the public Inception

    def __init__(self, teacher):
        e, shape, text = teacher.evaluation, getattr(teacher, "image_shape", teacher.shape), hasattr(teacher, "prompts")
        for key in ("protocol", "classifier", "reference", "names", *(("kinds", "groups", "labels") if text else ("images",))):
            if key not in e:
                raise UserError(f"{teacher.folder / 'teacher.json'}: evaluation.{key} is missing, so this teacher's samples cannot be measured")
        self.protocol, self.device = e["protocol"], next(teacher.parameters()).device
        kinds = e.get("kinds", e["names"])  # with kinds, names are groups of them
        self.groups = torch.tensor(e["groups"]) if text else None
        self.targets = known_prompts(teacher.folder / e["labels"], teacher.prompts, len(kinds)) if text else None
        self.net = fid.SmallCNN(shape[0], shape[-1], len(kinds), stages=e.get("stages", 2))
        try:
            self.net.load_state_dict(load_file(teacher.folder / e["classifier"]))
        except Exception as err:  # safetensors and torch raise several kinds; all mean the same to the user
            raise UserError(f"{teacher.folder / e['classifier']}: expected the safetensors of the classifier ({type(err).__name__})") from None
        self.net.eval().to(self.device)
        self.reference = fid.load_stats(teacher.folder / e["reference"])
        self.teacher, self.ref_name, self.shape = teacher, self.reference["n"], torch.Size(shape)
        real = self.reference["features"]  # of the images, where these are not shipped
        self.real = None if real is None else real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))]

    def use(self, reference, name, real=None):
        """Another reference: statistics, and features [m, D] of its images where there are any (KID, precision and recall need them)."""
        if real is not None:  # files come class by class; the first n shall hold all classes
            real = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))]
        self.reference, self.ref_name, self.teacher, self.real = reference, name, None, real

    def describe(self, n, source):
        """Protocol string: all that changes the number."""
        return f"{self.metric} {self.protocol} uint8 n={n} {source} ref={self.ref_name}"

    def classes(self, labels):
        """Class that the classifier shall see for these labels [n], or for the prompts of these numbers: -1 where nothing is known of a prompt."""
        return labels if self.targets is None else self.targets[labels.cpu()]

    def right(self, predicted, labels):
        """Did the classifier see [n] what the labels [n] say? -> dict of float64 [n], nan where nothing is known: agreement, of the group where classes have
        groups, and then agreement_kind, of the class itself. Empty if nothing is known of any."""
        wanted = self.classes(labels)
        same = lambda a, b: torch.where(wanted < 0, torch.nan, (a == b).double())
        if not (wanted >= 0).any():
            return {}
        if self.groups is None:
            return dict(agreement=same(predicted, wanted))
        return dict(agreement=same(self.groups[predicted], self.groups[wanted]), agreement_kind=same(predicted, wanted))

    def part(self, labels):
        """The same extractor with the reference images of these labels only. None if only statistics are known, or if there are too few images."""
        data = load_images(None, self.teacher, lambda *a: None) if self.teacher is not None and "images" in self.teacher.evaluation else None
        images = data.images[torch.isin(data.labels, torch.as_tensor(labels))] if data else ()
        if len(images) <= self.dims:
            return None
        real, stats, twin = torch.cat([self(batch)[0] for batch in images.split(500)]), fid.Stats(self.dims), copy.copy(self)
        stats.update(real)
        mu, sigma = stats.mean_cov()
        twin.use(dict(mu=mu.numpy(), sigma=sigma.numpy(), n=len(real)), len(real), real)
        return twin

    @torch.no_grad()
    def __call__(self, images):
        return [a.float().cpu() for a in self.net(images.to(self.device))]

    def real_features(self, n):
        """Features of the first n reference images, of a fixed shuffle, so that the classes are mixed; None if only statistics are known."""
        if self.real is None and self.teacher is not None:
            data = load_images(None, self.teacher, lambda *a: None)
            order = data.order(0, 0)[:n]
            self.real = torch.cat([self(part)[0] for part in data.images[order].split(500)])
        return None if self.real is None else self.real[:n]


def known_prompts(path, prompts, classes):
    """Class of each prompt, int64 [n], -1 where the file, a JSON object of prompts and numbers of classes, has no such prompt."""
    known = read_json(path)
    if wrong := [k for k, v in known.items() if not isinstance(v, int) or isinstance(v, bool) or not 0 <= v < classes]:
        raise UserError(f"{path}: {wrong[0][:80]!r}: expected a number below {classes}, found {str(known[wrong[0]])[:80]!r}")
    return torch.tensor([known.get(p, -1) for p in prompts])


class InceptionExtractor(Extractor):
    """The 2048 features of the public Inception network, given by path. `use` names the reference. Weights forced by the user give fd, not FID."""

    dims = 2048

    def __init__(self, path, device, resize="tf1", force=False):
        self.net, digest = fid.load_inception(path, device, force)
        public = digest == fid.INCEPTION_SHA256
        self.metric, self.protocol = "fid" if public else "fd", f"inception-{resize}resize" + ("" if public else f"-{digest}")
        self.device, self.resize, self.teacher, self.real, self.reference, self.shape = device, resize, None, None, None, None  # any RGB

    def describe(self, n, source):
        return f"{self.metric}{f'{n // 1000}k' if n % 1000 == 0 else n} {self.protocol} uint8 ref={self.ref_name} n={n} {source}"

    def __call__(self, images):
        return self.net(images.to(self.device), self.resize)[0].float().cpu(), None


def generate(sampler, model, n, seed=0, batch=250, rank=0, world=1, first=0, classes=None):
    """Yields (indices, labels, samples) of this rank, from `first` to n - 1: image i has label i % classes (default: all) and noise of its own seed, whatever
    the batch or world size.

    sampler(model, z, cond, noise) -> samples; noise() gives more of the images' own noise, in the same order for any batch."""
    device = next(model.parameters()).device
    mine = torch.arange(first + rank, n, world)
    # several ranks: as many batches on each, since a sharded network answers when all ask
    for part in mine.split(batch) if world == 1 else filter(len, mine.tensor_split(-(-(n - first) // world // batch))):
        noise = ImageNoise(seed, part.tolist(), device)
        labels = part % (classes or max(model.classes, 1))
        yield part, labels, sampler(model, noise(*model.shape), model.encode(labels), lambda: noise(*model.shape))


def gather(x, n, rank, world):
    """Rows i = rank, rank + world, ... of every rank -> all n rows in order, on every rank. x [n_local, ...]"""
    if world == 1:
        return x
    most = -(-n // world)
    padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[:n]


def together(fn, world):
    """fn() on every rank -> list of its results by rank. A UserError on one rank is raised on all, so that none waits for a process that has ended."""
    try:
        mine = (fn(), None)
    except UserError as e:
        mine = (None, str(e))
    box = [mine]
    if world > 1:
        box = [None] * world
        dist.all_gather_object(box, mine)
    for _, error in box:
        if error is not None:
            raise UserError(error)
    return [result for result, _ in box]


def fingerprints(x):
    """One number per image, equal for equal images: int64 [n]. Counting distinct ones finds a seed that is the same on every rank."""
    rows = x.detach().cpu().contiguous().numpy()
    return torch.tensor([int.from_bytes(hashlib.sha256(r.tobytes()).digest()[:8], "big", signed=True) for r in rows], dtype=torch.int64)


def distances(extractor, features):
    """Features [n, D] of the samples against the extractor's reference -> dict: fd or fid; kid (mean and std of 100 subsets of 1,000, not times 1000),
    precision, recall, density, coverage (k = 3, as many reference images as samples, if there are so many) where reference images are known."""
    device = extractor.device if torch.device(extractor.device).type == "cuda" else "cpu"  # on CUDA the eigenvalues take seconds, not a minute
    features, ref, stats = features.to(device), extractor.reference, fid.Stats(features.shape[1], device)
    try:
        for part in features.split(5000):
            stats.update(part)
        out = {extractor.metric: fid.frechet(*stats.mean_cov(), torch.as_tensor(ref["mu"]), torch.as_tensor(ref["sigma"]))}
        real = extractor.real_features(len(features))
        if real is not None:
            out["kid"], out["kid_std"] = fid.kid(real.to(device), features)
            out |= fid.prdc(real.to(device), features, k=3)
    except ValueError as e:  # too few images, or a reference that is no covariance
        raise UserError(str(e)) from None
    return out


def toy_distances(x, mixture, labels, seed):
    """Samples [n, 2] against as many of the exact mixture, with the same labels [n] -> dict."""
    y = mixture.sample(len(x), labels, torch.Generator().manual_seed(seed + 1))
    share, near = mode_shares(x, mixture)
    return dict(energy_distance=energy_distance(x, y), sliced_wasserstein=sliced_wasserstein(x, y), mode_min=float(share.min()), mode_max=float(share.max()),
                near_mode=near)


def evaluate(sampler, model, teacher, n=5000, seed=0, batch=250, rank=0, world=1, extractor=None, progress=None, keep=None):
    """Metrics of n samples -> dict, the same on every rank and for any world size. `mnist`-type teachers: fd (or fid: InceptionExtractor), kid, precision,
    recall, density, coverage, agreement of the classifier with the labels; `toy`: energy distance, sliced Wasserstein distance, mode shares against the
    exact mixture. progress(number done) and keep(indices, uint8 images) are called for each batch of this rank."""
    start, seconds, toy = time.time(), 0.0, teacher.adapter == "toy"
    if n < world:
        raise UserError(f"{n} samples: expected at least one for each of {world} processes")
    device = next(model.parameters()).device
    sync = (lambda: torch.cuda.synchronize()) if device.type == "cuda" else (lambda: None)
    if not toy:
        extractor = extractor or Extractor(teacher)
    points, predicted, ids, finite = [], [], [], []
    for index, _, (x, spent) in generate(lambda *a: timed(sampler, sync, *a), model, n, seed, batch, rank, world):
        seconds += spent
        images = x.cpu() if toy else model.decode(x)
        f, logits = (images, None) if toy else extractor(images)
        points.append(f)
        ids.append(fingerprints(images))
        finite.append(x.isfinite().flatten(1).all(1).cpu())
        if logits is not None:
            predicted.append(logits.argmax(1))
        if keep:
            keep(index, images)
        if progress:
            progress(len(index))
    points, ids, bad = (gather(torch.cat(a), n, rank, world) for a in (points, ids, [1 - f.long() for f in finite]))
    labels = torch.arange(n) % max(teacher.classes, 1)
    if toy:
        protocol, measure = f"toy exact n={n} seed={seed}", lambda: toy_distances(points, teacher.mixture, labels, seed)
    else:
        protocol, measure = extractor.describe(n, f"seed={seed}"), lambda: distances(extractor, points)
    result = together(lambda: measure() if rank == 0 else None, world)[0]  # the other ranks would only compute the same again
    right = extractor.right(gather(torch.cat(predicted), n, rank, world), labels) if predicted else {}
    result |= {k: v.nanmean().item() for k, v in right.items()}
    if getattr(model, "by", None) == "label" and len(model.experts) > 1:
        by_expert = lambda: experts(model.table, points, labels, right.get("agreement"), teacher, extractor, seed)
        result["experts"] = together(lambda: by_expert() if rank == 0 else None, world)[0]
    if bad.any():
        result["nonfinite"] = int(bad.sum())
    return dict(protocol=protocol, **result, n=n, seed=seed, distinct=len(ids.unique()), images_per_s=round(len(range(rank, n, world)) / max(seconds, 1e-9), 1),
                seconds=round(time.time() - start, 1))


def similarity(sampler, model, extractor, images, seed=0, batch=250, rank=0, world=1, prompts=8):
    """How alike are images of one prompt or label? Mean cosine of the features of two of them: over all pairs of `images` of each of the first prompts. 1: all
    are one; what the teacher has is the scale. Phased DMD (arXiv 2510.27684) measures diversity like this, in the features of DINOv3."""
    p = min(prompts, max(model.classes, 1))
    if p * images < world:
        raise UserError(f"--per-prompt {images}: expected at least one of {p} x {images} images for each of {world} processes")
    parts = [extractor(model.decode(x))[0] for _, _, x in generate(sampler, model, p * images, seed, batch, rank, world, classes=p)]
    f = torch.nn.functional.normalize(gather(torch.cat(parts), p * images, rank, world).double(), dim=1).view(images, p, -1)
    return ((f.sum(0).square().sum(1) - images) / (images * (images - 1))).mean().item()  # |sum|^2 = images + the sum over ordered pairs


def experts(table, points, labels, right, teacher, extractor, seed):
    """What each expert of a model routed by label makes of its own labels, against the reference of these labels -> list of dicts. The same samples as
    in the joint numbers, which are no average of these: distances within a part do not see how the parts compare."""
    out, table = [], torch.tensor(table)
    for i in range(int(table.max()) + 1):
        mine, rows = (table == i).nonzero()[:, 0].tolist(), table[labels] == i
        found = dict(expert=i, labels=mine, n=int(rows.sum()))
        reference = extractor.part(mine) if extractor else None
        if extractor is None and found["n"] > 1:
            d = toy_distances(points[rows], teacher.mixture, labels[rows], seed)
            found |= {k: d[k] for k in ("energy_distance", "sliced_wasserstein", "near_mode")}  # shares of modes are those of the labels drawn
        elif reference and found["n"] > reference.dims:
            found |= distances(reference, points[rows])
        out.append(found | (dict(agreement=right[rows].nanmean().item()) if right is not None and rows.any() else {}))
    return out


# ---- images of a folder ------------------------------------------------------------------------------------------------------------------


def list_images(flag, folder, n=None):
    if not Path(folder).is_dir():
        raise UserError(f"{flag} {folder}: expected a folder of images, found {'a file' if Path(folder).exists() else 'nothing'}")
    files = sorted(f for f in Path(folder).rglob("*") if f.suffix.lower() in SUFFIXES)
    if len(files) < (n or 8):
        raise UserError(f"{flag} {folder}: expected at least {n or 8} images ({', '.join(SUFFIXES)}), found {len(files)}")
    return files[:n]


def read(path, channels):
    """uint8 [C, H, W] at the file's own size: an image that is resized twice gives another number."""
    from PIL import Image
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP")) as img:  # others run programs (EPS) or are rare
                a = np.array(img.convert("L" if channels == 1 else "RGB"))
        except Exception as e:  # pillow's readers raise many kinds for a damaged file; leaving it out would change n without a word
            raise UserError(f"{path}: not readable as an image ({type(e).__name__})") from None
    return torch.from_numpy(a).reshape(*a.shape[:2], channels).permute(2, 0, 1)


def folder_features(files, extractor, batch, rank, world):
    """Features float32 [n, D] and fingerprints [n] of image files, on every rank."""
    shape = extractor.shape
    if len(files) < world:
        raise UserError(f"{len(files)} images: expected at least one for each of {world} processes")

    def mine():
        features, ids, group = [], [], []
        for path in tqdm(files[rank::world] + [None], desc=files[0].parent.name, disable=rank > 0, mininterval=pace()):
            image = None if path is None else read(path, 3 if shape is None else shape[0])
            if image is not None and shape is not None and image.shape != shape:
                raise UserError(f"{path}: expected {shape[1]} x {shape[2]} pixels, the teacher's size, found {image.shape[1]} x {image.shape[2]}")
            if group and (image is None or len(group) == batch or image.shape != group[0].shape):  # sizes may differ within a folder
                stack = torch.stack(group)
                features.append(extractor(stack)[0])
                ids.append(fingerprints(stack))
                group = []
            group.append(image)
        return torch.cat(features), torch.cat(ids)

    local = []
    together(lambda: local.extend(mine()), world)  # a file that one rank cannot read ends all of them
    return tuple(gather(a, len(files), rank, world) for a in local)


def pace():
    return 0.2 if sys.stderr.isatty() else 10


# ---- cost of a sampler: network passes and time -----------------------------------------------------------------------------------------


def timed(sampler, sync, *args):
    sync()
    t = time.perf_counter()
    x = sampler(*args)
    sync()
    return x, time.perf_counter() - t


def trial(model, n):
    """(z, cond, noise) for n samples that nobody looks at."""
    device = next(model.parameters()).device
    z = torch.randn(n, *model.shape, device=device)
    return z, model.encode(torch.arange(n) % max(model.classes, 1)), lambda: torch.randn_like(z)


@torch.no_grad()
def passes(sampler, model):
    """Network passes per image, counted where they happen: rows that enter the network (the exact toy teacher has none, there the model itself counts)."""
    seen = []
    count = lambda m, a, kw: seen.append(len(next(v for v in (*a, *kw.values()) if torch.is_tensor(v))))
    targets = [m if getattr(m, "exact", False) else m.net for m in getattr(model, "experts", [model])]
    hooks = [m.register_forward_pre_hook(count, with_kwargs=True) for m in targets]
    try:
        sampler(model, *trial(model, 2))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(seen) / 2


@torch.no_grad()
def latency(sampler, model, batch):
    """Median time of sampling and decoding, at batch 1 and `batch`, of at least three calls."""
    out, device = {}, next(model.parameters()).device
    for b in sorted({1, batch}):
        inputs, times = trial(model, b), []
        while len(times) < 5 or (len(times) < 50 and sum(times) < 2):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            x = sampler(model, *inputs)
            x = x if model.adapter == "toy" else model.decode(x)
            x.cpu()  # waits for the device
            times.append(time.perf_counter() - start)
        t = float(np.median(times[2:]))  # two calls of warm-up
        out[str(b)] = dict(ms_per_image=round(t / b * 1000, 4), images_per_s=round(b / t, 2))
    return out


# ---- what a script does at the end of a run, and in between ------------------------------------------------------------------------------


def pictures(run, teacher, student, sample, sampler, it, n=20):
    """samples/<it>.png: teacher row beside student rows, same noise, same labels. Rank 0 draws."""
    if not (run.main or run.args.shard):  # a sharded network answers when all processes ask
        return
    nfe = run.args.nfe
    n = 4000 if teacher.adapter == "toy" else n if teacher.shape[-1] <= 64 and not hasattr(teacher, "prompts") else 8
    one = lambda fn, model: torch.cat([x for _, _, x in generate(fn, model, n, run.args.seed, 4000 if n > 8 else 2)])
    if not hasattr(run, "teacher_row"):
        run.teacher_row = teacher.rows(one(lambda m, z, c, noise: teacher_sample(m, z, c, TEACHER_NFE, run.args.cfg), teacher))
    now = student.rows(one(lambda m, z, c, noise: sample(m, z, c, nfe, noise, **sampler), student))
    rows = [(f"teacher, {TEACHER_NFE} steps, w = {run.args.cfg}", run.teacher_row), (f"{run.method}, {nfe} step{'s' * (nfe > 1)}, iteration {it}", now)]
    if run.main:
        save_grid(run.out / "samples" / f"{it:08d}.png", rows)


def draw(path, rows, args, device):
    """Picture: same noise, same labels in every row."""
    sheet = []
    for row in rows:
        model, n = row["model"].to(device), 4000 if row["teacher"].adapter == "toy" else 20
        parts = generate(row["sampler"], model, n, args.seed, max(args.batch, 1000) if n > 20 else args.batch)
        sheet.append((row["caption"], model.rows(torch.cat([x for _, _, x in parts]))))
    save_grid(path, sheet)
    print(f"picture: {path}")


def report(run, teacher, student, sample, sampler, it, n):
    """Metrics of the student into metrics.json, and one line of eval.jsonl. Beside it, for scale, what was measured of its teacher (teacher.json)."""
    args = run.args
    if n and teacher.adapter != "toy" and not teacher.evaluation:
        run.print(f"{run.method}: this teacher brings no metric; samples/ has pictures, eval.py measures folders of images")
        n = 0
    if not n:
        return
    model_sampler = lambda m, z, c, noise: sample(m, z, c, args.nfe, noise, **sampler)
    result = evaluate(model_sampler, student, teacher, n, args.seed, rank=run.rank, world=run.world)
    result = dict(method=run.method, teacher=args.teacher, it=it, nfe=args.nfe, cfg=args.cfg, train_seconds=round(run.seconds), **result)
    if run.main:
        before = [line for line in path.read_text().splitlines() if earlier(line, it)] if (path := run.out / "eval.jsonl").exists() else []
        with atomic(path) as f:
            f.write("\n".join([*before, dumps(result), ""]).encode())
        write_json(run.out / "metrics.json", json.loads(dumps(result)))  # strict JSON: a diverged run has nan
        for row in teacher.evaluation.get("measured", []):
            run.print(summary(dict(row, method=f"teacher w={row['cfg']:g}")))
        run.print(summary(result))
        for part in result.get("experts", []):
            run.print(summary(dict(result, **{k: None for k in METRICS}) | part | dict(method=f"  expert {part['expert']}", protocol=f"labels {part['labels']}, n={part['n']}")))


def earlier(line, it):
    """Is this line of eval.jsonl of an iteration before `it`? Others are of iterations that a resume has undone, or half a line."""
    try:
        return json.loads(line)["it"] < it
    except (ValueError, KeyError, TypeError):
        return False


def summary(r):
    """One line for people."""
    keys = [k for k in METRICS if r.get(k) is not None and k not in ("kid_std", "density", "mode_max")]
    return f"{r['method']} nfe={r['nfe']}: " + "  ".join(f"{k} {r[k]:.4g}" for k in keys) + f"  ({r['protocol']})"


def export(run, teacher, student, sampler):
    """student/: weights in diffusers format and distill.json, all that inference needs."""
    student = student.whole()
    if run.main:
        (run.out / "student" / "distill.json").unlink(missing_ok=True)  # written last: no half-written student looks finished
        flags = {k: v for k, v in vars(run.args).items() if k not in ("resume", "overwrite")}
        student.save(run.out / "student", dict(method=run.method, teacher=run.args.teacher, nfe=run.args.nfe, cfg=run.args.cfg, sampler=sampler, flags=flags,
                                               seed=run.args.seed, revision=run.revision, torch=torch.__version__,
                                               training=run.record | dict(seconds=round(run.seconds), iterations=run.args.iters, batch=run.args.batch,
                                                                          command=shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), world=run.world,
                                                                          dtype=str(run.dtype)[6:], threads=torch.get_num_threads(), hardware=hardware(run.device),
                                                                          date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))))
        run.print(f"student: {run.out / 'student'}")


# ---- results as text ---------------------------------------------------------------------------------------------------------------------


def sha256(folder):
    """Of all weights below a model's folder, by name."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*.safetensors")):
        with open(path, "rb") as f:
            while part := f.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()[:12]


def hardware(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return next((line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), platform.processor() or platform.machine())


def dumps(value):
    """One line of strict JSON: NaN and infinities become null."""
    clean = lambda v: ({k: clean(w) for k, w in v.items()} if isinstance(v, dict) else [clean(w) for w in v] if isinstance(v, list)
                       else None if isinstance(v, float) and not math.isfinite(v) else v)
    return json.dumps(clean(value), allow_nan=False)


def table(results):
    """Markdown; columns that no result has are left out. Several seeds: mean, of distances also (minimum)."""
    columns = ["name", "nfe", "passes", "cfg", *[k for k in METRICS if k != "kid_std"], "distinct", "nonfinite", "images_per_s"]
    columns = [c for c in columns if any(r.get(c) is not None for r in results)]

    def show(r, c):
        least = f" ({r['min'][c]:.4g})" if c in DISTANCES and c in r.get("min", {}) else ""
        return "" if r.get(c) is None else f"{r[c]:.4g}{least}" if isinstance(r[c], float) else str(r[c])

    cells = [columns] + [[show(r, c) for c in columns] for r in results]
    width = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(v.ljust(w) for v, w in zip(line, width)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])
