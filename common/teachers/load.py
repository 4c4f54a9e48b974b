"""--teacher NAME | FOLDER -> Model."""

import inspect
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.utils.checkpoint
from safetensors import safe_open

from common import lora, schedules
from common.errors import UserError, did_you_mean
from common.files import LOAD_ERRORS, ROOT, WEIGHTS, is_local_name, load_weights, read_json
from common.image_folder import read_captions
from common.metrics import METRICS
from common.model import load_extras
from common.routed import ByLabel, ByLevel, Routed
from common.teachers.dit import DiT
from common.teachers.flow import SD3, Flux, QwenImage, Sana, ZImage
from common.teachers.imagenet import ClassDiT, EDMUNet, load_sit
from common.teachers.prompts import embed_prompts, read_prompts
from common.teachers.toy import Toy
from common.teachers.unet import SD15, SDXL
from common.teachers.wan import Wan

TEACHER_CLASSES = {cls.adapter: cls for cls in (DiT, Toy, EDMUNet)}


NETWORKS = {"dit": "DiTTransformer2DModel", "toy": "MLP", "edm": "UNet2DModel"}


HUB = {  # short names of pipelines on the Hugging Face hub; common/teachers.py
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sana": "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    "sana-0.6b": "Efficient-Large-Model/Sana_600M_512px_diffusers",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3.5": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
    "qwen-image": "Qwen/Qwen-Image",
    "z-image": "Tongyi-MAI/Z-Image",
    "wan2.1": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan2.1-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "wan2.2": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "dit-xl-256": "facebook/DiT-XL-2-256",
    "dit-xl-512": "facebook/DiT-XL-2-512",
}


EMBEDDED = {
    "toy": "toy",
    "toy-cond": "toy",
    "mnist": "mnist",
    "emoji": "emoji",
    "emoji-flow": "emoji-flow",
}


def load_model(folder, info, teacher=None):
    """Model from a folder of our own format: config.json, diffusion_pytorch_model.safetensors, and `info`, the dict under "model" of its JSON.
    teacher: of a student; needed for pipelines, whose VAE and prompts are the teacher's.

    UserError, one line, if a file is missing, truncated, not safetensors, of another class, or holds other tensors than the configuration asks for.
    """
    folder = Path(folder)
    if info.get("adapter") == "routed":
        return load_routed(folder, info, teacher)
    if "lora" in info:
        return load_lora(folder, info, teacher)
    if getattr(teacher, "adapter", None) == info.get("adapter") and hasattr(teacher, "load_net"):
        return teacher.load_student(folder, info)
    if info.get("adapter") not in list(
        TEACHER_CLASSES
    ):  # a list, since the value may be unhashable
        raise UserError(
            f"{folder}: adapter: expected one of {', '.join(TEACHER_CLASSES)}, found {info.get('adapter')!r}"
        )
    config, cls = (
        read_json(folder / "config.json", "teacher file"),
        TEACHER_CLASSES[info["adapter"]],
    )
    if config.get("_class_name") != NETWORKS[cls.adapter]:
        raise UserError(
            f"{folder / 'config.json'}: _class_name: expected {NETWORKS[cls.adapter]}, found {config.get('_class_name')!r}"
        )
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: expected the weights as safetensors, found no such file")
    try:
        net = cls.network(config)
        schedule = schedules.from_config(info["schedule"])
        model = cls(
            net,
            schedule,
            info["prediction"],
            info["shape"],
            int(info["classes"]),
            sigma_data=float(info["sigma_data"]),
            **{k: info[k] for k in getattr(cls, "fields", ()) if k in info},
        )
    except (
        Exception
    ) as e:  # diffusers and torch raise many kinds for a configuration that cannot be built
        raise UserError(
            f"{folder}: configuration not usable: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
        ) from None
    for key, p in inspect.signature(
        type(net).__init__
    ).parameters.items():  # diffusers builds what then fails in its first pass
        if p.annotation in (int, float) and not isinstance(
            value := config.get(key, p.default), (int, float)
        ):
            raise UserError(
                f"{folder / 'config.json'}: {key}: expected {p.annotation.__name__}, found {str(value)[:80]!r}"
            )
    if (model.shape, model.classes) != model.expected_shape():
        raise UserError(
            f"{folder}: shape and classes: expected {model.expected_shape()}, as in config.json, found {(model.shape, model.classes)}"
        )
    if not 0 < model.sigma_data < float("inf"):
        raise UserError(
            f"{folder}: sigma_data: expected a positive number, found {model.sigma_data}"
        )
    if (adapted := info.get("adapted")) is not None:
        if not hasattr(cls, "adapt") or adapted not in (["dense"], ["dense", "qk_norm"]):
            raise UserError(
                f"{folder}: adapted: expected none, dense or dense and qk_norm, found {adapted!r}"
            )
        model.adapt("qk_norm" in adapted)
    load_weights(path, net)
    load_extras(folder, info, model)
    model.folder = folder
    if cls is Toy:
        model.labelled = info.get("labelled") is True  # toy and toy-cond share a network
    return model


