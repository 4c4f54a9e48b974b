"""--teacher NAME | FOLDER -> Model: the one entry to all teachers and their students.

NAME: a teacher of this repository (EMBEDDED), a short name (HUB) or a name on the Hugging Face hub.
FOLDER: a diffusers pipeline (model_index.json), or a network in our own format (teacher.json,
config.json, diffusion_pytorch_model.safetensors).

Folders may be somebody else's: no code in them is run, no pickle is read, and all JSON is checked
before it is used (common/teachers/formats.py).
"""

import inspect
import math
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from common import lora, schedules, small
from common.distributed import require_same
from common.errors import UserError, describe, require
from common.files import (
    ROOT,
    WEIGHTS,
    is_local_name,
    load_errors,
    load_weights,
    read_json,
)
from common.model import load_extras
from common.routed import ByLabel, ByLevel, Routed
from common.schema import check
from common.teachers.bake import UNBAKED_LORA
from common.teachers.chroma import Chroma
from common.teachers.configuration import (
    check_configurations,
    full_config,
    read_scheduler,
    release,
    with_defaults,
)
from common.teachers.dit import DiT
from common.teachers.flow import SD3, Flux, FluxKontext, QwenImage, Sana, ZImage
from common.teachers.flux2 import Flux2, Flux2Klein
from common.teachers.formats import (
    LORA,
    MODEL,
    check_evaluation,
    check_routed,
    read_index,
    wrong_route,
)
from common.teachers.from_image import read_image_prompts
from common.teachers.hub import CONFIGS, HUB, download, is_hub_name
from common.teachers.hunyuan_image import HunyuanImage
from common.teachers.hunyuan_video import HunyuanVideo15
from common.teachers.imagenet import ClassDiT, EDMUNet, load_sit
from common.teachers.kind import (
    EMBEDDED,
    no_such_teacher,
    no_teacher_in,
    refuse_file,
    which_is_taken,
)
from common.teachers.ltx import LTXVideo
from common.teachers.lumina import Lumina2
from common.teachers.prompt_files import read_prompts
from common.teachers.prompts import embed_prompts
from common.teachers.qwen_edit import QwenImageEdit, QwenImageEditPlus
from common.teachers.sana_video import SanaVideo
from common.teachers.sizes import sizes_of
from common.teachers.toy import Toy
from common.teachers.unet import SD15, SDXL
from common.teachers.wan import Wan, WanImage
from common.teachers.weights import find_weights
from data.image_folder import read_captions

# Every teacher class. A class with a `pipeline` loads the folders of that diffusers pipeline, the
# others load folders in our own format that name their `adapter`. SiT has a loader of its own.
IMAGES = (SD15, SDXL, SD3, Sana, Flux, Chroma, Flux2, Flux2Klein)
IMAGES += (HunyuanImage, Lumina2, QwenImage, ZImage)
VIDEOS = (Wan, SanaVideo, LTXVideo, HunyuanVideo15)
FROM_IMAGE = (FluxKontext, QwenImageEdit, QwenImageEditPlus, WanImage)
CLASSES = (*IMAGES, *VIDEOS, *FROM_IMAGE, ClassDiT, DiT, Toy, EDMUNet)
PIPELINES = {cls.pipeline: cls for cls in CLASSES if cls.pipeline}
PIPELINES["Lumina2Text2ImgPipeline"] = Lumina2  # its first name in diffusers
OWN_FORMAT = {cls.adapter: cls for cls in CLASSES if not cls.pipeline}


def ignore_sizes(**sizes):
    """Default of `budget`: memory is not estimated."""


# ---- teachers ------------------------------------------------------------------------------------


def load_teacher(
    name, device="cpu", dtype=torch.float32, text=None, budget=ignore_sizes, place=None
):
    """--teacher -> frozen Model. Its `evaluation` is how its samples are measured.

    dtype: of the network passes. text: options of load_pipeline, from `prompts` to `data`.
    budget: called with numbers of parameters before anything big is loaded (Run.teacher_kwargs).
    place: moves the model to the device (Run.to_device).
    """
    refuse_file(name)
    folder = ROOT / "assets" / EMBEDDED[name] if name in EMBEDDED else Path(name)
    options = text or {}
    taken = which_is_taken(name)
    if taken:
        options.get("say", print)(taken)
    if os.path.isdir(folder):  # unlike Path.is_dir, False also for a name that no file can have
        if (folder / "distill.json").is_file():
            raise no_teacher_in(name, folder)
        if not (folder / "model_index.json").is_file():
            return load_own_teacher(name, folder, device, dtype, options, budget, place)
        teacher = load_pipeline(str(folder), device, dtype, **options, budget=budget, place=place)
        if (folder / "teacher.json").is_file():
            info = read_json(folder / "teacher.json", "--teacher")
            teacher.evaluation = read_evaluation(folder, info)
        if teacher.loras:  # these are results without it
            teacher.evaluation.pop("measured", None)
        return teacher
    if name in HUB or is_hub_name(name):
        return load_pipeline(name, device, dtype, **options, budget=budget, place=place)
    raise no_such_teacher(name)


