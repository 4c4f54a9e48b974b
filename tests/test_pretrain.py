"""recipes/pretrain.py: own images become a teacher, and the teacher's students are measured."""

import re
import signal

import numpy as np
import pytest
import torch
from helpers.runs import log, wait_for
from PIL import Image

from common.checkpoint import list_checkpoints, write_checkpoint
from common.errors import UserError
from common.files import ROOT, WEIGHTS, read_json
from common.teachers.load import load_teacher
from data.images import Images, load_images, load_npz
from recipes import pretrain

PRETRAIN = "recipes/pretrain.py"
TINY = ["--size", 8, "--width", 48, "--depth", 1, "--heads", 2, "--batch", 8]
SHORT = [*TINY, "--iters", 30, "--epochs", 20, "--eval-n", 8]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folder with two classes of 40 images, which a classifier separates by their brightness."""
    folder = tmp_path_factory.mktemp("data") / "my.photos"
    rng = np.random.default_rng(0)
    for name, brightness in dict(dark=60, light=190).items():
        (folder / name).mkdir(parents=True)
        for i in range(40):
            pixels = rng.normal(brightness, 20, (10, 12, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def training(photos, scripts, tmp_path_factory):
    """The finished process, and the folder that it made."""
    out = tmp_path_factory.mktemp("teacher") / "new"
    return scripts.run(PRETRAIN, "--data", photos, "--out", out, *SHORT), out


@pytest.fixture(scope="module")
def teacher(training):
    return training[1]


@pytest.fixture(scope="module")
def continued(photos, teacher):
    """Flags that train on from a teacher, given as the last one."""
    flags = ["--data", photos, "--size", 8, "--keep-classifier", teacher, "--iters", 3]
    return [*flags, "--eval-n", 8, "--start"]


# ---- the folder ----------------------------------------------------------------------------------


def test_teacher_json_has_the_classes_and_the_classifiers_accuracy(teacher):
    evaluation = read_json(teacher / "teacher.json")["evaluation"]
    assert evaluation["names"] == ["dark", "light"]
    assert evaluation["held_out_accuracy"] == 1.0


def test_teacher_json_has_the_shape_of_the_images(teacher):
    """Colours are kept without --channels."""
    model = read_json(teacher / "teacher.json")["model"]
    assert model["shape"] == [3, 8, 8]
    assert model["classes"] == 2


def test_teacher_json_has_the_teachers_own_fd(teacher):
    row = read_json(teacher / "teacher.json")["evaluation"]["measured"][0]
    assert row["fd"] > 0
    assert row["protocol"] == "fd my.photos-cnn uint8 n=8 seed=0 ref=80"


def test_what_is_printed(training):
    text = training[0].out
    for expected in (
        "RGB images of 8 x 8 pixels",
        r"\d s an iteration: about \d+ s to go",
        r"two halves of the images: fd [\d.]+, what no model gets below",
        r"teacher nfe=16: fd [\d.]+ ",
    ):
        assert re.search(expected, text), expected


def test_a_complete_teacher_has_a_picture_and_no_checkpoints(teacher):
    files = {path.name for path in teacher.iterdir()}
    metrics = {"classifier.safetensors", "stats.npz", "images.npz"}
    assert files == {"config.json", WEIGHTS, "teacher.json", "samples.png", "log.jsonl", *metrics}


def test_a_student_of_the_teacher(teacher, scripts, tmp_path):
    flags = ["--smoke", "--gan", "--nfe", 2, "--batch", 8, "--cfg", 1.5]
    p = scripts.run("dmd2.py", "--teacher", teacher, *flags, "--out", tmp_path)
    assert read_json(tmp_path / "metrics.json")["fd"] > 0
    assert "teacher w=1.5 nfe=16: fd" in p.out  # the scale for the student's fd
    assert "n differs, and fd falls as n grows" in p.out
    assert f"python eval.py {tmp_path} --n 8" in p.out


def test_no_remark_where_teacher_and_student_have_the_same_n(teacher, scripts, tmp_path):
    flags = ["--iters", 1, "--warmup", 0, "--batch", 8, "--eval-n", 8]
    p = scripts.run("dmd2.py", "--teacher", teacher, *flags, "--out", tmp_path)
    assert "teacher w=1.5 nfe=16: fd" in p.out
    assert "n differs" not in p.out


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
    assert student["sampler"]["cfg"] == 1.5  # of the preset for own teachers
    assert read_json(run / "metrics.json")["fd"] > 0


# ---- README --------------------------------------------------------------------------------------


def readme_commands():
    """The commands of README's section on own images: words after `python`."""
    section = (ROOT / "README.md").read_text().split("\n## Your own images")[1]
    block = section.split("```\n")[1]
    return [line.split("#")[0].split()[1:] for line in block.splitlines()]