def load_lora(folder, info, teacher):
    """A student whose weights are its teacher's with adapters."""
    spec, number = info["lora"], lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0
    names = spec.get("targets") if isinstance(spec, dict) else None
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(n, str) for n in names)
        or not number(spec.get("rank"))
    ):
        raise UserError(f"{folder}: lora: expected rank and targets, found {str(spec)[:80]}")
    if teacher is None:
        raise UserError(
            f"{folder}: a LoRA: expected its teacher, whose weights it needs, found none"
        )
    kind = lambda c: [c.get(k) for k in ("adapter", "prediction", "adapted")]
    if kind(info) != kind(teacher.config()):
        raise UserError(
            f"{folder}: a LoRA: expected a teacher of its kind, {kind(info)}, found {kind(teacher.config())}"
        )
    student = teacher.copy(
        dict(
            rank=spec["rank"],
            alpha=spec["rank"],
            targets=names,
            seed=0,
            flag=f"{folder}: lora: rank",
        )
    )
    load_weights(folder / lora.FILE, student.net, lora.file_key(student.part))
    load_extras(folder, info, student)
    student.folder = folder
    return student


def load_routed(folder, info, teacher=None, inner=True):
    """inner: its experts may be such themselves, those of msd and phased_dmd on a teacher of several. teacher: of each expert its own, whose weights a LoRA needs."""
    experts, by, table = info.get("experts"), info.get("by"), info.get("table")
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)
    if (
        not isinstance(experts, list)
        or not experts
        or not all(isinstance(e, dict) and (e.get("adapter") != "routed" or inner) for e in experts)
    ):
        raise UserError(f"{folder}: experts: expected a list of models, found {str(experts)[:80]}")
    fine = isinstance(table, list) and all(number(v) for v in table)
    if by == "level":
        fine = fine and len(table) == len(experts) - 1 and table == sorted(table, reverse=True)
    else:
        fine = (
            fine
            and by == "label"
            and all(isinstance(v, int) and 0 <= v < len(experts) for v in table)
        )
    if fine:
        part = lambda i: (
            teacher.at_level(table[i - 1] if i else math.inf)
            if by == "level" and isinstance(teacher, Routed)
            else teacher
        )  # at its noisy end
        one = lambda i, e: (
            load_routed(folder / f"expert-{i}", e, teacher, False)
            if e.get("adapter") == "routed"
            else load_model(folder / f"expert-{i}", e, part(i))
        )
        models = [one(i, e) for i, e in enumerate(experts)]
        fine = by == "level" or len(table) == models[0].classes
    if not fine or any(
        (m.shape, m.classes) != (models[0].shape, models[0].classes) for m in models
    ):
        raise UserError(
            f"{folder}: expected by and table that route to {len(experts)} experts of one shape, found {by!r}, {str(table)[:80]}"
        )
    model = ByLevel(models, table) if by == "level" else ByLabel(models, table)
    model.folder = folder
    return model