def load_own_teacher(name, folder, device, dtype, options, budget, place):
    """Frozen Model of a folder in our own format, or with a SiT checkpoint."""
    path = folder / "teacher.json"
    if not path.is_file():
        raise no_teacher_in(name, folder)
    flags = dict(guidance="--embedded-guidance", loras="--teacher-lora")
    flags["negative"] = "--negative-prompt"
    for option in ("prompts", "negative", "size", "frames", "guidance", "loras"):
        if options.get(option) is not None:
            flag = flags.get(option, f"--{option}")
            raise UserError(
                f"{flag}: expected a teacher that is a pipeline of diffusers, found {name}, a "
                "network in our own format"
            )
    info = read_json(path, "--teacher")
    model = check(info.get("model"), f"--teacher {path}: model.")
    # in a dry run these weights are read too: they are small, or their shapes say what to build
    if model.get("adapter") == "sit":
        teacher = load_sit(folder, model, dtype, options.get("cache"))
    else:
        teacher = load_model(folder, model)
    budget(
        network=sum(p.numel() for p in teacher.parameters()),
        width=4,
        count_small=partial(small.count_parameters, teacher.network, teacher.net_config()),
    )
    teacher.evaluation = read_evaluation(folder, info)
    if isinstance(teacher, Toy):  # toy and toy-cond share a folder
        teacher.exact = True
        teacher.labelled = name == "toy-cond"
    if is_blank(device) and teacher.vae is not None:
        from dryrun.teachers import make_blank

        make_blank(teacher)
    return freeze(teacher, device, dtype, place)


def read_evaluation(folder, info):
    return check_evaluation(folder / "teacher.json", info.get("evaluation", {}))


def is_blank(device):
    """Whether networks on this device have no weights: that of --dry-run (dryrun/ghost.py)."""
    return torch.device(device).type == "ghost"


def freeze(teacher, device, dtype, place):
    teacher.dtype = dtype
    teacher.requires_grad_(False)
    return place(teacher) if place else teacher.to(device)


