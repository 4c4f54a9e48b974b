"""Own images to a teacher folder to a student, by the commands of README at a tiny size."""

import numpy as np
from PIL import Image

from common.files import read_json


def test_a_folder_of_images_becomes_a_teacher_and_a_student(scripts, tmp_path):
    rng = np.random.default_rng(0)
    for name, shade in dict(dark=60, light=190).items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(40):
            Image.fromarray(
                (rng.normal(shade, 20, (10, 12, 3))).clip(0, 255).astype(np.uint8)
            ).save(tmp_path / "photos" / name / f"{i}.png")
    driver = tmp_path / "driver.py"
    driver.write_text(
        "from common import pretrain\nfrom common.run import launch\nlaunch(pretrain.main)\n"
    )
    teacher = tmp_path / "teacher"
    scripts.run(
        driver,
        "--data",
        tmp_path / "photos",
        "--out",
        teacher,
        "--size",
        8,
        "--channels",
        3,
        "--patch",
        4,
        "--width",
        16,
        "--depth",
        1,
        "--heads",
        2,
        "--iters",
        30,
        "--batch",
        8,
        "--epochs",
        8,
    )
    info = read_json(teacher / "teacher.json")
    assert (
        info["evaluation"]["names"] == ["dark", "light"]
        and info["evaluation"]["held_out_accuracy"] == 1.0
        and (teacher / "samples.png").exists()
    )
    assert info["model"]["shape"] == [3, 8, 8] and info["model"]["classes"] == 2
    scripts.run(
        "dmd2.py",
        "--teacher",
        teacher,
        "--smoke",
        "--gan",
        "--nfe",
        2,
        "--batch",
        8,
        "--cfg",
        1.5,
        "--out",
        tmp_path / "run",
    )
    assert read_json(tmp_path / "run" / "metrics.json")["fd"] > 0
    # trained on with a dense time embedding and QK norm, and the student of that
    adapted, data = (
        tmp_path / "adapted",
        [
            "--data",
            tmp_path / "photos",
            "--size",
            8,
            "--channels",
            3,
            "--patch",
            4,
            "--keep-classifier",
            teacher,
        ],
    )
    scripts.run(
        driver,
        *data,
        "--start",
        teacher,
        "--qk-norm",
        "--iters",
        3,
        "--batch",
        8,
        "--lr",
        2e-5,
        "--out",
        adapted,
    )
    assert read_json(adapted / "teacher.json")["model"]["adapted"] == ["dense", "qk_norm"]
    scripts.run(
        "sana_sprint.py",
        "--teacher",
        adapted,
        "--smoke",
        "--batch",
        8,
        "--out",
        tmp_path / "sprint",
    )
    info = read_json(tmp_path / "sprint" / "student" / "distill.json")
    assert (
        read_json(tmp_path / "sprint" / "metrics.json")["fd"] > 0
        and info["model"]["adapted"] == ["dense", "qk_norm"]
        and info["sampler"]["cfg"] == 4.5
    )
    assert (
        "--start mnist: expected"
        in scripts.run(
            driver, *data, "--start", "mnist", "--iters", 3, "--out", tmp_path / "no", code=2
        ).err
    )
    assert "expected mnist, toy" in scripts.run(driver, "--data", tmp_path / "nothing", code=2).err
