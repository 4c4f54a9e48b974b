"""LoRA (common/lora.py): adapters on the teacher's own weights, in every script, exported for diffusers. And full students in plain diffusers."""

import json
import re
import shutil
import warnings

import pytest
import torch
from helpers.runs import QUICK, close, processes, same
from helpers.cases import SCRIPTS as ALL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_teachers import folders, load  # noqa: F401  the fixture

import dmd2
import eval as evaluation
from common import lora
from common.ema import EMA
from common.errors import UserError
from common.files import ROOT
from common.teachers.load import HUB, load_model, load_teacher

# How README loads students, as it stands there. Tests put tiny folders in the place of the names
FULL = """
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
unet = UNet2DConditionModel.from_pretrained("out/dmd2-sdxl/student", torch_dtype=torch.bfloat16)
pipe = StableDiffusionXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0", unet=unet, torch_dtype=torch.bfloat16).to("cuda")
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
image = pipe("a red heart", timesteps=[999, 749, 499, 249], guidance_scale=0).images[0]
"""
LORA = """
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
pipe = StableDiffusionXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0", torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("out/dmd2-sdxl/student")
pipe.fuse_lora()  # may be left out: adds the adapters to the weights, so that they cost nothing
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
image = pipe("a red heart", timesteps=[999, 749, 499, 249], guidance_scale=0).images[0]
"""
FLOW = """
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
net = SD3Transformer2DModel.from_pretrained("out/dmd2-sd3/student", torch_dtype=torch.bfloat16)
pipe = StableDiffusion3Pipeline.from_pretrained("stabilityai/stable-diffusion-3-medium-diffusers", transformer=net, torch_dtype=torch.bfloat16).to("cuda")
pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
image = pipe("a red heart", sigmas=[1.0, 0.75, 0.5, 0.25], guidance_scale=1).images[0]
"""
FLOW_LORA = """
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
pipe = SanaPipeline.from_pretrained("Efficient-Large-Model/Sana_1600M_1024px_diffusers", torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("out/dmd2-sana/student")
pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
image = pipe("a red heart", sigmas=[1.0, 0.75, 0.5, 0.25], guidance_scale=1, complex_human_instruction=None).images[0]
"""
MNIST = """
import json
from diffusers import DiTTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
net, lora = DiTTransformer2DModel.from_pretrained("assets/mnist").eval(), json.load(open("out/dmd2-mnist/student/distill.json"))["model"]["lora"]
inject_adapter_in_model(LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["targets"]), net)
weights = load_file("out/dmd2-mnist/student/pytorch_lora_weights.safetensors")
set_peft_model_state_dict(net, {k.removeprefix("transformer."): v for k, v in weights.items()})
"""
PROMPTS = ["a red heart", "dog", "pizza 7"]  # the first is what README asks for
NAMES = ["sd15", "sdxl", "sd3", "sana", "mnist", "toy"]
FLAT = dict(rank=4, alpha=4.0, targets=None, seed=0, flag="--lora")  # what --lora 4 is
CONV = dict(FLAT, rank=2, alpha=5.0, targets=["conv1", "time_emb_proj", "to_v"])


def teacher_of(name, folders, **kw):  # noqa: F811
    return load_teacher(name) if name in ("mnist", "toy") else load(folders, name, **kw)


def batch(model, n=2, seed=0):
    z = torch.randn(n, *model.shape, generator=torch.Generator().manual_seed(seed))
    return z, 0.6, 0.8, model.encode(torch.arange(n))


