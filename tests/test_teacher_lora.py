"""common/teachers/teacher_lora.py: --teacher-lora, a LoRA that becomes part of the teacher.

Files are random factors for the tiny pipelines; what they do to weights and embeddings is compared
with `load_lora_weights` and `fuse_lora` of diffusers.
"""

import hashlib
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import cards
from helpers.teachers import copy_of, load, plain_pipeline, quiet
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dmd2
import eval as evaluation
import phased_dmd
import sample
from common import lora
from common.errors import UserError
from common.files import read_json
from common.routed import ByLevel
from common.teachers import whole
from common.teachers.load import load_model, load_pipeline, load_teacher
from common.teachers.students import network_of, read_student, start_from
from common.teachers.teacher_lora import HOME, TeacherLora, read_teacher_loras, split_scale
from tools import compare, page
from tools import export as export_module
from tools.cache import ResultCache
from tools.export import export
from tools.rows import load_student, student_row, teacher_row

KINDS = [
    "sd15",
    "sdxl",
    "sd3",
    "sana",
    "flux",
    "chroma",
    "flux2",
    "lumina",
    "qwen",
    "zimage",
    "wan",
]
WITH_TEXT = ["sd15", "sdxl", "sd3", "flux"]  # pipelines whose text encoders take LoRA
NETWORK = ("to_q", "to_v", "to_out.0", "conv1")
TEXT = ("q_proj", "v_proj", "fc1")
LORA = dict(rank=3, alpha=6, targets=None, seed=0, flag="--lora")
PROMPTS = ["a red heart", "dog", "pizza 7"]
SCALE = 0.7


def has_end(name, ends):
    return any(f".{name}".endswith(f".{end}") for end in ends)


def make_factors(model, prefix, ends, rank, seed):
    """Factors for the layers of a model whose names end so, with diffusers' names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        if weight is None or not has_end(name, ends):
            continue
        a = 0.3 * torch.randn(rank, *weight.shape[1:], generator=generator)
        ones = [1] * (weight.ndim - 2)  # of a convolution
        b = 0.3 * torch.randn(len(weight), rank, *ones, generator=generator)
        tensors |= {f"{prefix}{name}.lora_A.weight": a, f"{prefix}{name}.lora_B.weight": b}
    return tensors


def make_lora(folders, kind, path, text=False, rank=2, seed=1):
    """Writes a LoRA file for a tiny pipeline in diffusers' form -> its path."""
    teacher = load(folders, kind, PROMPTS)
    tensors = make_factors(teacher.net, f"{teacher.part}.", NETWORK, rank, seed)
    if text:
        pipe = teacher.text_pipeline(teacher.folder, torch.float32)
        for part in ("text_encoder", "text_encoder_2"):
            encoder = getattr(pipe, part, None)
            if encoder is not None and type(encoder).__name__.startswith("CLIP"):
                # the name of CLIP's layers in files, whatever transformers' version
                prefix = f"{part}." if hasattr(encoder, "text_model") else f"{part}.text_model."
                tensors |= make_factors(encoder, prefix, TEXT, rank, seed + 1)
    save_file(tensors, path)
    return path


