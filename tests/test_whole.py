"""common/teachers/whole.py, plain.py, bake.py: students in plain diffusers.

A student of every script and every kind of pipeline is written from a perturbed teacher, without a
training. The lines of its card run in a process without this repository, and give the samples of
the script's own sampler.
"""

import copy
import json
import re

import pytest
import torch
from helpers import cards
from helpers.cards import our_latents, relative, run_apart, write_as_run
from helpers.teachers import load
from safetensors import safe_open
from safetensors.torch import load_file

import anyflow
import boot
import decoupled_dmd
import dmd2
import flowmap
import msd
import phased_dmd
import sana_sprint
import sid
import swiftbrush
import twinflow
from common import lora
from common.errors import UserError
from common.files import ROOT, WEIGHTS, read_json
from common.model import EXTRAS
from common.routed import ByLabel, ByLevel
from common.teachers import bake as bake_module
from common.teachers import whole
from common.teachers.bake import UNBAKED, UNBAKED_LORA, bake
from common.teachers.load import load_model, load_teacher
from common.teachers.plain import NotPlain, fit_shift, trace

NEW = ["chroma", "flux2", "klein", "hunyuan", "lumina"]
VIDEOS = ["wan5b", "sanavideo", "ltx", "hunyuanvideo"]  # with FEW cases, as they take long
FEW = ["dmd2", "dmd2 as LoRA", "twinflow", "twinflow --steps", "sana_sprint --nfe 1"]
KINDS = ["sd15", "sdxl", "sd3", "sana", "flux", *NEW, "qwen", "zimage", "wan", "wan22", *VIDEOS]
PROMPTS = ["a red heart", "dog", "pizza 7"]
LORA = dict(rank=3, alpha=6, targets=None, seed=0, flag="--lora")
EVEN = "1.0,0.75,0.5,0.25"

# script -> module, steps, arguments of its sampler, new inputs of its student
CASES = {
    "dmd2": (dmd2, 4, {}, ()),
    "decoupled_dmd": (decoupled_dmd, 8, {}, ()),
    "sid": (sid, 4, {}, ()),
    "phased_dmd": (phased_dmd, 4, dict(step_shift=5.0), ()),
    "twinflow": (twinflow, 2, {}, ("r", "fake")),
    "twinflow --steps": (twinflow, 4, dict(steps=EVEN), ("r", "fake")),
    "flowmap": (flowmap, 1, dict(w=3.0), ("duration", "guidance")),
    "boot": (boot, 1, {}, ("time",)),
    "sana_sprint": (sana_sprint, 2, dict(rho=0.6, cfg=4.5), ("guidance",)),
    "sana_sprint --nfe 1": (sana_sprint, 1, dict(rho=1.0, cfg=4.5), ("guidance",)),
    "swiftbrush": (swiftbrush, 1, {}, ()),
    "anyflow": (anyflow, 4, dict(shift=5.0), ("r",)),
}
N_ONLY = "n"  # pipe(prompt, num_inference_steps=n)
IN_CALL = "times in the call"
NO = "no"

# Rows of docs/travel.md: what plain diffusers needs for each script, by the kind of pipeline.
UNET, FLOW, WAN = (
    ["sd15", "sdxl"],
    ["sd3", "sana", "flux", *NEW, "qwen", "zimage", "sanavideo", "hunyuanvideo"],
    ["wan", "wan22", "wan5b", "ltx"],
)
EXPECTED = {
    "dmd2": (N_ONLY, N_ONLY, N_ONLY),
    "decoupled_dmd": (N_ONLY, N_ONLY, N_ONLY),
    "sid": (IN_CALL, N_ONLY, N_ONLY),
    "phased_dmd": (NO, N_ONLY, N_ONLY),
    "twinflow": (NO, IN_CALL, NO),
    "twinflow --steps": (IN_CALL, N_ONLY, N_ONLY),
    "flowmap": (N_ONLY, N_ONLY, N_ONLY),
    "boot": (N_ONLY, N_ONLY, N_ONLY),
    "sana_sprint": (NO, IN_CALL, NO),
    "sana_sprint --nfe 1": (N_ONLY, N_ONLY, N_ONLY),
    "swiftbrush": (N_ONLY, N_ONLY, N_ONLY),
    "anyflow": (IN_CALL, N_ONLY, N_ONLY),
}