# ---- diffusers pipelines -------------------------------------------------------------------------


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
    data=None,
    edits=None,
    loras=None,
    negative=None,
    budget=ignore_sizes,
    place=None,
):
    """Frozen Model of a diffusers pipeline: a folder or a name on the hub.

    prompts: list of str, or a file of them; default: the folder's prompts.txt, or ours. Of a
    teacher that takes an image: list of (text, file of the source); default: those of `data`.
    cache: folder of cached embeddings and latents.
    size: in pixels, [height, width] or one number for both, or a list of several [height, width],
    of which the model has one at a time (Sizes); default: the network's own.
    frames: of a video. guidance: see Flux. say: prints a line of progress.
    data: folder of images; their captions are embedded together with the prompts, because the text
    encoders are in memory only then. Of a teacher that takes an image: see read_image_prompts.
    edits: `data` of a student's training, for teachers that take an image and nothing else.
    loras: list of TeacherLora that become part of the weights, or None.
    negative: the prompt of the null condition, in the place of the pipeline's; None: that one.
    """
    sizes = sizes_of(size)
    if is_blank(device):  # the largest size takes the most memory
        size = max(sizes, key=math.prod, default=None)
        options = (size, frames, guidance, budget)
        model = load_blank_pipeline(name, device, dtype, prompts, negative, *options)
        return freeze(model, device, dtype, place)
    if prompts is not None and not isinstance(prompts, list):
        prompts = read_prompts(prompts)
    # the configurations first: a mistake in the flags is found before weights are downloaded
    folder = download(name, CONFIGS)
    silence_libraries()
    index = read_index(name, folder, PIPELINES)
    cls = PIPELINES[index["_class_name"]]
    check_version(name, cls)
    scheduler, c, vae = check_pipeline(name, cls, folder, index, sizes, frames, guidance)
    folder = download(name)
    if cls.takes_image:
        require(len(sizes) <= 1, f"--size: expected one size for {name}, which takes images")
        facts = (cls.sample_shape(c, sizes[0] if sizes else None, frames), vae, negative)
        prompts, captions = read_image_prompts(name, cls, prompts, data or edits, *facts)
    else:
        prompts, captions = read_texts(name, cls, folder, prompts, negative, data)
    loras = read_loras(loras, cls, folder, index)
    parts = cls.networks(index)
    counts = {}
    for part in (*parts, "vae"):
        weights = find_weights(folder / part, name)
        if weights.variant:
            say(f"{part}: weights in {weights.variant}, the folder has no others")
        with load_errors(f"--teacher {name}: not loaded"):
            counts[part] = weights.count_parameters()
    budget(
        network=sum(counts[part] for part in parts),
        vae=counts["vae"],
        width=dtype.itemsize,
        experts=len(parts),
        count_small=count_small(cls, c),
    )

    table, first_caption = None, 0
    if cls.takes_prompts:
        options = (device, dtype, cache, say, loras)
        table = embed_prompts(cls, folder, prompts, *options, negative)
        if captions and not cls.takes_image:  # which has them among its prompts
            texts = [text for _, own in captions for text in own]
            first_caption = table.append(embed_prompts(cls, folder, texts, *options))

    with load_errors(f"--teacher {name}: not loaded"):
        options = (scheduler, dtype, sizes, frames, loras)
        model = load_network_and_vae(cls, folder, index, *options)
        if guidance is not None:
            model.guidance = guidance
        model.attach(folder, table, prompts, negative)
        model.cache = cache
        model.captioned = (captions, first_caption)
        model = model.with_experts(folder, index, dtype)
    return freeze(model, device, dtype, place)


def load_blank_pipeline(name, device, dtype, prompts, negative, size, frames, guidance, budget):
    """What load_pipeline returns, without values: for --dry-run. Arguments as there."""
    import diffusers

    from dryrun.teachers import (
        TABLE,
        blank_embeddings,
        blank_network,
        make_blank,
        public_configs,
    )

    silence_libraries()
    if name in TABLE:
        folder = ROOT / "assets"  # of the default prompts
        index, config, vae, scheduler = public_configs(name)
        cls = PIPELINES[index["_class_name"]]
        check_version(name, cls)
        c = with_defaults(getattr(diffusers, cls.network_class), config)
        cls.check(name, c, vae, size, frames, guidance)
    else:
        folder = download(name, CONFIGS)
        index = read_index(name, folder, PIPELINES)
        cls = PIPELINES[index["_class_name"]]
        check_version(name, cls)
        sizes = [size] if size else []
        scheduler, c, vae = check_pipeline(name, cls, folder, index, sizes, frames, guidance)
        config = vars(c)
    experts = len(cls.networks(index))
    with load_errors(f"--teacher {name}: not loaded"):
        net = blank_network(cls, config, device, dtype)
        budget(
            network=experts * sum(p.numel() for p in net.parameters()),
            vae=getattr(vae, "parameters", 0),
            width=dtype.itemsize,
            experts=experts,
            count_small=count_small(cls, c),
        )
        options = {} if frames is None else dict(frames=frames)
        model = make_blank(cls(net, SimpleNamespace(config=vae), scheduler, size, **options))
        if guidance is not None:
            model.guidance = guidance
        prompts, _ = read_texts(name, cls, folder, prompts, negative, None)
        table = None
        if cls.takes_prompts:
            shapes = cls.text_shapes(c) | model.source_shapes()
            table = blank_embeddings(shapes, len(prompts), dtype)
        model.attach(folder, table, prompts, negative)
        # of further experts, which have the first one's configuration
        model.load_net = lambda *unused: blank_network(cls, config, device, dtype)
        return model.with_experts(folder, index, dtype)


def read_texts(name, cls, folder, prompts, negative, data):
    """-> prompts (list of str; None for a teacher of labels), captions (list of (file, texts))."""
    if not cls.takes_prompts:
        for flag, value in {"--prompts": prompts, "--negative-prompt": negative}.items():
            require(
                value is None,
                f"{flag}: expected a teacher that takes text, found {name}, which takes labels",
            )
        return None, []
    if not isinstance(prompts, list):
        prompts = read_prompts(prompts or default_prompts(folder))
    return prompts, read_captions(data) if data else []