def as_kohya(path, to, alpha):
    """The same file with the names of kohya's scripts. Its update is alpha / rank as large."""
    tensors = {}
    for name, v in load_file(path).items():
        layer, side = name.removesuffix(".weight").rsplit(".lora_", 1)
        part, _, layer = layer.partition(".")
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te"}[part]
        layer = f"{prefix}_{layer.replace('.', '_')}"
        tensors[f"{layer}.{'lora_down' if side == 'A' else 'lora_up'}.weight"] = v
        tensors[f"{layer}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, to)
    return to


def with_loras(folders, kind, *texts, **options):
    """The teacher of a tiny pipeline with --teacher-lora."""
    loras = read_teacher_loras([str(text) for text in texts])
    return load(folders, kind, PROMPTS, loras=loras, **options)


def fused_by_diffusers(folders, kind, *files):
    """The pipeline into which diffusers has added [(file, scale), ...]."""
    teacher = load(folders, kind, PROMPTS)
    pipe = plain_pipeline(teacher, folders(kind))
    for path, scale in files:
        pipe.load_lora_weights(str(path))
        parts = pipe.get_list_adapters()
        pipe.fuse_lora(components=list(parts), lora_scale=scale)
        pipe.unload_lora_weights()
    return pipe


def distance(a, b):
    """The largest difference of two dicts of tensors with the same names."""
    assert a.keys() == b.keys()
    with torch.no_grad():
        return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


def weights(teacher):
    return teacher.net.state_dict()


def embeddings(teacher):
    return {k: v for k, v in teacher.encode([0, 1, 2]).items() if v.is_floating_point()}


# ---- weights and embeddings ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_equals_diffusers(kind, folders, tmp_path):
    """Weights and embeddings, where the file has keys of text encoders."""
    path = make_lora(folders, kind, tmp_path / "style.safetensors", text=kind in WITH_TEXT)
    teacher = with_loras(folders, kind, f"{path}:{SCALE}")
    pipe = fused_by_diffusers(folders, kind, (path, SCALE))
    plain = load(folders, kind, PROMPTS)
    fused = getattr(pipe, teacher.part).state_dict()
    assert distance(weights(teacher), fused) < 1e-6
    assert distance(weights(plain), fused) > 0.1
    expected = teacher.embed(pipe, PROMPTS)
    found = embeddings(teacher)
    expected = {name: v for name, v in expected.items() if name in found}
    assert distance(found, expected) < 1e-5
    changed = distance(found, embeddings(plain))
    assert changed > 0.1 if kind in WITH_TEXT else changed == 0


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_kohya_files(kind, folders, tmp_path):
    """Their alpha is not their rank: the update is alpha / rank as large."""
    path = make_lora(folders, kind, tmp_path / "style.safetensors")
    kohya = as_kohya(path, tmp_path / "kohya.safetensors", alpha=1)  # rank 2
    teacher = with_loras(folders, kind, kohya)
    pipe = fused_by_diffusers(folders, kind, (kohya, 1.0))
    assert distance(weights(teacher), pipe.unet.state_dict()) < 1e-6
    half = with_loras(folders, kind, f"{path}:0.5")
    assert distance(weights(teacher), weights(half)) < 1e-6
    assert distance(weights(teacher), weights(load(folders, kind, PROMPTS))) > 0.1


def test_a_kohya_file_with_text_encoder_keys(folders, tmp_path):
    """All of its factors are used, or it is refused with their number."""
    path = make_lora(folders, "sd15", tmp_path / "style.safetensors", text=True)
    kohya = as_kohya(path, tmp_path / "kohya.safetensors", alpha=1)
    try:
        teacher = with_loras(folders, "sd15", kohya)
    except UserError as e:
        assert "factors for CLIPTextModel, of which" in str(e)
        return
    half = with_loras(folders, "sd15", f"{path}:0.5")
    assert distance(embeddings(teacher), embeddings(half)) < 1e-5


def test_the_scale(folders, tmp_path):
    path = make_lora(folders, "sd3", tmp_path / "style.safetensors")
    base, full, half = (
        weights(teacher)
        for teacher in (
            load(folders, "sd3", PROMPTS),
            with_loras(folders, "sd3", path),
            with_loras(folders, "sd3", f"{path}:0.5"),
        )
    )
    middle = {name: (base[name] + full[name]) / 2 for name in base}
    assert distance(half, middle) < 1e-6
    assert distance(half, full) > 0.1


def test_two_files(folders, tmp_path):
    first = make_lora(folders, "sd15", tmp_path / "a.safetensors", text=True)
    second = make_lora(folders, "sd15", tmp_path / "b.safetensors", text=True, rank=3, seed=8)
    teacher = with_loras(folders, "sd15", f"{first}:0.5", f"{second}:-1.5")
    pipe = fused_by_diffusers(folders, "sd15", (first, 0.5), (second, -1.5))
    assert distance(weights(teacher), pipe.unet.state_dict()) < 1e-6
    assert distance(embeddings(teacher), teacher.embed(pipe, PROMPTS)) < 1e-5


def test_students_of_a_rounded_teacher_start_from_fused_weights_in_float32(folders, tmp_path):
    path = make_lora(folders, "sd15", tmp_path / "style.safetensors")
    exact = with_loras(folders, "sd15", path)
    rounded = with_loras(folders, "sd15", path, dtype=torch.bfloat16)
    assert rounded.net.conv_in.weight.dtype == torch.bfloat16
    assert 0 < distance(weights(rounded), weights(exact)) < 0.02
    assert distance(rounded.copy().net.state_dict(), weights(exact)) == 0


def test_a_teacher_with_loras_has_no_measured_results(folders, tmp_path):
    """Those of its teacher.json are of the teacher without."""
    folder = copy_of(folders, "sd15", tmp_path)
    measured = [dict(protocol="p", nfe=16, cfg=1.5, fd=1.0)]
    evaluation = dict(protocol="p", measured=measured)
    (folder / "teacher.json").write_text(json.dumps(dict(evaluation=evaluation)))
    path = make_lora(folders, "sd15", tmp_path / "style.safetensors")
    text = dict(prompts=["dog"], cache=tmp_path, say=quiet)
    assert load_teacher(str(folder), text=text).evaluation == evaluation
    loras = [TeacherLora(path, 1.0)]
    teacher = load_teacher(str(folder), text=dict(text, loras=loras))
    assert teacher.evaluation == dict(protocol="p")


# ---- the cache of embeddings ---------------------------------------------------------------------


def cached(home):
    return {path.name for path in home.iterdir()}


def test_the_cache_of_embeddings(folders, tmp_path):
    """Another file or scale is another folder, unless the text encoders stay as they are."""
    cache = tmp_path / "cache"
    net_only = make_lora(folders, "sd15", tmp_path / "net.safetensors")
    text = make_lora(folders, "sd15", tmp_path / "text.safetensors", text=True)
    other = make_lora(folders, "sd15", tmp_path / "other.safetensors", text=True, seed=5)

    def load_with(*texts):
        loras = read_teacher_loras([str(t) for t in texts])
        folder = str(folders("sd15"))
        return load_pipeline(folder, prompts=PROMPTS, cache=cache, say=quiet, loras=loras)

    load_with()
    plain = cached(cache)
    load_with(net_only)
    assert cached(cache) == plain
    found = [embeddings(load_with(t)) for t in (text, f"{text}:0.5", other)]
    assert len(cached(cache) - plain) == 3
    assert distance(found[0], found[1]) > 0.01
    assert distance(found[0], found[2]) > 0.01
    load_with(net_only, text)  # the same change of the text encoders
    load_with(text)
    assert len(cached(cache) - plain) == 3
    assert distance(embeddings(load_with(text)), found[0]) == 0


# ---- what is refused -----------------------------------------------------------------------------


def changed(path, to, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, to)
    return to


def foreign_layer(tensors):
    for side in "AB":
        tensors[f"unet.nothing.to_q.lora_{side}.weight"] = torch.zeros(2, 2)


def half_of_a_pair(tensors):
    tensors.pop(min(tensors))


def wrong_shape(tensors):
    name = min(tensors)
    tensors[name] = torch.zeros(2, 3)


def wrong_rank(tensors):
    """Sides of a layer that do not go together."""
    name = next(name for name in tensors if name.endswith("to_q.lora_A.weight"))
    tensors[name] = torch.cat([tensors[name], tensors[name]])


def foreign_part(tensors):
    for side in "AB":
        tensors[f"text_encoder_9.to_q.lora_{side}.weight"] = torch.zeros(2, 2)


def dora(tensors):
    name = min(tensors).split(".lora_")[0]
    tensors[f"{name}.lora_magnitude_vector"] = torch.ones(16)


def loha(tensors):
    for name in list(tensors):
        tensors[name.replace("lora_A.weight", "hada_w1_a")] = tensors.pop(name)


def whole_weights(tensors):
    tensors["unet.conv_in.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    "change, message",
    [
        (foreign_layer, r"found 1 of \d+ layers that it does not have, the first is unet.nothing"),
        (foreign_part, r"found 1 of \d+ layers that it does not have, the first is text_encoder_9"),
        (half_of_a_pair, "expected two factors for layer unet.*, found one"),
        (wrong_shape, r"expected factors for the weight \[.*\] of layer unet.*, found some for"),
        (wrong_rank, "that fit|expected"),
        (dora, r"found 1 of \d+ tensors that are something else, the first is unet.*magnitude"),
        (loha, r"tensors that are something else, the first is unet.*hada_w1_a"),
        (whole_weights, "found 1 of .* tensors that are something else, .* unet.conv_in.weight"),
    ],
)
def test_files_that_do_not_fit(change, message, folders, tmp_path):
    path = make_lora(folders, "sd15", tmp_path / "style.safetensors")
    spoilt = changed(path, tmp_path / "spoilt.safetensors", change)
    with pytest.raises(UserError, match=message) as e:
        with_loras(folders, "sd15", spoilt)
    assert str(e.value).startswith(f"--teacher-lora {spoilt}: ")
    assert "\n" not in str(e.value)


def test_a_lora_of_another_kind(folders, tmp_path):
    path = make_lora(folders, "sd15", tmp_path / "style.safetensors")
    with pytest.raises(UserError, match=f"--teacher-lora {path}: expected a LoRA of "):
        with_loras(folders, "sd3", path)
    with pytest.raises(UserError, match=r"expected factors for the weight \[32, 40\] of"):
        with_loras(folders, "sdxl", path)


def test_text_encoder_keys_that_do_not_fit(folders, tmp_path):
    """diffusers would leave them out, with no more than a warning."""
    path = make_lora(folders, "sd15", tmp_path / "style.safetensors", text=True)

    def foreign(tensors):
        for side in "AB":
            tensors[f"text_encoder.text_model.nothing.q_proj.lora_{side}.weight"] = torch.ones(2, 2)

    spoilt = changed(path, tmp_path / "spoilt.safetensors", foreign)
    with pytest.raises(UserError, match=f"--teacher-lora {spoilt}: expected"):
        with_loras(folders, "sd15", spoilt)


@pytest.mark.parametrize(
    "name, contents, message",
    [
        ("absent.safetensors", None, "expected a LoRA file, found no such file"),
        ("style.ckpt", b"pickle", "expected a .safetensors file, found .ckpt"),
        ("style.safetensors", b"\x10\0\0\0\0\0\0\0{}", "expected a safetensors file, found: "),
    ],
)
def test_files_that_are_none(name, contents, message, tmp_path):
    path = tmp_path / name
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(UserError, match=f"^--teacher-lora {path}: {message}"):
        read_teacher_loras([str(path)])


def test_a_truncated_file(folders, tmp_path):
    path = make_lora(folders, "sd15", tmp_path / "style.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="expected a safetensors file, found: "):
        read_teacher_loras([str(path)])


def test_an_empty_file(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(UserError, match="expected pairs of LoRA factors"):
        read_teacher_loras([str(tmp_path / "empty.safetensors")])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("C:\\a.safetensors", ("C:\\a.safetensors", 1.0)),
        ("x:y/a.safetensors:-2", ("x:y/a.safetensors", -2.0)),
    ],
)
def test_the_value_of_the_flag(text, expected):
    assert split_scale(text) == expected


@pytest.mark.parametrize("text", ["a.safetensors:0", "a.safetensors:nan", "a:inf", ":2"])
def test_scales_that_are_refused(text):
    with pytest.raises(UserError, match="expected FILE or FILE:SCALE with a number other than 0"):
        split_scale(text)


def test_a_pipeline_of_two_networks(folders, tmp_path):
    path = make_lora(folders, "wan", tmp_path / "style.safetensors")
    with pytest.raises(UserError, match="found transformer and transformer_2: .*save_pretrained"):
        with_loras(folders, "wan22", path)


def test_a_pipeline_that_takes_no_lora(folders, tmp_path):
    save_file({"a.lora_A.weight": torch.ones(2, 2)}, tmp_path / "style.safetensors")
    loras = [TeacherLora(tmp_path / "style.safetensors", 1.0)]
    with pytest.raises(UserError, match="whose pipeline takes LoRA files, found DiTPipeline"):
        load_teacher(str(folders("dit")), text=dict(loras=loras))


def test_teachers_that_are_no_pipelines(tmp_path):
    save_file({"a.lora_A.weight": torch.ones(2, 2)}, tmp_path / "style.safetensors")
    loras = [TeacherLora(tmp_path / "style.safetensors", 1.0)]
    for name in ("mnist", "toy"):
        with pytest.raises(UserError, match="^--teacher-lora: expected a teacher that is a pipel"):
            load_teacher(name, text=dict(loras=loras))


# ---- students in plain diffusers -----------------------------------------------------------------


def student_of(teacher, spec=None, seed=3):
    """As after a training: all weights have changed."""
    student = teacher.copy(spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.03 * torch.randn(p.shape, generator=generator)
    return student


def write(home, student, teacher, module=dmd2, nfe=4, sampler=None, merged=False):
    """Writes a student's folder as a run or tools/export.py does -> its record."""
    sampler = sampler or {}
    files, entries = whole.student_files(student, teacher, module.sample, sampler, nfe)
    record = dict(method=module.__name__, teacher=str(teacher.folder), nfe=nfe, cfg=3.0)
    record |= entries | dict(sampler=sampler, flags={})
    record["teacher_lora"] = [lora.record() for lora in teacher.loras]
    files["distill.json"] = json.loads(json.dumps(record))
    if merged:
        files = whole.merge_loras(files, teacher.loras, teacher.folder)
    whole.write_student(home, files, teacher.folder, loras=teacher.loras)
    return files["distill.json"]


def check_card(home, teacher, student, module=dmd2, nfe=4, **sampler):
    """The card's lines give the student's samples, and they are not those of the base."""
    z = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(1))
    ours = cards.our_latents(module.sample, student, z, teacher.encode([0]), nfe, **sampler)
    theirs = cards.run_card(home, teacher, z, PROMPTS[0])
    assert cards.relative(theirs, ours) < 1e-5


def two_loras(folders, kind, tmp_path):
    """The teacher with two LoRAs of different ranks and scales; one of them for text as well."""
    text = kind in WITH_TEXT
    first = make_lora(folders, kind, tmp_path / "style.safetensors", text=text)
    second = make_lora(folders, kind, tmp_path / "it's.safetensors", rank=1, seed=9)
    return with_loras(folders, kind, f"{first}:{SCALE}", f"{second}:-0.3")


slow_kinds = [k if k in ("sd15", "sd3") else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]


@pytest.mark.parametrize("kind", slow_kinds)
def test_a_lora_student_in_plain_diffusers(kind, folders, tmp_path):
    """With the teacher's LoRAs beside it, and as one file that contains them."""
    teacher = two_loras(folders, kind, tmp_path)
    student = student_of(teacher, LORA)
    home, one = tmp_path / "student", tmp_path / "merged"
    record = write(home, student, teacher)
    check_card(home, teacher, student)
    assert sorted(p.name for p in (home / "teacher_lora").iterdir()) == [
        "0-style.safetensors",
        "1-it's.safetensors",
    ]

    merged = write(one, student, teacher, merged=True)
    check_card(one, teacher, student)
    assert "pipe.load_lora_weights(folder)\n" in cards.card_code(one)
    z = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(1))

    def samples(folder, info, teacher):
        """Of the student as this repository loads it."""
        loaded = load_model(folder, info["model"], teacher)
        return cards.our_latents(dmd2.sample, loaded, z, teacher.encode([0]), 4)

    ours = cards.our_latents(dmd2.sample, student, z, teacher.encode([0]), 4)
    assert cards.relative(samples(home, record, teacher), ours) < 1e-6
    assert cards.relative(samples(one, merged, teacher), ours) < 1e-6
    plain = load(folders, kind, PROMPTS)
    assert cards.relative(samples(home, record, plain), ours) > 1e-2


