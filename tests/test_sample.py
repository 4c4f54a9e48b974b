"""sample.py: images of students and teachers for prompts and labels."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_readme import CODE_BLOCKS

import dmd2
import sample as sample_script
from common.errors import UserError
from common.files import ROOT
from common.rng import PerImageNoise
from common.sampling import teacher_sample
from common.teachers import cache
from common.teachers.load import load_pipeline, load_teacher
from common.teachers.students import read_student
from controls.controlled import make_controlled
from controls.maps import Control
from sample import POINTS, file_names, load

STEPS = dict(steps="999,499")


def pixels(images):
    return np.stack([np.asarray(image, dtype=int) for image in images])


def as_arrays(decoded):
    """uint8 [n, C, H, W] as `pixels` has images."""
    array = decoded.permute(0, 2, 3, 1).int().numpy()
    return array[..., 0] if array.shape[-1] == 1 else array


def noise_of(seeds, shape):
    noise = PerImageNoise(0, seeds)
    return lambda: noise(*shape)


def load_prompts(folder, prompts, negative=None):
    options = dict(prompts=prompts, negative=negative)
    return load_pipeline(str(folder), **options, say=lambda line: None)


def close(a, b):
    """Equal up to the rounding of a grey level."""
    assert a.shape == b.shape
    assert abs(a - b).max() <= 1
    assert a.std() > 5  # no empty pictures


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Folder of a run on mnist: its student is the teacher with two steps."""
    run = tmp_path_factory.mktemp("runs") / "dmd2-mnist"
    info = dict(method="dmd2", teacher="mnist", nfe=2, cfg=1.0, sampler=STEPS)
    load_teacher("mnist").copy().save(run / "student", info)
    return run


@pytest.fixture(scope="module")
def pictures(folders, tmp_path_factory):
    """The same on a tiny pipeline of random weights, which has no teacher.json; and its folder."""
    teacher = folders("sd15")
    run = tmp_path_factory.mktemp("runs") / "dmd2-sd15"
    info = dict(method="dmd2", teacher=str(teacher), nfe=2, cfg=3.0, sampler=STEPS)
    load_prompts(teacher, [""]).copy().save(run / "student", info)
    return run, teacher


@pytest.fixture(autouse=True)
def cached(folders, monkeypatch):
    """Prompts are cached in a folder of the tests, not in out/."""
    monkeypatch.setattr(cache, "ROOT", folders.home)


def command(*words, cwd, path=(), code=0):
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(map(str, [ROOT, *path])))
    words = [sys.executable, ROOT / "sample.py", *words]
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


# ---- teachers of labels --------------------------------------------------------------------------


def test_a_student_of_labels(digits):
    """The images of the method's own sampler."""
    images = load(digits)([3, "7"], n=2, seed=5)
    teacher = load_teacher("mnist")
    noise = noise_of([5, 6, 5, 6], teacher.shape)
    cond = teacher.encode([3, 3, 7, 7])
    expected = dmd2.sample(teacher, noise(), cond, 2, noise, **STEPS)
    close(pixels(images), as_arrays(teacher.decode(expected)))


def test_an_image_depends_on_its_seed_only(digits):
    sampler = load(digits)
    four = pixels(sampler([1, 2], n=4, seed=3, batch=8))
    close(pixels(sampler([2], n=1, seed=5)), four[6:7])
    close(pixels(sampler([1, 2], n=4, seed=3, batch=3)), four)
    assert abs(four[0] - four[1]).max() > 50


def test_other_steps(digits):
    """A run's own list of steps belongs to its number of steps."""
    images = load(digits, nfe=1)([3], seed=1)
    teacher = load_teacher("mnist")
    noise = noise_of([1], teacher.shape)
    expected = dmd2.sample(teacher, noise(), teacher.encode([3]), 1, noise)
    close(pixels(images), as_arrays(teacher.decode(expected)))


def test_names_of_classes(digits):
    sampler = load(digits)
    names = [["cat", "tomcat"], *([digit] for digit in "123456789")]
    sampler.teacher.class_names = lambda: names
    assert sampler.find(["tomcat", "2", 0]) == [(0, "cat"), (2, "2"), (0, "cat")]
    assert [caption for _, caption in sampler.find()] == ["cat", *"123456789"]
    with pytest.raises(UserError, match="--labels cats: .* from 0 to 9, .*did you mean cat"):
        sampler.find(["cats"])
    for word in (10, -1, "x", 1.5):
        with pytest.raises(UserError, match="expected a number from 0 to 9"):
            sampler.find([word])


