"""dmd2.py --smoke on every kind of tiny teacher: whole or as LoRA, one and four steps, with and without the GAN term; the export in plain diffusers gives our
sampler's samples. Combinations that other files run (test_lora.py, test_teachers*.py: most without GAN) are not run again."""

import json

import pytest
import test_lora
import test_teachers_flow
import torch
from helpers import pipelines
from safetensors.torch import load_file
from test_captions import fill
from test_teachers import PROMPTS, SIZE, folders  # noqa: F401  the fixture: tiny pipelines
from test_teachers_class import pictures  # noqa: F401  the fixture: a folder of classes

import dmd2
from common.teachers.load import load_model, load_teacher

CLASSES = dict(dit="DiTTransformer2DModel", edm="UNet2DModel")
LORA = ["--lora", 4, "--lora-fake", 2]
FAST = [("qwen", 4, [], True), ("wan", 1, LORA, True), ("dit", 4, LORA, True)]
RUNS = [
    (name, nfe, lora, True)
    for name in ("qwen", "dit", "edm")
    for nfe in (1, 4)
    for lora in ([], LORA)
]
RUNS += [
    (name, nfe, lora, True)
    for name in ("sd15", "sdxl", "sd3", "sana")
    for nfe, lora in ((1, []), (4, LORA))
]
RUNS += [
    ("flux", 1, [], True),
    ("flux", 4, LORA, True),
    ("zimage", 4, [], True),
    ("zimage", 1, LORA, True),
    ("wan", 4, [], True),
    ("wan22", 1, [], True),
]
RUNS += [
    (name, nfe, LORA, False) for name in CLASSES for nfe in (1, 4)
]  # those without GAN that no other file has
RUNS += [
    (name, nfe, lora, False)
    for name, nfe, lora in (
        ("sd15", 4, []),
        ("sdxl", 1, []),
        ("sd3", 1, []),
        ("sana", 1, []),
        ("sana", 1, LORA),
    )
]
RUNS = FAST + [pytest.param(*r, marks=pytest.mark.slow) for r in RUNS if r not in FAST]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Prompts, images with captions and everything that is encoded: once for all runs."""
    home = tmp_path_factory.mktemp("smoke")
    (home / "flow.txt").write_text("\n".join(PROMPTS))
    (home / "readme.txt").write_text(
        "\n".join(test_lora.PROMPTS)
    )  # the first is that of README's lines
    fill(home / "captioned")
    return home


@pytest.mark.parametrize(
    "name, nfe, lora, gan",
    RUNS,
    ids=lambda v: (
        {True: "gan", False: "plain"}.get(v)
        if isinstance(v, bool)
        else "lora"
        if v == LORA
        else "full"
        if v == []
        else None
    ),
)
def test_dmd2(name, nfe, lora, gan, folders, pictures, place, scripts, tmp_path):  # noqa: F811
    scripts.load(*pipelines.MODULES, "peft", "diffusers.loaders.peft")
    folder, size = (
        folders(name),
        dict(SIZE.get(name, {})) | (dict(frames=1) if name.startswith("wan") and gan else {}),
    )  # pictures are all the real data it has
    flow = name in test_teachers_flow.NAMES
    text = (
        {} if name in CLASSES else dict(prompts=str(place / ("flow.txt" if flow else "readme.txt")))
    )
    args = [
        "--teacher",
        folder,
        "--cache-prompts",
        place / "cache",
        "--nfe",
        nfe,
        "--cfg",
        1 if name == "edm" else 3,
        "--batch",
        4,
        "--warmup",
        0,
        "--ratio",
        1,
        *lora,
    ]
    args += [f for k, v in (size | text).items() for f in (f"--{k}", v)] + [
        "--lr",
        2e-2 if lora else 1e-3,
        "--lr-fake",
        1e-3,
    ]
    args += ["--gan", "--data", pictures if name in CLASSES else place / "captioned"] * gan
    p = scripts.run("dmd2.py", *args, "--smoke", "--out", tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert (
        len(log) == 3
        and "Traceback" not in p.err
        and ("of the teacher's, frozen" in p.out) == bool(lora)
        and (tmp_path / "run" / "samples" / "00000003.png").exists()
    )
    assert all(line["skipped"] == 0 and ({"gen", "cls"} <= line.keys()) == gan for line in log)
    head = [
        v
        for k, v in torch.load(tmp_path / "run" / "ckpt" / "it-00000003.pt", weights_only=True)[
            "state"
        ]["critic"].items()
        if k.startswith("head.")
    ]
    assert bool(head) == gan and all(v.isfinite().all() for v in head)
    if gan:  # the head learns to tell them apart: at the start its logits are near 0
        assert (
            log[0]["cls"] == pytest.approx(1.39, abs=0.7)
            and log[2]["logit_real"] != log[0]["logit_real"]
        )
    home = tmp_path / "run" / "student"
    info = json.loads((home / "distill.json").read_text())
    teacher = load_teacher(
        str(folder), text=dict(say=lambda *a: None, cache=place / "cache", **size, **text)
    )
    student = load_model(home, info["model"], teacher)
    if name in CLASSES:
        in_diffusers(name, nfe, teacher, student, home, folder, info)
    elif flow:
        test_teachers_flow.same_latents(
            name, nfe, teacher, student, home, folders, info["sampler"], bool(lora)
        )
    else:
        test_lora.same_picture(
            name,
            nfe,
            teacher,
            student,
            home,
            folders,
            test_lora.SNIPPETS[name, int(bool(lora))],
            info["sampler"],
        )


@torch.no_grad()
def in_diffusers(name, nfe, teacher, student, home, folder, info):
    """Networks that are not, or not always, part of a pipeline: loaded alone, adapters by peft."""
    import diffusers
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    cls, lora = getattr(diffusers, CLASSES[name]), info["model"].get("lora")
    net = (
        cls.from_pretrained(home)
        if not lora
        else cls.from_pretrained(folder, subfolder="transformer" if name == "dit" else "")
    )
    if lora:
        inject_adapter_in_model(
            LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["targets"]),
            net,
        )
        left = set_peft_model_state_dict(
            net,
            {
                k.removeprefix("transformer."): v
                for k, v in load_file(home / "pytorch_lora_weights.safetensors").items()
            },
        )
        assert not left.unexpected_keys
    z, cond = (
        torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1)),
        teacher.encode([0, 1]),
    )
    draw = lambda model: dmd2.sample(
        model, z, cond, nfe, lambda: torch.zeros_like(z), **info["sampler"]
    )
    ours = draw(student)
    assert (ours - draw(teacher.with_network(net.eval()))).norm() < 1e-4 * ours.norm() and (
        ours - draw(teacher)
    ).norm() > 1e-3 * ours.norm()