def test_ranks_of_the_merged_file(folders, tmp_path):
    """They add up; older versions of diffusers expect one rank in all layers."""
    teacher = two_loras(folders, "sd15", tmp_path)
    student = student_of(teacher, LORA)
    write(tmp_path / "merged", student, teacher, merged=True)
    tensors = load_file(tmp_path / "merged" / lora.FILE)
    ranks = {v.shape[0] for name, v in tensors.items() if ".lora_A." in name}
    assert ranks == {3 + 2 + 1}  # of LORA and of the two files
    layers = {name.split(".lora_")[0] for name in tensors}
    assert any(name.startswith("text_encoder.text_model.") for name in layers)
    assert any(name.endswith("conv1") for name in layers)  # of the files alone
    assert any(name.endswith("to_k") for name in layers)  # of the student alone


def test_factors_of_a_file_whose_alpha_is_not_its_rank(folders, tmp_path):
    """Those of the merged file have alpha and the scale in B: it has no alpha of its own."""
    path = make_lora(folders, "sd15", tmp_path / "style.safetensors")
    kohya = as_kohya(path, tmp_path / "kohya.safetensors", alpha=1)  # rank 2
    (user_lora,) = with_loras(folders, "sd15", f"{kohya}:-3").loras
    found = user_lora.factors(folders("sd15"))
    expected = load_file(path)
    assert len(found) == len(expected) / 2
    for name, (a, b) in found.items():
        assert torch.equal(a, expected[f"{name}.lora_A.weight"])
        assert torch.allclose(b, -1.5 * expected[f"{name}.lora_B.weight"])


