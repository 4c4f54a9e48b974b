"""common/lora.py: adapters on the teacher's own weights, in every script, exported for diffusers.

Also full students in plain diffusers.
"""

import json
import re
import shutil

import pytest
import torch
from helpers import pipelines
from helpers.cards import write_as_run
from helpers.cases import SCRIPTS
from helpers.readme import PROMPTS, same_picture
from helpers.runs import QUICK, close, run_processes, same
from helpers.teachers import load
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dmd2
import eval as evaluation
from common import lora
from common.errors import UserError
from common.files import ROOT
from common.teachers.load import load_model, load_teacher
from tools.rows import load_student
from training.ema import EMA

NAMES = ["sd15", "sdxl", "sd3", "sana", "mnist", "toy"]
ATTENTION = dict(rank=4, alpha=4.0, targets=None, seed=0, flag="--lora")  # --lora 4
CONVOLUTIONS = dict(ATTENTION, rank=2, alpha=5.0, targets=["conv1", "time_emb_proj", "to_v"])
slow = pytest.mark.slow


def teacher_of(name, folders, **kw):
    return load_teacher(name) if name in ("mnist", "toy") else load(folders, name, **kw)


def inputs(model, n=2, seed=0):
    """x_t, alpha, sigma, cond."""
    z = torch.randn(n, *model.shape, generator=torch.Generator().manual_seed(seed))
    return z, 0.6, 0.8, model.encode(torch.arange(n))