def test_the_table_of_the_page():
    rows = [f"| {case} | {' | '.join(cells)} |" for case, cells in EXPECTED.items()]
    assert "\n".join(rows) in (ROOT / "docs" / "travel.md").read_text()


# The time of Lumina's network runs from 0 to 1: its embeddings of four steps are nearly alike.
LUMINA = {"twinflow --steps": NO, "anyflow": NO}


def expected_of(kind, case):
    if kind == "lumina" and case in LUMINA:
        return LUMINA[case]
    column = [kind in kinds for kinds in (UNET, FLOW, WAN)].index(True)
    return EXPECTED[case][column]


def perturbed(student, seed=3):
    """As after a training: all weights have changed, those of new inputs strongly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in student.named_parameters():
            scale = 0.3 if "extras." in name else 0.02
            p += scale * torch.randn(p.shape, generator=generator)
    return student


def make_student(teacher, inputs=(), spec=None):
    return perturbed(teacher.copy(spec).extend(*inputs))


def how(record):
    plain = record["plain"]
    if "reason" in plain:
        return NO
    call = plain["call"]
    return N_ONLY if "num_inference_steps" in call and "noise" not in call else IN_CALL


# ---- every script, every pipeline ----------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        k if k in ("sd15", "sd3", "wan22") else pytest.param(k, marks=pytest.mark.slow)
        for k in KINDS
    ],
)
def test_students_in_plain_diffusers(kind, folders, tmp_path):
    """Whole and as LoRA; common's own loader gives the student back, bit for bit."""
    teacher = load(folders, kind, PROMPTS)
    z = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(1))
    cond = teacher.encode([0])
    jobs, expected, found_how = {}, {}, {}
    loras = ("dmd2", "twinflow --steps", "boot")
    cases = [*CASES, *(f"{name} as LoRA" for name in loras)]
    for case in FEW if kind in VIDEOS else cases:
        name = case.removesuffix(" as LoRA")
        module, nfe, sampler, inputs = CASES[name]
        student = make_student(teacher, inputs, LORA if case != name else None)
        home = tmp_path / case.replace(" ", "_")
        record = write_as_run(home, student, teacher, module.__name__, module, nfe, sampler)
        ours = our_latents(module.sample, student, z, cond, nfe, **sampler)
        loaded = load_model(home, record["model"], teacher)
        again = our_latents(module.sample, loaded, z, cond, nfe, **sampler)
        assert relative(again, ours) < 1e-6  # a LoRA's factor is in its file
        assert loaded.state_dict().keys() == student.state_dict().keys()
        untrained = make_student(teacher, inputs)
        for p, old in zip(untrained.parameters(), teacher.copy().extend(*inputs).parameters()):
            p.data = old.data
        untrained = our_latents(module.sample, untrained, z, cond, nfe, **sampler)
        assert relative(untrained, ours) > 1e-3, case
        found_how[case] = how(record)
        assert found_how[case] == expected_of(kind, name), (case, record["plain"])
        if found_how[case] == NO:
            assert not (home / "model_index.json").exists()
            continue
        jobs[case] = (home, teacher, z, PROMPTS[0])
        expected[case] = ours
    for case, theirs in run_apart(jobs, tmp_path).items():
        assert relative(theirs, expected[case]) < 1e-5, case
    assert len(expected) > (2 if kind in VIDEOS else 7)


@pytest.mark.parametrize("kind", UNET)
def test_a_unet_is_never_guided(kind, folders, tmp_path):
    """Whatever guidance_scale and the negative prompt are: it has an input that it ignores."""
    from diffusers import DiffusionPipeline

    teacher = load(folders, kind, PROMPTS)
    student = make_student(teacher)
    write_as_run(tmp_path, student, teacher, "dmd2", dmd2, 4, {})
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    z = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(1))
    ours = our_latents(dmd2.sample, student, z, teacher.encode([0]), 4)
    for options in ({}, dict(guidance_scale=9.0), dict(guidance_scale=9.0, negative_prompt="dog")):
        torch.manual_seed(cards.SEED)
        call = dict(latents=z, output_type="latent", num_inference_steps=4) | options
        assert relative(pipe(PROMPTS[0], **call).images, ours) < 1e-5
    net = load_model(tmp_path, read_json(tmp_path / "distill.json")["model"], teacher).net
    assert net.config.time_cond_proj_dim is None