def count_parameters(folder):
    """Parameters in the safetensors files of a diffusers folder, from the headers alone."""
    index, count = Path(folder) / f"{WEIGHTS}.index.json", 0
    old = (
        Path(folder) / "diffusion_pytorch_model.bin"
    )  # older than safetensors (facebook/DiT): in fp32
    if old.is_file() and not index.is_file() and not (Path(folder) / WEIGHTS).is_file():
        return old.stat().st_size // 4
    names = set(read_json(index)["weight_map"].values()) if index.is_file() else [WEIGHTS]
    for path in [Path(folder) / name for name in names]:
        with safe_open(path, "pt") as f:
            count += sum(math.prod(f.get_slice(k).get_shape()) for k in f.keys())
    return count


def check_evaluation(path, found):
    """What teacher.json says under "evaluation", checked before anything is trained."""

    def is_result(row):
        """A result that `common.report` can print: numbers, and the protocol they were measured by."""
        number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)
        return (
            isinstance(row, dict)
            and isinstance(row.get("protocol"), str)
            and number(row.get("nfe"))
            and number(row.get("cfg"))
            and all(v is None or number(v) for k, v in row.items() if k in METRICS)
        )

    kinds = dict(
        protocol=("text", lambda v: isinstance(v, str)),
        names=(
            "a list of names",
            lambda v: isinstance(v, list) and v and all(isinstance(n, str) for n in v),
        ),
        measured=("a list of results", lambda v: isinstance(v, list) and all(map(is_result, v))),
        kinds=(
            "a list of names",
            lambda v: isinstance(v, list) and v and all(isinstance(n, str) for n in v),
        ),
        groups=(
            "a number below that of the names for each kind",
            lambda v: (
                isinstance(v, list)
                and len(v) == len(found.get("kinds", ()))
                and all(type(i) is int and 0 <= i < len(found.get("names", ())) for i in v)
            ),
        ),
        stages=("a number from 1 to 5", lambda v: type(v) is int and 1 <= v <= 5),
        **dict.fromkeys(
            ("classifier", "reference", "images", "labels"),
            ("a file in this folder", is_local_name),
        ),
    )
    if not isinstance(found, dict):
        raise UserError(
            f'--teacher {path}: expected an object under "evaluation", found {type(found).__name__}'
        )
    for key, value in found.items():
        expected, fine = kinds.get(key, ("", lambda v: True))
        if not fine(value):
            raise UserError(
                f"--teacher {path}: evaluation.{key}: expected {expected}, found {str(value)[:80]!r}"
            )
    return found


