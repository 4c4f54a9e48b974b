"""recipes/pretrain.py: own images become a teacher, and the teacher's students are measured."""

import numpy as np
import pytest
from PIL import Image

from common.files import read_json

PRETRAIN = "recipes/pretrain.py"
IMAGES = ["--size", 8, "--channels", 3, "--patch", 4]
TINY = ["--width", 16, "--depth", 1, "--heads", 2, "--iters", 30, "--batch", 8, "--epochs", 8]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folder with two classes of 40 images, which a classifier separates by their brightness."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, brightness in dict(dark=60, light=190).items():
        (folder / name).mkdir()
        for i in range(40):
            pixels = rng.normal(brightness, 20, (10, 12, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def teacher(photos, scripts, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    scripts.run(PRETRAIN, "--data", photos, "--out", out, *IMAGES, *TINY)
    return out


@pytest.fixture(scope="module")
def continued(photos, teacher):
    """Flags that train on from a teacher, given as the last one."""
    return ["--data", photos, *IMAGES, "--keep-classifier", teacher, "--iters", 3, "--start"]


def test_teacher_json_has_the_classes_and_the_classifiers_accuracy(teacher):
    evaluation = read_json(teacher / "teacher.json")["evaluation"]
    assert evaluation["names"] == ["dark", "light"]
    assert evaluation["held_out_accuracy"] == 1.0


def test_teacher_json_has_the_shape_of_the_images(teacher):
    model = read_json(teacher / "teacher.json")["model"]
    assert model["shape"] == [3, 8, 8]
    assert model["classes"] == 2


def test_a_sample_picture_is_written(teacher):
    assert (teacher / "samples.png").exists()


def test_a_student_of_the_teacher(teacher, scripts, tmp_path):
    flags = ["--smoke", "--gan", "--nfe", 2, "--batch", 8, "--cfg", 1.5]
    scripts.run("dmd2.py", "--teacher", teacher, *flags, "--out", tmp_path)
    assert read_json(tmp_path / "metrics.json")["fd"] > 0


def test_an_adapted_teacher_and_its_student(teacher, continued, scripts, tmp_path):
    """--start --qk-norm: a dense time embedding and QK norm, which sana_sprint.py needs."""
    adapted = tmp_path / "adapted"
    flags = ["--qk-norm", "--batch", 8, "--lr", 2e-5]
    scripts.run(PRETRAIN, *continued, teacher, *flags, "--out", adapted)
    assert read_json(adapted / "teacher.json")["model"]["adapted"] == ["dense", "qk_norm"]

    run = tmp_path / "run"
    scripts.run("sana_sprint.py", "--teacher", adapted, "--smoke", "--batch", 8, "--out", run)
    student = read_json(run / "student" / "distill.json")
    assert student["model"]["adapted"] == ["dense", "qk_norm"]
    assert student["sampler"]["cfg"] == 4.5
    assert read_json(run / "metrics.json")["fd"] > 0


def test_a_start_for_other_images_is_refused(continued, scripts, tmp_path):
    p = scripts.run(PRETRAIN, *continued, "mnist", "--out", tmp_path, code=2)
    assert "--start mnist: expected" in p.err


def test_a_missing_folder_is_refused(scripts, tmp_path):
    p = scripts.run(PRETRAIN, "--data", tmp_path / "nothing", code=2)
    assert "expected mnist, toy" in p.err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--size", 8, "--patch", 3], "--size 8: expected a multiple of 4 and of --patch 3"),
        (["--width", 20, "--heads", 3], "--width 20: expected a multiple of --heads 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(flags, message, scripts):
    assert message in scripts.run(PRETRAIN, "--data", "mnist", *flags, code=2).err