def two_experts(teacher, nfe, step_shift):
    ends = phased_dmd.phase_ends(nfe, 2)
    times = phased_dmd.step_times(nfe, step_shift)
    table = [float(times[ends[0]] / (1 - times[ends[0]]))]
    experts = [perturbed(teacher.copy(), seed) for seed in (3, 4)]
    return ByLevel(experts, table)


def test_two_experts_are_the_two_networks_of_wan(folders, tmp_path):
    """The boundary lies between two steps: at a step itself Wan's pipeline takes the first network,
    ours the second."""
    teacher = load(folders, "wan", PROMPTS)
    student = two_experts(teacher, 4, 5.0)
    record = write_as_run(
        tmp_path, student, teacher, "phased_dmd", phased_dmd, 4, dict(step_shift=5.0)
    )
    times = record["plain"]["times"]
    ratio = read_json(tmp_path / "model_index.json")["boundary_ratio"]
    assert times[2] < ratio < times[1]
    z = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(1))
    sampler = dict(step_shift=5.0)
    ours = our_latents(phased_dmd.sample, student, z, teacher.encode([0]), 4, **sampler)
    assert relative(cards.run_card(tmp_path, teacher, z, PROMPTS[0]), ours) < 1e-5
    assert "pipeline_tag: text-to-video" in (tmp_path / "README.md").read_text()
    loaded = load_model(tmp_path, record["model"], teacher)
    again = our_latents(phased_dmd.sample, loaded, z, teacher.encode([0]), 4, **sampler)
    assert torch.equal(again, ours)
    swapped = ByLevel([student.experts[1], student.experts[0]], student.table)
    other = our_latents(phased_dmd.sample, swapped, z, teacher.encode([0]), 4, **sampler)
    assert relative(other, ours) > 1e-2


def by_label(teacher):
    experts = [perturbed(teacher.copy(), seed) for seed in (3, 4)]
    return ByLabel(experts, [0, 1, 0])


@pytest.mark.parametrize(
    "make, module, sampler, reason",
    [
        (lambda t: two_experts(t, 4, 5.0), phased_dmd, dict(step_shift=5.0), "its 2 experts: Stab"),
        (by_label, msd, {}, "its students share the prompts"),
    ],
)
def test_students_that_no_pipeline_has(make, module, sampler, reason, folders, tmp_path):
    """They are a folder for each expert, as before, and their card says why."""
    teacher = load(folders, "sd3", PROMPTS)
    student = make(teacher)
    nfe = 1 if module is msd else 4
    record = write_as_run(tmp_path, student, teacher, module.__name__, module, nfe, sampler)
    assert record["plain"]["reason"].startswith(reason)
    assert reason in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "model_index.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["expert-0", "expert-1"]
    loaded = load_model(tmp_path, record["model"], teacher)
    for name, v in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], v)


def test_a_lora_that_cannot_be_baked_is_not_taken_for_a_whole_one(folders, tmp_path):
    """load_lora_weights would leave out its new inputs, silently."""
    teacher = load(folders, "sd15", PROMPTS)
    student = make_student(teacher, ("r", "fake"), LORA)
    record = write_as_run(tmp_path, student, teacher, "twinflow", twinflow, 2, {})
    assert how(record) == NO
    assert not (tmp_path / lora.FILE).exists()
    loaded = load_model(tmp_path, record["model"], teacher)
    assert loaded.state_dict().keys() == student.state_dict().keys()
    for name, v in loaded.extras.state_dict().items():
        assert torch.equal(v, student.extras.state_dict()[name])


# ---- the folder ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd3(folders):
    return load(folders, "sd3", PROMPTS)


def all_files(home):
    return {str(p.relative_to(home)) for p in home.glob("**/*") if p.is_file()}


def test_parts_of_the_teacher_are_links_file_by_file(sd3, tmp_path):
    """No folder is a link: programs that upload a folder do not enter those."""
    write_as_run(tmp_path, make_student(sd3), sd3, "dmd2", dmd2, 4, {})
    assert not [p for p in tmp_path.rglob("*") if p.is_dir() and p.is_symlink()]
    links = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_symlink()}
    own = all_files(tmp_path) - links
    assert own == {
        "README.md",
        "comfyui.json",
        "distill.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        f"transformer/{WEIGHTS}",
    }
    teachers = {name for name in all_files(sd3.folder) if name.startswith(("vae", "text", "token"))}
    assert links == teachers
    assert not [p for p in tmp_path.rglob("*.tmp")]


