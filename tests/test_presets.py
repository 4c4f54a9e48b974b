"""Presets: the kind of a teacher, every (script, kind) pair, and the table in docs/teachers.md."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch

import huggingface_hub.constants
import pytest

from common.errors import UserError
from common.files import ROOT, read_json, write_json
from common.teachers.hub import HUB
from common.teachers.kind import (
    ASSETS,
    EMBEDDED,
    FROM_IMAGE,
    KIND_OF_SHORT_NAME,
    PIPELINE_KINDS,
    STUDENTS,
    kind_of_folder,
    teacher_kind,
)
from common.teachers.load import PIPELINES
from tools import presets as table

# kind -> tiny folder of helpers/pipelines.py, {file: fields to change}
FOLDERS = {
    "sd15": ("sd15", {}),
    "sd21": (
        "sd15",
        {"scheduler/scheduler_config.json": dict(prediction_type="v_prediction")},
    ),
    "sdxl": ("sdxl", {}),
    "sd3": ("sd3", {}),
    "sana": ("sana", {"transformer/config.json": dict(num_attention_heads=70)}),
    "sana-0.6b": ("sana", {"transformer/config.json": dict(num_attention_heads=36)}),
    "flux": ("flux", {}),
    "chroma": ("chroma", {}),
    "flux-kontext": ("kontext", {}),
    "flux2": ("flux2", {}),
    "flux2-klein": ("klein", {}),
    "hunyuan-image": ("hunyuan", {}),
    "lumina2": ("lumina", {}),
    "qwen-image": ("qwen", {}),
    "qwen-image-edit": ("qwen_edit", {}),
    "qwen-image-edit-plus": ("qwen_plus", {}),
    "z-image": ("zimage", {}),
    "wan2.1": ("wan", {"transformer/config.json": dict(num_attention_heads=12)}),
    "wan2.1-14b": ("wan", {"transformer/config.json": dict(num_attention_heads=40)}),
    "wan2.2": ("wan22", {}),
    "wan2.1-i2v": ("wan_i2v", {}),
    "wan2.2-i2v": ("wan_i2v22", {}),
    "wan2.2-5b": ("wan5b", {}),
    "sana-video": ("sanavideo", {}),
    "ltx-video": ("ltx", {}),
    "hunyuanvideo-1.5": ("hunyuanvideo", {}),
    "dit": ("dit", {}),
    "sit": ("sit", {}),
    "edm-imagenet64": ("edm", {}),
    "edm-cifar10": ("edm", {}),
}
HEAD_SIZE = {"sana": 32, "wan": 128}  # of the published networks
TEXT = [kind for kind in FOLDERS if kind not in ("dit", "sit") and not kind.startswith("edm")]
TOLD = ("flux", "flux2", "flux-kontext")  # whose network has guidance as an input
KINDS = [*EMBEDDED, "own", *FOLDERS]

# Numbers of papers and of code, typed a second time.
PUBLISHED = [
    ("dmd2", "sdxl", dict(cfg=8, nfe=4, lr=5e-7, lr_fake=5e-7, batch=128, iters=20_000, ratio=5)),
    ("dmd2", "sd15", dict(cfg=1.75, nfe=1, lr=1e-5, batch=2048, iters=40_000, ratio=10)),
    ("dmd2", "edm-imagenet64", dict(cfg=1, nfe=1, lr=2e-6, batch=280, iters=200_000, ratio=5)),
    ("dmd2", "sd3", dict(cfg=4, nfe=4, lr=1e-6, lr_fake=1e-6, weight_decay=0, ratio=5)),
    ("dmd2", "sit", dict(cfg=1, nfe=1, lr=2e-5, lr_fake=2e-5, batch=512, clip=1)),
    ("dmd2", "flux", dict(cfg=1, embedded_guidance=None, nfe=4, lr=1e-5, gan_weight=0.03)),
    ("dmd2", "wan2.2-5b", dict(cfg=5, nfe=2, lr=1e-5, gan_weight=0.03, step_indices="999,499")),
    ("sid", "edm-cifar10", dict(cfg=1, alpha=1.2, lr=1e-5, batch=256, ema=500_000)),
    ("sid", "edm-imagenet64", dict(alpha=1.2, lr=4e-6, lr_fake=4e-6, batch=8192, ema=2_000_000)),
    ("sid", "sd15", dict(cfg=2, alpha=1, nfe=1, lr=1e-6, lr_fake=1e-6, batch=512)),
    ("sid", "sana", dict(cfg=4.5, nfe=4, lr=5e-6, lr_fake=5e-6, batch=256, ema=0)),
    ("sid", "sd3", dict(cfg=4.5, nfe=4, lr=1e-6, lr_fake=1e-6, batch=256)),
    ("decoupled_dmd", "sdxl", dict(cfg=8, nfe=4, lr=5e-7, batch=128, moments=(0.075, 0.81))),
    ("decoupled_dmd", "sd3", dict(cfg=8, lr=1e-5, lr_fake=5e-6, ratio=2, moments=None)),
    ("phased_dmd", "wan2.2", dict(cfg=4, nfe=4, lr=2e-6, lr_fake=4e-7, step_shift=5, phases=2)),
    ("phased_dmd", "wan2.1", dict(cfg=5, iters=5000, phase_iters=[2500], clip=10)),
    ("phased_dmd", "qwen-image", dict(step_shift=3, shift=3, lr=2e-7, lr_fake=4e-7)),
    ("msd", "edm-imagenet64", dict(students=4)),
    ("sana_sprint", "sana", dict(cfg=4.5, cfg_train=[4, 4.5, 5], lr=2e-6, batch=512, clip=0.1)),
    ("sana_sprint", "wan2.1", dict(cfg=5, p_scm=(-0.8, 1.6), lr=2e-6, lr_fake=4e-7)),
    ("twinflow", "sana-0.6b", dict(cfg=5, lr=1e-4, betas=(0.9, 0.95), batch=128, iters=30_000)),
    ("twinflow", "sana", dict(cfg=5, lr=1e-4, betas=(0.9, 0.99), batch=128, iters=30_000)),
    ("twinflow", "qwen-image", dict(lr=1e-5, betas=(0.9, 0.99), batch=32, iters=10_000)),
    ("flowmap", "sit", dict(cfg=1.5, cfg_range=(1, 3), batch=256, iters=1_500_000)),
    ("nct", "sd15", dict(lr=1e-5, betas=(0.9, 0.95), batch=128)),
    ("swiftbrush", "sd21", dict(cfg=4.5, lr=1e-6, lr_fake=1e-3, lora_fake=64, lora_alpha=108)),
    ("anyflow", "wan2.1", dict(cfg=3, dm_cfg=4, shift=5, velocity="data", rows="balanced")),
    ("anyflow", "wan2.1", dict(map_iters=6000, iters=7200, lr=5e-5, lr_dm=2e-6, lr_fake=2e-6)),
    ("anyflow", "wan2.1", dict(rollouts=[2, 4, 8, 16, 50], batch=32, warmup=1000, clip=1)),
    ("anyflow", "wan2.1-14b", dict(map_iters=4000, iters=5200, batch=16)),
    ("swiftbrush", "sd21", dict(iters=65_000, clip=1, null_share=0.1, betas=(0.9, 0.999))),
]


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_weights(source, target):
    ignore = shutil.ignore_patterns("*.safetensors", "*.npz", "*.pt", "*.png")
    return shutil.copytree(source, target, ignore=ignore)


@pytest.fixture
def folder_of(folders, tmp_path):
    """folder_of(kind) -> a folder of that kind with configurations only, or None (toy-cond)."""

    def make(kind):
        target = tmp_path / "made" / f"x-{KINDS.index(kind)}"  # a name that says nothing
        if kind == "toy-cond":
            return None
        if kind == "own":
            without_weights(ROOT / "assets" / "mnist", target)
            edit(target / "teacher.json", name="photos")
            return target
        if kind in EMBEDDED:
            return without_weights(ROOT / "assets" / EMBEDDED[kind], target)
        name, changes = FOLDERS[kind]
        without_weights(folders(name), target)
        for file, fields in changes.items():
            if "num_attention_heads" in fields:
                fields = fields | dict(attention_head_dim=HEAD_SIZE[name])
            edit(target / file, **fields)
        if kind == "edm-imagenet64":
            model = read_json(target / "teacher.json")["model"]
            edit(target / "teacher.json", model=model | dict(shape=[3, 64, 64]))
        return target

    return make


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """offline(name, folder): puts a folder into the hub's cache under a name. No network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(name, folder):
        home = cache / f"models--{name.replace('/', '--')}"
        commit = "0123456789abcdef0123456789abcdef01234567"
        shutil.copytree(folder, home / "snapshots" / commit)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(commit)
        return home / "snapshots" / commit

    return put


