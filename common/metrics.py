"""Samples of a model, and what they are worth: used by the scripts at the end of a run and by eval.py. Distances themselves: common/fid.py, common/toy.py."""
import json
import time

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from common import fid
from common.data import load_images
from common.run import ImageNoise, UserError, revision, save_grid, write_json
from common.toy import energy_distance, mode_shares, sliced_wasserstein

TEACHER_NFE = 16  # Euler steps of the teacher row in sample grids


@torch.no_grad()
def teacher_sample(teacher, z, cond, nfe, cfg=1.0, heun=False):
    """Deterministic sampler of the probability-flow ODE from pure noise to data on the teacher's own schedule: first order (Euler for flow, DDIM for
    VP and EDM: the same step x_s = alpha_s x0 + sigma_s eps), or Heun on the same grid (two calls per step, one in the last). nfe counts steps of the
    first-order sampler; guidance doubles the cost of each. z [B, *shape] unit noise -> x [B, *shape]."""
    s = teacher.schedule
    if s.unit_norm:  # VP: evenly spaced indices, then the clean end
        times = torch.linspace(s.t_max, 0, nfe + 1, dtype=torch.float64)[:-1]
    elif teacher.prediction == "edm":  # EDM eq. (5)
        times = s.grid(max(nfe, 2)).flip(0)[:nfe]
    else:
        times = s.grid(nfe).flip(0)
    alpha, sigma = [*s.alpha(times), torch.tensor(1.0)], [*s.sigma(times), torch.tensor(0.0)]
    x = z.double() * (1.0 if s.unit_norm else sigma[0])
    step = lambda x, x0, i: alpha[i + 1] * x0 + sigma[i + 1] / sigma[i] * (x - alpha[i] * x0)
    for i in range(nfe):
        x0 = teacher.guided(x.to(z.dtype), alpha[i], sigma[i], cond, cfg).double()
        y = step(x, x0, i)
        if heun and i < nfe - 1:  # average of x0 at both ends, exact second order in log-SNR for either schedule to the same order
            x0 = (x0 + teacher.guided(y.to(z.dtype), alpha[i + 1], sigma[i + 1], cond, cfg).double()) / 2
            y = step(x, x0, i)
        x = y
    return x.to(z.dtype)


class Extractor:
    """Features and label logits of images under a teacher's own protocol (its classifier), with the reference statistics of its data."""

    def __init__(self, teacher):
        e = teacher.evaluation
        for key in ("protocol", "classifier", "reference", "images", "names"):
            if key not in e:
                raise UserError(f"{teacher.folder / 'teacher.json'}: evaluation.{key} is missing, so this teacher's samples cannot be measured")
        self.protocol, self.device = e["protocol"], next(teacher.parameters()).device
        self.net = fid.SmallCNN(teacher.shape[0], teacher.shape[-1], len(e["names"]))
        try:
            self.net.load_state_dict(load_file(teacher.folder / e["classifier"]))
        except Exception as err:  # safetensors and torch raise several kinds; all mean the same to the user
            raise UserError(f"{teacher.folder / e['classifier']}: expected the safetensors of the classifier ({type(err).__name__})") from None
        self.net.eval().to(self.device)
        self.reference = fid.load_stats(teacher.folder / e["reference"])
        self.teacher, self.real = teacher, None

    @torch.no_grad()
    def __call__(self, images):
        return [a.float().cpu() for a in self.net(images.to(self.device))]

    def real_features(self, n):
        """Features of the first n reference images: of a fixed shuffle, so that the classes are mixed. For KID, precision and recall."""
        if self.real is None:
            data = load_images(None, self.teacher, lambda *a: None)
            order = data.order(0, 0)[:n]
            self.real = torch.cat([self(part)[0] for part in data.images[order].split(500)])
        return self.real[:n]


def generate(sampler, model, n, seed=0, batch=250, rank=0, world=1):
    """Yields (indices, labels, samples) of this rank: image i has label i % classes and noise of its own seed, whatever the batch or world size.

    sampler(model, z, cond, noise) -> samples; noise() gives more of the images' own noise, in the same order for any batch."""
    device = next(model.parameters()).device
    mine = torch.arange(rank, n, world)
    for part in mine.split(batch):
        noise = ImageNoise(seed, part.tolist(), device)
        labels = part % max(model.classes, 1)
        cond = {k: v.to(device) for k, v in model.encode(labels).items()}
        yield part, labels, sampler(model, noise(*model.shape), cond, lambda: noise(*model.shape))