def test_copies_instead_of_links(sd3, tmp_path):
    write_as_run(tmp_path / "links", make_student(sd3), sd3, "dmd2", dmd2, 4, {})
    write_as_run(tmp_path / "copies", make_student(sd3), sd3, "dmd2", dmd2, 4, {}, copy=True)
    assert not [p for p in (tmp_path / "copies").rglob("*") if p.is_symlink()]
    assert all_files(tmp_path / "copies") == all_files(tmp_path / "links")
    for name in all_files(tmp_path / "links"):
        assert (tmp_path / "copies" / name).read_bytes() == (tmp_path / "links" / name).read_bytes()


def test_a_file_system_without_links(sd3, tmp_path, monkeypatch):
    from pathlib import Path

    def refuse(self, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    write_as_run(tmp_path, make_student(sd3), sd3, "dmd2", dmd2, 4, {})
    assert (tmp_path / "vae" / WEIGHTS).is_file()


def test_an_earlier_student_leaves_nothing(sd3, tmp_path):
    """Neither its files and links nor those of a folder that an older version wrote. Files of
    others stay."""
    sd3.copy().save(tmp_path, dict(method="dmd2"))  # as before there were whole folders
    (tmp_path / "notes.txt").write_text("mine")
    student = make_student(sd3, ("r", "fake"), LORA)
    write_as_run(tmp_path, student, sd3, "twinflow", twinflow, 4, dict(steps=EVEN))
    assert (tmp_path / UNBAKED_LORA).is_file()
    assert not (tmp_path / WEIGHTS).exists()
    write_as_run(tmp_path, make_student(sd3), sd3, "dmd2", dmd2, 4, {})
    assert not (tmp_path / UNBAKED_LORA).exists()
    assert not (tmp_path / EXTRAS).exists()
    fresh = tmp_path / "fresh"
    write_as_run(fresh, make_student(sd3), sd3, "dmd2", dmd2, 4, {})
    expected = all_files(fresh) | {"notes.txt"}
    assert {n for n in all_files(tmp_path) if not n.startswith("fresh/")} == expected


def test_a_folder_that_is_half_written_does_not_look_finished(sd3, tmp_path, monkeypatch):
    write_as_run(tmp_path, make_student(sd3), sd3, "dmd2", dmd2, 4, {})

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole, "add_component", fail)
    with pytest.raises(OSError):
        write_as_run(tmp_path, make_student(sd3), sd3, "dmd2", dmd2, 4, {})
    assert not (tmp_path / "model_index.json").exists()
    assert not (tmp_path / "distill.json").exists()


def test_variants_get_their_plain_names(sd3, tmp_path):
    """A teacher whose folder has fp16 files only, one of them in two parts."""
    import shutil

    teacher = tmp_path / "teacher"
    shutil.copytree(sd3.folder, teacher)
    vae = teacher / "vae"
    (vae / WEIGHTS).rename(vae / "diffusion_pytorch_model.fp16.safetensors")
    encoder = teacher / "text_encoder"
    tensors = load_file(encoder / "model.safetensors")
    (encoder / "model.safetensors").unlink()
    from safetensors.torch import save_file

    names = sorted(tensors)
    halves = [names[::2], names[1::2]]
    table = {}
    for i, half in enumerate(halves, 1):
        file = f"model.fp16-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, encoder / file, metadata={"format": "pt"})
        table |= dict.fromkeys(half, file)
    index = dict(metadata=dict(total_size=1), weight_map=table)
    (encoder / "model.safetensors.index.fp16.json").write_text(json.dumps(index))

    home = tmp_path / "student"
    changed = copy.copy(sd3)
    changed.folder = teacher
    student = make_student(sd3)
    write_as_run(home, student, changed, "dmd2", dmd2, 4, {})
    assert not [name for name in all_files(home) if "fp16" in name]
    z = torch.randn(1, *sd3.shape, generator=torch.Generator().manual_seed(1))
    ours = our_latents(dmd2.sample, student, z, sd3.encode([0]), 4)
    assert relative(cards.run_card(home, sd3, z, PROMPTS[0]), ours) < 1e-5