def parse(script, *flags):
    return importlib.import_module(script).parse_args([str(flag) for flag in flags])


def flags_of(script, teacher):
    """The flags that a preset decides: all but where the teacher and the run are."""
    where = ("teacher", "preset_from", "generator", "out")
    args = vars(parse(script, "--teacher", teacher))
    return {name: value for name, value in args.items() if name not in where}


def names_of(kind, folder, put):
    """Every spelling of --teacher for one kind."""
    names = [kind] if kind in EMBEDDED else []
    for short, repository in HUB.items():
        if KIND_OF_SHORT_NAME.get(short, short) == kind:
            names += [short, repository]
    if folder is not None:
        snapshot = put("someone/fine-tune.v2", folder)
        names += [str(folder), str(snapshot), "someone/fine-tune.v2"]
    return names


# ---- kinds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_spelling_of_a_kind_gives_the_same_flags(kind, folder_of, offline):
    """Short name, hub name, folder in the hub's cache, renamed folder, a stranger's name on the
    hub; in every script. And no script starts a text-to-image teacher without guidance."""
    names = names_of(kind, folder_of(kind), offline)
    assert len(names) >= (1 if kind == "toy-cond" else 3)
    for name in names:
        assert teacher_kind(name)[0] == kind, name
    for script in table.SCRIPTS:
        first = flags_of(script, names[0])
        presets = importlib.import_module(script).PRESETS
        relative = FROM_IMAGE.get(kind, kind)
        assert first["preset"] == (relative if relative in presets else "default")
        preset = dict(presets[first["preset"]])
        if kind in FROM_IMAGE and relative in presets:
            preset["source"] = f"nobody's: {relative}'s"
        assert first["cfg"] == preset["cfg"]
        assert (first["lr"], first["batch"]) == (preset["lr"], preset["batch"])
        assert first["preset_source"] == preset["source"]
        for name in names[1:]:
            assert flags_of(script, name) == first, (script, name)
        if kind in TEXT and kind not in TOLD and script != "nct":  # nct guides nothing
            assert first["cfg"] > 1.2, script


