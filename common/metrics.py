"""Metrics of samples: distances to a reference set, agreement with labels."""

import hashlib
import time

import torch
import torch.nn.functional as F

from common import fid
from common.distributed import gather_rows, on_rank0
from common.errors import UserError
from common.features import ClassifierExtractor
from common.routed import ByLabel
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
    "vendi",
    "clip_score",
    "pickscore",
    "hps",
    "motion",
    "flicker",
    "frame_similarity",
    "agreement",
    "agreement_kind",
    "energy_distance",
    "sliced_wasserstein",
    "mode_min",
    "mode_max",
    "near_mode",
)


def distances(extractor, features):
    """Distances of samples with these features [n, D] to the extractor's reference.

    Features of videos are [n, F, D]: the frames are compared, and frame_similarity is added, the
    mean cosine of consecutive ones.
    dict, empty without a reference: fd or fid; if there are reference images also kid, kid_std (100
    subsets of 1,000, not multiplied by 1000), precision, recall, density, coverage (k = 3, against
    n reference images).
    """
    result = {}
    if features.ndim == 3:
        if features.shape[1] > 1 and features.shape[2]:
            cosine = F.cosine_similarity(features[:, 1:], features[:, :-1], dim=2)
            result["frame_similarity"] = cosine.double().mean().item()
        features = features.flatten(0, 1)
    if extractor.reference is None:
        return result
    features = features.to(extractor.device)  # CUDA: eigenvalues in seconds instead of a minute
    reference = extractor.reference
    try:
        stats = fid.Stats(features.shape[1], features.device)
        for part in features.split(5000):
            stats.update(part)
        distance = fid.frechet(*stats.mean_cov(), reference["mu"], reference["sigma"])
        result[extractor.metric] = distance
        real = extractor.real_features(len(features))
        if real is not None:
            real = real.to(features.device)
            result["kid"], result["kid_std"] = fid.kid(real, features)
            result |= fid.prdc(real, features, k=3)
    except ValueError as e:  # too few images, or a reference that is not a covariance
        raise UserError(str(e)) from None
    return result


def toy_distances(x, mixture, labels, seed):
    """Distances of points [n, 2] to as many of the exact mixture with the same labels [n]."""
    y = mixture.sample(len(x), labels, torch.Generator().manual_seed(seed + 1))
    shares, near_mode = mode_shares(x, mixture)
    return dict(
        energy_distance=energy_distance(x, y),
        sliced_wasserstein=sliced_wasserstein(x, y),
        mode_min=shares.min().item(),
        mode_max=shares.max().item(),
        near_mode=near_mode,
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
    """Metrics of n samples -> dict, the same on every rank and for any number of processes.

    Samples are compared with the extractor's reference (default: the teacher's protocol), those of
    a toy teacher with its exact mixture. sampler(model, z, cond, noise) -> samples.
    progress(number of samples) and keep(indices, uint8 images or points) are called per batch.
    """
    start = time.time()
    if n < world:
        raise UserError(f"{n} samples: expected at least one for each of {world} processes")
    is_toy = teacher.adapter == "toy"
    if extractor is None and not is_toy:
        extractor = ClassifierExtractor(teacher)
    sampler = Stopwatch(sampler, next(model.parameters()).device)

    rows = dict(features=[], hashes=[], finite=[], predicted=[])
    for index, _, x in generate(sampler, model, n, seed, batch, rank, world):
        if is_toy:
            images = features = x.cpu()
        else:
            images = model.decode(x)
            features, logits = extractor(images)
            if logits is not None:
                rows["predicted"].append(logits.argmax(1))
        rows["features"].append(features)
        rows["hashes"].append(hash_images(images))
        rows["finite"].append(x.isfinite().flatten(1).all(1).long().cpu())
        if keep:
            keep(index, images)
        if progress:
            progress(len(index))
    rows = {k: gather_rows(torch.cat(v), n, rank, world) for k, v in rows.items() if v}
    features = rows["features"]  # of all samples, on every rank
    labels = torch.arange(n) % max(teacher.classes, 1)

    def measure():
        agreement = {}
        if is_toy:
            result = toy_distances(features, teacher.mixture, labels, seed)
        else:
            result = distances(extractor, features)
        if "predicted" in rows:
            agreement = extractor.label_agreement(rows["predicted"], labels)
        result |= {name: values.nanmean().item() for name, values in agreement.items()}
        if isinstance(model, ByLabel) and len(model.experts) > 1:
            result["experts"] = [
                measure_expert(i, model, features, labels, agreement, teacher, extractor, seed)
                for i in range(max(model.table) + 1)
            ]
        return result

    result = on_rank0(measure)
    protocol = f"toy exact n={n} seed={seed}" if is_toy else extractor.describe(n, f"seed={seed}")
    result = dict(protocol=protocol, **result)
    if not rows["finite"].all():
        result["nonfinite"] = n - int(rows["finite"].sum())
    rate = len(range(rank, n, world)) / max(sampler.seconds, 1e-9)
    return result | dict(
        n=n,
        seed=seed,
        distinct=len(rows["hashes"].unique()),
        images_per_s=round(rate, 1),
        seconds=round(time.time() - start, 1),
    )


def measure_expert(i, model, features, labels, agreement, teacher, extractor, seed):
    """Metrics of expert i of a ByLabel model, on the samples of its labels -> dict.

    The joint metrics are not an average of these: they also compare the sizes of the parts.
    """
    table = torch.tensor(model.table)
    own_labels = (table == i).nonzero()[:, 0].tolist()
    rows = table[labels] == i
    n = int(rows.sum())
    result = dict(expert=i, labels=own_labels, n=n)
    if extractor is None:
        if n > 1:
            found = toy_distances(features[rows], teacher.mixture, labels[rows], seed)
            keys = ("energy_distance", "sliced_wasserstein", "near_mode")
            result |= {key: found[key] for key in keys}
    else:
        part = extractor.for_labels(own_labels)
        if part is not None and n > part.dims:
            result |= distances(part, features[rows])
    if n and "agreement" in agreement:
        result["agreement"] = agreement["agreement"][rows].nanmean().item()
    return result


class Stopwatch:
    """A sampler that adds up the seconds it takes."""

    def __init__(self, sampler, device):
        self.sampler = sampler
        self.device = device
        self.seconds = 0.0

    def __call__(self, *args):
        self.synchronize()
        start = time.perf_counter()
        x = self.sampler(*args)
        self.synchronize()
        self.seconds += time.perf_counter() - start
        return x

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def hash_images(x):
    """A hash per image, int64 [n], equal for equal images.

    Counting different ones finds noise that is the same on every rank or in every batch.
    """
    hashes = []
    for image in x.detach().cpu().contiguous().numpy():
        digest = hashlib.sha256(image.tobytes()).digest()
        hashes.append(int.from_bytes(digest[:8], "big", signed=True))
    return torch.tensor(hashes, dtype=torch.int64)


def summary(result):
    """One line for the terminal."""
    hidden = ("kid_std", "density", "mode_max")
    shown = [k for k in METRICS if k not in hidden and result.get(k) is not None]
    values = "  ".join(f"{k} {result[k]:.4g}" for k in shown)
    return f"{result['method']} nfe={result['nfe']}: {values}  ({result['protocol']})"