def default_prompts(folder):
    """File of the prompts without --prompts. folder: of the pipeline."""
    own = Path(folder) / "prompts.txt"
    return own if own.is_file() else ROOT / "assets" / "prompts.txt"


def silence_libraries():
    """Truncated prompts are normal, torchvision is not needed, and loading bars of seconds only
    hide our own lines."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def check_version(name, cls):
    import diffusers

    if release(diffusers.__version__) < cls.since:
        since = ".".join(map(str, cls.since))
        raise UserError(
            f"--teacher {name}: {cls.pipeline}: expected diffusers {since} or newer, "
            f"found {diffusers.__version__}"
        )


def check_pipeline(name, cls, folder, index, sizes, frames, guidance):
    """-> configurations of scheduler (dict), network and VAE, checked, and flags against them.

    Needs the configuration files only, so that a mistake is found before anything is loaded.
    """
    import diffusers

    with load_errors(f"--teacher {name}: not loaded"):
        scheduler = read_scheduler(folder, index)
        net = full_config(getattr(diffusers, index[cls.part][1]), folder / cls.part)
        vae = full_config(getattr(diffusers, index["vae"][1]), folder / "vae")
        check_configurations(name, cls, scheduler, net, vae)
        for size in sizes or [None]:
            cls.check(name, net, vae, size, frames, guidance)
    return scheduler, net, vae


def count_small(cls, c):
    """Function that counts the parameters of a network that --small makes. c: configuration of the
    teacher's network."""
    return partial(small.count_parameters, cls.network, vars(c))


def read_loras(loras, cls, folder, index):
    """-> list of TeacherLora, read for a pipeline. UserError: one does not fit, or not on all
    machines the same one is found."""
    if not loras:
        return []
    parts = cls.networks(index)
    require(
        len(parts) == 1,
        f"{loras[0].flag}: expected a pipeline of one network, found {' and '.join(parts)}: a LoRA "
        "is for one of them; add it there with diffusers (fuse_lora, save_pretrained) and give the "
        "new folder as --teacher",
    )
    require_same([user_lora.sha256 for user_lora in loras], "--teacher-lora")
    for user_lora in loras:
        user_lora.read(cls, folder)
    return loras


def load_network_and_vae(cls, folder, index, scheduler, dtype, sizes, frames, loras):
    """Model of the pipeline's first network."""
    net = cls.load_net(folder, dtype, cls.part)
    for user_lora in loras:
        user_lora.add_to_network(net)
    vae = cls.load_vae(folder, dtype, index["vae"][1])
    options = {} if frames is None else dict(frames=frames)
    model = cls(net, vae, scheduler, sizes[0] if sizes else None, **options)
    if len(sizes) > 1:
        model.offer_sizes(sizes, scheduler)
        model.sizes.use_smallest()
    model.read_weights = cls.weights_of(folder, cls.part, loras)
    model.loras = loras
    model.vae_folder = folder / "vae"
    return model


# ---- networks in folders of our own --------------------------------------------------------------


def load_model(folder, info, teacher=None):
    """Model of a folder that `Model.save` wrote. info: "model" of its teacher.json or distill.json.

    teacher: of a student. Pipelines, whose VAE and prompts are the teacher's, and LoRAs need it.
    UserError, one line: a file is missing, damaged or no safetensors, the network is of another
    class than expected, or its tensors do not fit the configuration.
    """
    folder = Path(folder)
    if "folder" in info:  # of the network in a whole pipeline
        part = info["folder"]
        require(
            is_local_name(part), f"{folder}: folder: expected a folder in this one, found {part!r}"
        )
        folder = folder / part
    adapter = info.get("adapter")
    if adapter == "routed":
        return load_routed(folder, info, teacher)
    if "lora" in info:
        return load_lora(folder, info, teacher)
    if adapter in list(OWN_FORMAT):  # a list, since the value may be unhashable
        return load_network(folder, info)
    if teacher is not None and teacher.adapter == adapter:
        return teacher.load_student(folder, info)
    raise UserError(
        f"{folder}: adapter: expected one of {', '.join(OWN_FORMAT)}, found {adapter!r}"
    )