def test_a_teacher_itself():
    images = load(teacher="mnist", nfe=4, cfg=2.0)([3, 8], seed=2)
    teacher = load_teacher("mnist")
    noise = noise_of([2, 2], teacher.shape)
    expected = teacher_sample(teacher, noise(), teacher.encode([3, 8]), 4, 2.0)
    close(pixels(images), as_arrays(teacher.decode(expected)))


# ---- teachers of prompts -------------------------------------------------------------------------


def test_a_student_of_prompts(pictures):
    """Without teacher.json; prompts that were not given to `load` are embedded when they come."""
    run, folder = pictures
    sampler = load(run, prompts=["a dog"])
    images = sampler(["a dog", "a red heart", "a dog"], seed=4)
    teacher = load_prompts(folder, ["a dog", "a red heart"])
    noise = noise_of([4, 4, 4], teacher.shape)
    cond = teacher.encode(torch.tensor([0, 1, 0]))
    expected = dmd2.sample(teacher, noise(), cond, 2, noise, **STEPS)
    close(pixels(images), as_arrays(teacher.decode(expected)))
    assert abs(pixels(images)[0] - pixels(images)[1]).max() > 1
    # more prompts, in any order
    more = pixels(sampler(["pizza", "a red heart"], seed=4))
    close(more[1:], pixels(images)[1:2])


@pytest.mark.parametrize("negative", [None, "blurred"])
def test_a_teacher_of_prompts_with_guidance(negative, pictures):
    _, folder = pictures
    images = load(teacher=str(folder), nfe=3, cfg=4.0, negative_prompt=negative)(["a dog"])
    teacher = load_prompts(folder, ["a dog"], negative)
    noise = noise_of([0], teacher.shape)
    expected = teacher_sample(teacher, noise(), teacher.encode(torch.tensor([0])), 3, 4.0)
    close(pixels(images), as_arrays(teacher.decode(expected)))


def test_students_that_share_the_prompts(pictures, folders, tmp_path):
    """msd.py: which student makes a prompt is known for the prompts of the training only."""
    from common.routed import ByLabel

    _, folder = pictures
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\npizza\n")
    teacher = load_prompts(folder, ["a dog", "pizza"])
    students = ByLabel([teacher.copy(), teacher.copy()], [0, 1])
    flags = dict(prompts=str(file))
    info = dict(method="msd", teacher=str(folder), nfe=1, cfg=1.0, sampler={}, flags=flags)
    students.save(tmp_path / "run" / "student", info)
    sampler = load(tmp_path / "run", prompts=["pizza"])
    assert sampler.find(["pizza", "a dog"]) == [(1, "pizza"), (0, "a dog")]
    assert len(sampler(["pizza", "a dog"])) == 2
    with pytest.raises(UserError, match="'a cat': expected a prompt of the training"):
        sampler(["a cat"])


def test_lines_of_the_readme(tmp_path, monkeypatch):
    """The block with `from sample import load`, on a student that is the embedded teacher."""
    (block,) = [block for block in CODE_BLOCKS if "from sample import load" in block]
    info = dict(method="dmd2", teacher="emoji", nfe=1, cfg=3.5, sampler={})
    teacher = load_prompts(ROOT / "assets" / "emoji", [""])
    teacher.copy().save(tmp_path / "out" / "dmd2-emoji" / "student", info)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    (saved,) = tmp_path.glob("*.png")
    assert np.array_equal(np.asarray(Image.open(saved)), np.asarray(names["images"][0]))
    assert len(names["images"]) == 2


# ---- other methods -------------------------------------------------------------------------------