def load_teacher(
    name, device="cpu", dtype=torch.float32, text=None, budget=lambda **sizes: None, place=None
):
    """--teacher NAME or a folder -> frozen Model. `.evaluation` says how its samples are measured (files relative to `.folder`).
    text: for pipelines, arguments of common.teachers.load_pipeline (prompts, cache, size, frames, guidance, say, once, data). budget: told the sizes before anything
    big is loaded. place: puts the model on the device (Run.place)."""
    place = place or (lambda model: model.to(device))
    folder = ROOT / "assets" / EMBEDDED[name] if name in EMBEDDED else Path(name)
    here = os.path.isdir(folder)  # unlike Path.is_dir, False also for a name that no file can have
    if (
        here
        and (folder / "model_index.json").is_file()
        or not here
        and (name in HUB or re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name))
    ):
        teacher = load_pipeline(
            str(folder) if here else name, device, dtype, **(text or {}), budget=budget, place=place
        )
        if here and (folder / "teacher.json").is_file():
            teacher.evaluation = check_evaluation(
                folder / "teacher.json",
                read_json(folder / "teacher.json", "--teacher").get("evaluation", {}),
            )
        return teacher
    if not here:
        raise UserError(
            f"--teacher {name}: expected {', '.join([*EMBEDDED, *HUB])}, a hub name or a folder{did_you_mean(name, [*EMBEDDED, *HUB])}"
        )
    if not (folder / "teacher.json").is_file():
        hint = (
            "it is a student of this project; give its teacher"
            if (folder / "distill.json").is_file()
            else "no teacher.json in it"
        )
        raise UserError(
            f"--teacher {name}: expected a teacher folder (teacher.json, or model_index.json of a diffusers pipeline), found: {hint}"
        )
    if wrong := [
        k for k in ("prompts", "size", "frames", "guidance") if (text or {}).get(k) is not None
    ]:
        raise UserError(
            f"--{wrong[0].replace('guidance', 'embedded-guidance')}: expected a teacher that is a pipeline of diffusers, found {name}, whose teacher.json says all"
        )
    info = read_json(folder / "teacher.json", "--teacher")
    if not isinstance(info.get("model"), dict):
        raise UserError(
            f'--teacher {folder / "teacher.json"}: expected an object under "model", found {type(info.get("model")).__name__}'
        )
    if info["model"].get("adapter") == "sit":
        teacher = load_sit(folder, info["model"], dtype, (text or {}).get("cache"))
    else:
        teacher = load_model(folder, info["model"])
    budget(network=sum(p.numel() for p in teacher.parameters()), width=4)
    teacher.evaluation = check_evaluation(folder / "teacher.json", info.get("evaluation", {}))
    if teacher.adapter == "toy":
        teacher.exact, teacher.labelled = True, name == "toy-cond"
    teacher.dtype = dtype
    return place(teacher.requires_grad_(False))


PIPELINES = {
    cls.pipeline: cls for cls in (SD15, SDXL, SD3, Sana, Flux, QwenImage, ZImage, Wan, ClassDiT)
}


def read_index(name, folder):
    """model_index.json, checked: a supported pipeline, components of diffusers and transformers only."""
    index = read_json(Path(folder) / "model_index.json", "--teacher")
    if index.get("_class_name") not in list(PIPELINES):  # a list, since the value may be unhashable
        raise UserError(
            f"--teacher {name}: expected one of the pipelines {', '.join(PIPELINES)}, found {index.get('_class_name')!r}"
            f"{did_you_mean(index.get('_class_name'), PIPELINES)}"
        )
    for part, value in index.items():
        if (
            part.startswith("_")
            or value == [None, None]
            or not (
                isinstance(value, list)
                or isinstance(value, (str, dict))
                and len(value) == 2
                and part != "id2label"
            )
        ):
            continue  # diffusers takes anything of length two for a library and a class of it
        library, kind = value if isinstance(value, list) and len(value) == 2 else (None, None)
        # a class of transformers called Auto... looks for code in the folder, and older versions of diffusers run <part>/<library>.py
        code = (
            library == "transformers"
            and str(kind).startswith("Auto")
            or (Path(folder) / part / f"{library}.py").exists()
        )
        if library not in ("diffusers", "transformers") or not isinstance(kind, str) or code:
            raise UserError(
                f"--teacher {name}: {part}: expected a component of diffusers or transformers, found {value}; code of a folder is never run"
            )
    return index