@pytest.mark.parametrize("kind", slow_kinds)
def test_a_whole_student_in_plain_diffusers(kind, folders, tmp_path):
    """Its network has the LoRAs in it; text encoders that they change are files of its own."""
    teacher = two_loras(folders, kind, tmp_path)
    student = student_of(teacher)
    home = tmp_path / "student"
    write(home, student, teacher)
    check_card(home, teacher, student)
    assert not (home / "teacher_lora").exists()
    weights_file = home / "text_encoder" / "model.safetensors"
    assert weights_file.is_symlink() != (kind in WITH_TEXT)
    assert "is not to be loaded again" in (home / "README.md").read_text()


def test_two_experts_on_a_teacher_with_a_lora(folders, tmp_path):
    teacher = two_loras(folders, "wan", tmp_path)
    times = phased_dmd.step_times(4, 5.0)
    end = phased_dmd.phase_ends(4, 2)[0]
    experts = [student_of(teacher, LORA, seed) for seed in (3, 4)]
    student = ByLevel(experts, [float(times[end] / (1 - times[end]))])
    sampler = dict(step_shift=5.0)
    for merged in (False, True):
        home = tmp_path / f"merged-{merged}"
        write(home, student, teacher, phased_dmd, 4, sampler, merged)
        check_card(home, teacher, student, phased_dmd, 4, **sampler)