def test_the_index_of_a_teacher_without_its_optional_parts(folders, tmp_path):
    """The hub's Stable Diffusion names a safety checker, which is not downloaded."""
    teacher = load(folders, "sd15", PROMPTS)
    home = tmp_path / "teacher"
    import shutil

    shutil.copytree(teacher.folder, home)
    index = read_json(home / "model_index.json")
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (home / "model_index.json").write_text(json.dumps(index))
    changed = copy.copy(teacher)
    changed.folder = home
    student = make_student(teacher)
    write_as_run(tmp_path / "student", student, changed, "dmd2", dmd2, 4, {})
    z = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(1))
    ours = our_latents(dmd2.sample, student, z, teacher.encode([0]), 4)
    assert relative(cards.run_card(tmp_path / "student", teacher, z, PROMPTS[0]), ours) < 1e-5


@pytest.mark.parametrize("part", ["../elsewhere", "/tmp", 3, ""])
def test_a_network_is_only_looked_for_in_the_students_folder(part, sd3, tmp_path):
    record = write_as_run(tmp_path, make_student(sd3), sd3, "dmd2", dmd2, 4, {})
    with pytest.raises(UserError, match="folder: expected a folder in this one"):
        load_model(tmp_path, record["model"] | dict(folder=part), sd3)


def test_a_students_folder_is_no_teacher(sd3, tmp_path):
    write_as_run(tmp_path, make_student(sd3), sd3, "dmd2", dmd2, 4, {})
    with pytest.raises(UserError, match="it is a student of this project; give its teacher"):
        load_teacher(str(tmp_path))


