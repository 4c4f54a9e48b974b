"""Folders of diffusers pipelines as the world has them: components that are never loaded, weights
under other names, links, half downloads (common/teachers/{formats,load,hub}.py)."""

import json

import pytest
from helpers.files import edit
from helpers.teachers import PROMPTS, copy_of, load, quiet

from common.errors import UserError
from common.teachers.load import load_pipeline


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