def scramble(student, seed=0, scale=0.3):
    """Adapters as after a long training: their own noise, so that a swapped or missing one shows."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in student.parameters():
            p += scale * torch.randn(p.shape, generator=g)
    return student


@pytest.mark.parametrize("name", NAMES)
def test_starts_as_the_teacher_on_the_teachers_own_weights(name, folders):  # noqa: F811
    teacher = teacher_of(name, folders)
    before, student = {k: v.clone() for k, v in teacher.state_dict().items()}, teacher.copy(FLAT)
    if teacher.adapter == "toy":
        teacher.exact = False  # the network that its copies start from
    args = batch(teacher)
    with torch.no_grad():
        told = teacher(*args)
    assert torch.equal(student(*args), told)
    names, theirs = set(student.state_dict()), {p.data_ptr() for p in teacher.parameters()}
    assert (
        names
        and all(".lora_" in k for k in names)
        and names == {k for k, _ in student.named_parameters()}
    )  # nothing of the base: what checkpoints hold
    assert {t.data_ptr() for t in student.base} == theirs and not any(
        p.data_ptr() in theirs for p in student.parameters()
    )
    held = [t for m in student.net.modules() for t in vars(m).values() if torch.is_tensor(t)]
    assert {
        t.data_ptr() for t in held
    } == theirs  # every weight is in its place, and no copy of one
    # training reaches the adapters, all of them, and nothing else
    opt = torch.optim.SGD(student.requires_grad_(True).parameters(), lr=10.0)
    for _ in range(2):  # B is 0 at first, so A moves in the second step
        (student(*args) - args[0]).square().mean().backward()
        assert all(p.grad is not None for p in student.parameters())
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        opt.step()
        opt.zero_grad()
    still = [
        k
        for (k, a), b in zip(student.named_parameters(), teacher.copy(FLAT).parameters())
        if torch.equal(a, b)
    ]
    assert all("transformer_blocks.1.attn.add_q_proj" in k for k in still) and len(still) == 2 * (
        name == "sd3"
    )  # what SD3's last block throws away
    with torch.no_grad():
        assert torch.equal(teacher(*args), told) and not torch.equal(student(*args), told)
    assert teacher.state_dict().keys() == before.keys() and all(
        torch.equal(v, before[k]) for k, v in teacher.state_dict().items()
    )


def test_each_network_has_its_own_adapters(folders):  # noqa: F811
    teacher = teacher_of("sdxl", folders)
    student, critic = teacher.copy(FLAT), teacher.copy(FLAT)
    ema, args = EMA(student, 10), batch(teacher)
    old = student(*args)
    scramble(student)
    for net in (critic, ema.model):
        assert torch.equal(net(*args), old) and {t.data_ptr() for t in net.base} == {
            t.data_ptr() for t in student.base
        }
    ema.update(100)  # half-life 5 images of 100: all of the new and none of the old
    with torch.no_grad():
        assert torch.allclose(ema.model(*args), student(*args), atol=1e-4) and not any(
            p.requires_grad for p in ema.model.parameters()
        )
    assert torch.equal(critic(*args), old)
    again = teacher.copy(dict(FLAT, seed=1))
    again.load_state_dict(student.state_dict())
    assert torch.equal(again(*args), student(*args)) and not torch.equal(
        teacher.copy(dict(FLAT, seed=1)).state_dict()[next(iter(critic.state_dict()))],
        next(iter(critic.state_dict().values())),
    )


def test_bf16_base(folders):  # noqa: F811
    """A frozen teacher in bf16: adapters and their gradients are float32, the start is the teacher bit for bit, and the base goes where the teacher goes."""
    teacher = teacher_of("sd3", folders, dtype=torch.bfloat16)
    student, args = teacher.copy(FLAT), batch(teacher)
    assert torch.equal(student(*args), teacher(*args)) and {p.dtype for p in student.base} == {
        torch.bfloat16
    }
    student(*args).square().sum().backward()
    assert (
        {p.dtype for p in student.parameters()}
        == {p.grad.dtype for p in student.parameters()}
        == {torch.float32}
    )
    teacher.to(torch.float64)
    assert {p.dtype for p in student.base} == {torch.float64}


def test_new_conditions_are_trained_whole(folders):  # noqa: F811
    """What TwinFlow, flow maps and SANA-Sprint add: a module of its own beside the adapters, saved with them."""
    student = teacher_of("sana", folders).copy(FLAT).extend("r")
    scalars = {k for k, _ in student.named_parameters() if k.startswith("extras.r.")}
    assert (
        scalars
        and scalars < set(student.state_dict())
        and all(p.requires_grad for p in student.parameters())
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", [FLAT, CONV], ids=["default", "convolutions"])
def test_file(name, spec, folders, tmp_path):  # noqa: F811
    """save, load: the same student, from a file of adapters only."""
    if spec is CONV and name not in ("sd15", "sdxl"):
        return
    teacher = teacher_of(name, folders)
    student, args = scramble(teacher.copy(spec).extend("r")), batch(teacher)
    args[3]["r"] = torch.rand(2)
    student.save(tmp_path, dict(method="dmd2"))
    with safe_open(tmp_path / lora.FILE, "pt") as f:
        keys = list(f.keys())
    part = "unet" if name.startswith("sd1") or name == "sdxl" else "transformer"
    assert {p.name for p in tmp_path.iterdir()} == {lora.FILE, "extras.safetensors", "distill.json"}
    assert all(
        k.startswith(f"{part}.") and k.endswith((".lora_A.weight", ".lora_B.weight")) for k in keys
    ) and len(keys) == len(student.net.state_dict())
    info = json.loads((tmp_path / "distill.json").read_text())["model"]
    assert info["lora"]["rank"] == spec["rank"] == info["lora"]["alpha"] and set(
        info["lora"]["targets"]
    ) <= {*lora.LAYERS, *CONV["targets"], "inp", "hidden.0", "hidden.1"}
    again = load_model(tmp_path, info, teacher)
    with torch.no_grad():
        ours, theirs = student(*args), again(*args)
    assert torch.allclose(ours, theirs, atol=1e-5 * ours.abs().max()) and (
        spec["alpha"] != spec["rank"] or torch.equal(ours, theirs)
    )
    assert {t.data_ptr() for t in again.base} == {p.data_ptr() for p in teacher.parameters()}


# ---- mistakes -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, says",
    [
        (
            dict(rank=17),
            "--lora 17: expected a rank of at most 16, the smaller side of layer .*attn2.to_[kv];",
        ),
        (
            dict(targets=["to_q", "to_w"]),
            "--lora-targets to_w: .*UNet2DConditionModel, did you mean to_[kqv]",
        ),
        (dict(targets=["norm"]), "--lora-targets norm"),
    ],
)
def test_layers_that_do_not_fit(change, says, folders):  # noqa: F811
    with pytest.raises(UserError, match=says) as e:
        teacher_of("sd15", folders).copy(dict(FLAT, **change))
    assert "\n" not in str(e.value)


def test_a_network_without_attention_is_refused():
    with pytest.raises(
        UserError,
        match="--lora 4: expected a network with attention, found Sequential; .*--lora-targets, e.g. 0",
    ):
        lora.add_adapters(torch.nn.Sequential(torch.nn.Linear(8, 8)), FLAT)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--lora 0", "--lora: expected a rank of at least 1, found 0"),
        ("--lora-fake -1", "--lora-fake: expected a rank"),
        ("--lora-alpha 2", "--lora-alpha and"),
        ("--lora 4 --lora-alpha 0", "--lora-alpha: expected a number > 0"),
        ("--lora-targets to_q", "--lora-targets mean"),
        ("--lora x", "--lora"),
    ],
)
def test_flags(flags, says, capsys):
    with pytest.raises((UserError, SystemExit)) as e:
        dmd2.parse_args(flags.split())
    assert re.search(says, f"{e.value} {capsys.readouterr().err}")


@pytest.mark.parametrize(
    "script, flags, says",
    [
        ("boot", "--lora-fake 4", "--lora-fake: this method has no second"),
        ("twinflow", "--lora-fake 4", "--lora-fake: there is no second"),
        ("sana_sprint", "--lora-fake 4", "--lora-fake: expected none"),
        ("msd", "--lora 4 --small width=16", "--lora: .*--small"),
        ("phased_dmd", "--lora 4 --ida 0.9", "--ida 0.9: .*--lora"),
    ],
)
def test_contradictions(script, flags, says):
    with pytest.raises(UserError, match=says):
        __import__(script).parse_args(["--teacher", "toy", *flags.split()])


def test_files_that_do_not_fit(folders, tmp_path):  # noqa: F811
    teacher = teacher_of("sd15", folders)
    teacher.copy(FLAT).save(tmp_path, {})
    info = json.loads((tmp_path / "distill.json").read_text())["model"]
    fine = load_file(tmp_path / lora.FILE)
    key = next(iter(fine))

    def refused(says, info=info, teacher=teacher):
        with pytest.raises(UserError, match=says) as e:
            load_model(tmp_path, info, teacher)
        assert "\n" not in str(e.value)

    refused("a LoRA: expected its teacher", teacher=None)
    refused("expected a teacher of its kind, .*sd15.*found .*dit", teacher=load_teacher("mnist"))
    for wrong in (
        None,
        4,
        dict(rank=4),
        dict(rank="4", targets=["to_q"]),
        dict(rank=True, targets=["to_q"]),
        dict(rank=4, targets=[]),
        dict(rank=4, targets=[1]),
    ):
        refused(r"lora(\.rank|\.targets)?: expected", dict(info, lora=wrong))
    refused("rank 99: expected a rank of at most", dict(info, lora=dict(info["lora"], rank=99)))
    for change, says in (
        (dict(), "is missing"),
        ({key: torch.zeros(1)}, "expected shape"),
        (fine | {"unet.x": torch.zeros(1)}, "1 tensors .* unet.x"),
    ):
        save_file({k: v for k, v in fine.items() if k != key} | change, tmp_path / lora.FILE)
        refused(f"{lora.FILE}: .*{says}")
    (tmp_path / lora.FILE).write_bytes(b"x")
    refused(f"{lora.FILE}: expected a safetensors file")


# ---- scripts --------------------------------------------------------------------------------------------------------------------------------


def latents(code, student, teacher_folder, size, z, seed=7):
    """What README's lines give with tiny folders in the place of their names, from noise z, as latents; other noise of the same seed."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub = next(v for v in HUB.values() if v in code)
    for a, b in {
        '"out/dmd2-sdxl/student"': repr(str(student)),
        '"out/dmd2-sd3/student"': repr(str(student)),
        '"out/dmd2-sana/student"': repr(str(student)),
        f'"{hub}"': f"{str(teacher_folder)!r}, **empty",
        "bfloat16": "float32",
        '.to("cuda")': "",
    }.items():
        code = code.replace(a, b)
    more = 'latents=z, output_type="latent", height=size, width=size' + (
        ", use_resolution_binning=False" if "Sana" in code else ""
    )
    code = code.replace(").images", f", {more}).images").replace(
        "image = pipe(",
        "pipe.set_progress_bar_config(disable=True)\ntorch.manual_seed(seed)\nimage = pipe(",
    )
    index = json.loads((teacher_folder / "model_index.json").read_text())
    space = dict(
        z=z, seed=seed, size=size, empty={k: None for k, v in index.items() if v == [None, None]}
    )  # parts that the tiny pipelines do not have
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, space)
    return space["image"]