def test_the_card(folders, tmp_path):
    teacher = two_loras(folders, "sd15", tmp_path)
    write(tmp_path / "student", student_of(teacher, LORA), teacher)
    text = (tmp_path / "student" / "README.md").read_text()
    assert "with the LoRA `style.safetensors` (scale 0.7) and `it's.safetensors`" in text
    assert str(tmp_path) not in text
    with safe_open(tmp_path / "student" / lora.FILE, "pt") as f:
        found = json.loads(f.metadata()["distill.teacher_lora"])
    assert [record["scale"] for record in found] == [0.7, -0.3]


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(folders, scripts, tmp_path_factory):
    """Two runs of dmd2.py, whole and lora, on a teacher with a LoRA, as a user starts them."""
    home = tmp_path_factory.mktemp("teacher-lora")
    make_lora(folders, "sd15", home / "style.safetensors", text=True)
    make_lora(folders, "sd15", home / "other.safetensors", text=True, seed=5)
    (home / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = ["--teacher", folders("sd15"), "--prompts", "prompts.txt", "--smoke", "--eval-n", 0]
    flags += ["--cache-prompts", "cache", "--nfe", 4, "--cfg", 3, "--batch", 4, "--lr", 0.01]
    flags += ["--teacher-lora", "style.safetensors:0.7", "--sample-every", 0, "--warmup", 0]
    for name, own in (("whole", []), ("lora", ["--lora", 3])):
        scripts.run("dmd2.py", *flags, "--out", name, *own, **at(home))
    return home


def at(folder):
    """Environment of a script that runs in another working directory."""
    return dict(BEFORE=f"import os; os.chdir({str(folder)!r})")


@pytest.fixture
def runs(home, tmp_path):
    """A copy of these runs, to be changed; they refer to the first place."""
    for name in ("whole", "lora"):
        shutil.copytree(home / name, tmp_path / name, symlinks=True)
    return tmp_path


def options(home, **changes):
    args = dict(teacher=None, teacher_lora=None, prompts=None, cache_prompts=str(home / "cache"))
    args |= dict(size=None, frames=None, it=None, negative_prompt=None)
    return SimpleNamespace(**args | changes)


@pytest.mark.parametrize("name", ["whole", "lora"])
def test_a_run_from_the_command_line(name, home):
    """Its records, and its student as eval.py and sample.py load it and as the card does."""
    run = home / name
    start = json.loads((run / "run.jsonl").read_text())
    info = read_json(run / "student" / "distill.json")
    digest = hashlib.sha256((home / "style.safetensors").read_bytes()).hexdigest()
    expected = [dict(file="style.safetensors", sha256=digest, scale=0.7)]
    assert start["teacher_lora"] == info["teacher_lora"] == expected
    assert start["flags"]["teacher_lora"] == ["style.safetensors:0.7"]
    assert info["flags"]["teacher_lora"] == [f"{home}/style.safetensors:0.7"]
    assert str(home) not in (run / "student" / "README.md").read_text()
    assert "style.safetensors:0.7" in start["plan"]["teacher lora"]

    loaded = load_student(run, options(home), {})
    assert [lora.scale for lora in loaded.teacher.loras] == [0.7]
    check_card(run / "student", loaded.teacher, loaded.model)
    row = student_row(loaded, 4)
    assert row.facts["teacher_lora"] == expected


def test_the_last_checkpoint_has_the_same_student(home, tmp_path):
    for name in ("whole", "lora"):
        folder = export(home / name, to=tmp_path / name)
        for path in (home / name / "student").rglob("*.safetensors"):
            same = folder / path.relative_to(home / name / "student")
            assert same.read_bytes() == path.read_bytes()
            assert same.is_symlink() == path.is_symlink()


def test_one_file_from_the_command_line(home, tmp_path, monkeypatch, capsys):
    to = tmp_path / "one"
    flags = [home / "lora", "--merge-teacher-lora", "--to", to]
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, flags)])
    export_module.main()
    assert capsys.readouterr().out == f"student: {to}\n"
    loaded = load_student(to, options(home), {})
    check_card(to, loaded.teacher, loaded.model)
    assert not (to / "teacher_lora").exists()


