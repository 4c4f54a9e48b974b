"""common/data.py and the parts of common/run.py that a loop stands on: order of images, random numbers, weight average, atomic files, guarded steps."""

import json
import os
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import Images, load_folder, load_images, load_npz
from common.ema import EMA
from common.errors import UserError
from common.files import atomic, read_json, write_json
from common.image_folder import read_image
from common.rng import BatchRandom, PerImageNoise, derive_seed
from common.run import Run
from common.teachers.load import load_teacher

# ---- order of images --------------------------------------------------------------------------------------------------------------------


def numbered(n):
    """n images whose label is their place in the set."""
    return Images(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1), torch.arange(n), ["one"])


def test_every_epoch_is_a_permutation():
    data = numbered(30)
    seen = torch.cat(
        [data.batch(it, 7)[1] for it in range(30)]
    )  # 210 = 7 epochs, batches across their borders
    epochs = seen.view(7, 30)
    assert torch.equal(epochs.sort(1).values, torch.arange(30).expand(7, 30))
    assert len({tuple(e.tolist()) for e in epochs}) == 7  # each in its own order


def test_batch_larger_than_the_set():
    images, labels = numbered(3).batch(2, 10)
    assert images.shape == (10, 1, 1, 1) and labels.bincount().tolist() in (
        [3, 3, 4],
        [3, 4, 3],
        [4, 3, 3],
    )


def test_image_and_label_stay_together():
    images, labels = numbered(100).batch(3, 64, seed=5)
    assert torch.equal(images.flatten().long(), labels)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_make_up_the_global_batch(world):
    data = numbered(30)
    for it in (0, 3, 11):
        parts = torch.cat(
            [numbered(30).batch(it, 8, seed=2, rank=r, world=world)[1] for r in range(world)]
        )
        assert torch.equal(parts, data.batch(it, 8, seed=2)[1])


def test_order_is_a_function_of_the_iteration():
    """A resumed run asks for batch 9 first; the cache of the epoch must not matter."""
    walked = numbered(30)
    for it in range(9):
        walked.batch(it, 8)
    assert torch.equal(walked.batch(9, 8)[1], numbered(30).batch(9, 8)[1])
    assert torch.equal(walked.batch(2, 8)[1], numbered(30).batch(2, 8)[1])  # backwards too
    assert not torch.equal(numbered(30).batch(9, 8, seed=1)[1], numbered(30).batch(9, 8, seed=0)[1])
    a, b = walked.batch(0, 8, seed=0)[1], walked.batch(0, 8, seed=1)[1]
    assert not torch.equal(a, b)  # the cache knows the seed


# ---- random numbers ---------------------------------------------------------------------------------------------------------------------