def one_step(code):
    return code.replace("[999, 749, 499, 249]", "[999]").replace("[1.0, 0.75, 0.5, 0.25]", "[1.0]")


def for_sd15(code):
    return (
        code.replace("StableDiffusionXLPipeline", "StableDiffusionPipeline")
        .replace(HUB["sdxl"], HUB["sd15"])
        .replace("guidance_scale=0", "guidance_scale=1")
    )


def for_sd3(code):
    return (
        code.replace("SanaPipeline", "StableDiffusion3Pipeline")
        .replace(HUB["sana"], HUB["sd3"])
        .replace(", complex_human_instruction=None", "")
    )


def for_sana(code):
    code = (
        code.replace("StableDiffusion3Pipeline", "SanaPipeline")
        .replace(HUB["sd3"], HUB["sana"])
        .replace("SD3Transformer2DModel", "SanaTransformer2DModel")
    )
    return code.replace("guidance_scale=1", "guidance_scale=1, complex_human_instruction=None")


SNIPPETS = {
    ("sdxl", 0): FULL,
    ("sdxl", 1): LORA,
    ("sd15", 0): for_sd15(FULL),
    ("sd15", 1): for_sd15(LORA),
    ("sd3", 0): FLOW,
    ("sd3", 1): for_sd3(FLOW_LORA),
    ("sana", 0): for_sana(FLOW),
    ("sana", 1): FLOW_LORA,
}
SNIPPETS |= {("emoji", i): SNIPPETS["sd15", i] for i in (0, 1)}
slow = pytest.mark.slow