def download(name):
    """Folder of a hub name's files (without pickles), downloaded once by huggingface_hub; a local folder is itself."""
    if Path(name).is_dir():
        return str(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.txt", "*.model", "*/*.safetensors", "*.jinja"] + ["*/*.bin"] * HUB.get(
        name, name
    ).startswith("facebook/DiT")  # `pickles`
    try:
        return snapshot_download(
            HUB.get(name, name),
            allow_patterns=wanted,
            ignore_patterns=["*.fp16.safetensors", "*/*.fp16-*"],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        raise UserError(
            f"--teacher {name}: not downloaded from the hub ({str(e).splitlines()[0][:200]}); give a local folder"
        ) from None


def full_config(kind, folder):
    """The configuration in a folder of diffusers class `kind`, with the defaults of the class where the file, perhaps that of an older version, is silent."""
    given = {
        k: p.default
        for k, p in inspect.signature(kind.__init__).parameters.items()
        if p.default is not p.empty
    }
    return SimpleNamespace(**given | read_json(Path(folder) / "config.json", "--teacher"))


def load_pipeline(
    name,
    device="cpu",
    dtype=torch.float32,
    prompts=None,
    cache=None,
    size=None,
    frames=None,
    guidance=None,
    say=print,
    once=lambda fn: fn(),
    data=None,
    budget=lambda **sizes: None,
    place=None,
):
    """Frozen Model of a pipeline. prompts: list of str, or a file of them; size: of the picture in pixels, [height, width] or both in one, if other than what
    the network was built for; frames: of a video, likewise; guidance: see Flux; data: folder of images, whose captions are encoded beside the prompts while
    the text encoders are here."""
    folder = download(name)
    index = read_index(name, folder)
    cls = PIPELINES[index["_class_name"]]
    size = [size, size] if isinstance(size, int) else size
    if prompts is not None and cls.text is None:
        raise UserError(
            f"--prompts: expected a teacher that takes text, found {name}, which takes labels"
        )
    if cls.text is not None and not isinstance(prompts, list):
        own = Path(folder) / "prompts.txt"
        prompts = read_prompts(
            prompts or (own if own.is_file() else ROOT / "assets" / "prompts.txt")
        )
    captions = read_captions(data) if data and cls.text is not None else []
    import diffusers
    import transformers

    for logging in (
        diffusers.utils.logging,
        transformers.utils.logging,
    ):  # truncated prompts are normal, loading bars say nothing
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if tuple(map(int, diffusers.__version__.split(".")[:2])) < cls.since:
        raise UserError(
            f"--teacher {name}: {cls.pipeline}: expected diffusers {'.'.join(map(str, cls.since))} or newer, found {diffusers.__version__}"
        )
    try:
        config, vae = (
            full_config(getattr(diffusers, index[part][1]), Path(folder) / part)
            for part in (cls.part, "vae")
        )
        cls.check(name, config, vae, size, frames, guidance)
    except LOAD_ERRORS as e:
        raise UserError(
            f"--teacher {name}: not loaded: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
        ) from None
    table, first = (
        embed_prompts(cls, folder, prompts, device, dtype, cache, say, once)
        if cls.text is not None
        else None,
        0,
    )
    if captions:
        first = table.append(
            embed_prompts(
                cls, folder, [text for _, text in captions], device, dtype, cache, say, once
            )
        )
    scheduler = read_json(Path(folder) / "scheduler" / "scheduler_config.json", "--teacher")
    try:
        nets = cls.networks(index)
        budget(
            network=sum(count_parameters(Path(folder) / part) for part in nets),
            vae=count_parameters(Path(folder) / "vae"),
            width=dtype.itemsize,
            experts=len(nets),
        )
        net = cls.load_net(folder, dtype)
        vae = getattr(diffusers, index["vae"][1]).from_pretrained(
            folder,
            subfolder="vae",
            torch_dtype=dtype,
            use_safetensors=None if cls.pickles else True,
        )
        model = cls(
            net,
            vae.eval().requires_grad_(False),
            scheduler,
            size,
            **({} if frames is None else dict(frames=frames)),
        )
        if guidance is not None:
            model.guidance = guidance
        model.attach(Path(folder), table, prompts)
        model.cache, model.vae_folder, model.captioned = (
            cache,
            Path(folder) / "vae",
            ([path for path, _ in captions], first),
        )
        model = model.assembled(folder, index, dtype, nets)
    except LOAD_ERRORS as e:
        raise UserError(
            f"--teacher {name}: not loaded: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
        ) from None
    model.dtype = dtype
    return (place or (lambda model: model.to(device)))(model.requires_grad_(False))