def test_students_that_cannot_be_merged(home, tmp_path):
    with pytest.raises(UserError, match="--merge-teacher-lora: .*found one of whole weights"):
        export(home / "whole", to=tmp_path / "a", merge_teacher_lora=True)
    files = export_module.read_student_files(export_module.find_checkpoint(home / "lora"))
    del files["distill.json"]["teacher_lora"]
    with pytest.raises(UserError, match="found one whose teacher had none"):
        export_module.require_mergeable("run", files, home)


@pytest.mark.parametrize("name", ["whole", "lora"])
def test_a_file_that_is_gone_or_changed(name, home, runs):
    """A LoRA student has it in its folder; what is there must be the file of the training."""
    run = runs / name
    record = read_json(run / "student" / "distill.json")
    gone = runs / "gone.safetensors"
    record["flags"]["teacher_lora"] = [f"{gone}:0.7"]
    (run / "student" / "distill.json").write_text(json.dumps(record))
    if name == "lora":
        assert load_student(run, options(home), {}).teacher.loras[0].path.parent.name == HOME
        shutil.rmtree(run / "student" / HOME)
    with pytest.raises(UserError, match="the LoRA style.safetensors, .* found no such file; give"):
        load_student(run, options(home), {})
    shutil.copy(home / "other.safetensors", gone)
    with pytest.raises(UserError, match=f"found another file in {gone}; give it as --teacher-lora"):
        load_student(run, options(home), {})

    given = [str(home / "style.safetensors:0.7")]
    assert load_student(run, options(home, teacher_lora=given), {}).teacher.loras
    for wrong in (home / "other.safetensors:0.7", home / "style.safetensors:0.6"):
        with pytest.raises(UserError, match="expected the LoRA of its training, sha256 .* at scal"):
            load_student(run, options(home, teacher_lora=[str(wrong)]), {})