@pytest.fixture
def forks(scripts):
    scripts.load("peft", "diffusers.loaders.peft")
    return scripts


def same_picture(name, nfe, teacher, student, folder, folders, code, sampler=None):  # noqa: F811
    """README's lines give the latents of our own sampler, with the same noise: z given, what is added between steps drawn from the same seed."""
    z = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(1))
    own = lambda model: (
        torch.manual_seed(7),
        dmd2.sample(
            model, z, teacher.encode([0]), nfe, lambda: torch.randn_like(z), **(sampler or {})
        ),
    )[1]
    theirs = latents(
        code if nfe == 4 else one_step(code), folder, folders(name), teacher.image_shape[-1], z
    )
    ours = own(student)
    assert (ours - theirs).norm() < 1e-4 * ours.norm()
    assert (
        ours - own(teacher)
    ).norm() > 1e-2 * ours.norm()  # it has learnt something: the same picture is no accident


@pytest.mark.parametrize("name, adapters", [("sdxl", 0), ("sdxl", 1), ("sd3", 0), ("sana", 1)])
def test_readme(name, adapters, folders, tmp_path):  # noqa: F811
    teacher = load(folders, name, PROMPTS)
    student = scramble(
        teacher.copy(dict(FLAT, alpha=3.0) if adapters else None), scale=0.2 if adapters else 0.02
    )
    student.save(tmp_path / "student", {})
    same_picture(name, 4, teacher, student, tmp_path / "student", folders, SNIPPETS[name, adapters])