def test_readmes_commands(photos, scripts, tmp_path):
    """As written, with shorter flags after them."""
    first, second = readme_commands()
    assert first[:2] == ["-m", "recipes.pretrain"]
    places = {"photos": str(photos), "out/teacher-photos": str(tmp_path / "teacher")}
    first = [places.get(word, word) for word in first[2:]]
    second = [places.get(word, word) for word in second]
    size = first[first.index("--size") + 1]
    short = ["--width", 48, "--heads", 2, "--depth", 1, "--iters", 2, "--epochs", 2, "--eval-n", 8]
    scripts.run(PRETRAIN, *first, "--out", tmp_path / "teacher", *short)
    shape = read_json(tmp_path / "teacher" / "teacher.json")["model"]["shape"]
    assert shape == [3, int(size), int(size)]

    short = ["--out", tmp_path / "run", "--iters", 2, "--warmup", 0, "--eval-n", 8]
    scripts.run(*second, *short)
    assert (tmp_path / "run" / "student" / WEIGHTS).exists()


# ---- images --------------------------------------------------------------------------------------


def write_grey(home, mode):
    """Twelve grey PNGs, stored in this mode of pillow."""
    rng = np.random.default_rng(1)
    for i in range(12):
        pixels = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
        (home / str(i % 2)).mkdir(parents=True, exist_ok=True)
        pixels.convert(mode).save(home / str(i % 2) / f"{i}.png")
    return home


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_images_have_one_channel(mode, tmp_path, capsys):
    args = pretrain.parse_args(["--data", str(write_grey(tmp_path, mode)), "--size", "8"])
    assert pretrain.load_data(args).images.shape == (12, 1, 8, 8)
    assert "grey images of 8 x 8 pixels" in capsys.readouterr().out


def test_one_coloured_image_makes_all_rgb(tmp_path):
    write_grey(tmp_path, "L")
    Image.new("RGB", (8, 8), (9, 9, 10)).save(tmp_path / "0" / "red.png")
    args = pretrain.parse_args(["--data", str(tmp_path), "--size", "8"])
    assert pretrain.load_data(args).images.shape == (13, 3, 8, 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_by_flag(channels, photos):
    flags = ["--data", str(photos), "--size", "8", "--channels", str(channels)]
    assert pretrain.load_data(pretrain.parse_args(flags)).images.shape == (80, channels, 8, 8)


def test_classes_of_different_size_are_said(photos, capsys):
    labels = torch.tensor([0] * 12 + [1] * 20)
    args = pretrain.parse_args(["--data", str(photos)])
    pretrain.check_images(Images(torch.zeros(32, 3, 8, 8), labels, ["a", "b"]), args)
    assert "classes of 12 to 20 images" in capsys.readouterr().out
    pretrain.check_images(Images(torch.zeros(26, 3, 8, 8), labels[:26], ["a", "b"]), args)
    assert capsys.readouterr().out == ""


def test_300_classes(scripts, tmp_path):
    """A byte would take class 256 for class 0. The brightness of an image tells its class."""
    for k in range(300):
        folder = tmp_path / "data" / f"class {k:03d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), (k % 256, k // 256 * 100, 0)).save(folder / "image.png")
    out = tmp_path / "teacher"
    short = ["--iters", 2, "--epochs", 1, "--eval-n", 8]
    scripts.run(PRETRAIN, "--data", tmp_path / "data", "--out", out, *TINY, *short)
    teacher = load_teacher(str(out))
    assert teacher.classes == 300
    assert teacher.evaluation["names"][299] == "class 299"
    data = load_images(None, teacher)
    assert data.labels.tolist() == list(range(300))
    assert data.images[299, :, 0, 0].tolist() == [43, 100, 0]


def test_labels_of_images_npz(tmp_path):
    """The largest label of int64 comes back."""
    labels = torch.tensor([0, 255, 256, 70_000])
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    pretrain.save_images(Images(images, labels, []), tmp_path / "images.npz")
    found = load_npz(tmp_path / "images.npz")
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.images, images)