def scramble(student, seed=0, scale=0.3):
    """Adds noise to all weights, as after a long training: a swapped or missing one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in student.parameters():
            p += scale * torch.randn(p.shape, generator=generator)
    return student


def memory(tensors):
    """Where in memory the tensors are."""
    return {t.data_ptr() for t in tensors}


def saved_model(folder):
    return json.loads((folder / "distill.json").read_text())["model"]


# ---- adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_starts_as_the_teacher_on_the_teachers_own_weights(name, folders):
    teacher = teacher_of(name, folders)
    student, args = teacher.copy(ATTENTION), inputs(teacher)
    if name == "toy":
        teacher.exact = False  # the network that its copies start from
    with torch.no_grad():
        assert torch.equal(student(*args), teacher(*args))

    # checkpoints hold nothing of the teacher
    names = set(student.state_dict())
    assert names
    assert [key for key in names if ".lora_" not in key] == []
    assert names == {key for key, _ in student.named_parameters()}

    # each of the teacher's weights has its place in the student, and there is no copy of one
    theirs = memory(teacher.parameters())
    assert memory(student.base) == theirs
    assert not memory(student.parameters()) & theirs
    attributes = [v for m in student.net.modules() for v in vars(m).values() if torch.is_tensor(v)]
    assert memory(attributes) == theirs


@pytest.mark.parametrize("name", NAMES)
def test_training_changes_all_adapters_and_nothing_else(name, folders):
    teacher = teacher_of(name, folders)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student, args = teacher.copy(ATTENTION), inputs(teacher)
    with torch.no_grad():
        teachers_estimate, students_first = teacher(*args), student(*args)

    opt = torch.optim.SGD(student.requires_grad_(True).parameters(), lr=10.0)
    for _ in range(2):  # B is 0 at first, so A moves in the second step
        (student(*args) - args[0]).square().mean().backward()
        assert all(p.grad is not None for p in student.parameters())
        opt.step()
        opt.zero_grad()
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())

    started = dict(teacher.copy(ATTENTION).named_parameters())
    still = [key for key, p in student.named_parameters() if torch.equal(p, started[key])]
    if name == "sd3":  # its last block computes a query of the text that nothing reads
        assert len(still) == 2
        assert all("transformer_blocks.1.attn.add_q_proj" in key for key in still)
    else:
        assert still == []

    with torch.no_grad():
        assert torch.equal(teacher(*args), teachers_estimate)
        assert not torch.equal(student(*args), students_first)
    after = teacher.state_dict()
    assert after.keys() == before.keys()
    assert [key for key in after if not torch.equal(after[key], before[key])] == []


def test_each_network_has_its_own_adapters(folders):
    teacher = teacher_of("sdxl", folders)
    student, critic = teacher.copy(ATTENTION), teacher.copy(ATTENTION)
    ema, args = EMA(student, 10), inputs(teacher)
    first = student(*args)
    scramble(student)
    for net in (critic, ema.model):
        assert torch.equal(net(*args), first)
        assert memory(net.base) == memory(student.base)

    ema.update(100)  # a half-life of 5 images, 100 images: the average is the new weights
    with torch.no_grad():
        assert torch.allclose(ema.model(*args), student(*args), atol=1e-4)
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert torch.equal(critic(*args), first)


def test_the_seed_chooses_the_adapters_and_a_state_replaces_them(folders):
    teacher = teacher_of("sdxl", folders)
    student, args = scramble(teacher.copy(ATTENTION)), inputs(teacher)
    key = next(iter(student.state_dict()))
    same_seed, other_seed = teacher.copy(ATTENTION), teacher.copy(dict(ATTENTION, seed=1))
    again = teacher.copy(ATTENTION)
    assert torch.equal(same_seed.state_dict()[key], again.state_dict()[key])
    assert not torch.equal(same_seed.state_dict()[key], other_seed.state_dict()[key])
    other_seed.load_state_dict(student.state_dict())
    assert torch.equal(other_seed(*args), student(*args))


def test_bf16_base(folders):
    """On a bf16 teacher, adapters and gradients are float32; the weights go where it goes."""
    teacher = teacher_of("sd3", folders, dtype=torch.bfloat16)
    student, args = teacher.copy(ATTENTION), inputs(teacher)
    assert torch.equal(student(*args), teacher(*args))
    assert {p.dtype for p in student.base} == {torch.bfloat16}
    student(*args).square().sum().backward()
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in student.parameters()} == {torch.float32}
    teacher.to(torch.float64)
    assert {p.dtype for p in student.base} == {torch.float64}


def test_scalar_conditions_are_trained_whole(folders):
    """The inputs that TwinFlow, flow maps and SANA-Sprint add: modules, saved with the adapters."""
    student = teacher_of("sana", folders).copy(ATTENTION).extend("r")
    added = {key for key, _ in student.named_parameters() if key.startswith("extras.r.")}
    assert added
    assert added < set(student.state_dict())
    assert all(p.requires_grad for p in student.parameters())


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, spec",
    [*[(name, ATTENTION) for name in NAMES], ("sd15", CONVOLUTIONS), ("sdxl", CONVOLUTIONS)],
    ids=[*NAMES, "sd15-convolutions", "sdxl-convolutions"],
)
def test_file(name, spec, folders, tmp_path):
    """A student that is saved and loaded is the same, from a file of adapters only."""
    teacher = teacher_of(name, folders)
    student, args = scramble(teacher.copy(spec).extend("r")), inputs(teacher)
    args[3]["r"] = torch.rand(2)
    student.save(tmp_path, dict(method="dmd2"))
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {lora.FILE, "extras.safetensors", "distill.json"}

    with safe_open(tmp_path / lora.FILE, "pt") as f:
        keys = list(f.keys())
    unet = name in ("sd15", "sdxl")
    kohya = r"lora_unet_\w+\.(lora_(down|up)\.weight|alpha)"
    pattern = kohya if unet else r"transformer\..*\.lora_[AB]\.weight"
    assert [key for key in keys if not re.fullmatch(pattern, key)] == []
    assert len(keys) == len(student.net.state_dict()) * (3 if unet else 2) // 2

    info = saved_model(tmp_path)
    assert info["lora"]["rank"] == spec["rank"]
    assert info["lora"]["alpha"] == spec["rank"]  # alpha of the file; ours is in B
    toys_layers = ["inp", "hidden.0", "hidden.1"]
    assert set(info["lora"]["targets"]) <= {*lora.LAYERS, *CONVOLUTIONS["targets"], *toys_layers}

    again = load_model(tmp_path, info, teacher)
    with torch.no_grad():
        expected, found = student(*args), again(*args)
    if spec["alpha"] == spec["rank"]:
        assert torch.equal(found, expected)
    assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max())
    assert memory(again.base) == memory(teacher.parameters())


@pytest.mark.parametrize(
    "name, as_lora", [("sdxl", False), ("sdxl", True), ("sd3", False), ("sana", True)]
)
def test_readme(name, as_lora, folders, tmp_path):
    teacher = load(folders, name, PROMPTS)
    spec = dict(ATTENTION, alpha=3.0) if as_lora else None
    student = scramble(teacher.copy(spec), scale=0.2 if as_lora else 0.02)
    write_as_run(tmp_path, student, teacher, "dmd2", dmd2, 4, {})
    same_picture(name, 4, teacher, student, tmp_path, as_lora)


def test_a_lora_of_mnist_in_diffusers_and_peft(tmp_path):
    from diffusers import DiTTransformer2DModel
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    teacher = load_teacher("mnist")
    student = scramble(teacher.copy(dict(ATTENTION, alpha=3.0)))
    student.save(tmp_path, {})
    spec = saved_model(tmp_path)["lora"]
    config = LoraConfig(r=spec["rank"], lora_alpha=spec["alpha"], target_modules=spec["targets"])
    net = DiTTransformer2DModel.from_pretrained(teacher.folder).eval()
    inject_adapter_in_model(config, net)
    tensors = load_file(tmp_path / lora.FILE)
    tensors = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    set_peft_model_state_dict(net, tensors)

    z, _, _, cond = inputs(teacher)
    with torch.no_grad():
        velocity = net(z, timestep=torch.full((2,), 1000.0), class_labels=cond["labels"]).sample
        expected = student(z, 0.0, 1.0, cond)
    assert torch.allclose(z - velocity, expected, atol=1e-5 * expected.abs().max())
    assert not torch.allclose(expected, teacher(z, 0.0, 1.0, cond), atol=1e-2)


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
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
def test_layers_that_do_not_fit(change, message, folders):
    with pytest.raises(UserError, match=message) as e:
        teacher_of("sd15", folders).copy(dict(ATTENTION, **change))
    assert "\n" not in str(e.value)


def test_a_network_without_attention_is_refused():
    message = (
        "--lora 4: expected a network with attention, found Sequential; .*--lora-targets, e.g. 0"
    )
    with pytest.raises(UserError, match=message):
        lora.add_adapters(torch.nn.Sequential(torch.nn.Linear(8, 8)), ATTENTION)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--lora -1", "--lora: expected a rank of at least 1, found -1"),
        ("--lora-fake -1", "--lora-fake: expected a rank"),
        ("--lora-alpha 2", "--lora-alpha and"),
        ("--lora 4 --lora-alpha 0", "--lora-alpha: expected a number > 0"),
        ("--lora-targets to_q", "--lora-targets need --lora or --lora-fake"),
        ("--lora x", "--lora"),
    ],
)
def test_flags(flags, message, capsys):
    with pytest.raises((UserError, SystemExit)) as e:
        dmd2.parse_args(flags.split())
    assert re.search(message, f"{e.value} {capsys.readouterr().err}")


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("boot", "--lora-fake 4", "unrecognized arguments: --lora-fake 4"),
        ("twinflow", "--lora-fake 4", "unrecognized arguments: --lora-fake 4"),
        ("sana_sprint", "--lora-fake 4", "unrecognized arguments: --lora-fake 4"),
        ("msd", "--lora 4 --small width=16", "--small with --lora: adapters"),
        ("dmd2", "--lora-fake 4 --small-fake depth=2", "--small-fake with --lora-fake: adapters"),
        ("twinflow", "--small depth=2", "unrecognized arguments: --small"),
    ],
)
def test_contradictions(script, flags, message, capsys):
    with pytest.raises((UserError, SystemExit)) as e:
        __import__(script).parse_args(["--teacher", "toy", *flags.split()])
    assert re.search(message, f"{e.value} {capsys.readouterr().err}")


def test_files_that_do_not_fit(folders, tmp_path):
    teacher = teacher_of("sd15", folders)
    teacher.copy(ATTENTION).save(tmp_path, {})
    info = saved_model(tmp_path)

    def refused(message, info=info, teacher=teacher):
        with pytest.raises(UserError, match=message) as e:
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
    too_large = dict(info["lora"], rank=99)
    refused("rank 99: expected a rank of at most", dict(info, lora=too_large))

    tensors = load_file(tmp_path / lora.FILE)
    key = next(key for key in tensors if key.endswith(".weight"))
    others = {name: tensor for name, tensor in tensors.items() if name != key}
    for content, message in (
        (others, "is missing"),
        (others | {key: torch.zeros(1)}, "expected shape"),
        (tensors | {"unet.x": torch.zeros(1)}, "1 tensors .* unet.x"),
    ):
        save_file(content, tmp_path / lora.FILE)
        refused(f"{lora.FILE}: .*{message}")
    (tmp_path / lora.FILE).write_bytes(b"x")
    refused(f"{lora.FILE}: expected a safetensors file")


# ---- scripts -------------------------------------------------------------------------------------

TO_DIFFUSERS = [
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
]


@pytest.fixture
def forks(scripts):
    scripts.load(*pipelines.MODULES, "peft", "diffusers.loaders.peft")
    return scripts


@pytest.mark.parametrize(
    "name, nfe, flags",
    [
        ("sdxl", 4, "--lora 4 --lora-fake 2 --grad-checkpoint"),
        *[pytest.param(*case, marks=slow) for case in TO_DIFFUSERS],
    ],
)
def test_dmd2_to_diffusers(name, nfe, flags, folders, forks, tmp_path):
    """From the command line to plain diffusers; eval.py loads the same student.

    emoji is the teacher that is shipped.
    """
    teacher_folder = ROOT / "assets" / "emoji" if name == "emoji" else folders(name)
    prompts, cache, out = tmp_path / "prompts.txt", tmp_path / "cache", tmp_path / "run"
    prompts.write_text("\n".join(PROMPTS))
    args = ["--teacher", teacher_folder, "--prompts", prompts, "--cache-prompts", cache]
    args += ["--nfe", nfe, "--cfg", 3, "--batch", 4, "--lr", 0.02, "--warmup", 0, "--ratio", 1]
    process = forks.run("dmd2.py", *args, "--smoke", "--out", out, *flags.split())
    assert "Traceback" not in process.err
    assert ("of the teacher's, frozen" in process.out) == bool(flags)

    args = evaluation.parse_args([str(out), "--cache-prompts", str(cache)])
    loaded = load_student(out, args, {})
    student, info, teacher = loaded.model, loaded.info, loaded.teacher
    home, sampler = out / "student", info["sampler"]
    same_picture(name, nfe, teacher, student, home, bool(flags), sampler)

    state = torch.load(out / "ckpt" / "it-00000003.pt", weights_only=True)["state"]
    if flags:
        assert all(".lora_" in key for key in state["student"])
        assert any(".lora_" in key for key in state["critic"]) == ("--lora-fake" in flags)
        trained = sum(value.numel() for value in state["student"].values())
        assert trained < 0.2 * sum(p.numel() for p in teacher.parameters())


WITH_LORA = [script for script in SCRIPTS if script != "nct"]  # which has no --lora
WITHOUT_CRITIC = ["boot", "twinflow", "sana_sprint"]
FLAGS = {script: "--lora 4 --lora-fake 3" for script in WITH_LORA}
FLAGS |= {script: "--lora 4" for script in WITHOUT_CRITIC}
FLAGS["dmd2"] += " --gan --nfe 2 --ema 1000"
FLAGS["phased_dmd"] += " --phases 2 --phase-iters 4 --ema 1000"
FLAGS["twinflow"] += " --target-decay 0.9 --ema 1000"
FLAGS["msd"] += " --teacher toy-cond --students 2 --adm 0.5 --ema 1000 --ratio 2"
FLAGS["flowmap"] += " --cfg-range 0.5 2 --ema 1000"
each = pytest.mark.parametrize(
    "script", [s if s == "dmd2" else pytest.param(s, marks=slow) for s in WITH_LORA]
)


@each
def test_resume(script, forks, tmp_path):
    """N + N = 2N, bit for bit."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"

    def run(out, *more):
        args = [*QUICK, *FLAGS[script].split(), "--save-every", 7, "--out", out, *more]
        return forks.run(f"{script}.py", *args)

    run(whole, "--iters", 14)
    if script == "msd":  # its plan follows from --iters
        shutil.copytree(whole, halves)
        (halves / "ckpt" / "it-00000014.pt").unlink()
    else:
        run(halves, "--iters", 7)
    assert "resumed it-00000007.pt" in run(halves, "--iters", 14, "--resume").out
    same(whole, halves, 14)


