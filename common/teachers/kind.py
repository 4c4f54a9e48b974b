"""Which kind of teacher --teacher is, by its configuration files. Scripts choose presets by it.

A short name, a name on the hub, a folder of the hub's cache and a renamed folder of a fine-tune are
one kind: what counts is the pipeline's class, and within a class the prediction type or the size of
the network. No weights are read.
"""

import os
from pathlib import Path

from common.errors import UserError, did_you_mean, require
from common.files import read_json
from common.teachers.hub import CONFIGS, HUB, download, is_hub_name

EMBEDDED = {  # folder in assets/
    "toy": "toy",
    "toy-cond": "toy",
    "mnist": "mnist",
    "emoji": "emoji",
    "emoji-flow": "emoji-flow",
}

# Kinds whose name is not the short name of HUB.
KIND_OF_SHORT_NAME = {
    "sd3.5": "sd3",
    "sana-1.5": "sana",
    "sana-1.5-4.8b": "sana",
    "sana-sprint-teacher": "sana",
    "sana-sprint-teacher-0.6b": "sana-0.6b",
    "flux2-klein-9b": "flux2-klein",
    "qwen-image-2512": "qwen-image",
    "dit-xl-256": "dit",
    "dit-xl-512": "dit",
}

# Class of model_index.json -> kind. `refine` divides some of these.
PIPELINE_KINDS = {
    "DiTPipeline": "dit",
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "SanaPipeline": "sana",
    "FluxPipeline": "flux",
    "ChromaPipeline": "chroma",
    "FluxKontextPipeline": "flux-kontext",
    "Flux2Pipeline": "flux2",
    "Flux2KleinPipeline": "flux2-klein",
    "HunyuanImagePipeline": "hunyuan-image",
    "Lumina2Pipeline": "lumina2",
    "Lumina2Text2ImgPipeline": "lumina2",
    "QwenImagePipeline": "qwen-image",
    "QwenImageEditPipeline": "qwen-image-edit",
    "QwenImageEditPlusPipeline": "qwen-image-edit-plus",
    "ZImagePipeline": "z-image",
    "WanPipeline": "wan2.1",
    "SanaVideoPipeline": "sana-video",
    "LTXPipeline": "ltx-video",
    "HunyuanVideo15Pipeline": "hunyuanvideo-1.5",
    "WanImageToVideoPipeline": "wan2.1-i2v",
}

# Kinds whose prompts come with an image, and the kind for text alone whose recipe they share: no
# recipe has been published for them, or none that differs.
FROM_IMAGE = {
    "flux-kontext": "flux",
    "qwen-image-edit": "qwen-image",
    "qwen-image-edit-plus": "qwen-image",
    "wan2.1-i2v": "wan2.1-14b",
    "wan2.2-i2v": "wan2.2",
}

# Few-step students of others, which are no teachers -> what to take in their place.
STUDENTS = {"SanaSprintPipeline": "--teacher sana-sprint-teacher"}

# "adapter" in teacher.json -> kind. own: of recipes/pretrain.py, from a user's images.
ADAPTER_KINDS = {"toy": "toy", "dit": "own", "sit": "sit", "edm": "edm-imagenet64"}

# Copies of assets/ say in teacher.json what they are: name -> kind that they would have without it.
ASSETS = {"mnist": "own", "emoji": "sd15", "emoji-flow": "sd3"}


def teacher_kind(name):
    """--teacher -> (kind, what says so), two texts.

    UserError: no such teacher, a configuration that is missing or no JSON, or a hub name whose
    configuration is not in the cache and cannot be downloaded.
    """
    if name in EMBEDDED:
        return name, "teacher of this repository"
    refuse_file(name)
    if os.path.isdir(name):  # unlike Path.is_dir, False also for a name that no file can have
        return kind_of_folder(name, Path(name))
    for short, repository in HUB.items():
        if name in (short, repository):
            return KIND_OF_SHORT_NAME.get(short, short), f"{repository} on the hub"
    if is_hub_name(name):
        return kind_of_folder(name, download(name, CONFIGS))
    raise no_such_teacher(name)


def which_is_taken(name):
    """A line that says which of two teachers a name means; None where there is only one."""
    if not os.path.isdir(name):
        return None
    here = os.path.abspath(name)
    if name in EMBEDDED:
        return f"--teacher {name}: the one of this repository; ./{name} would be the folder {here}"
    repository = HUB.get(name, name)
    if repository in HUB.values():
        return f"--teacher {name}: the folder {here}, not {repository} of the hub"
    return None