# ---- network -------------------------------------------------------------------------------------


def filled_in(photos, channels, *flags):
    """Flags of a run on `channels` channels, with what follows from them."""
    args = pretrain.parse_args(["--data", str(photos), *map(str, flags)])
    images = torch.zeros(1, channels, args.size, args.size)
    pretrain.fill_in_network(Images(images, torch.zeros(1), ["a"]), args)
    return args


@pytest.mark.parametrize(
    "size, channels, patch",
    [(28, 1, 7), (28, 3, 4), (32, 1, 4), (32, 3, 4), (48, 3, 4), (12, 3, 4)],
)
def test_patch_by_size(photos, size, channels, patch):
    assert filled_in(photos, channels, "--size", size).patch == patch


def test_sizes_by_default(photos):
    assert pretrain.parse_args(["--data", str(photos)]).size == 32
    assert pretrain.parse_args(["--data", "mnist", "--out", "none"]).size == 28


def test_mnist_is_not_a_folder_of_that_name(monkeypatch, tmp_path):
    (tmp_path / "mnist").mkdir()
    monkeypatch.chdir(tmp_path)
    args = pretrain.parse_args(["--data", "mnist", "--out", "none"])
    assert (args.size, args.channels, args.epochs) == (28, 1, 30)
    assert pretrain.load_data(args).images.shape[1:] == (1, 28, 28)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--size", 30], "--size 30: expected a multiple of 4, 28 or 32"),
        (["--size", 32, "--patch", 7], "multiple of 4 and of --patch 7, 28 or 56"),
        (["--size", 8, "--patch", 16], "multiple of 4 and of --patch 16, such as 16"),
        # a patch of more numbers than the width of the network (samples keep speckle for ever)
        (
            ["--patch", 8],
            "--patch 8: expected at most --width 160 numbers in a patch, found 8 x 8 x 3 = 192; "
            "use --patch 4 or --width 192 or more",
        ),
        (["--width", 45], "--patch 4: expected at most --width 45 .* use --patch 2 or --width 48"),
        (["--width", 20, "--heads", 3], "--width 20: expected a multiple of --heads 3"),
        (["--iters", 0], "--iters: expected at least 1, found 0"),
        (["--lr", "nan"], "--lr: expected a number > 0, found nan"),
        (["--device", "tpu"], "--device: expected auto, cpu, .* found tpu"),
        (["--qk-norm"], "--qk-norm: only with --start"),
        (["--eval-n", 3], "--eval-n 3: expected 0 or at least 8 samples"),
    ],
)
def test_flags_that_do_not_fit_are_refused(photos, flags, message):
    with pytest.raises(UserError, match=message):
        filled_in(photos, 3, *flags)


def test_a_patch_as_wide_as_the_network_is_accepted(photos):
    assert filled_in(photos, 3, "--patch", 8, "--width", 192, "--heads", 6).patch == 8


# ---- wrong starts --------------------------------------------------------------------------------


def test_wrong_starts_leave_no_folder(photos, scripts, tmp_path):
    few = tmp_path / "few"
    empty = tmp_path / "empty"
    write_grey(few, "L")
    for path in list(few.rglob("*.png"))[9:]:
        path.unlink()
    write_grey(empty, "L")
    (empty / "broken").mkdir()
    (empty / "broken" / "x.png").write_bytes(b"no image")
    (tmp_path / "nothing").mkdir()
    short = ["--out", tmp_path / "out", "--iters", 1, "--epochs", 1, "--eval-n", 0]
    for flags, message in (
        (["--data", tmp_path / "missing"], "expected mnist, toy"),
        (["--data", tmp_path / "nothing"], "expected images"),
        (["--data", few], "expected at least 10 images, found 9"),
        (["--data", empty, "--size", 8], "found none of broken"),
        (["--data", photos, "--patch", 3], "--size 32: expected a multiple of 4 and of --patch 3"),
        (["--data", photos, "--widht", 3], "unrecognized arguments: --widht 3"),
        (["--data", photos, "--resume"], "--resume: no checkpoint in"),
    ):
        p = scripts.run(PRETRAIN, *flags, *short, code=2)
        assert message in p.err
        assert p.err.startswith("pretrain.py: ") and p.err.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_start_for_other_images_is_refused(continued, scripts, tmp_path):
    p = scripts.run(PRETRAIN, *continued, "mnist", "--out", tmp_path / "out", code=2)
    assert "--start mnist: expected" in p.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["assets/mnist", "assets/emoji", "docs"])
