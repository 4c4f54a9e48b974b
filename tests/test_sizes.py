"""common/teachers/sizes.py: several sizes in one run. That samples of each size are those of the
teacher's own pipeline is in test_teachers.py."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import cards
from helpers.cards import our_latents, relative, write_as_run
from helpers.runs import close, log, run_processes
from helpers.teachers import PROMPTS, draw, from_output, load, quiet, to_argument

import anyflow
import decoupled_dmd
import dmd2
import eval as eval_script
import msd
import nct
import swiftbrush
from common.errors import UserError
from common.rng import BatchRandom
from common.teachers.load import load_pipeline
from common.teachers.sizes import sizes_of
from tools.rows import prompt_kwargs
from training.alarm import FIGURES
from training.flags import is_value_of, parse_sizes
from training.report import Report

SIZES = [[24, 16], [16, 16], [16, 32]]  # the second has the shortest sides
TEXT = "24x16,16x16,16x32"


@pytest.fixture(scope="module")
def flux(folders):
    """Its time shift depends on the size."""
    return load(folders, "flux", size=SIZES)


# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, expected",
    [
        (None, []),
        (64, [[64, 64]]),
        ([64, 32], [[64, 32]]),
        (SIZES, SIZES),
        ([], None),
        ("64", None),
        (True, None),
        ([64], None),
        ([[64, 32], 64], None),
        ([[64, 32.0]], None),
    ],
)
def test_what_a_json_file_says(value, expected):
    assert sizes_of(value) == expected


def test_the_flag():
    assert dmd2.parse_args(["--size", "64"]).size == [64, 64]
    assert dmd2.parse_args(["--size", TEXT]).size == SIZES


def test_a_resumed_run_has_its_sizes():
    action = SimpleNamespace(type=parse_sizes)
    assert is_value_of(action, SIZES)
    assert is_value_of(action, [64, 64])
    assert not is_value_of(action, [[64, "64"]])


@pytest.mark.parametrize("text", ["64,", ",", "64;32", "64x32x16,64"])
def test_wrong_flags(text, capsys):
    with pytest.raises(SystemExit):
        dmd2.parse_args(["--size", text])
    assert "--size: expected pixels" in capsys.readouterr().err


def test_each_size_is_checked(folders):
    with pytest.raises(UserError, match="--size 16x18: expected a multiple of 4 pixels"):
        load(folders, "flux", size=[[16, 16], [16, 18]])


def test_a_size_of_a_run_for_those_who_sample_it(tmp_path):
    """The first one, or --size."""
    trained = dict(flags=dict(size=SIZES))
    args = eval_script.parse_args([str(tmp_path)])
    assert prompt_kwargs(args, trained)["size"] == SIZES[0]
    args = eval_script.parse_args([str(tmp_path), "--size", "16x32"])
    assert prompt_kwargs(args, trained)["size"] == [16, 32]


def test_nct_has_the_size_of_its_generator(tmp_path, monkeypatch):
    args = SimpleNamespace(generator=str(tmp_path), teacher="toy", size=SIZES)
    monkeypatch.setattr(nct, "parse_args", lambda: args)
    with pytest.raises(UserError, match="--size: expected one size, that of --generator, found 3"):
        nct.main()


# ---- one of several ------------------------------------------------------------------------------


def test_copies_share_the_size(flux):
    student = flux.copy()
    average = student.copy()
    shifts = []
    for i in flux.sizes.each():
        for model in (flux, student, average):
            assert list(model.image_shape[1:]) == SIZES[i]
            assert model.schedule is flux.schedule
        shifts.append(flux.schedule.shift)
        assert flux.schedule.config["shift"] == flux.schedule.shift
    assert shifts[1] < shifts[0] < shifts[2]
    assert list(student.image_shape[1:]) == SIZES[0]


def test_all_processes_draw_the_same_size(flux):
    drawn = []
    for it in range(30):
        ranks = []
        for rank in range(2):
            flux.sizes.draw(BatchRandom(7, it, 4, rank, 2))
            ranks.append(flux.sizes.index)
        assert ranks[0] == ranks[1]
        drawn.append(ranks[0])
    assert {drawn.count(i) > 4 for i in range(3)} == {True}
    flux.sizes.use(0)


def test_each_iteration_has_one_size_and_its_levels(flux, trace):
    """Steps of the student, and all other levels, are those of the size's own schedule."""
    flags = ["--nfe", 2, "--cfg", 2, "--iters", 6, "--batch", 2]
    record = [(dmd2, "fake_loss"), (dmd2, "backward_simulation")]
    found = trace(dmd2, *flags, record=record, teacher=flux)
    calls = zip(found.calls["fake_loss"], found.calls["backward_simulation"])  # then of the export
    for it, (fake, simulation) in enumerate(calls):
        flux.sizes.draw(BatchRandom(0, it, 2))
        assert fake.args[1].shape[1:] == flux.shape
        times = flux.schedule.grid(1000)[[999, 499]]
        assert torch.equal(simulation.args[2], times)
    flux.sizes.use(0)


@torch.no_grad()
def test_heads_fit_all_sizes(folders):
    """Networks are built while the size with the shortest side is in use."""
    teacher = load(folders, "flux", size=[[32, 32], [16, 48]])
    assert teacher.sizes.index == 1

    def features():
        z = torch.zeros(1, *teacher.shape)
        return teacher(z, 1.0, 1.0, teacher.encode([0]), features=True)[-1]

    head = dmd2.Head(features())
    for _ in teacher.sizes.each():
        assert head(features()).ndim == 2
    assert teacher.sizes.index == 0


