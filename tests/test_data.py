"""data/images.py and data/image_folder.py: order of the images, folders of images, .npz files."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.teachers.load import load_teacher
from data.images import Images, load_folder, load_images, load_npz


def quiet(line):
    pass


# ---- order of the images -------------------------------------------------------------------------


def numbered(n):
    """n images whose label is their place in the set."""
    return Images(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1), torch.arange(n), ["one"])


def test_every_epoch_is_a_permutation():
    data = numbered(30)
    batches = [data.batch(it, 7)[1] for it in range(30)]  # 210 rows: batches span epochs
    epochs = torch.cat(batches).view(7, 30)
    assert torch.equal(epochs.sort(1).values, torch.arange(30).expand(7, 30))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 7  # each in its own order


def test_batch_larger_than_the_set():
    images, labels = numbered(3).batch(2, 10)
    assert images.shape == (10, 1, 1, 1)
    assert labels.bincount().tolist() in ([3, 3, 4], [3, 4, 3], [4, 3, 3])


def test_image_and_label_stay_together():
    images, labels = numbered(100).batch(3, 64, seed=5)
    assert torch.equal(images.flatten().long(), labels)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_make_up_the_global_batch(world):
    for it in (0, 3, 11):
        _, whole = numbered(30).batch(it, 8, seed=2)
        parts = [numbered(30).batch(it, 8, 2, rank, world)[1] for rank in range(world)]
        assert torch.equal(torch.cat(parts), whole)


def test_order_is_a_function_of_the_iteration():
    """A resumed run starts with batch 9. The permutation that is kept must not matter."""
    walked = numbered(30)
    for it in range(9):
        walked.batch(it, 8)
    assert torch.equal(walked.batch(9, 8)[1], numbered(30).batch(9, 8)[1])
    assert torch.equal(walked.batch(2, 8)[1], numbered(30).batch(2, 8)[1])  # backwards too


def test_order_depends_on_the_seed():
    data = numbered(30)
    first, second = data.batch(9, 8, seed=0)[1], data.batch(9, 8, seed=1)[1]
    assert not torch.equal(first, second)
    assert torch.equal(data.batch(9, 8, seed=0)[1], first)


def test_samples_are_the_rows_of_the_process():
    data = numbered(30)
    run = SimpleNamespace(args=SimpleNamespace(batch=8, seed=2), data_shard=(1, 4), device="cpu")
    teacher = SimpleNamespace(encode_images=lambda images: -images.float(), encode=torch.neg)
    x, cond = data.samples(run, teacher, 5)
    images, labels = data.batch(5, 8, 2, 1, 4)
    assert torch.equal(x, -images.float())
    assert torch.equal(cond, -labels)


# ---- folders of images ---------------------------------------------------------------------------


def picture(path, size=(20, 20), color=200, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


@pytest.fixture
def folder(tmp_path):
    """Classes a, b, c of two grey images each, of grey levels 10, 30, 50."""
    for name, color in dict(b=30, a=10, c=50).items():
        for i in range(2):
            picture(tmp_path / "set" / name / f"{i}.png", color=color)
    return tmp_path / "set"


def test_class_subfolders(folder):
    lines = []
    data = load_folder(folder, 1, 8, lines.append)
    assert data.names == ["a", "b", "c"]  # sorted by name
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.images.shape == (6, 1, 8, 8)
    assert data.images.dtype == torch.uint8
    assert data.images[:, 0, 4, 4].tolist() == [10, 10, 30, 30, 50, 50]
    assert "6 images, 3 classes, 0 skipped" in lines[-1]


def test_folder_without_subfolders_is_one_class(folder):
    data = load_folder(folder / "a", 3, 8, quiet)
    assert data.labels.tolist() == [0, 0]
    assert data.images.shape == (2, 3, 8, 8)


def test_other_files_are_ignored(folder):
    (folder / "a" / "notes.txt").write_text("no image")
    (folder / ".cache").mkdir()
    picture(folder / "a" / "deeper" / "x.JPG")
    data = load_folder(folder, 1, 8, quiet)
    assert len(data) == 7
    assert data.names == ["a", "b", "c"]


def bad_png(path):
    """A valid signature and header, then nonsense."""
    picture(path)
    raw = path.read_bytes()
    path.write_bytes(raw[:40] + b"\xff" * 30 + raw[70:])


def truncated_jpeg(path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:600])


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"not an image"),
        lambda path: path.write_bytes(b""),
        bad_png,
        truncated_jpeg,
        lambda path: path.mkdir(),
    ],
    ids=["text", "empty", "bad png", "truncated jpeg", "folder"],
)
def test_corrupt_image_is_named_and_skipped(folder, write):
    write(folder / "b" / "broken.png")
    lines = []
    data = load_folder(folder, 1, 8, lines.append)
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert any("broken.png" in line and "skipped" in line for line in lines)
    assert "1 skipped" in lines[-1]


def test_decompression_bombs_are_refused(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    picture(folder / "a" / "warned.png", (40, 40))  # pillow only warns up to twice its limit
    picture(folder / "a" / "refused.png", (60, 60))
    lines = []
    assert len(load_folder(folder, 1, 8, lines.append)) == 6
    assert sum("over 1,000 pixels, the limit" in line for line in lines) == 2
    assert "2 skipped" in lines[-1]


def test_links_inside_the_folder_are_read(folder, tmp_path):
    (folder / "a" / "z.png").symlink_to(folder / "b" / "0.png")
    assert len(load_folder(folder, 1, 8, quiet)) == 7


def test_links_to_folders_below_a_class_are_not_followed(folder, tmp_path):
    picture(tmp_path / "outside" / "x.png")
    (folder / "a" / "deep").symlink_to(tmp_path / "outside")
    lines = []
    assert len(load_folder(folder, 1, 8, lines.append)) == 6
    assert "links to folders left out: 1" in lines[-1]


def test_links_to_other_folders_are_counted(folder, tmp_path):
    """A link to an image, to a class folder, and one that leads nowhere."""
    picture(tmp_path / "outside" / "x.png", color=70)
    (folder / "a" / "z.png").symlink_to(tmp_path / "outside" / "x.png")
    (folder / "a" / "loop.png").symlink_to(folder / "a" / "loop.png")
    (folder / "d").symlink_to(tmp_path / "outside")
    lines = []
    data = load_folder(folder, 1, 8, lines.append)
    assert data.names == ["a", "b", "c", "d"]
    assert data.images[:, 0, 4, 4].tolist() == [10, 10, 70, 30, 30, 50, 50, 70]
    assert "loop.png: not readable as an image (not a file)" in lines[1]
    assert "1 skipped" in lines[-1]
    assert "links to other folders: 2, class folders that are links: 1" in lines[-1]


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert len(load_folder(tmp_path / "link", 1, 8, quiet)) == 6


def test_no_readable_image(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="found none readable .0 skipped."):
        load_folder(tmp_path, 1, 8)
    (tmp_path / "a" / "x.png").write_text("no")
    with pytest.raises(UserError, match="found none readable .1 skipped."):
        load_folder(tmp_path, 1, 8, quiet)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="expected a folder of images, found nothing"):
        load_folder(tmp_path / "none", 1, 8)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="expected a folder of images, found a file"):
        load_folder(tmp_path / "file", 1, 8)


def teacher_of(classes, names=()):
    """A teacher of grey images 8 x 8, which knows these names of its classes."""
    class_names = lambda: [[name] for name in names]
    return SimpleNamespace(
        shape=(1, 8, 8), classes=classes, vae=None, adapter="dit", class_names=class_names
    )


def test_too_many_classes(folder):
    teacher = teacher_of(2)
    with pytest.raises(UserError, match="at most 2 class subfolders for this teacher, found 3"):
        load_images(str(folder), teacher, quiet)


# ---- images of a teacher -------------------------------------------------------------------------


def test_images_of_the_toy():
    data = load_images(None, load_teacher("toy"))
    assert data.images.shape == (20000, 2)
    assert data.labels.bincount().tolist() == [2500] * 8
    assert torch.equal(data.images, load_images(None, load_teacher("toy")).images)


IMAGES = np.zeros((4, 8, 8), np.uint8)
LABELS = np.array([0, 1, 1, 0], np.uint8)


def npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def test_npz(tmp_path):
    data = load_npz(npz(tmp_path / "x.npz", images=IMAGES, labels=LABELS))
    assert data.images.shape == (4, 1, 8, 8)
    assert data.labels.tolist() == [0, 1, 1, 0]
    assert data.labels.dtype == torch.int64
    assert data.names == ["0", "1"]


def test_npz_in_colour(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 8, 6, 3), dtype=np.uint8)
    data = load_npz(npz(tmp_path / "x.npz", images=pixels, labels=LABELS))
    assert torch.equal(data.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    "arrays",
    [
        dict(images=IMAGES),
        dict(images=IMAGES, labels=np.zeros(3, np.uint8)),
        dict(images=np.zeros((4, 8, 8)), labels=LABELS),
        dict(images=IMAGES, labels=np.array([0, 1, -1, 0])),
        dict(images=IMAGES, labels=np.zeros(4)),
        dict(images=IMAGES, labels=np.array(list("abcd"))),
        dict(images=IMAGES[:0], labels=LABELS[:0]),
        dict(images=IMAGES, labels=np.array([0, 1, None, 2])),
    ],
    ids=["missing", "length", "dtype", "negative", "float", "text", "empty", "pickled"],
)
def test_bad_npz(tmp_path, arrays):
    with pytest.raises(UserError, match="x.npz: expected"):
        load_npz(npz(tmp_path / "x.npz", **arrays))


@pytest.mark.parametrize("classes, dtype", [(256, np.uint8), (300, np.uint16), (300, np.int64)])
def test_labels_of_many_classes(classes, dtype, tmp_path):
    path = npz(tmp_path / "x.npz", images=IMAGES, labels=np.array([0, classes - 1, 7, 0], dtype))
    assert load_npz(path, classes).labels.tolist() == [0, classes - 1, 7, 0]


def test_labels_that_have_wrapped(tmp_path):
    """299 is 43 in 8 bits."""
    npz(tmp_path / "x.npz", images=IMAGES, labels=np.array([0, 43, 7, 0], np.uint8))
    teacher = SimpleNamespace(
        adapter="dit",
        image_shape=(1, 8, 8),
        classes=300,
        folder=tmp_path,
        evaluation=dict(images="x.npz"),
    )
    with pytest.raises(UserError, match="labels that can count 300 classes, found uint8"):
        load_images(None, teacher)


def test_damaged_npz(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
    path = npz(tmp_path / "x.npz", images=noise, labels=np.zeros(40, np.uint8))
    raw = path.read_bytes()
    for damaged in (b"", b"no", raw[:1000], raw[:500] + bytes(60) + raw[560:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="x.npz: expected an .npz"):
            load_npz(path)


def test_npy_is_not_npz(tmp_path):
    with open(tmp_path / "x.npz", "wb") as f:
        np.save(f, IMAGES)
    with pytest.raises(UserError, match="x.npz: expected an .npz"):
        load_npz(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "changes, error",
    [
        ({}, None),
        (dict(classes=1), "x.npz: expected images"),
        (dict(image_shape=(3, 8, 8)), "x.npz: expected images"),
        (dict(evaluation={}), "ships no images; give a folder with one subfolder per class"),
        (dict(evaluation={}, prompts=["a"]), "ships no images; give a folder of images with capt"),
    ],
)
def test_images_of_a_teacher_must_fit_it(tmp_path, changes, error):
    npz(tmp_path / "x.npz", images=IMAGES, labels=LABELS)
    facts = dict(
        adapter="dit",
        image_shape=(1, 8, 8),
        classes=2,
        blank=False,
        prompts=None,
        folder=tmp_path,
        evaluation=dict(images="x.npz"),
    )
    teacher = SimpleNamespace(**(facts | changes))
    if error is None:
        assert len(load_images(None, teacher)) == 4
        return
    with pytest.raises(UserError, match=error):
        load_images(None, teacher)