def test_a_copied_script(tmp_path):
    """mine.py's own sampler: it puts every point at (7, 7), outside of the picture."""
    last = "    return student(x_in, schedule.alpha(times[-1]), schedule.sigma(times[-1]), cond)\n"
    code = (ROOT / "dmd2.py").read_text()
    assert code.count(last) == 1
    (tmp_path / "mine.py").write_text(code.replace(last, "    return torch.full_like(z, 7.0)\n"))
    info = dict(method="mine", teacher="toy", nfe=1, cfg=1.0, sampler={})
    load_teacher("toy").copy().save(tmp_path / "run" / "student", info)
    command("run", "--out", "mine.png", cwd=tmp_path, path=[tmp_path])
    assert (np.asarray(Image.open(tmp_path / "mine.png").convert("L"))[20:100, 20:100] == 255).all()
    info["method"] = "dmd2"
    load_teacher("toy").copy().save(tmp_path / "run" / "student", info)
    command("run", "--out", "dmd2.png", cwd=tmp_path)
    assert (np.asarray(Image.open(tmp_path / "dmd2.png").convert("L"))[20:100, 20:100] < 255).any()


@pytest.fixture(scope="module")
def controlled(tmp_path_factory):
    """Folder of a run of nct.py on mnist with edges, whose branch has random weights."""
    run = tmp_path_factory.mktemp("runs") / "nct-mnist-edges"
    teacher = load_teacher("mnist")
    info = dict(method="dmd2", teacher="mnist", nfe=1, cfg=1.0, sampler=dict(steps="999"))
    student = make_controlled(teacher, info, dmd2.sample, Control("edges", teacher), blocks=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in student.branch.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    student.save(run / "student", dict(info, method="nct", sampler={}))
    return run


def test_a_control_image(controlled, tmp_path):
    Image.new("RGB", (40, 28), "black").save(tmp_path / "black.png")
    square = Image.new("L", (28, 28), 0)
    square.paste(255, (8, 8, 20, 20))
    square.save(tmp_path / "square.png")
    one = pixels(load(controlled, control=tmp_path / "square.png")([3], n=2, batch=1))
    two = pixels(load(controlled, control=tmp_path / "black.png")([3], n=2))
    assert abs(one - two).max() > 5

    sampler = load(controlled, control=tmp_path / "square.png")
    model = sampler.model
    image = torch.from_numpy(np.asarray(square).copy())[None, None]
    c = model.control(model.encode_images(image), torch.full((1, 4), 0.5))
    noise = noise_of([0, 1], model.shape)
    cond = sampler.teacher.encode(torch.tensor([3, 3]))
    with torch.no_grad():
        expected = model(noise(), c.expand(2, -1, -1, -1), cond)
    close(one, as_arrays(model.decode(expected)))


def test_a_control_image_is_needed(controlled, digits, tmp_path):
    with pytest.raises(UserError, match=r"--control FILE: expected an image .*\(edges\)"):
        load(controlled)
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(UserError, match="--control .*x.png: expected an image, found"):
        load(controlled, control=tmp_path / "x.png")
    with pytest.raises(UserError, match="--control a.png: expected a student of nct.py"):
        load(digits, control="a.png")


# ---- checkpoints, the command line ---------------------------------------------------------------


def test_of_a_checkpoint(scripts, tmp_path):
    """A stopped run: refused without --it, with what to do."""
    flags = ["--teacher", "toy", "--batch", 32, "--eval-n", 0, "--sample-every", 0]
    run = tmp_path / "dmd2-toy"
    scripts.run("dmd2.py", *flags, "--iters", 4, "--save-every", 2, "--out", run)
    whole = pixels(load(run)())
    assert whole.shape[0] == 1  # one picture of all points
    shutil.rmtree(run / "student")
    message = "the run has not ended yet .*--it 4, or python -m tools.export .*/student-4"
    with pytest.raises(UserError, match=message):
        load(run)
    assert np.array_equal(pixels(load(run, it=4)()), whole)
    sampler = load(run, it="2")
    assert sampler.name == "dmd2-toy it 2"
    home, info = read_student(sampler.model.folder)
    assert info["training"]["iterations"] == 2
    with pytest.raises(UserError, match="--it 3: expected a checkpoint of .*: 2, 4 or best"):
        load(run, it=3)
    p = scripts.run("eval.py", run, "--it", 4, "--n", 100, "--out", tmp_path / "eval.jsonl")
    assert '"name": "dmd2-toy it 4"' in p.out


def test_the_command_line(digits, tmp_path):
    flags = ["--labels", 3, 7, "--n", 2, "--seed", 5, "--nfe", 1]
    done = command(digits, *flags, "--dir", "many", "--out", "grid.png", cwd=tmp_path)
    names = sorted(path.name for path in (tmp_path / "many").iterdir())
    assert names == ["3-seed5.png", "3-seed6.png", "7-seed5.png", "7-seed6.png"]
    images = load(digits, nfe=1)(["3", "7"], n=2, seed=5)
    close(pixels([Image.open(tmp_path / "many" / name) for name in names]), pixels(images))
    # rows of two columns, each picture enlarged four times, with room for its caption
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape[1] == 2 * (4 * 28 + 12) + 12
    first = np.asarray(Image.open(tmp_path / "many" / "3-seed5.png"))
    assert np.array_equal(grid[12 : 12 + 112 : 4, 12 : 12 + 112 : 4, 0], first)
    assert (grid[12 + 112 : 12 + 112 + 16, 12 : 12 + 112] < 100).any()  # the caption
    assert "4 images: many" in done.stdout


def test_libraries_are_silent(tmp_path):
    """No line of transformers about torchvision, nor a loading bar: nothing but our own lines."""
    flags = ["--teacher", "emoji", "red heart", "--nfe", 1, "--cfg", 1]
    done = command(*flags, "--cache-prompts", tmp_path / "prompts", cwd=tmp_path)
    assert done.stderr == ""
    assert "sample.png" in done.stdout


def test_file_names():
    captions = ["A red Heart!", "a red heart", "a red heart", "../../x", "", "日本", "a" * 99]
    names = file_names(captions, [0, 0, 1, 0, 0, 0, 0])
    assert names[:3] == [
        "a-red-heart-seed0.png",
        "a-red-heart-seed0_2.png",
        "a-red-heart-seed1.png",
    ]
    assert names[3:6] == ["x-seed0.png", "image-seed0.png", "日本-seed0.png"]
    assert len(names[6]) < 80


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "expected the folder of a run or --teacher NAME"),
        ("nowhere", "nowhere: expected the folder of a run, found nothing"),
        ("--teacher mnist heart", "prompts: expected --labels, which --teacher mnist takes"),
        ("--teacher emoji heart", "--cfg: expected the guidance scale of --teacher emoji"),
        ("--teacher emoji --cfg 2", "expected prompts"),
        ("--teacher mnistt", "did you mean mnist"),
        ("RUN --labels 3 --n 0", "--n: expected at least 1, found 0"),
        ("RUN --batch 0", "--batch: expected at least 1, found 0"),
        ("RUN --seed -1", "--seed: expected a number >= 0, found -1"),
        ("RUN --cfg 2", "--cfg: expected a teacher"),
        ("RUN --negative-prompt x", "--negative-prompt: expected a teacher"),
        (
            "--teacher emoji heart --cfg 1 --negative-prompt x",
            "--negative-prompt: expected --cfg other than 1",
        ),
        (
            "--teacher mnist --cfg 2 --negative-prompt x",
            "--negative-prompt: expected a teacher that is a pipeline of diffusers, found mnist",
        ),
        ("RUN --labels 10", "--labels 10: expected a number from 0 to 9"),
        ("RUN heart --labels 1", "--labels and prompts: expected one of them"),
        ("RUN --nfe 1 --out nowhere/file/x.png --labels x", "--labels x"),
        ("RUN --out file/x.png", "--out file: expected a folder that can be written"),
        ("RUN --out .", "--out .: expected the name of a file, found a folder"),
        ("RUN --dir file", "--dir file: expected a folder that can be written"),
    ],
)
def test_mistakes(flags, message, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    words = [str(digits) if word == "RUN" else word for word in flags.split()]
    with pytest.raises(UserError, match=message):
        sample_script.main(words)
    assert not list(tmp_path.glob("*.png"))


def test_points():
    (picture,) = load(teacher="toy-cond", nfe=4)([0, 4])
    ink = (255 - np.asarray(picture, dtype=float)) > 60
    rows, columns = np.nonzero(ink)
    assert POINTS >= 1000
    assert columns.min() < 40  # mode 4 is on the left, mode 0 on the right
    assert columns.max() > 88
    assert abs(rows - 64).max() < 24
