"""Pipelines on the Hugging Face hub: short names, download."""

import re
from pathlib import Path

from common.errors import UserError, first_line
from common.teachers.weights import NAME

HUB = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sana": "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    "sana-0.6b": "Efficient-Large-Model/Sana_600M_512px_diffusers",
    "sana-1.5": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
    "sana-1.5-4.8b": "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers",
    "sana-sprint-teacher": "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_teacher_diffusers",
    "sana-sprint-teacher-0.6b": "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_teacher_diffusers",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3.5": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
    "chroma": "lodestones/Chroma1-HD",
    "flux-kontext": "black-forest-labs/FLUX.1-Kontext-dev",
    "flux2": "black-forest-labs/FLUX.2-dev",
    "flux2-klein": "black-forest-labs/FLUX.2-klein-base-4B",
    "flux2-klein-9b": "black-forest-labs/FLUX.2-klein-base-9B",
    "hunyuan-image": "hunyuanvideo-community/HunyuanImage-2.1-Diffusers",
    "lumina2": "Alpha-VLLM/Lumina-Image-2.0",
    "qwen-image": "Qwen/Qwen-Image",
    "qwen-image-2512": "Qwen/Qwen-Image-2512",
    "qwen-image-edit": "Qwen/Qwen-Image-Edit",
    "qwen-image-edit-plus": "Qwen/Qwen-Image-Edit-2509",
    "z-image": "Tongyi-MAI/Z-Image",
    "wan2.1": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan2.1-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "wan2.2": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "wan2.2-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "sana-video": "Efficient-Large-Model/SANA-Video_2B_480p_diffusers",
    "ltx-video": "Lightricks/LTX-Video",
    "hunyuanvideo-1.5": "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
    "wan2.1-i2v": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "wan2.2-i2v": "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    "dit-xl-256": "facebook/DiT-XL-2-256",
    "dit-xl-512": "facebook/DiT-XL-2-512",
}

# Patterns of the files that a teacher needs, and of those that say what kind of teacher it is.
FILES = ["*.json", "*.txt", "*.model", "*/*.safetensors", "*.jinja"]
CONFIGS = ["model_index.json", "teacher.json", "*/config.json", "*/scheduler_config.json"]

# Not needed: components that no teacher class loads, and further variants of the same weights.
UNUSED = ["safety_checker/*", "feature_extractor/*"]
VARIANTS = [f"*.{name}{mark}*" for name in ("fp16", "bf16", "non_ema") for mark in ".-"]


def is_hub_name(name):
    """Can this be OWNER/REPOSITORY?"""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def download(name, wanted=FILES):
    """A local folder itself; else the folder of a hub name's files, downloaded once.

    wanted: patterns of file names.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository = HUB.get(name, name)
    try:
        folder = snapshot_download(
            repository, allow_patterns=wanted, ignore_patterns=[*UNUSED, *VARIANTS]
        )
        if wanted is FILES:
            # Other forms of the weights, where a component comes in no better one.
            for form in ("*.safetensors", "*.bin"):
                parts = without_weights(Path(folder))
                if parts:
                    patterns = [f"{part}/{end}" for part in parts for end in (form, "*.json")]
                    snapshot_download(repository, allow_patterns=patterns)
        return Path(folder)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        raise UserError(
            f"--teacher {name}: not downloaded from the hub ({first_line(e)[:200]}); "
            "give a local folder"
        ) from None


def without_weights(folder):
    """Names of the components that have a configuration of a network, but no weights."""
    parts = [path.parent for path in sorted(folder.glob("*/config.json"))]
    return [part.name for part in parts if not has_weights(part)]


def has_weights(folder):
    return any(NAME.fullmatch(path.name) for path in folder.glob("*"))
