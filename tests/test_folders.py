"""Folders of diffusers pipelines as the world has them: components that are never loaded, weights
under other names, links, half downloads (common/teachers/{formats,load,hub}.py)."""

import json
import os
import re
import shutil
from fnmatch import fnmatch

import pytest
import torch
from helpers.files import Bomb, edit
from helpers.teachers import PROMPTS, copy_of, load, quiet
from safetensors.torch import load_file

from common.errors import UserError
from common.files import WEIGHTS
from common.teachers.kind import teacher_kind
from common.teachers.load import load_pipeline, load_teacher
from common.teachers.weights import find_weights


def load_folder(folder, **options):
    return load_pipeline(str(folder), prompts=PROMPTS, cache=folder / "cache", say=quiet, **options)


def refusal(folder, **options):
    """The message of the one-line UserError."""
    with pytest.raises(UserError) as e:
        load_folder(folder, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


def same_network(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(bool((p == q).all()) for p, q in pairs)


# ---- components ----------------------------------------------------------------------------------


def add_safety_checker(folder):
    """Saves the pipeline with a safety checker, as Stable Diffusion 1.5 is published."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(sizes, image_size=32, patch_size=16)
    config = CLIPConfig(text_config=dict(sizes), vision_config=vision, projection_dim=16)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.register_modules(
        safety_checker=StableDiffusionSafetyChecker(config), feature_extractor=CLIPImageProcessor()
    )
    pipe.save_pretrained(folder)


def test_a_pipeline_with_its_safety_checker(folders, tmp_path):
    folder = copy_of(folders, "sd15", tmp_path)
    add_safety_checker(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    assert same_network(load_folder(folder), load(folders, "sd15"))


NEVER_LOADED = [  # (pipeline, entries of its model_index.json)
    ("sd15", dict(feature_extractor=["transformers", "CLIPFeatureExtractor"])),  # older than 4.26
    ("sd15", dict(safety_checker=["evil_module", "Class"])),
    ("sdxl", dict(image_encoder=["transformers", "NoSuchEncoder"])),
    ("sdxl", dict(refiner=["evil_module", "Class"])),  # no component of this pipeline
    ("sd3", dict(image_encoder=["evil_module", "Class"])),
]


@pytest.mark.parametrize("name, entries", NEVER_LOADED, ids=str)
def test_components_that_are_never_loaded(name, entries, folders, tmp_path, monkeypatch):
    folder, marker = copy_of(folders, name, tmp_path), tmp_path / "executed"
    edit(folder / "model_index.json", **entries)
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_folder(folder).classes == len(PROMPTS)
    assert not marker.exists()


def test_a_second_network_is_judged_only_where_it_is_loaded(folders, tmp_path):
    """Wan 2.1 has none; an entry without boundary_ratio is not used by its pipeline."""
    folder = copy_of(folders, "wan22", tmp_path)
    edit(folder / "model_index.json", transformer_2=["evil_module", "Class"])
    assert "transformer_2: expected a component" in refusal(folder, size=32, frames=5)
    edit(folder / "model_index.json", boundary_ratio=None)
    assert load_folder(folder, size=32, frames=5).adapter == "wan"


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler"])
def test_a_component_that_is_needed(part, folders, tmp_path):
    folder = copy_of(folders, "sd15", tmp_path)
    edit(folder / "model_index.json", **{part: [None, None]})
    assert f"model_index.json: {part}: expected a component of diffusers" in refusal(folder)


def test_no_component_in_the_wrong_form(folders, tmp_path):
    folder = copy_of(folders, "sd15", tmp_path)
    edit(folder / "model_index.json", image_encoder=None)
    assert "image_encoder: expected [library, class], or [null, null]" in refusal(folder)


# ---- the cache of embeddings ---------------------------------------------------------------------


def test_the_null_prompt_follows_model_index(folders, tmp_path):
    """force_zeros_for_empty_prompt was changed after the prompts had been encoded."""
    folder = copy_of(folders, "sdxl", tmp_path)
    before = load_folder(folder).null(1)["text"]
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    after = load_folder(folder).null(1)["text"]
    assert before.norm() == 0
    assert after.norm() > 1


# ---- files of weights ----------------------------------------------------------------------------


def save_parts(folder, **options):
    """Saves network, VAE and text encoders anew, as save_pretrained does with these options."""
    import diffusers
    import transformers

    index = json.loads((folder / "model_index.json").read_text())
    for part, (library, kind) in without_others(index):
        net = getattr(diffusers if library == "diffusers" else transformers, kind)
        net = net.from_pretrained(folder / part)
        for path in [
            *(folder / part).glob("*.safetensors"),
            *(folder / part).glob("*.index*.json"),
        ]:
            path.unlink()
        if library == "transformers" and options.get("safe_serialization") is False:
            torch.save(net.state_dict(), folder / part / "pytorch_model.bin")  # older versions
        else:
            net.save_pretrained(folder / part, **options)


def without_others(index):
    kinds = ("unet", "transformer", "vae", "text_encoder")
    return [(k, v) for k, v in index.items() if k.startswith(kinds) and v != [None, None]]


FORMS = dict(
    fp16=dict(variant="fp16"),
    shards=dict(max_shard_size="60KB"),
    fp16_shards=dict(variant="fp16", max_shard_size="60KB"),
    bin=dict(safe_serialization=False),
    bin_shards=dict(safe_serialization=False, max_shard_size="60KB"),
)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("form", FORMS)
def test_weights_in_another_form(form, name, folders, tmp_path):
    folder, lines = copy_of(folders, name, tmp_path), []
    save_parts(folder, **FORMS[form])
    assert not (folder / "unet" / WEIGHTS).exists()
    options = dict(prompts=PROMPTS, cache=tmp_path / "cache", say=lines.append)
    found, expected = load_pipeline(str(folder), **options), load(folders, name)
    assert same_network(found, expected)
    assert same_network(found.vae, expected.vae)
    assert torch.equal(found.encode([0])["text"], expected.encode([0])["text"])
    said = [line for line in lines if "the folder has no others" in line]
    assert len(said) == (2 if "fp16" in form else 0)
    weights = find_weights(folder / "unet", "x")
    count = sum(p.numel() for p in expected.net.parameters())
    assert abs(weights.count_parameters() - count) < count * 0.5
    if not weights.pickled:
        assert weights.count_parameters() == count


@torch.no_grad()
def test_text_encoders_in_two_forms(folders, tmp_path):
    folder = copy_of(folders, "sdxl", tmp_path)
    path = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    found, expected = load_folder(folder).encode([0]), load(folders, "sdxl").encode([0])
    assert torch.equal(found["text"], expected["text"])
    assert torch.equal(found["pooled"], expected["pooled"])


def test_plain_weights_are_taken_before_a_variant(folders, tmp_path):
    from diffusers import UNet2DConditionModel

    folder = copy_of(folders, "sd15", tmp_path)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    for p in unet.parameters():
        p.data.zero_()
    unet.save_pretrained(folder / "unet", variant="non_ema")
    assert same_network(load_folder(folder), load(folders, "sd15"))


def test_a_hub_cache_has_links(folders, tmp_path):
    """snapshots/HASH/part/file -> ../../../blobs/..."""
    home = tmp_path / "models--a--b"
    snapshot, blobs = home / "snapshots" / "0123abcd", home / "blobs"
    blobs.mkdir(parents=True)
    for i, path in enumerate(sorted(folders("sd15").rglob("*"))):
        if path.is_file():
            link = snapshot / path.relative_to(folders("sd15"))
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blobs / str(i))
            link.symlink_to(os.path.relpath(blobs / str(i), link.parent))
    options = dict(prompts=PROMPTS, cache=tmp_path / "cache", say=quiet)
    assert same_network(load_pipeline(str(snapshot), **options), load(folders, "sd15"))
    with pytest.raises(UserError, match="cache of a hub repository; give its snapshots/<hash>"):
        load_teacher(str(home))
    os.unlink(os.path.realpath(snapshot / "unet" / WEIGHTS))
    with pytest.raises(
        UserError, match=f"unet/{WEIGHTS}: expected weights, found no file, or a li"
    ):
        load_pipeline(str(snapshot), **options)


def spoil_lfs(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "unet" / WEIGHTS).write_text(pointer)


def spoil_index(folder):
    save_parts(folder, max_shard_size="60KB")
    min((folder / "unet").glob("*00001-of*")).unlink()


def spoil_names(folder):
    save_parts(folder, max_shard_size="60KB")
    edit(folder / "unet" / f"{WEIGHTS}.index.json", weight_map={"a": "../../x.safetensors"})


def spoil_format(folder):
    os.rename(folder / "unet" / WEIGHTS, folder / "unet" / "diffusion_flax_model.msgpack")


def spoil_all(folder):
    (folder / "vae" / WEIGHTS).unlink()


def spoil_text(folder):
    (folder / "text_encoder" / "model.safetensors").unlink()


def spoil_pickle(folder):
    spoil_text(folder)
    bomb = Bomb(folder / "executed")
    torch.save(dict(x=bomb), folder / "text_encoder" / "pytorch_model.bin")


def spoil_variants(folder):
    for part, variant in (("text_encoder", "fp16"), ("text_encoder_2", "bf16")):
        path = folder / part / "model.safetensors"
        os.rename(path, path.with_name(f"model.{variant}.safetensors"))


@pytest.mark.parametrize(
    "name, spoil, says",
    [
        ("sd15", spoil_lfs, "a pointer of Git LFS; run `git lfs pull`"),
        ("sd15", spoil_index, "00001-of-.* expected weights, found no file"),
        ("sd15", spoil_names, "weight_map: expected names of files in this folder"),
        ("sd15", spoil_format, "diffusion_flax_model.msgpack, a format that diffusers does not"),
        ("sd15", spoil_all, "vae: expected weights .* found none"),
        ("sd15", spoil_text, "text_encoder: expected weights .* found none"),
        ("sd15", spoil_pickle, "expected weights that can be read without running code"),
        ("sdxl", spoil_variants, "expected weights of one variant, found only bf16 and fp16"),
    ],
)
def test_weights_that_cannot_be_used(name, spoil, says, folders, tmp_path):
    folder = copy_of(folders, name, tmp_path)
    spoil(folder)
    assert re.search(says, refusal(folder))
    assert not (folder / "executed").exists()


def test_a_single_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    for read in (load_teacher, teacher_kind):
        with pytest.raises(UserError, match="found a file; .*from_single_file"):
            read(str(tmp_path / "model.safetensors"))


def test_a_network_alone(folders):
    with pytest.raises(UserError, match="a network alone; give the folder of its pipeline"):
        load_teacher(str(folders("sd15") / "unet"))


# ---- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub(folder): from then on the only repository; its snapshot is the folder `download`."""

    def publish(folder):
        def snapshot(repository, allow_patterns, ignore_patterns=()):
            for path in sorted(folder.rglob("*")):
                name = str(path.relative_to(folder))
                wanted = any(fnmatch(name, pattern) for pattern in allow_patterns)
                if path.is_file() and wanted and not any(fnmatch(name, p) for p in ignore_patterns):
                    (tmp_path / "download" / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, tmp_path / "download" / name)
            return str(tmp_path / "download")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)

    return publish


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(size=[33, 33]), "--size 33: expected a multiple of"),
        (dict(frames=5), "--frames 5: expected a text-to-video teacher"),
        (dict(prompts="nowhere.txt"), "nowhere.txt"),
    ],
)
def test_mistakes_are_found_before_weights_are_downloaded(options, message, hub, folders, tmp_path):
    hub(folders("sd15"))
    with pytest.raises(UserError, match=message):
        load_pipeline("a/b", cache=tmp_path / "cache", say=quiet, **options)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("form", ["plain", "fp16", "bin", "fp16_shards"])
def test_what_is_downloaded(form, hub, folders, tmp_path):
    """Weights in the best form that there is, and nothing that is never loaded."""
    folder = copy_of(folders, "sd15", tmp_path)
    add_safety_checker(folder)
    if form != "plain":
        save_parts(folder, **FORMS[form])
    else:
        for variant in ("fp16", "non_ema"):
            other = f"diffusion_pytorch_model.{variant}.safetensors"
            shutil.copy(folder / "unet" / WEIGHTS, folder / "unet" / other)
    hub(folder)
    options = dict(prompts=PROMPTS, cache=tmp_path / "cache", say=quiet)
    assert same_network(load_pipeline("a/b", **options), load(folders, "sd15"))
    parts = {path.name for path in (tmp_path / "download").iterdir() if path.is_dir()}
    assert parts - {"words"} == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    weights = {path.name for path in (tmp_path / "download" / "unet").iterdir()} - {"config.json"}
    assert weights == {WEIGHTS} if form == "plain" else weights