def gather(x, n, rank, world):
    """Rows i = rank, rank + world, ... of every rank -> all n rows in order, on every rank. x [n_local, ...]"""
    if world == 1:
        return x
    most = -(-n // world)
    padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[:n]


def evaluate(sampler, model, teacher, n=5000, seed=0, batch=250, rank=0, world=1, extractor=None, progress=None):
    """Metrics of n samples -> dict. `mnist`-type teachers: fd, kid, precision, recall, density, coverage, agreement under the teacher's protocol;
    `toy`: energy distance, sliced Wasserstein distance, mode shares against samples of the exact mixture. Same result for any world size."""
    start, samples, labels, seconds = time.time(), [], [], 0.0
    device = next(model.parameters()).device
    sync = (lambda: torch.cuda.synchronize()) if device.type == "cuda" else (lambda: None)
    features, logits = [], []
    if teacher.adapter != "toy":
        extractor = extractor or Extractor(teacher)
    for _, y, x in generate(lambda *a: timed(sampler, sync, *a), model, n, seed, batch, rank, world):
        x, spent = x
        seconds += spent
        labels.append(y)
        if teacher.adapter == "toy":
            samples.append(x.cpu())
        else:
            f, l = extractor(model.decode(x))
            features.append(f)
            logits.append(l)
        if progress:
            progress(len(y))
    common = dict(n=n, seed=seed, images_per_s=round(len(torch.cat(labels)) / max(seconds, 1e-9), 1))
    if teacher.adapter == "toy":
        x = gather(torch.cat(samples), n, rank, world)
        y = teacher.mixture.sample(n, torch.arange(n) % teacher.classes, torch.Generator().manual_seed(seed + 1))
        share, near = mode_shares(x, teacher.mixture)
        return dict(protocol=f"toy exact n={n}", energy_distance=energy_distance(x, y), sliced_wasserstein=sliced_wasserstein(x, y), mode_min=float(share.min()),
                    mode_max=float(share.max()), near_mode=near, **common)
    features = gather(torch.cat(features), n, rank, world)
    predicted = gather(torch.cat(logits).argmax(1), n, rank, world)
    stats = fid.Stats(features.shape[1])
    stats.update(features)
    ref = extractor.reference
    fd = fid.frechet(*stats.mean_cov(), torch.as_tensor(ref["mu"]), torch.as_tensor(ref["sigma"]))
    real = extractor.real_features(n)
    kid, kid_std = fid.kid(real, features)
    prdc = fid.prdc(real, features, k=3)
    agreement = (predicted == torch.arange(n) % teacher.classes).double().mean().item()
    return dict(protocol=f"fd {extractor.protocol} uint8 n={n} seed={seed} ref={ref.get('n')}", fd=fd, kid=kid, kid_std=kid_std, **prdc, agreement=agreement,
                **common, seconds=round(time.time() - start, 1))


def timed(sampler, sync, *args):
    sync()
    t = time.perf_counter()
    x = sampler(*args)
    sync()
    return x, time.perf_counter() - t


# ---- what a script does at the end of a run, and in between ------------------------------------------------------------------------------


def pictures(run, teacher, student, sample, sampler, it, n=20):
    """samples/<it>.png: teacher row beside student rows, same noise, same labels. Rank 0 draws."""
    if not run.main:
        return
    nfe = run.args.nfe
    one = lambda fn, model: next(generate(fn, model, 4000 if teacher.adapter == "toy" else n, run.args.seed, 4000))[2]
    if not hasattr(run, "teacher_row"):
        run.teacher_row = teacher.rows(one(lambda m, z, c, noise: teacher_sample(m, z, c, TEACHER_NFE, run.args.cfg), teacher))
    now = student.rows(one(lambda m, z, c, noise: sample(m, z, c, nfe, noise, **sampler), student))
    rows = [(f"teacher, {TEACHER_NFE} steps, w = {run.args.cfg}", run.teacher_row), (f"{run.method}, {nfe} step{'s' * (nfe > 1)}, iteration {it}", now)]
    save_grid(run.out / "samples" / f"{it:08d}.png", rows)


def report(run, teacher, student, sample, sampler, it, n):
    """Metrics of the student and, for scale, of its teacher at one step, into metrics.json (and log.jsonl's neighbour eval.jsonl in between)."""
    if not n:
        return
    args = run.args
    model_sampler = lambda m, z, c, noise: sample(m, z, c, args.nfe, noise, **sampler)
    result = evaluate(model_sampler, student, teacher, n, args.seed, rank=run.rank, world=run.world)
    result = dict(method=run.method, teacher=args.teacher, it=it, nfe=args.nfe, cfg=args.cfg, train_seconds=round(run.seconds), **result)
    if run.main:
        with open(run.out / "eval.jsonl", "a") as f:
            f.write(json.dumps(result) + "\n")
        write_json(run.out / "metrics.json", result)
        run.print(summary(result))


def summary(r):
    """One line for people."""
    keys = [k for k in ("fd", "kid", "precision", "recall", "coverage", "agreement", "energy_distance", "sliced_wasserstein", "mode_min", "near_mode") if k in r]
    return f"{r['method']} nfe={r['nfe']}: " + "  ".join(f"{k} {r[k]:.4g}" for k in keys) + f"  ({r['protocol']})"


def export(run, teacher, student, sampler):
    """student/: weights in diffusers format and distill.json, all that inference needs."""
    if run.main:
        flags = {k: v for k, v in vars(run.args).items() if k not in ("resume", "overwrite")}
        student.save(run.out / "student", dict(method=run.method, teacher=run.args.teacher, nfe=run.args.nfe, cfg=run.args.cfg, sampler=sampler, flags=flags,
                                               seed=run.args.seed, revision=revision(), torch=torch.__version__))
        run.print(f"student: {run.out / 'student'}")
