"""dmd2.py --smoke on every kind of tiny teacher: whole or as LoRA, one and four steps, with and
without the GAN term. The exported student in plain diffusers gives the samples of our sampler.

Combinations that test_lora.py and test_teachers*.py run (most without the GAN term) are left out.
"""

import dataclasses
import json

import diffusers
import pytest
import torch
from helpers import pipelines, readme
from helpers.cards import same_as_card
from helpers.teachers import NEWER, PROMPTS, SIZE, write_captioned
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file

import dmd2
from common.teachers.load import load_model, load_teacher

CLASS_CONDITIONAL = {"dit": "DiTTransformer2DModel", "edm": "UNet2DModel"}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    nfe: int
    lora: bool
    gan: bool

    def __str__(self):
        lora = "lora" if self.lora else "full"
        gan = "gan" if self.gan else "plain"
        return f"{self.name}-{self.nfe}-{lora}-{gan}"


def cases(text):
    """Cases of a table with the columns name, steps, full or lora, gan or plain."""
    found = []
    for line in text.split("\n"):
        if line.strip():
            name, nfe, lora, gan = line.split()
            found.append(Case(name, int(nfe), lora == "lora", gan == "gan"))
    return found


FAST = cases("""
    qwen    4   full    gan
    wan     1   lora    gan
    dit     4   lora    gan
""")
SLOW = cases("""
    qwen    1   full    gan
    qwen    1   lora    gan
    qwen    4   lora    gan
    dit     1   full    gan
    dit     1   lora    gan
    dit     4   full    gan
    edm     1   full    gan
    edm     1   lora    gan
    edm     4   full    gan
    edm     4   lora    gan
    sd15    1   full    gan
    sd15    4   lora    gan
    sdxl    1   full    gan
    sdxl    4   lora    gan
    sd3     1   full    gan
    sd3     4   lora    gan
    sana    1   full    gan
    sana    4   lora    gan
    flux    1   full    gan
    flux    4   lora    gan
    chroma  4   full    gan
    hunyuan 1   lora    gan
    lumina  4   full    gan
    klein   1   lora    gan
    zimage  4   full    gan
    zimage  1   lora    gan
    wan     4   full    gan
    wan22   1   full    gan
    dit     1   lora    plain
    dit     4   lora    plain
    edm     1   lora    plain
    edm     4   lora    plain
    sd15    4   full    plain
    sdxl    1   full    plain
    sd3     1   full    plain
    sana    1   full    plain
    sana    1   lora    plain
""")
RUNS = FAST + [pytest.param(case, marks=pytest.mark.slow) for case in SLOW]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folder with prompts, images with captions, and the cache of all encodings."""
    home = tmp_path_factory.mktemp("smoke")
    (home / "flow.txt").write_text("\n".join(PROMPTS))
    (home / "readme.txt").write_text("\n".join(readme.PROMPTS))  # starts with README's prompt
    write_captioned(home / "captioned")
    return home


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_dmd2(case, folders, pictures, inputs, scripts, tmp_path):
    scripts.load(*pipelines.MODULES, "peft", "diffusers.loaders.peft")
    folder = folders(case.name)
    text = text_options(case, inputs)
    out = tmp_path / "run"
    flags = flags_of(case, pictures, inputs, text)
    process = scripts.run("dmd2.py", "--teacher", folder, *flags, "--smoke", "--out", out)
    assert "Traceback" not in process.err
    assert ("of the teacher's, frozen" in process.out) == case.lora
    assert (out / "samples" / "00000003.png").exists()
    check_log(case, out)
    check_head(case, out)

    home = out / "student"
    info = json.loads((home / "distill.json").read_text())
    loading = dict(say=lambda *line: None, cache=inputs / "cache", **text)
    teacher = load_teacher(str(folder), text=loading)
    student = load_model(home, info["model"], teacher)
    nfe, sampler = case.nfe, info["sampler"]
    if case.name in CLASS_CONDITIONAL:
        check_in_diffusers(case, teacher, student, home, folder, info)
    elif case.name in NEWER:
        same_as_card(home, teacher, student, dmd2.sample, nfe, PROMPTS[0], 0, **sampler)
    else:
        readme.same_picture(case.name, nfe, teacher, student, home, case.lora, sampler)


def text_options(case, inputs):
    """{flag: value} of what a text-to-image teacher is told."""
    options = dict(SIZE.get(case.name, {}))
    if case.name.startswith("wan") and case.gan:
        options["frames"] = 1  # the real data are pictures
    if case.name in NEWER:
        options["prompts"] = str(inputs / "flow.txt")
    elif case.name not in CLASS_CONDITIONAL:
        options["prompts"] = str(inputs / "readme.txt")
    return options


def flags_of(case, pictures, inputs, text):
    flags = ["--cache-prompts", inputs / "cache", "--nfe", case.nfe]
    for name, value in text.items():
        flags += [f"--{name}", value]
    flags += ["--cfg", 1 if case.name == "edm" else 3]
    flags += ["--batch", 4, "--warmup", 0, "--ratio", 1]
    flags += ["--lr", 2e-2 if case.lora else 1e-3, "--lr-fake", 1e-3]
    if case.lora:
        flags += ["--lora", 4, "--lora-fake", 2]
    if case.gan:
        data = pictures if case.name in CLASS_CONDITIONAL else inputs / "captioned"
        flags += ["--gan", "--data", data]
    return flags


def check_log(case, out):
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(log) == 3
    for line in log:
        assert line["skipped"] == 0
        assert ("gen" in line) == case.gan
        assert ("cls" in line) == case.gan
    if case.gan:
        # at the start the logits are near 0, and the loss is 2 ln 2; then the head learns
        assert log[0]["cls"] == pytest.approx(1.39, abs=0.7)
        assert log[2]["logit_real"] != log[0]["logit_real"]


def check_head(case, out):
    checkpoint = torch.load(out / "ckpt" / "it-00000003.pt", weights_only=True)
    critic = checkpoint["state"]["critic"]
    head = [value for name, value in critic.items() if name.startswith("head.")]
    assert bool(head) == case.gan
    for value in head:
        assert value.isfinite().all()


@torch.no_grad()
def check_in_diffusers(case, teacher, student, home, folder, info):
    """Networks that are not always part of a pipeline are loaded alone, adapters by peft."""
    network = getattr(diffusers, CLASS_CONDITIONAL[case.name])
    if case.lora:
        part = "transformer" if case.name == "dit" else ""
        net = network.from_pretrained(folder, subfolder=part)
        load_adapters(net, home, info["model"]["lora"])
    else:
        net = network.from_pretrained(home)

    z = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1))
    cond = teacher.encode([0, 1])

    def sample(model):
        return dmd2.sample(model, z, cond, case.nfe, lambda: torch.zeros_like(z), **info["sampler"])

    ours = sample(student)
    theirs = sample(teacher.with_network(net.eval()))
    untrained = sample(teacher)
    assert (ours - theirs).norm() < 1e-4 * ours.norm()
    assert (ours - untrained).norm() > 1e-3 * ours.norm()


def load_adapters(net, home, lora):
    config = LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["targets"])
    inject_adapter_in_model(config, net)
    weights = {}
    for name, value in load_file(home / "pytorch_lora_weights.safetensors").items():
        weights[name.removeprefix("transformer.")] = value
    result = set_peft_model_state_dict(net, weights)
    assert not result.unexpected_keys