def test_a_student_whose_teacher_had_none(folders, home, tmp_path):
    teacher = load(folders, "sd15", PROMPTS)
    write(tmp_path, student_of(teacher), teacher)
    given = [str(home / "style.safetensors")]
    with pytest.raises(UserError, match="expected the LoRA of its training, none, found sha256"):
        load_student(tmp_path, options(home, teacher_lora=given), {})


@pytest.mark.parametrize("value", [3, [3], [dict(file="../x", sha256="", scale=1)], [dict()]])
def test_a_record_that_somebody_has_changed(value, runs):
    path = runs / "lora" / "student" / "distill.json"
    path.write_text(json.dumps(read_json(path) | dict(teacher_lora=value)))
    with pytest.raises(UserError, match="distill.json: teacher_lora: expected a list of objects"):
        read_student(runs / "lora")


def test_a_lora_student_needs_the_weights_of_its_training(home, folders):
    """As --start RUN, and as the generator of nct.py."""
    home_of, info = read_student(home / "lora")
    plain = load(folders, "sd15", PROMPTS)
    with pytest.raises(UserError, match="expected the LoRA of its training, sha256 .*, found none"):
        network_of("RUN", home_of, info, plain, "sd15")
    whole_home, info = read_student(home / "whole")
    network_of("RUN", whole_home, info, plain, "sd15")  # as a start, it is as good as any
    with pytest.raises(UserError, match="--start .*whole: expected the LoRA of its training"):
        start_from(home / "whole", plain, plain.copy(), critic=plain.copy(LORA))