@pytest.mark.parametrize("script", [decoupled_dmd, swiftbrush, msd])
def test_levels_of_other_scripts(script, flux, trace, monkeypatch):
    """Noise levels that they draw are of the grid of the iteration's size."""
    record = [(script, "add_noise")]
    flags = ["--cfg", 2, "--iters", 4, "--batch", 2]
    flags += ["--students", 1] if script is msd else []
    found = trace(script, *flags, record=record, teacher=flux)
    grids = {}
    for _ in flux.sizes.each():
        grid = flux.schedule.grid(1000)
        if script is decoupled_dmd:
            grid = torch.cat([grid, grid.clamp(0.02, 0.98)])
        grids[flux.shape] = grid
    seen = set()
    for call in found.calls["add_noise"]:
        x, _, sigma, _ = call.args
        grid = grids[tuple(x.shape[1:])]
        assert torch.isin(sigma, grid).all()
        seen.add(tuple(x.shape[1:]))
    assert len(seen) > 1


def test_anyflow_draws_noise_of_the_iterations_size(flux, trace):
    flags = ["--image-free", "--velocity", "teacher", "--iters", 4, "--map-iters", 2, "--batch", 4]
    found = trace(anyflow, *flags, record=[(anyflow, "add_noise")], teacher=flux)
    calls = found.calls["add_noise"]
    assert all(call.args[0].shape == call.args[3].shape for call in calls)
    assert len({call.args[0].shape[1:] for call in calls}) > 1


def test_resume_is_bit_equal(flux, trace, tmp_path, monkeypatch):
    """All pictures are of the first size, whatever size the iteration had."""
    shown = []
    measure = Report.measure
    note = lambda *args: shown.append(flux.sizes.index) or measure(*args)
    monkeypatch.setattr(Report, "measure", note)
    flags = ["--nfe", 2, "--cfg", 2, "--batch", 2, "--cooldown", 0, "--ema", 8, "--save-every", 2]
    whole = trace(dmd2, *flags, "--iters", 4, "--sample-every", 2, teacher=flux)
    lines = [{k: v for k, v in line.items() if k not in FIGURES} for line in log(tmp_path / "out")]
    assert shown == [0] * 4  # the teacher's once, the student's after 1, 2 and 4 iterations
    trace(dmd2, *flags, "--iters", 2, teacher=flux)
    resumed = trace(dmd2, *flags, "--iters", 4, "--resume", teacher=flux)
    assert log(tmp_path / "out") == lines
    for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_two_processes_are_one(folders, scripts, tmp_path):
    flags = ["--teacher", folders("flux"), "--cache-prompts", folders.cache, "--size", TEXT]
    flags += "--nfe 2 --cfg 2 --batch 4 --iters 4 --eval-n 0 --sample-every 0 --log-every 1".split()
    scripts.run("dmd2.py", *flags, "--out", tmp_path / "one")
    run_processes(scripts, 2, "dmd2.py", *flags, "--out", tmp_path / "two")
    close(tmp_path / "one", tmp_path / "two", 4)


# ---- images --------------------------------------------------------------------------------------


def test_images_in_each_size(folders, tmp_path):
    """In the order and with the captions of one size; students of a part of them as well."""
    for i in range(5):
        draw(tmp_path / "set" / f"{i}.png", (40, 30 + i), (50 * i, 20, 90))
        (tmp_path / "set" / f"{i}.txt").write_text(f"picture {i}")
    options = dict(prompts=PROMPTS, cache=tmp_path / "cache", say=quiet, data=tmp_path / "set")
    several = load_pipeline(str(folders("flux")), size=SIZES, **options)
    images = several.load_image_folder(tmp_path / "set", quiet)
    part = images.part(None, 1, 2)
    assert (len(images), len(part)) == (5, 2)
    for i in (0, 2):
        several.sizes.use(i)
        one = load_pipeline(str(folders("flux")), size=SIZES[i], **options)
        expected = one.load_image_folder(tmp_path / "set", quiet)
        run = FakeRun()
        for ours, theirs in ((images, expected), (part, expected.part(None, 1, 2))):
            x, cond = ours.samples(run, several, 3)
            y, other = theirs.samples(run, one, 3)
            assert torch.equal(x, y)
            assert x.shape[1:] == several.shape
            assert torch.equal(cond["labels"], other["labels"])


class FakeRun:
    args = type("Args", (), dict(batch=4, seed=0))
    data_shard = (0, 1)
    device = "cpu"


# ---- the student in plain diffusers --------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["sdxl", "flux", "klein", *[pytest.param("qwen", marks=pytest.mark.slow)]]
)
def test_the_student_in_plain_diffusers(name, folders, tmp_path):
    """The folder's scheduler, with the arguments that the card has for each size: SDXL's is the
    same for all, FLUX.1's makes the shift of a size, FLUX.2's steps are in the call."""
    from diffusers import DiffusionPipeline

    teacher = load(folders, name, size=SIZES)
    teacher.sizes.use(0)
    student = teacher.copy()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    record = write_as_run(tmp_path, student, teacher, "dmd2", dmd2, 4, {})
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    card = (tmp_path / "README.md").read_text()
    calls = record["plain"]["sizes"]
    for i in teacher.sizes.each():
        assert ("sigmas" in calls[i]) == (name == "klein")
        assert f"height={SIZES[i][0]}, width={SIZES[i][1]}" in card
        z = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(1))
        ours = our_latents(dmd2.sample, student, z, teacher.encode([0]), 4)
        call = dict(calls[i], latents=to_argument(teacher, z), output_type="latent")
        torch.manual_seed(cards.SEED)
        theirs = from_output(teacher, pipe(prompt=PROMPTS[0], **call).images)
        assert relative(theirs, ours) < 1e-5
    assert json.loads((tmp_path / "distill.json").read_text())["model"]["image"] == [3, *SIZES[0]]