def test_resume_with_other_adapters_is_refused(forks, tmp_path):
    args = ["dmd2.py", *QUICK, *FLAGS["dmd2"].split(), "--out", tmp_path]
    forks.run(*args, "--iters", 7)
    for change, message in (
        (["--lora-targets", "inp"], "does not fit the networks of these flags"),
        (["--lora-alpha", 2], "expected a run .*-alpha 2"),
    ):
        process = forks.run(*args, *change, "--iters", 14, "--resume", code=2)
        assert re.fullmatch(rf"dmd2.py: --resume .*{message}.*\n", process.err), process.err


@each
def test_two_processes_equal_one(script, forks, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    args = [f"{script}.py", *QUICK, *FLAGS[script].split(), "--iters", 5, "--log-every", 1]
    forks.run(*args, "--out", one)
    run_processes(forks, 2, *args, "--out", two)
    close(one, two, 5)


@slow
@pytest.mark.parametrize("script", WITH_LORA)
def test_mnist(script, forks, tmp_path):
    """Three iterations on the embedded transformer, then eval.py on what they left."""
    out = tmp_path / "run"
    flags = ["--lora", 4] if script in WITHOUT_CRITIC else ["--lora", 4, "--lora-fake", 3]
    if script == "sana_sprint":
        flags += ["--time", "native"]
    args = ["--teacher", "mnist", "--smoke", "--batch", 16, *flags]
    forks.run(f"{script}.py", *args, "--out", out)
    files = {path.name for path in (out / "student").rglob("*.safetensors")}
    assert files
    assert files <= {lora.FILE, "extras.safetensors"}

    process = forks.run("eval.py", out, "--n", 100, "--out", tmp_path / "eval.jsonl")
    measured = json.loads(process.out.splitlines()[-1])
    trained = json.loads((out / "metrics.json").read_text())
    assert measured["method"] == script
    assert trained["method"] == script
    assert measured["n"] == 100
