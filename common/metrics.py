"""Metrics of samples: distances to a reference, agreement with labels."""

import copy
import hashlib
import time

import torch
from safetensors.torch import load_file

from common import fid
from common.data import load_images
from common.distributed import gather_rows, on_all_ranks
from common.errors import UserError
from common.files import read_json
from common.sampling import generate
from common.teachers.toy import energy_distance, mode_shares, sliced_wasserstein

METRICS = (
    "fid",
    "fd",
    "kid",
    "kid_std",
    "precision",
    "recall",
    "density",
    "coverage",
    "similarity",
    "agreement",
    "agreement_kind",
    "energy_distance",
    "sliced_wasserstein",
    "mode_min",
    "mode_max",
    "near_mode",
)


class Extractor:
    """Features and label logits of images under a teacher's own protocol (its classifier), with the reference statistics of its data."""

    metric, dims = "fd", 64  # never called FID: the network is not the public Inception

    def __init__(self, teacher):
        e, shape, text = (
            teacher.evaluation,
            teacher.image_shape,
            teacher.prompts is not None,
        )
        for key in (
            "protocol",
            "classifier",
            "reference",
            "names",
            *(("kinds", "groups", "labels") if text else ("images",)),
        ):
            if key not in e:
                raise UserError(
                    f"{teacher.folder / 'teacher.json'}: evaluation.{key} is missing, so this teacher's samples cannot be measured"
                )
        self.protocol, self.device = e["protocol"], next(teacher.parameters()).device
        kinds = e.get("kinds", e["names"])  # with kinds, names are groups of them
        self.groups = torch.tensor(e["groups"]) if text else None
        self.targets = (
            known_prompts(teacher.folder / e["labels"], teacher.prompts, len(kinds))
            if text
            else None
        )
        self.net = fid.SmallCNN(shape[0], shape[-1], len(kinds), stages=e.get("stages", 2))
        try:
            self.net.load_state_dict(load_file(teacher.folder / e["classifier"]))
        except (
            Exception
        ) as err:  # safetensors and torch raise several kinds; all mean the same to the user
            raise UserError(
                f"{teacher.folder / e['classifier']}: expected the safetensors of the classifier ({type(err).__name__})"
            ) from None
        self.net.eval().to(self.device)
        self.reference = fid.load_stats(teacher.folder / e["reference"])
        self.teacher, self.ref_name, self.shape = teacher, self.reference["n"], torch.Size(shape)
        real = self.reference["features"]  # of the images, where these are not shipped
        self.real = (
            None
            if real is None
            else real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))]
        )

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

    def label_agreement(self, predicted, labels):
        """Did the classifier see [n] what the labels [n] say? -> dict of float64 [n], nan where nothing is known: agreement, of the group where classes have
        groups, and then agreement_kind, of the class itself. Empty if nothing is known of any."""
        wanted = self.classes(labels)
        same = lambda a, b: torch.where(wanted < 0, torch.nan, (a == b).double())
        if not (wanted >= 0).any():
            return {}
        if self.groups is None:
            return dict(agreement=same(predicted, wanted))
        return dict(
            agreement=same(self.groups[predicted], self.groups[wanted]),
            agreement_kind=same(predicted, wanted),
        )

    def part(self, labels):
        """The same extractor with the reference images of these labels only. None if only statistics are known, or if there are too few images."""
        data = (
            load_images(None, self.teacher, lambda *a: None)
            if self.teacher is not None and "images" in self.teacher.evaluation
            else None
        )
        images = data.images[torch.isin(data.labels, torch.as_tensor(labels))] if data else ()
        if len(images) <= self.dims:
            return None
        real, stats, twin = (
            torch.cat([self(batch)[0] for batch in images.split(500)]),
            fid.Stats(self.dims),
            copy.copy(self),
        )
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
    if wrong := [
        k
        for k, v in known.items()
        if not isinstance(v, int) or isinstance(v, bool) or not 0 <= v < classes
    ]:
        raise UserError(
            f"{path}: {wrong[0][:80]!r}: expected a number below {classes}, found {str(known[wrong[0]])[:80]!r}"
        )
    return torch.tensor([known.get(p, -1) for p in prompts])


def hash_images(x):
    """One number per image, equal for equal images: int64 [n]. Counting distinct ones finds a seed that is the same on every rank."""
    rows = x.detach().cpu().contiguous().numpy()
    return torch.tensor(
        [
            int.from_bytes(hashlib.sha256(r.tobytes()).digest()[:8], "big", signed=True)
            for r in rows
        ],
        dtype=torch.int64,
    )