def test_a_folders_name_decides_nothing(folder_of, tmp_path):
    for kind, other in (("sd15", "emoji"), ("sdxl", "sd15"), ("own", "mnist"), ("dit", "flux")):
        folder = folder_of(kind).rename(tmp_path / other)
        assert teacher_kind(str(folder))[0] == kind


def test_a_name_in_teacher_json_is_believed_for_the_same_format_only(folder_of):
    folder = folder_of("sdxl")
    (folder / "teacher.json").write_text('{"name": "emoji"}')
    assert teacher_kind(str(folder))[0] == "sdxl"
    for name, kind in ASSETS.items():
        assert kind_of_folder(name, ROOT / "assets" / name)[0] == name
        assert kind != name


def test_what_says_so_is_named(folder_of):
    _, found = teacher_kind(str(folder_of("sdxl")))
    assert found == "StableDiffusionXLPipeline in model_index.json"
    assert teacher_kind("sdxl") == ("sdxl", f"{HUB['sdxl']} on the hub")


def test_all_pipelines_that_load_have_a_kind():
    assert set(PIPELINE_KINDS) == set(PIPELINES)
    assert not STUDENTS.keys() & PIPELINES.keys()
    for words in STUDENTS.values():
        assert words.removeprefix("--teacher ") in HUB


@pytest.mark.parametrize("short", HUB)
def test_short_names_are_of_the_kind_that_their_files_would_give(short, tmp_path):
    """The table of short names against the published configurations."""
    known = read_json(ROOT / "dryrun" / "networks.json")[short]
    index = dict(_class_name=known["pipeline"], boundary_ratio=known.get("boundary_ratio"))
    if "boundary_ratio" in known:
        index["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
    write_json(tmp_path / "model_index.json", index)
    for part, config in (("transformer", "network"), ("scheduler", "scheduler")):
        (tmp_path / part).mkdir()
        name = "config.json" if part == "transformer" else "scheduler_config.json"
        write_json(tmp_path / part / name, known[config])
    assert teacher_kind(str(tmp_path))[0] == teacher_kind(short)[0]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(_class_name="FluxPipelin"), "expected one of the pipelines .*did you mean Flux"),
        (dict(_class_name=["FluxPipeline"]), "expected one of the pipelines"),
        (dict(_class_name="WanPipeline"), "transformer.*config.json"),
        (
            dict(_class_name="SanaSprintPipeline"),
            "expected a teacher of many steps, found SanaSprintPipeline, a student of few; "
            "give its teacher, --teacher sana-sprint-teacher",
        ),
    ],
)
def test_pipelines_that_are_none(change, message, folder_of):
    folder = folder_of("sdxl")
    edit(folder / "model_index.json", **change)
    with pytest.raises(UserError, match=message):
        parse("dmd2", "--teacher", folder)