def test_readme_mnist(tmp_path):
    teacher, space = load_teacher("mnist"), {}
    student = scramble(teacher.copy(dict(FLAT, alpha=3.0)))
    student.save(tmp_path, {})
    exec(
        MNIST.replace("out/dmd2-mnist/student", str(tmp_path)).replace(
            "assets/mnist", str(teacher.folder)
        ),
        space,
    )
    z, _, _, cond = batch(teacher)
    with torch.no_grad():
        theirs, ours = (
            z
            - space["net"](
                z, timestep=torch.full((2,), 1000.0), class_labels=cond["labels"]
            ).sample,
            student(z, 0.0, 1.0, cond),
        )
    assert torch.allclose(ours, theirs, atol=1e-5 * ours.abs().max()) and not torch.allclose(
        ours, teacher(z, 0.0, 1.0, cond), atol=1e-2
    )


@pytest.mark.parametrize(
    "name, nfe, flags",
    [
        ("sdxl", 4, "--lora 4 --lora-fake 2 --grad-checkpoint"),
        *(
            pytest.param(*p, marks=slow)
            for p in (
                ("sana", 1, "--lora 4 --lora-alpha 3"),
                ("sd15", 1, "--lora 4"),
                ("sd15", 4, "--lora 4 --lora-fake 4"),
                ("sdxl", 1, "--lora 4 --lora-targets to_q to_k to_v conv1 conv2 time_emb_proj"),
                ("sd3", 1, "--lora 4"),
                ("sd3", 4, "--lora 4 --lora-fake 4"),
                ("sana", 4, "--lora 4 --lora-fake 4"),
                ("sd15", 1, ""),
                ("sdxl", 4, ""),
                ("sd3", 4, ""),
                ("sana", 4, ""),
                ("emoji", 4, ""),
                ("emoji", 4, "--lora 8 --lora-fake 8"),
            )
        ),
    ],
)
def test_dmd2_to_diffusers(name, nfe, flags, folders, forks, tmp_path):  # noqa: F811
    """From the command line to plain diffusers; eval.py's loader gives the same student. emoji is the teacher that is shipped."""
    folders = (lambda name: ROOT / "assets" / "emoji") if name == "emoji" else folders
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    out = tmp_path / "run"
    p = forks.run(
        "dmd2.py",
        "--teacher",
        folders(name),
        "--prompts",
        tmp_path / "prompts.txt",
        "--cache-prompts",
        tmp_path / "cache",
        "--nfe",
        nfe,
        "--cfg",
        3,
        "--batch",
        4,
        "--smoke",
        "--lr",
        0.02,
        "--warmup",
        0,
        "--ratio",
        1,
        "--out",
        out,
        *flags.split(),
    )
    assert "Traceback" not in p.err and ("of the teacher's, frozen" in p.out) == bool(flags)
    args = evaluation.parse_args([str(out), "--cache-prompts", str(tmp_path / "cache")])
    student, _, info, teacher, _ = evaluation.load_student(out, args, {})
    same_picture(
        name,
        nfe,
        teacher,
        student,
        out / "student",
        folders,
        SNIPPETS[name, int(bool(flags))],
        info["sampler"],
    )
    state = torch.load(out / "ckpt" / "it-00000003.pt", weights_only=True)["state"]
    if flags:
        assert all(".lora_" in k for k in state["student"]) and any(
            ".lora_" in k for k in state["critic"]
        ) == ("--lora-fake" in flags)
        assert sum(v.numel() for v in state["student"].values()) < 0.2 * sum(
            p.numel() for p in teacher.parameters()
        )