def refuse_file(name):
    require(
        not os.path.isfile(name),
        f"--teacher {name}: expected a folder, found a file; diffusers makes a folder of it: "
        "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER), of SDXL "
        "StableDiffusionXLPipeline",
    )


def no_such_teacher(name):
    known = [*EMBEDDED, *HUB]
    return UserError(
        f"--teacher {name}: expected {', '.join(known)}, a hub name or a folder"
        f"{did_you_mean(name, known)}"
    )


def kind_of_folder(name, folder):
    if (folder / "distill.json").is_file():
        raise no_teacher_in(name, folder)
    if (folder / "model_index.json").is_file():
        kind, found = kind_of_pipeline(name, folder)
    else:
        kind, found = kind_of_own_format(name, folder)
    if (folder / "teacher.json").is_file():
        own_name = read_json(folder / "teacher.json", "--teacher").get("name")
        if isinstance(own_name, str) and ASSETS.get(own_name) == kind:
            return own_name, "name in teacher.json"
    return kind, found


def kind_of_pipeline(name, folder):
    index = read_json(folder / "model_index.json", "--teacher")
    found = index.get("_class_name")
    if isinstance(found, str) and found in STUDENTS:
        raise UserError(
            f"--teacher {name}: expected a teacher of many steps, found {found}, a student of few; "
            f"give its teacher, {STUDENTS[found]}"
        )
    require(
        isinstance(found, str) and found in PIPELINE_KINDS,
        f"--teacher {name}: expected one of the pipelines {', '.join(PIPELINE_KINDS)}, "
        f"found {found!r}{did_you_mean(found, PIPELINE_KINDS)}",
    )
    kind, detail = refine(PIPELINE_KINDS[found], folder, index)
    return kind, f"{found}{detail} in model_index.json"


def refine(kind, folder, index):
    """-> (kind, text): divides the kinds of one pipeline class whose recipes differ."""
    if kind == "sd15":
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json", "--teacher")
        if scheduler.get("prediction_type") == "v_prediction":
            return "sd21", " with v_prediction"
    if kind == "sana" and width(folder, heads=70, head=32) < 1700:  # 0.6B: 1152, 1.6B: 2240
        return "sana-0.6b", " of 0.6B"
    if kind in ("wan2.1", "wan2.1-i2v"):
        absent = [None, None]
        two = index.get("transformer_2", absent) != absent
        if two and index.get("boundary_ratio") is not None:
            return kind.replace("2.1", "2.2"), " with two networks"
    if kind == "wan2.1":
        if network_config(folder).get("in_channels") == 48:  # those of its VAE
            return "wan2.2-5b", " of 48 channels"
        if width(folder, heads=40, head=128) > 2300:  # 1.3B: 1536, 14B: 5120
            return "wan2.1-14b", " of 14B"
    return kind, ""


def network_config(folder):
    return read_json(folder / "transformer" / "config.json", "--teacher")


def width(folder, heads, head):
    """Width of a pipeline's transformer. heads, head: the defaults of its class in diffusers."""
    config = network_config(folder)
    count = config.get("num_attention_heads", heads)
    size = config.get("attention_head_dim", head)
    ok = isinstance(count, int) and isinstance(size, int)
    path = folder / "transformer" / "config.json"
    require(ok, f"--teacher {path}: num_attention_heads and attention_head_dim: expected integers")
    return count * size


def kind_of_own_format(name, folder):
    path = folder / "teacher.json"
    if not path.is_file():
        raise no_teacher_in(name, folder)
    model = read_json(path, "--teacher").get("model")
    model = model if isinstance(model, dict) else {}  # the loader says what is wrong with it
    adapter = str(model.get("adapter"))
    kind = ADAPTER_KINDS.get(adapter, "default")
    if kind == "edm-imagenet64":
        shape = model.get("shape")
        side = shape[-1] if isinstance(shape, list) and shape else 0
        small = isinstance(side, int) and side <= 32
        return "edm-cifar10" if small else kind, f"adapter edm, side {side}, in teacher.json"
    return kind, f"adapter {adapter} in teacher.json"


def no_teacher_in(name, folder):
    found = "no teacher.json in it"
    if (folder / "distill.json").is_file():
        found = "it is a student of this project; give its teacher"
    elif (folder / "snapshots").is_dir():
        found = "it is the cache of a hub repository; give its snapshots/<hash>"
    elif (folder / "config.json").is_file():
        found = "a network alone; give the folder of its pipeline"
    elif name in HUB:
        found += f"; it hides the hub's: for that give --teacher {HUB[name]}"
    return UserError(
        f"--teacher {name}: expected a teacher folder (teacher.json, or model_index.json of a "
        f"diffusers pipeline), found: {found}"
    )