def test_a_hub_name_without_network(offline):
    with pytest.raises(UserError, match="--teacher someone/model: not downloaded from the hub"):
        parse("dmd2", "--teacher", "someone/model")


def test_only_configurations_of_a_strangers_model_are_fetched(folder_of, monkeypatch):
    """Before the first weights: from the patterns that the hub's client is given."""
    folder, patterns = folder_of("sana"), []

    def fetch(repository, allow_patterns, ignore_patterns):
        assert repository == "someone/model"
        patterns.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert teacher_kind("someone/model")[0] == "sana"
    wanted = lambda name: any(fnmatch(name, pattern) for pattern in patterns)
    assert wanted("model_index.json")
    assert wanted("transformer/config.json")
    assert wanted("scheduler/scheduler_config.json")
    assert not wanted("transformer/diffusion_pytorch_model.safetensors")
    assert not wanted("tokenizer/tokenizer.json")


def test_odd_values_in_configurations(folder_of):
    folder = folder_of("sana")
    edit(folder / "transformer" / "config.json", num_attention_heads="70")
    with pytest.raises(UserError, match="num_attention_heads and attention_head_dim: expected"):
        parse("dmd2", "--teacher", folder)
    folder = folder_of("own")
    edit(folder / "teacher.json", model=["dit"])
    assert teacher_kind(str(folder))[0] == "default"  # the loader refuses it


# ---- presets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, kind, numbers", PUBLISHED)
def test_published_numbers(script, kind, numbers):
    preset = importlib.import_module(script).PRESETS[kind]
    found = {name: preset.get(name) for name in numbers}
    assert found == numbers
    assert "[" in preset["source"]


@pytest.mark.parametrize("script", table.SCRIPTS)
def test_every_preset_says_where_it_is_from(script):
    presets = importlib.import_module(script).PRESETS
    assert set(presets) <= {*KINDS, "default"}
    for kind, preset in presets.items():
        ok = re.search(r"\[[PCATDFO](, [PC])?\]|nobody's", preset["source"])
        assert ok, f"{kind}: {preset['source']!r}"
        assert (kind in ("default", "own", "emoji-flow")) <= ("nobody's" in preset["source"])


def test_steps_of_a_preset_are_for_its_number_of_steps():
    assert parse("dmd2", "--teacher", "wan2.1").step_indices == "999,832,624,356"
    assert parse("dmd2", "--teacher", "wan2.1", "--nfe", "4").step_indices == "999,832,624,356"
    assert parse("dmd2", "--teacher", "wan2.1", "--nfe", "2").step_indices is None


def test_steps_of_wan_and_qwen_have_the_shift_of_their_students():
    """Shift 5 on files with 3, shift 3 on a file with 2: recipes' 1, .9375, .8333, .625 and 1, .9,
    .75, .5, within half a step of the grid."""
    from common.schedules import Flow

    for teacher, own_shift, shift in (("wan2.1", 3, 5), ("qwen-image", 2, 3)):
        args = parse("dmd2", "--teacher", teacher)
        indices = [int(i) for i in args.step_indices.split(",")]
        times = Flow(float(own_shift)).grid(1000)[indices]
        for found, u in zip(times.tolist(), (1, 0.75, 0.5, 0.25), strict=True):
            assert found == pytest.approx(shift * u / (1 + (shift - 1) * u), abs=7e-4)
        assert args.shift * own_shift == pytest.approx(shift)


def test_help_shows_the_defaults_of_the_kind(folder_of):
    command = [sys.executable, "dmd2.py", "--help", "--teacher", folder_of("sdxl")]
    p = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    assert "learning rate of the student [5e-07]" in p.stdout


def test_the_page_has_the_presets_of_the_scripts():
    page = table.PAGE.read_text()
    shown = page.split(table.FIRST)[1].split(table.LAST)[0]
    assert shown == f"\n{table.section()}\n", "python -m tools.presets --write"