def load_network(folder, info):
    """Model of a folder in our own format: config.json, diffusion_pytorch_model.safetensors."""
    cls = OWN_FORMAT[info["adapter"]]
    check(info, f"{folder}: ", required=MODEL)
    path = folder / "config.json"
    config = read_json(path, "teacher file")
    if config.get("_class_name") != cls.network_class:
        raise UserError(
            f"{path}: _class_name: expected {cls.network_class}, "
            f"found {config.get('_class_name')!r}"
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{folder / WEIGHTS}: expected the weights as safetensors, found no such file"
        )
    model = build_model(folder, cls, config, info)
    check_numbers(path, model.net, config)
    if (model.shape, model.classes) != model.expected_shape():
        raise UserError(
            f"{folder}: shape and classes: expected {model.expected_shape()}, as in config.json, "
            f"found {(model.shape, model.classes)}"
        )
    if info.get("adapted"):
        if cls is not DiT:
            raise UserError(f"{folder}: adapted: expected none, found {info['adapted']!r}")
        model.adapt(qk_norm="qk_norm" in info["adapted"])
    load_weights(folder / WEIGHTS, model.net)
    load_extras(folder, info, model)
    model.folder = folder
    return model


def build_model(folder, cls, config, info):
    """Model with random weights."""
    options = {name: info[name] for name in cls.fields if name in info}
    try:
        return cls(
            cls.network(config),
            schedules.from_config(info["schedule"]),
            info["prediction"],
            info["shape"],
            info["classes"],
            sigma_data=float(info["sigma_data"]),
            **options,
        )
    except Exception as e:  # diffusers and torch raise many kinds for what cannot be built
        raise UserError(f"{folder}: configuration not usable: {describe(e)}") from None


def check_numbers(path, net, config):
    """UserError for a value that is no number where diffusers needs one.

    It would build such a network, and fail in the first pass.
    """
    for name, parameter in inspect.signature(type(net).__init__).parameters.items():
        value = config.get(name, parameter.default)
        if parameter.annotation in (int, float) and not isinstance(value, (int, float)):
            raise UserError(
                f"{path}: {name}: expected {parameter.annotation.__name__}, "
                f"found {str(value)[:80]!r}"
            )


def load_lora(folder, info, teacher):
    """A student whose weights are its teacher's with adapters."""
    spec = check(info["lora"], f"{folder}: lora.", required=LORA)
    if teacher is None:
        raise UserError(
            f"{folder}: a LoRA: expected its teacher, whose weights it needs, found none"
        )
    expected, found = kind_of(info), kind_of(teacher.config())
    if expected != found:
        raise UserError(
            f"{folder}: a LoRA: expected a teacher of its kind, {expected}, found {found}"
        )
    adapters = dict(
        rank=spec["rank"],
        alpha=spec["rank"],  # the file's factors contain alpha / rank
        targets=spec["targets"],
        seed=0,
        flag=f"{folder}: lora: rank",
    )
    student = teacher.copy(adapters)
    unbaked = folder / UNBAKED_LORA  # where the other file holds the new inputs as adapters
    path = unbaked if unbaked.is_file() else folder / lora.FILE
    lora.load(path, student)
    load_extras(folder, info, student)
    student.folder = folder
    return student


def kind_of(config):
    return [config.get(name) for name in ("adapter", "prediction", "adapted")]


def load_routed(folder, info, teacher=None, nested=False):
    """Several experts, each in a subfolder: students of MSD and Phased DMD.

    nested: these experts are one expert of another student, and none of them is routed again.
    """
    check_routed(folder, info, nested)
    by, table = info["by"], info["table"]
    models = []
    for i, expert in enumerate(info["experts"]):
        home = folder if "folder" in expert else folder / f"expert-{i}"
        if expert.get("adapter") == "routed":
            models.append(load_routed(home, expert, teacher, nested=True))
        else:
            models.append(load_model(home, expert, teacher_of_expert(teacher, by, table, i)))
    first = models[0]
    same = all((m.shape, m.classes) == (first.shape, first.classes) for m in models)
    if not same or (by == "label" and len(table) != first.classes):
        raise wrong_route(folder, info)
    model = ByLevel(models, table) if by == "level" else ByLabel(models, table)
    model.folder = folder
    return model


def teacher_of_expert(teacher, by, table, i):
    """The teacher whose weights a LoRA of expert i uses: of several, that of i's highest level."""
    if by == "level" and isinstance(teacher, Routed):
        return teacher.at_level(table[i - 1] if i else math.inf)
    return teacher