def distances(extractor, features):
    """Features [n, D] of the samples against the extractor's reference -> dict: fd or fid; kid (mean and std of 100 subsets of 1,000, not times 1000),
    precision, recall, density, coverage (k = 3, as many reference images as samples, if there are so many) where reference images are known."""
    device = (
        extractor.device if torch.device(extractor.device).type == "cuda" else "cpu"
    )  # on CUDA the eigenvalues take seconds, not a minute
    features, ref, stats = (
        features.to(device),
        extractor.reference,
        fid.Stats(features.shape[1], device),
    )
    try:
        for part in features.split(5000):
            stats.update(part)
        out = {
            extractor.metric: fid.frechet(
                *stats.mean_cov(), torch.as_tensor(ref["mu"]), torch.as_tensor(ref["sigma"])
            )
        }
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
    return dict(
        energy_distance=energy_distance(x, y),
        sliced_wasserstein=sliced_wasserstein(x, y),
        mode_min=float(share.min()),
        mode_max=float(share.max()),
        near_mode=near,
    )


def evaluate(
    sampler,
    model,
    teacher,
    n=5000,
    seed=0,
    batch=250,
    rank=0,
    world=1,
    extractor=None,
    progress=None,
    keep=None,
):
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
    for index, _, (x, spent) in generate(
        lambda *a: timed(sampler, sync, *a), model, n, seed, batch, rank, world
    ):
        seconds += spent
        images = x.cpu() if toy else model.decode(x)
        f, logits = (images, None) if toy else extractor(images)
        points.append(f)
        ids.append(hash_images(images))
        finite.append(x.isfinite().flatten(1).all(1).cpu())
        if logits is not None:
            predicted.append(logits.argmax(1))
        if keep:
            keep(index, images)
        if progress:
            progress(len(index))
    points, ids, bad = (
        gather_rows(torch.cat(a), n, rank, world)
        for a in (points, ids, [1 - f.long() for f in finite])
    )
    labels = torch.arange(n) % max(teacher.classes, 1)
    if toy:
        protocol, measure = (
            f"toy exact n={n} seed={seed}",
            lambda: toy_distances(points, teacher.mixture, labels, seed),
        )
    else:
        protocol, measure = (
            extractor.describe(n, f"seed={seed}"),
            lambda: distances(extractor, points),
        )
    result = on_all_ranks(lambda: measure() if rank == 0 else None, world)[
        0
    ]  # the other ranks would only compute the same again
    right = (
        extractor.label_agreement(gather_rows(torch.cat(predicted), n, rank, world), labels)
        if predicted
        else {}
    )
    result |= {k: v.nanmean().item() for k, v in right.items()}
    if getattr(model, "by", None) == "label" and len(model.experts) > 1:
        by_expert = lambda: measure_experts(
            model.table, points, labels, right.get("agreement"), teacher, extractor, seed
        )
        result["experts"] = on_all_ranks(lambda: by_expert() if rank == 0 else None, world)[0]
    if bad.any():
        result["nonfinite"] = int(bad.sum())
    return dict(
        protocol=protocol,
        **result,
        n=n,
        seed=seed,
        distinct=len(ids.unique()),
        images_per_s=round(len(range(rank, n, world)) / max(seconds, 1e-9), 1),
        seconds=round(time.time() - start, 1),
    )


def measure_experts(table, points, labels, right, teacher, extractor, seed):
    """What each expert of a model routed by label makes of its own labels, against the reference of these labels -> list of dicts. The same samples as
    in the joint numbers, which are no average of these: distances within a part do not see how the parts compare."""
    out, table = [], torch.tensor(table)
    for i in range(int(table.max()) + 1):
        mine, rows = (table == i).nonzero()[:, 0].tolist(), table[labels] == i
        found = dict(expert=i, labels=mine, n=int(rows.sum()))
        reference = extractor.part(mine) if extractor else None
        if extractor is None and found["n"] > 1:
            d = toy_distances(points[rows], teacher.mixture, labels[rows], seed)
            found |= {
                k: d[k] for k in ("energy_distance", "sliced_wasserstein", "near_mode")
            }  # shares of modes are those of the labels drawn
        elif reference and found["n"] > reference.dims:
            found |= distances(reference, points[rows])
        out.append(
            found
            | (
                dict(agreement=right[rows].nanmean().item())
                if right is not None and rows.any()
                else {}
            )
        )
    return out


def timed(sampler, sync, *args):
    sync()
    t = time.perf_counter()
    x = sampler(*args)
    sync()
    return x, time.perf_counter() - t


def summary(r):
    """One line for people."""
    keys = [
        k for k in METRICS if r.get(k) is not None and k not in ("kid_std", "density", "mode_max")
    ]
    return (
        f"{r['method']} nfe={r['nfe']}: "
        + "  ".join(f"{k} {r[k]:.4g}" for k in keys)
        + f"  ({r['protocol']})"
    )