# ---- schedulers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("passes_sigmas", [False, True])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_the_configuration_holds_the_grid(shift, passes_sigmas):
    """Of dmd2's steps, whose distance before the shift is 1000 // n thousandths."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    for n in range(1, 13):
        u = torch.tensor([(i + 1) / 1000 for i in dmd2.step_indices(n)], dtype=torch.float64)
        times = shift * u / (1 + (shift - 1) * u)
        s, terminal = fit_shift(times.tolist(), passes_sigmas)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=s, shift_terminal=terminal)
        given = dict(sigmas=[1 - k / n for k in range(n)]) if passes_sigmas else {}
        scheduler.set_timesteps(n, **given)
        assert (scheduler.sigmas[:n] - times).abs().max() < 2e-6, n


def test_grids_that_no_shift_has():
    assert fit_shift([0.5, 0.5], False) is None
    assert fit_shift([1.0, 0.0], False) is None
    s, terminal = fit_shift([1.0, 0.4, 0.3, 0.1], False)  # fits the second and the last time only
    assert terminal == 0.1


def test_tracing_a_sampler_disturbs_nothing(sd3):
    """Neither random numbers nor the network."""
    student = make_student(sd3, ("r", "fake"))
    before = copy.deepcopy(student.state_dict())
    torch.manual_seed(11)
    expected = torch.randn(3)
    torch.manual_seed(11)
    found = trace(student, twinflow.sample, dict(steps=EVEN), 4)
    assert torch.equal(torch.randn(3), expected)
    assert all(torch.equal(v, before[name]) for name, v in student.state_dict().items())
    assert found.times == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert student.extra is None
    assert not found.stochastic
    z = torch.randn(1, *sd3.shape)
    assert torch.isfinite(student(z, 0.5, 0.5, sd3.encode([0]) | inputs_of(0.5))).all()


def inputs_of(t):
    pair = torch.tensor([[t, 0.1]], dtype=torch.float64)
    return dict(r=pair, fake=pair)


# ---- new inputs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [None, LORA, dict(LORA, targets=["linear_2", "to_q"])])
def test_baked_inputs_are_exact(spec, sd3, tmp_path):
    """The script's own sampler gives the same with the baked network, to 1e-6 and without inputs;
    also where the LoRA has an adapter on the layer already."""
    student = make_student(sd3, ("r", "fake"), spec)
    sampler = dict(steps=EVEN)
    found = trace(student, twinflow.sample, sampler, 4)
    files, restored = bake(student, found.steps)
    z = torch.randn(2, *sd3.shape, generator=torch.Generator().manual_seed(1))
    cond = sd3.encode([0, 1])
    ours = our_latents(twinflow.sample, student, z, cond, 4, **sampler)

    plain = sd3.copy()
    if spec is None:
        plain.net.load_state_dict(files[WEIGHTS])
        assert set(restored[UNBAKED]) == {
            f"time_text_embed.timestep_embedder.linear_2.{end}" for end in ("weight", "bias")
        }
    else:
        state = plain.net.state_dict()
        tensors = files[lora.FILE]
        for name in [n for n in tensors if ".lora_A." in n]:
            layer = name.removeprefix("transformer.").replace(".lora_A.weight", ".weight")
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            state[layer] = state[layer] + (up @ tensors[name]).view_as(state[layer])
        plain.net.load_state_dict(state)
    theirs = our_latents(twinflow.sample, plain, z, cond, 4, **sampler)
    assert relative(theirs, ours) < 1e-6
    dropped = copy.deepcopy(student)
    dropped.extras = torch.nn.ModuleDict()
    assert relative(our_latents(twinflow.sample, dropped, z, cond, 4, **sampler), ours) > 1e-2


@pytest.mark.parametrize(
    "limit, value, reason",
    [
        ("LARGEST_CONDITION", 1.0, "too close for the time embedding"),
        ("LARGEST_CHANGE", 1e-3, "times its own size"),
        ("EXACT", 0.0, "would be .* off"),
    ],
)
def test_what_is_not_exact_is_not_baked(limit, value, reason, sd3, monkeypatch, tmp_path):
    monkeypatch.setattr(bake_module, limit, value)
    student = make_student(sd3, ("r", "fake"))
    record = write_as_run(tmp_path, student, sd3, "twinflow", twinflow, 4, dict(steps=EVEN))
    assert re.search(reason, record["plain"]["reason"])
    assert not (tmp_path / "model_index.json").exists()


def test_close_steps_are_not_baked(sd3):
    student = make_student(sd3, ("r", "fake"))
    sampler = dict(steps="1.0,0.9999,0.9998,0.9997")
    found = trace(student, twinflow.sample, sampler, 4)
    with pytest.raises(NotPlain, match=r"condition number \d"):
        bake(student, found.steps)


def test_inputs_that_differ_between_samples_are_not_baked(sd3):
    student = make_student(sd3, ("guidance",))

    def sample(student, z, cond, nfe, noise):
        w = torch.arange(len(z), dtype=torch.float64)
        return student(z, 0.0, 1.0, cond | dict(guidance=w))

    found = trace(student, sample, {}, 1)
    with pytest.raises(NotPlain, match="differ between samples"):
        bake(student, found.steps)


# ---- the header of safetensors files -------------------------------------------------------------


def test_metadata_of_the_weights(folders, tmp_path):
    teacher = load(folders, "sdxl", PROMPTS)
    write_as_run(tmp_path / "whole", make_student(teacher), teacher, "dmd2", dmd2, 4, {})
    write_as_run(tmp_path / "lora", make_student(teacher, (), LORA), teacher, "dmd2", dmd2, 4, {})
    with safe_open(tmp_path / "whole" / "unet" / WEIGHTS, "pt") as f:
        found = f.metadata()
    assert found["format"] == "pt"
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert found["modelspec.prediction_type"] == "epsilon"
    assert found["modelspec.resolution"] == "16x16"
    assert found["distill.nfe"] == "4"
    assert all(isinstance(v, str) and "/" not in v for v in found.values())
    with safe_open(tmp_path / "lora" / lora.FILE, "pt") as f:
        assert f.metadata()["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def test_metadata_of_others_has_no_invented_architecture(sd3, tmp_path):
    write_as_run(tmp_path, make_student(sd3), sd3, "dmd2", dmd2, 4, {})
    with safe_open(tmp_path / "transformer" / WEIGHTS, "pt") as f:
        found = f.metadata()
    assert not [name for name in found if name.startswith("modelspec")]
    assert found["distill.method"] == "dmd2"


def test_the_emoji_teacher(tmp_path):
    """The teacher that is shipped, whose weights are half precision."""
    prompts = ["red heart", "pizza"]
    teacher = load_teacher("emoji", text=dict(prompts=prompts, cache=tmp_path, say=print))
    assert teacher.folder == ROOT / "assets" / "emoji"
    student = perturbed(teacher.copy(), 3)
    write_as_run(tmp_path / "s", student, teacher, "dmd2", dmd2, 4, {})
    cards.same_as_card(tmp_path / "s", teacher, student, dmd2.sample, 4, "red heart", 0)