def test_a_classifier_of_other_images_is_refused(folder, photos, scripts, tmp_path):
    flags = ["--keep-classifier", ROOT / folder, "--size", 8, "--iters", 1]
    p = scripts.run(PRETRAIN, "--data", photos, *flags, "--out", tmp_path / "out", code=2)
    assert "classifier.safetensors: expected the safetensors of the classifier" in p.err
    assert not (tmp_path / "out").exists()


def test_a_start_in_the_folder_that_is_emptied(photos, teacher, scripts):
    flags = ["--data", photos, "--size", 8, "--out", teacher, "--start", teacher, "--overwrite"]
    p = scripts.run(PRETRAIN, *flags, code=2)
    assert "expected another folder than --out" in p.err
    assert (teacher / "teacher.json").exists()


def test_a_teacher_is_not_overwritten(photos, teacher, scripts):
    before = (teacher / WEIGHTS).read_bytes()
    short = ["--data", photos, *TINY, "--iters", 1, "--epochs", 1]
    for flags, message in (
        ([], "holds a teacher; add --overwrite or another --out"),
        (["--resume"], "the teacher there is complete"),
    ):
        p = scripts.run(PRETRAIN, "--out", teacher, *short, *flags, code=2)
        assert message in p.err
    assert (teacher / WEIGHTS).read_bytes() == before


# ---- interruptions -------------------------------------------------------------------------------

SLOW = """
import time, torch
backward = torch.Tensor.backward
def slow(loss):
    time.sleep(0.05)
    backward(loss)
torch.Tensor.backward = slow
"""
STEPS = ["--iters", 60, "--epochs", 20, "--eval-n", 0, "--save-every", 10]