SCRIPTS = [s for s in ALL if s != "nct"]  # which refuses it
LORA_FLAGS = {
    s: ["--lora", 4] + ([] if s in ("boot", "twinflow", "sana_sprint") else ["--lora-fake", 3])
    for s in SCRIPTS
}
MORE = {
    "dmd2": ["--gan", "--nfe", 2, "--ema", 1000],
    "phased_dmd": ["--phases", 2, "--phase-iters", 4, "--ema", 1000],
    "twinflow": ["--target-decay", 0.9, "--ema", 1000],
    "msd": ["--teacher", "toy-cond", "--students", 2, "--adm", 0.5, "--ema", 1000, "--ratio", 2],
    "flowmap": ["--cfg-range", 0.5, 2, "--ema", 1000],
}
each = pytest.mark.parametrize(
    "script", [s if s == "dmd2" else pytest.param(s, marks=slow) for s in SCRIPTS]
)


@each
def test_resume(script, forks, tmp_path):
    """N + N = 2N, bit for bit."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run = lambda out, *more: forks.run(
        f"{script}.py",
        *QUICK,
        *LORA_FLAGS[script],
        *MORE.get(script, []),
        "--save-every",
        7,
        "--out",
        out,
        *more,
    )
    run(whole, "--iters", 14)
    if script == "msd":  # its plan follows from --iters
        shutil.copytree(whole, halves)
        (halves / "ckpt" / "it-00000014.pt").unlink()
    else:
        run(halves, "--iters", 7)
    assert "resumed it-00000007.pt" in run(halves, "--iters", 14, "--resume").out
    same(whole, halves, 14)
    if script == "dmd2":
        for change, says in (
            (["--lora-targets", "inp"], "does not fit the networks of these flags"),
            (["--lora-alpha", 2], "expected a run .*-alpha 2"),
        ):
            p = forks.run(
                f"{script}.py",
                *QUICK,
                *MORE[script],
                "--lora",
                4,
                "--lora-fake",
                3,
                *change,
                "--out",
                halves,
                "--iters",
                20,
                "--resume",
                code=2,
            )
            assert re.fullmatch(rf"dmd2.py: --resume .*{says}.*\n", p.err), p.err


@each
def test_two_processes_equal_one(script, forks, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    args = [
        f"{script}.py",
        *QUICK,
        *LORA_FLAGS[script],
        *MORE.get(script, []),
        "--iters",
        5,
        "--log-every",
        1,
        "--out",
    ]
    forks.run(*args, one)
    ps = processes(forks, 2, *args, two)
    assert [p.wait() for p in ps] == [0, 0], ps[0].err + ps[1].err
    close(one, two, 5)


@slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_mnist(script, forks, tmp_path):
    """Three iterations on the embedded transformer, then eval.py on what they left."""
    out, time = tmp_path / "run", ["--time", "native"] if script == "sana_sprint" else []
    forks.run(
        f"{script}.py",
        "--teacher",
        "mnist",
        "--smoke",
        "--batch",
        16,
        *time,
        *LORA_FLAGS[script],
        "--out",
        out,
    )
    files = sorted((out / "student").rglob("*.safetensors"))
    assert files and {f.name for f in files} <= {lora.FILE, "extras.safetensors"}
    p = forks.run("eval.py", out, "--n", 100, "--out", tmp_path / "eval.jsonl")
    measured, trained = (
        json.loads(p.out.splitlines()[-1]),
        json.loads((out / "metrics.json").read_text()),
    )
    assert measured["method"] == trained["method"] == script and measured["n"] == 100