def all_draws(d):
    return [
        d.randn(3),
        d.rand(),
        d.randint(0, 1000),
        d.randn_like(torch.zeros(2, 4, 4)),
        d.randn(3),
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_draw_does_not_depend_on_the_world_size(world):
    one = BatchRandom(0, 7, 8)
    ranks = [BatchRandom(0, 7, 8, r, world) for r in range(world)]
    for whole, *parts in zip(all_draws(one), *[all_draws(r) for r in ranks]):
        assert torch.equal(torch.cat(parts), whole)
    shared = [[d.shared_randint(0, 1000) for _ in range(20)] for d in (one, *ranks)]
    assert all(s == shared[0] for s in shared) and len(set(shared[0])) > 10


def test_draws_of_other_iterations_and_seeds_differ():
    first = {
        (seed, it): tuple(BatchRandom(seed, it, 4).normal(1).flatten().tolist())
        for seed in (0, 1, 2)
        for it in range(50)
    }
    assert len(set(first.values())) == 150  # (seed 0, it 1) is not (seed 1, it 0)
    assert len({BatchRandom(0, it, 1).shared_randint(0, 10**9) for it in range(50)}) == 50
    x = torch.stack([BatchRandom(0, it, 64).normal(1).flatten() for it in range(400)])
    assert (
        abs(float((x[1:] * x[:-1]).mean())) < 4 / (399 * 64) ** 0.5
    )  # neighbours are uncorrelated: 4 standard errors


def test_draw_ranges():
    d = BatchRandom(0, 0, 100000)
    i, u = d.randint(20, 981), d.rand()
    assert (int(i.min()), int(i.max())) == (20, 980)  # DMD2's times, both ends included
    assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.005


def test_mix():
    keys = [(s, i, p) for s in range(-2, 10) for i in range(50) for p in range(1, 6)]
    assert len({derive_seed(*k) for k in keys}) == len(keys)
    assert derive_seed(2**40, 1) != derive_seed(2**40 + 1, 1) and 0 <= derive_seed(-1) < 2**64


def test_image_noise_does_not_depend_on_the_batch():
    whole = PerImageNoise(3, range(10))
    z, more = whole(1, 4, 4), whole(2)
    for part in ([0, 1, 2], [9], [5, 1]):
        noise = PerImageNoise(3, part)
        assert torch.equal(noise(1, 4, 4), z[part]) and torch.equal(noise(2), more[part])
    assert len({float(v) for v in z[:, 0, 0, 0]}) == 10 and not torch.equal(
        PerImageNoise(4, [0])(1, 4, 4), z[:1]
    )


# ---- folders of images ------------------------------------------------------------------------------------------------------------------


def picture(path, size=(20, 20), color=200, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


@pytest.fixture
def folder(tmp_path):
    for name, color in (("b", 30), ("a", 10), ("c", 50)):
        for i in range(2):
            picture(tmp_path / "set" / name / f"{i}.png", color=color)
    return tmp_path / "set"


def test_class_subfolders(folder):
    lines = []
    data = load_folder(folder, 1, 8, lines.append)
    assert data.names == ["a", "b", "c"] and data.labels.tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]  # sorted by name
    assert data.images.shape == (6, 1, 8, 8) and data.images.dtype == torch.uint8
    assert data.images[:, 0, 4, 4].tolist() == [10, 10, 30, 30, 50, 50]
    assert "6 images, 3 classes, 0 skipped" in lines[-1]


def test_folder_without_subfolders_is_one_class(folder):
    data = load_folder(folder / "a", 3, 8, lambda *a: None)
    assert data.labels.tolist() == [0, 0] and data.images.shape == (2, 3, 8, 8)


def test_other_files_are_ignored(folder):
    (folder / "a" / "notes.txt").write_text("no image")
    (folder / ".cache").mkdir()
    picture(folder / "a" / "deeper" / "x.JPG")
    data = load_folder(folder, 1, 8, lambda *a: None)
    assert len(data) == 7 and data.names == ["a", "b", "c"]


def bad_png(path):
    """A valid signature and header, then nonsense."""
    picture(path)
    raw = path.read_bytes()
    path.write_bytes(raw[:40] + b"\xff" * 30 + raw[70:])


def truncated_jpeg(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(
        path, "JPEG"
    )
    path.write_bytes(path.read_bytes()[:600])


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.write_bytes(b"not an image"),
        lambda p: p.write_bytes(b""),
        bad_png,
        truncated_jpeg,
        lambda p: p.mkdir(),
    ],
    ids=["text", "empty", "bad png", "truncated jpeg", "folder"],
)
def test_corrupt_image_is_named_and_skipped(folder, write):
    write(folder / "b" / "broken.png")
    lines = []
    data = load_folder(folder, 1, 8, lines.append)
    assert len(data) == 6 and data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [
        line for line in lines if "broken.png" in line and "skipped" in line
    ] and "1 skipped" in lines[-1]