@pytest.fixture(scope="module")
def stopped(photos, scripts, tmp_path_factory):
    """A run of 60 iterations that SIGTERM stopped after its first checkpoint, and its folder."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    p = scripts.start(PRETRAIN, "--data", photos, "--out", out, *TINY, *STEPS, BEFORE=SLOW)
    wait_for(lambda: list_checkpoints(out), 120)
    p.kill(signal.SIGTERM)
    assert p.wait() == 143, p.err
    return p, out


@pytest.fixture(scope="module")
def resumed(stopped, photos, scripts):
    """The same run: what was refused, what was there, and its folder after `--resume` alone."""
    out = stopped[1]
    again = ["--data", photos, "--out", out, *TINY, *STEPS]
    other = ["--out", out, "--resume", "--lr", 1]
    facts = dict(
        out=out,
        it=int(list_checkpoints(out)[-1].stem[3:]),
        files={path.name for path in out.iterdir()},
        refused=scripts.run(PRETRAIN, *again, code=2).err,
        other_flag=scripts.run(PRETRAIN, *other, code=2).err,
    )
    scripts.run(PRETRAIN, "--out", out, "--resume")
    return facts


def test_a_stopped_run_says_how_to_go_on(stopped):
    p, out = stopped
    expected = rf"stopped by SIGTERM after iteration \d+; go on with --out {out} --resume"
    assert re.search(expected, p.err)


def test_a_stopped_run_has_a_picture_and_is_no_teacher(resumed):
    assert 10 <= resumed["it"] < 60
    assert "samples.png" in resumed["files"]
    assert "teacher.json" not in resumed["files"]


def test_a_stopped_run_is_not_begun_again_by_mistake(resumed):
    assert f"holds a run at iteration {resumed['it']}; add --resume" in resumed["refused"]


def test_a_resume_with_other_flags_is_refused(resumed):
    assert "--lr 1.0: expected 0.001 as in the run of --resume" in resumed["other_flag"]


def test_a_resumed_run_equals_one_that_was_not_stopped(resumed, photos, scripts, tmp_path):
    whole = tmp_path / "whole"
    scripts.run(PRETRAIN, "--data", photos, "--out", whole, *TINY, *STEPS)
    out = resumed["out"]
    for name in (WEIGHTS, "classifier.safetensors", "images.npz", "samples.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert log(out) == log(whole)
    without_time = lambda folder: read_json(folder / "teacher.json") | dict(seconds=0)
    assert without_time(out) == without_time(whole)


def test_a_resume_forgets_what_came_after_the_checkpoint(tmp_path):
    """A kill, unlike a signal, comes after lines of the log, and perhaps amid a checkpoint."""
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "log.jsonl").write_text("first\nsecond\n")
    net = torch.nn.Linear(2, 1)
    saved = dict(teacher={name: value + 1 for name, value in net.state_dict().items()})
    expected = saved["teacher"]["weight"].clone()
    write_checkpoint(tmp_path, 7, dict(it=7, seconds=1.5, log_bytes=6, state=saved))
    (tmp_path / "ckpt" / "it-00000009.pt").write_bytes(b"half of one")
    assert pretrain.resume(tmp_path, dict(teacher=net)) == (7, 1.5)
    assert torch.equal(net.weight, expected)
    assert (tmp_path / "log.jsonl").read_text() == "first\n"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["it-00000007.pt"]


def test_a_loss_that_is_not_finite_ends_the_run(photos, scripts, tmp_path):
    flags = ["--iters", 201, "--epochs", 1, "--lr", 1e30, "--save-every", 0]
    p = scripts.run(PRETRAIN, "--data", photos, "--out", tmp_path / "out", *TINY, *flags, code=1)
    assert "pretrain.py: the loss is not finite at iteration 100: lower --lr\n" in p.err
    assert not (tmp_path / "out" / "teacher.json").exists()


def test_overwrite_begins_again(training, photos, scripts, tmp_path):
    """Nothing of the old teacher is left, also if the new one is stopped at once."""
    out = tmp_path / "teacher"
    short = [*TINY, "--iters", 1, "--epochs", 1, "--eval-n", 0]
    for seed in (0, 1):
        scripts.run(PRETRAIN, "--data", photos, "--out", out, *short, "--overwrite", "--seed", seed)
    assert read_json(out / "teacher.json")["flags"]["seed"] == 1
    assert len(log(out)) == 1


def test_damaged_checkpoints(tmp_path, scripts):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "it-00000010.pt").write_bytes(b"half of one")
    p = scripts.run(PRETRAIN, "--out", tmp_path, "--resume", code=2)
    assert "expected a checkpoint of recipes.pretrain" in p.err


# ---- training ------------------------------------------------------------------------------------


def test_bf16_passes(photos):
    """The loss of one batch with bf16 passes: near to that of fp32, but not the same."""
    args = filled_in(photos, 3, "--size", 8, "--width", 48, "--heads", 2)
    data = pretrain.load_data(args)
    torch.manual_seed(0)
    teacher = pretrain.new_teacher(data, args)
    torch.nn.init.normal_(teacher.net.proj_out_2.weight, std=0.1)
    x0 = teacher.encode_images(data.images)

    def loss(dtype):
        teacher.dtype = dtype
        draw = pretrain.BatchRandom(0, 0, len(data))
        return pretrain.flow_matching_loss(teacher, x0, data.labels, draw, 0.1).item()

    fp32, bf16 = loss(torch.float32), loss(torch.bfloat16)
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, rel=0.01)


@pytest.mark.parametrize(
    "seconds, text", [(20, "20 s"), (89.6, "90 s"), (600, "10 minutes"), (9000, "2.5 hours")]
)
def test_times_in_words(seconds, text):
    assert pretrain.describe_time(seconds) == text


def test_the_sample_picture_has_other_images_of_a_class_and_its_name(monkeypatch, tmp_path):
    """Three classes in ten columns: class 0 in columns 0, 3, 6 and 9, and it has three images."""
    images = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 1, 2, 2)
    data = Images(images, torch.arange(9) // 3, ["a", "b", "c"])
    seen = {}
    grid = lambda path, rows, names: seen.update(rows=rows, names=names)
    monkeypatch.setattr(pretrain, "save_grid", grid)
    args = pretrain.parse_args(["--data", "toy", "--out", str(tmp_path), "--size", "4"])
    args.patch = 4
    teacher = pretrain.new_teacher(Images(torch.zeros(1, 1, 4, 4), [0], data.names), args)
    pretrain.sample_picture(teacher, data, args, "x.png")
    assert seen["names"] == ["a", "b", "c", "a", "b", "c", "a", "b", "c", "a"]
    captions = [caption for caption, _ in seen["rows"]]
    steps = [f"teacher, {n} steps, w = 1.5" for n in (4, 16, 50)]
    assert captions == ["data", "teacher, 1 step, w = 1.5", *steps]
    assert seen["rows"][0][1][:, 0, 0, 0].tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8, 0]