def test_rows_of_teachers_with_and_without(home, folders):
    """eval.py: two teachers, also where they have one name. Kept results are not mixed up."""
    teachers = {}
    student = load_student(home / "lora", options(home), teachers)
    plain = load(folders, "sd15", PROMPTS)
    assert list(teachers) != ["sd15"]
    rows = [teacher_row(t, "sd15", 2, 1.0, False) for t in (plain, student.teacher)]
    cache = ResultCache(home / "measured")
    assert cache.path(rows[0], {}) != cache.path(rows[1], {})
    command = compare.teacher_facts(rows[1], rows[1].facts)["command"]
    assert command[0].endswith(f"--teacher-lora {home}/style.safetensors:0.7")
    assert "--teacher-lora" not in compare.teacher_facts(rows[0], rows[0].facts)["command"][0]


def test_the_page_of_a_run(home):
    """Results in the teacher's folder are of the teacher without a LoRA."""
    run = page.read_run(home / "lora")
    run |= dict(teacher="emoji", results=[dict(it=3, fd=1.0)])
    assert "teacher emoji" not in page.metrics([run])
    del run["start"]["flags"]["teacher_lora"]
    assert "teacher emoji" in page.metrics([run])


def test_resume(home, runs, scripts, folders):
    """The file may have moved; another file or scale is refused, and so is none."""
    run = runs / "lora"
    flags = ["dmd2.py", "--resume", "--out", run, "--teacher", folders("sd15")]
    other = f"{home}/other.safetensors:0.7"
    p = scripts.run(*flags, "--teacher-lora", other, code=2)
    assert re.fullmatch(r"dmd2.py: --resume .*expected a run of .*--teacher-lora.*\n", p.err)
    p = scripts.run(*flags, "--teacher-lora", f"{home}/style.safetensors", code=2)
    assert re.fullmatch(r"dmd2.py: --resume .*expected a run of .*--teacher-lora.*\n", p.err)
    p = scripts.run(*flags, **at(runs))  # its path was relative to the first folder
    assert f"{home}/style.safetensors:0.7" in p.out

    shutil.copy(home / "style.safetensors", runs / "moved.safetensors")
    moved = f"{runs}/moved.safetensors:0.7"
    p = scripts.run(*flags, "--teacher-lora", moved, "--iters", 4)
    assert "resumed it-00000003.pt" in p.out


def test_a_resume_without_the_file(home, runs, scripts, folders):
    path = runs / "lora" / "run.jsonl"
    path.write_text(path.read_text().replace("style.safetensors:0.7", "gone.safetensors:0.7"))
    p = scripts.run("dmd2.py", "--resume", "--out", runs / "lora", "--iters", 4, code=2)
    expected = f"dmd2.py: --teacher-lora {home}/gone.safetensors: expected a LoRA file, found no"
    assert p.err.startswith(expected) and p.err.count("\n") == 1


def test_the_flag_is_repeatable(monkeypatch):
    parse = lambda *flags: dmd2.parse_args(["--teacher", "toy", *flags])
    assert parse().teacher_lora is None
    assert parse("--teacher-lora", "a").teacher_lora == ["a"]
    assert parse("--teacher-lora", "a", "--teacher-lora", "b:2").teacher_lora == ["a", "b:2"]
    assert sample.parse_args(["run", "--teacher-lora", "a"]).teacher_lora == ["a"]
    assert evaluation.parse_args(["run", "--teacher-lora", "a"]).teacher_lora == ["a"]


def test_a_teacher_alone(home, folders, tmp_path):
    """sample.py --teacher NAME --teacher-lora FILE, for a prompt of the first list and another."""
    kwargs = dict(teacher=str(folders("sd15")), nfe=2, cfg=1.0, cache_prompts=tmp_path, size=None)
    kwargs |= dict(device="cpu", prompts=["dog"])
    styled = sample.load(teacher_lora=[str(home / "style.safetensors:0.7")], **kwargs)
    styled(["pizza 7"])
    model = with_loras(folders, "sd15", home / "style.safetensors:0.7")
    row = styled.rows["pizza 7"]
    assert torch.equal(styled.teacher.encode([row])["text"], model.encode([2])["text"])