def test_decompression_bombs_are_refused(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    picture(
        folder / "a" / "warned.png", (40, 40)
    )  # between the limit and twice the limit pillow only warns
    picture(folder / "a" / "refused.png", (60, 60))
    lines = []
    assert len(load_folder(folder, 1, 8, lines.append)) == 6
    assert sum("DecompressionBomb" in line for line in lines) == 2 and "2 skipped" in lines[-1]


def test_a_long_strip_is_not_enlarged(folder):
    """1 x 3,000,000 pixels: enlarged to a width of 256 before the crop it would take 190 GB."""
    picture(folder / "a" / "strip.png", (1, 3_000_000), 99)
    start = time.time()
    image = read_image(folder / "a" / "strip.png", 1, 256)
    assert image.shape == (1, 256, 256) and (image == 99).all() and time.time() - start < 5


@pytest.mark.parametrize(
    "mode, color",
    [
        ("RGB", (9, 9, 9)),
        ("RGBA", (9, 9, 9, 255)),
        ("P", 9),
        ("I;16", 9),
        ("1", 1),
        ("CMYK", (0, 0, 0, 0)),
    ],
)
def test_modes_and_sizes(tmp_path, mode, color):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    picture(path, (13, 29), color, mode)
    for channels in (1, 3):
        assert read_image(path, channels, 8).shape == (channels, 8, 8)


def test_the_central_square_is_taken(tmp_path):
    a = np.zeros((10, 30), np.uint8)
    a[:, 10:20] = 255
    Image.fromarray(a).save(tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png", 1, 10) == 255).all()  # same size: no resampling
    assert (
        read_image(tmp_path / "x.png", 1, 5) > 235
    ).all()  # the Lanczos kernel reaches over the border
    Image.fromarray(a.T.copy()).save(tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png", 1, 20) > 195).all()


def test_other_formats(tmp_path):
    """The middle in the format that is asked for: of 40 x 10 pixels the 20 x 10 in the middle for one twice as wide as high, the 5 x 10 for the reverse."""
    a = np.full((10, 40), 7, np.uint8)
    a[:, 10:30] = np.where(np.arange(20) < 10, 60, 200)
    Image.fromarray(a).save(tmp_path / "x.png")
    wide, high = (
        read_image(tmp_path / "x.png", 1, (10, 20)),
        read_image(tmp_path / "x.png", 3, (20, 10)),
    )
    assert wide.shape == (1, 10, 20) and wide[0, 0].tolist() == [60] * 10 + [200] * 10
    assert (
        high.shape == (3, 20, 10)
        and high.min() > 40
        and high[0, 9, :3].float().mean() < 80 < 180 < high[0, 9, -3:].float().mean()
    )
    Image.fromarray(a.T.copy()).save(tmp_path / "x.png")
    assert torch.equal(read_image(tmp_path / "x.png", 1, (20, 10)), wide.transpose(1, 2))


@pytest.mark.parametrize(
    "link, says",
    [
        (
            lambda home, out: (home / "a" / "z.png").symlink_to(out / "x.png"),
            "image: .*a way out of it: .*z.png",
        ),
        (lambda home, out: (home / "d").symlink_to(out), "class: .*a way out of it: .*/d"),
        (lambda home, out: (home / "a" / "deep").symlink_to(out), None),  # not followed
        (
            lambda home, out: (home / "a" / "loop.png").symlink_to(home / "a" / "loop.png"),
            "image: .*a way out",
        ),
        (
            lambda home, out: (home / "a" / "z.png").symlink_to(home / "b" / "0.png"),
            None,
        ),  # stays inside
    ],
)
def test_links_out_of_the_folder_are_not_followed(link, says, folder, tmp_path):
    """The folder may be somebody else's: as with captions, nothing outside of it is read."""
    picture(tmp_path / "outside" / "x.png")
    link(folder, tmp_path / "outside")
    if says is None:
        data = load_folder(folder, 1, 8, lambda *a: None)
        assert len(data) == 6 + (folder / "a" / "z.png").exists() and data.names == ["a", "b", "c"]
        return
    with pytest.raises(UserError, match=f"--data {re.escape(str(folder))}: {says}") as e:
        load_folder(folder, 1, 8, lambda *a: None)
    assert "\n" not in str(e.value)


def test_a_folder_may_itself_be_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert len(load_folder(tmp_path / "link", 1, 8, lambda *a: None)) == 6


def test_no_readable_image(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="found none readable .0 skipped."):
        load_folder(tmp_path, 1, 8)
    (tmp_path / "a" / "x.png").write_text("no")
    with pytest.raises(UserError, match="found none readable .1 skipped."):
        load_folder(tmp_path, 1, 8, lambda *a: None)
    for path, found in ((tmp_path / "none", "nothing"), (tmp_path / "a" / "x.png", "a file")):
        with pytest.raises(UserError, match=f"expected a folder of images, found {found}"):
            load_folder(path, 1, 8)


def test_too_many_classes(folder):
    teacher = SimpleNamespace(vae=None, shape=(1, 8, 8), classes=2)
    with pytest.raises(UserError, match="at most 2 class subfolders for this teacher, found 3"):
        load_images(str(folder), teacher, lambda *a: None)


def test_images_of_the_toy():
    data = load_images(None, load_teacher("toy"))
    assert data.images.shape == (20000, 2) and data.labels.bincount().tolist() == [2500] * 8
    assert torch.equal(data.images, load_images(None, load_teacher("toy")).images)


def npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


GOOD = dict(images=np.zeros((4, 8, 8), np.uint8), labels=np.array([0, 1, 1, 0], np.uint8))


def test_npz(tmp_path):
    data = load_npz(npz(tmp_path / "x.npz", **GOOD))
    assert (
        data.images.shape == (4, 1, 8, 8)
        and data.labels.tolist() == [0, 1, 1, 0]
        and data.labels.dtype == torch.int64
        and data.names == ["0", "1"]
    )
    assert load_npz(
        npz(tmp_path / "x.npz", images=np.zeros((4, 8, 6, 3), np.uint8), labels=GOOD["labels"])
    ).images.shape == (4, 3, 8, 6)


@pytest.mark.parametrize(
    "arrays",
    [
        dict(images=GOOD["images"]),
        dict(GOOD, labels=np.zeros(3, np.uint8)),
        dict(GOOD, images=np.zeros((4, 8, 8))),
        dict(GOOD, labels=np.array([0, 1, -1, 0])),
        dict(GOOD, labels=np.zeros(4)),
        dict(GOOD, labels=np.array(list("abcd"))),
        dict(images=GOOD["images"][:0], labels=GOOD["labels"][:0]),
        dict(GOOD, labels=np.array([0, 1, None, 2])),
    ],
    ids=["missing", "length", "dtype", "negative", "float", "text", "empty", "pickled"],
)
def test_bad_npz(tmp_path, arrays):
    with pytest.raises(UserError, match="x.npz: expected"):
        load_npz(npz(tmp_path / "x.npz", **arrays))


def test_damaged_npz(tmp_path):
    path = npz(
        tmp_path / "x.npz",
        images=np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8),
        labels=np.zeros(40, np.uint8),
    )
    raw = path.read_bytes()
    for damaged in (b"", b"no", raw[:1000], raw[:500] + bytes(60) + raw[560:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="x.npz: expected an .npz"):
            load_npz(path)
    with open(path, "wb") as f:
        np.save(f, GOOD["images"])  # an .npy
    with pytest.raises(UserError, match="x.npz: expected an .npz"):
        load_npz(path)


def test_images_of_a_teacher_must_fit_it(tmp_path):
    npz(tmp_path / "x.npz", **GOOD)
    teacher = SimpleNamespace(
        adapter="dit",
        image_shape=(1, 8, 8),
        classes=2,
        prompts=None,
        folder=tmp_path,
        evaluation=dict(images="x.npz"),
    )
    assert len(load_images(None, teacher)) == 4
    for change in (dict(classes=1), dict(image_shape=(3, 8, 8))):
        with pytest.raises(UserError, match="x.npz: expected images"):
            load_images(None, SimpleNamespace(**dict(vars(teacher), **change)))
    with pytest.raises(UserError, match="ships no images"):
        load_images(None, SimpleNamespace(**dict(vars(teacher), evaluation={})))


# ---- weight average ---------------------------------------------------------------------------------------------------------------------


class Weights(torch.nn.Module):
    """Stands for a Model: one weight, and copy()."""

    def __init__(self, value, dtype=torch.float32):
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((2,), value, dtype=dtype))

    def copy(self):
        return Weights(float(self.w.detach()[0]))


def test_ema_starts_warm():
    """While few images are seen the half-life is 5 % of them: after 100 steps the start is forgotten, and the average lags about 5 % / ln 2 behind."""
    live = Weights(0.0)
    ema = EMA(live, 1e9)
    assert float(ema.model.w[0]) == 0
    for i in range(1, 101):
        live.w.data.fill_(float(i))
        ema.update(64)
    assert ema.images == 6400
    assert 100 - float(ema.model.w[0]) == pytest.approx(6.5, abs=0.5)  # measured 6.52


def test_ema_is_fp32_frozen_and_moves_only_on_update():
    live = Weights(1.0, torch.bfloat16)
    ema = EMA(live, 1000)
    ema.images = 10**6
    for _ in range(20):
        live.w.data.fill_(2.0)
    assert float(ema.model.w[0]) == 1.0  # the student moved, but nobody called update
    ema.update(1)
    assert ema.model.w.dtype == torch.float32 and not ema.model.w.requires_grad
    assert float(ema.model.w[0]) == pytest.approx(
        1 + 1 - 0.5**0.001, rel=1e-6
    )  # a step that bf16 could not hold
    assert live.w.dtype == torch.bfloat16 and live.w.requires_grad


def test_ema_off_is_the_model_itself():
    live = Weights(1.0)
    ema = EMA(live, 0)
    ema.update(64)
    assert (
        ema.model is live
        and ema.images == 64
        and live.w.requires_grad
        and ema.state_dict()["model"] == {}
    )


def test_ema_resumes_bit_for_bit():
    def walk(ema, live, steps):
        for i in steps:
            live.w.data.fill_(float(i))
            ema.update(64)

    live = Weights(0.0)
    straight, first = EMA(live, 500), EMA(live, 500)
    walk(straight, live, range(40))
    walk(first, live, range(20))
    second = EMA(Weights(-5.0), 500)
    second.load_state_dict(first.state_dict())
    walk(second, second.live, range(20, 40))
    assert torch.equal(second.model.w, straight.model.w) and second.images == straight.images


def test_ema_of_a_model():
    teacher = load_teacher("toy")
    student = teacher.copy()
    ema = EMA(student, 1000)
    with torch.no_grad():
        student.net.out.bias += 1
    ema.update(64)
    assert not ema.model.exact and torch.allclose(ema.model.net.out.bias, student.net.out.bias)
    assert not any(p.requires_grad for p in ema.model.parameters()) and all(
        p.requires_grad for p in student.parameters()
    )


# ---- files ------------------------------------------------------------------------------------------------------------------------------


def test_atomic_keeps_the_old_file_on_a_crash(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic(path) as f:
        f.write(b"half of the new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.pt"]
    with atomic(path) as f:
        f.write(b"new")
        f.flush()
        assert path.read_bytes() == b"old"  # not before it is complete
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["x.pt"]


def test_json_files(tmp_path):
    write_json(tmp_path / "x.json", dict(a=[1, None]))
    assert read_json(tmp_path / "x.json") == dict(a=[1, None])
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", dict(a=object()))
    assert json.loads((tmp_path / "x.json").read_text()) == dict(a=[1, None])
    for text in ("", "{", "[]", "NaN", '"a"'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match="x.json"):
            read_json(tmp_path / "x.json")


# ---- guarded steps ----------------------------------------------------------------------------------------------------------------------


def stepper():
    run = SimpleNamespace(
        bad={}, skipped=0, last=True, args=SimpleNamespace(shard=False, accumulate=1)
    )
    return run, lambda opt: Run.step(run, opt, 1.0)


def set_grads(params, value):
    for p in params:
        p.grad = torch.full_like(p, value)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_non_finite_gradient_leaves_weights_and_moments(poison):
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)
    params = list(net.parameters())
    opt = torch.optim.AdamW(params, lr=0.1, weight_decay=0.1, fused=True)
    run, step = stepper()
    for _ in range(3):
        set_grads(params, 0.5)
        step(opt)
    before = [
        v.clone() for p in params for v in (p, *opt.state[p].values())
    ]  # weight, step count, both moments
    for n in (1, 2):
        set_grads(params, 0.5)
        params[0].grad[0].fill_(poison)  # 1e38: each entry is finite, but their norm is not
        norm = step(opt)
        assert not norm.isfinite() and ([int(b) for b in run.bad.values()], int(run.skipped)) == (
            [n],
            n,
        )
        assert all(
            torch.equal(a, b)
            for a, b in zip(before, [v for p in params for v in (p, *opt.state[p].values())])
        )
        assert all(p.grad is None for p in params)
    set_grads(params, 0.5)
    step(opt)
    assert ([int(b) for b in run.bad.values()], int(run.skipped)) == (
        [0],
        2,
    )  # in a row, and in all
    assert not torch.equal(params[0], before[0]) and all(p.isfinite().all() for p in params)


def test_skipped_step_leaves_no_trace():
    """Five good steps equal five good steps with a bad one in between, bit for bit."""
    ends = []
    for poison_at in (None, 2):
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 3)
        opt, (run, step) = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True), stepper()
        for i in range(5):
            if i == poison_at:
                set_grads(net.parameters(), float("nan"))
                step(opt)
            set_grads(net.parameters(), 0.1 * (i + 1))
            step(opt)
        ends.append(net.weight.detach().clone())
    assert torch.equal(*ends)


def test_a_first_step_that_is_bad():
    p = torch.nn.Parameter(torch.ones(4))
    opt, (run, step) = torch.optim.AdamW([p], lr=0.1, fused=True), stepper()
    p.grad = torch.full((4,), float("nan"))
    step(opt)
    assert torch.equal(p.detach(), torch.ones(4)) and int(run.skipped) == 1
