"""README.md of a student's folder, a model card as the Hugging Face hub reads it, and the metadata
in the header of its safetensors files (ModelSpec, and entries `distill.*` of our own).

Both are made from distill.json, the teacher's folder and metrics.json, and hold no paths.
"""

import json
import math
import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData

from common.files import ROOT
from common.lora import FILE
from common.metrics import METRICS
from common.teachers.comfyui import student_name
from common.teachers.hub import HUB, is_hub_name
from common.teachers.kind import EMBEDDED
from common.teachers.teacher_lora import file_in_student

PROMPT = "red heart"  # in the lines that load a student
ABSENT = [None, None]
LICENCE_KEYS = ("license", "license_name", "license_link")

# Names of architectures that ModelSpec's users agree on, by the kind of the teacher.
ARCHITECTURES = dict(
    sd15="stable-diffusion-v1", sdxl="stable-diffusion-xl-v1-base", flux="flux-1-dev"
)
UNETS = (ARCHITECTURES["sd15"], ARCHITECTURES["sdxl"])
PREDICTIONS = dict(eps="epsilon", v="v")
KOHYA = "https://github.com/Stability-AI/generative-models"  # ModelSpec, for kohya's names


def make_card(record, index, teacher, metrics):
    """-> text. record: distill.json. index: model_index.json of the folder, or None for a folder
    that is no pipeline. teacher: folder of the teacher's pipeline, or None. metrics: dict or None.
    """
    method, nfe = record["method"], record["nfe"]
    plain = record.get("plain") or {}
    name = teacher_name(record)
    steps = "1 step" if nfe == 1 else f"{nfe} steps"
    call = plain.get("call") if index else None
    loras = record.get("teacher_lora", [])
    parts = [
        f"---\n{front_matter(record, call, teacher)}\n---",
        f"# {name} in {steps}, by {method}",
        f"A student of `{name}`{with_loras(loras)}, distilled by {paper_of(method)} to {steps}.",
        "## Use",
    ]
    if call is None:
        parts += use_of_a_network(record, plain)
    else:
        parts += use_of_a_pipeline(record, plain, index)
    parts += ["## Training", training_of(record)]
    if metrics and metrics.get("it") == record.get("training", {}).get("iterations"):
        parts += ["## Measured", measured(metrics)]
    parts += ["## Licence", licence_text(teacher)]
    return "\n\n".join(parts) + "\n"


def teacher_name(record):
    """The teacher's name on the hub, or the last part of its path."""
    name = record["teacher"]
    if name in HUB:
        return HUB[name]
    return name if is_hub_name(name) else Path(name).name


def with_loras(records):
    """Of the card's first sentence: the LoRAs that the teacher had."""
    texts = [f"`{Path(r['file']).name}` (scale {r['scale']:g})" for r in records]
    return f" with the LoRA {' and '.join(texts)}" if texts else ""


def paper_of(method):
    """The method's name, with a link to its paper if its script names one."""
    path = ROOT / f"{method}.py"
    found = re.search(r"arXiv[ :](\d{4}\.\d{5})", path.read_text()) if path.is_file() else None
    return f"[{method}](https://arxiv.org/abs/{found[1]})" if found else f"`{method}`"


# ---- front matter --------------------------------------------------------------------------------


def front_matter(record, call, teacher):
    """YAML between the two lines of dashes. call: arguments of pipe(...), None without pipeline."""
    lora = is_lora(record)
    name = record["teacher"]
    on_hub = name not in EMBEDDED and (name in HUB or is_hub_name(name))
    model = record.get("model", {})
    text = call is not None or bool(record.get("plain"))
    task = "unconditional-image-generation"
    if text:
        task = "text-to-video" if is_video(record) else "text-to-image"
        task = "image-to-image" if "source" in models_of(record)[0] else task
    tags = ["diffusion-distillation", record["method"]] + (["lora"] if lora else [])
    data = dict(tags=tags, pipeline_tag=task, **licence_of(teacher))
    if model.get("adapter") != "toy":
        data["library_name"] = "diffusers"
    if on_hub:
        data |= dict(base_model=teacher_name(record))
        data |= dict(base_model_relation="adapter" if lora else "finetune")
    if call is not None:
        names = ("num_inference_steps", "guidance_scale")
        parameters = dict(num_inference_steps=record["nfe"])
        parameters |= {key: call[key] for key in names if key in call}
        data["inference"] = dict(parameters=parameters)
    return ModelCardData(**data).to_yaml().strip()


def is_lora(record):
    model = record.get("model", {})
    return "lora" in model or any("lora" in expert for expert in model.get("experts", []))


def licence_of(teacher):
    """The entries on the licence in the card of the teacher's folder; `other` without one."""
    path = Path(teacher) / "README.md" if teacher is not None else None
    if path is not None and path.is_file():
        found = re.match(r"---\n(.*?)\n---\n", path.read_text(errors="replace"), re.S)
        try:
            entries = yaml.safe_load(found[1]) if found else None
        except yaml.YAMLError:
            entries = None
        if isinstance(entries, dict) and isinstance(entries.get("license"), str):
            return {k: entries[k] for k in LICENCE_KEYS if isinstance(entries.get(k), str)}
    return dict(license="other")


def licence_text(teacher):
    licence = licence_of(teacher)
    if licence == dict(license="other"):
        return (
            "That of the teacher, whose folder does not name it: name it in the lines at the top "
            "before you publish this folder."
        )
    return f"That of the teacher: {licence.get('license_name', licence['license'])}."


# ---- use -----------------------------------------------------------------------------------------


def use_of_a_pipeline(record, plain, index):
    """Paragraphs on a folder that DiffusionPipeline loads. The first one has the lines."""
    call = dict(plain["call"])
    lines = loading_lines(record, plain, index)
    notes = [
        'With `torch_dtype=torch.bfloat16` it takes half of the memory; `pipe.to("cuda")` moves '
        "it to a GPU."
    ]
    times = ", ".join(f"{t:.4g}" for t in plain["times"])
    how = "with fresh noise between them" if is_stochastic(plain) else "along the ODE"
    if record["nfe"] == 1:
        how = "from pure noise"
    if "num_inference_steps" in call:
        text = (
            f"The scheduler's configuration holds its {record['nfe']} steps, at the network's "
            f"times {times}, {how}. Other numbers of steps give a grid that it was not trained for."
        )
    else:
        text = (
            f"Its {record['nfe']} steps are at the network's times {times}, {how}. No scheduler's "
            "configuration holds this grid, so the call has it."
        )
    notes.append(text)
    if "sizes" in plain:
        notes.append(sizes_text(plain))
    if "nearly" in plain:
        notes.append(
            "In training they were rounded to thousandths; those of the scheduler are not, which "
            f"changes samples by about {plain['nearly']:.0e}, relative."
        )
    if "noise" in call:
        notes.append("The first noise is scaled as in training, so the call has `latents`.")
    notes.append(guidance_text(record, call))
    if plain["pipeline"].startswith("QwenImageEdit"):
        notes.append("Its processor needs torchvision.")
    if plain["pipeline"] == "WanImageToVideoPipeline":
        notes.append("Its pipeline needs the package ftfy.")
    if plain["pipeline"] == "ZImagePipeline":
        notes.append("The grid is for diffusers 0.39 or newer: older pipelines make another one.")
    if any("extras" in part for part in models_of(record)):
        notes.append(
            "The student has further inputs (a guidance scale, a second time). For these steps "
            "they are folded into its weights; `extras.safetensors` and `unbaked*.safetensors` "
            "hold them for the sampler of the repository."
        )
    if record.get("teacher_lora"):
        notes.append(lora_text(record, plain))
    if "comfyui" in plain and not plain.get("merged"):
        notes.append(comfyui_text(record, plain))
    return ["```python\n" + lines + "\n```", *notes]


def sizes_text(plain):
    """The arguments for each of several sizes."""
    calls = []
    for call in plain["sizes"]:
        names = [name for name in ("height", "width", "sigmas", "timesteps") if name in call]
        calls.append("`" + ", ".join(f"{name}={call[name]!r}" for name in names) + "`")
    return f"It was trained at several sizes, whose arguments are {'; '.join(calls)}."


def lora_text(record, plain):
    """On the LoRAs of the teacher: where they are."""
    if not is_lora(record):
        return "The teacher's LoRA is in the weights: it is not to be loaded again."
    if plain.get("merged"):
        return (
            "`pytorch_lora_weights.safetensors` contains the teacher's LoRA; "
            "`unbaked_lora_weights.safetensors` is the student's alone."
        )
    return (
        "`pytorch_lora_weights.safetensors` was trained on top of the teacher's LoRA, "
        "which is in `teacher_lora/`: both are needed, at these scales."
    )


def models_of(record):
    model = record.get("model", {})
    return model.get("experts", [model])


def is_video(record):
    """Whether samples are (colours, frames, height, width)."""
    return len(models_of(record)[0].get("image", [])) == 4


def is_stochastic(plain):
    return plain["scheduler"] == "LCMScheduler" or plain.get("stochastic", False)


def trained_guidance(record):
    flags = record.get("flags")
    negative = flags.get("negative_prompt") if isinstance(flags, dict) else None
    text = f"w = {record.get('cfg')}"
    return text if negative is None else f"{text}, negative prompt {str(negative)!r}"


def guidance_text(record, call):
    if "guidance_scale" in call:
        return (
            f"Guidance is trained in ({trained_guidance(record)}): leave `guidance_scale` at "
            f"{call['guidance_scale']:g}."
        )
    if is_lora(record) or record["model"].get("adapter", "").startswith("qwen-image"):
        return f"Guidance is trained in ({trained_guidance(record)}): give no negative prompt."
    return (
        f"Guidance is trained in ({trained_guidance(record)}); the pipeline does not guide it, "
        "whatever `guidance_scale` is."
    )


def comfyui_text(record, plain):
    """Where the files go in ComfyUI, and the settings of its sampler."""
    settings = plain["comfyui"]
    lora = is_lora(record)
    folder = "loras" if lora else "diffusion_models"
    several = len(plain["networks"]) > 1
    file = f"{'expert-0/' if several else ''}pytorch_lora_weights.safetensors"
    if not lora:
        file = f"{plain['networks'][0]}/diffusion_pytorch_model.safetensors"
    names = f"{student_name(record)}{'-0 and -1' if several else ''}"
    steps = f"scheduler `simple`, {record['nfe']} steps"
    if not settings["simple"]:
        steps = "the steps in the workflow's node ManualSigmas, which newer versions have"
    each = " of each expert" if several else ""
    return (
        f"ComfyUI: copy `{file}`{each} to its folder `models/{folder}` as `{names}.safetensors`, "
        "open `comfyui.json` (a workflow in the API format), and choose the teacher's files in "
        f"its loaders. Sampler `{settings['sampler']}`, {steps}, cfg 1. The weights must be in "
        "one file; `python -m tools.export RUN --comfyui FOLDER` writes it."
    )


def loading_lines(record, plain, index):
    """Python code that loads the folder and makes a picture."""
    absent = absent_arguments(index)
    lines = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        'folder = "."  # this folder, or its name on the hub',
        f"pipe = DiffusionPipeline.from_pretrained(folder, {absent}torch_dtype=torch.float32)",
    ]
    if is_lora(record):
        loras = [] if plain.get("merged") else record.get("teacher_lora", [])
        lines += lora_lines(plain["pipeline"], len(plain["networks"]), loras)
    call = dict(plain["call"])
    noise = call.pop("noise", None)
    arguments = [f"{name}={value!r}" for name, value in call.items()]
    if noise is not None:
        arguments.append("latents=latents")
        shape = ", ".join(map(str, latents_shape(record["model"])))
        lines.append(f"latents = {noise!r} * torch.randn({shape})")
    source = models_of(record)[0].get("source")
    if source:
        height, width = source
        lines[1:1] = ["from PIL import Image, ImageOps"]
        file = 'Image.open("source.png").convert("RGB")'
        lines.append(f"source = ImageOps.fit({file}, ({width}, {height}), Image.LANCZOS)")
        arguments[:0] = ["image=source"]
    output = "frames" if is_video(record) else "images"
    image_first = source or plain["pipeline"].startswith("Flux2")
    name = "prompt=" if image_first else ""
    call = ", ".join([f'{name}"{PROMPT}"', *arguments])
    lines.append(f"image = pipe({call}).{output}[0]")
    return "\n".join(lines)


def lora_lines(pipeline, networks, loras):
    """pipeline: name of its class. loras: entries of distill.json on the teacher's LoRAs, which lie
    in the folder."""
    import diffusers

    if not hasattr(getattr(diffusers, pipeline), "load_lora_weights"):  # its network can do it
        return [f"pipe.transformer.load_lora_adapter(folder, weight_name={FILE!r})"]
    if networks == 1 and not loras:
        return ["pipe.load_lora_weights(folder)"]
    if networks == 1:
        homes = [("transformer", "student", "", "")]
    else:
        homes = [
            ("transformer", "first", "expert-0/", ""),
            ("transformer_2", "second", "expert-1/", ", load_into_transformer_2=True"),
        ]
    lines = []
    for network, name, home, option in homes:
        files = {f"teacher{i}": file_in_student(i, record) for i, record in enumerate(loras)}
        files[name] = f"{home}{FILE}"
        for adapter, file in files.items():
            lines += [
                "pipe.load_lora_weights(",
                f'    folder, weight_name={str(file)!r}, adapter_name="{adapter}"{option}',
                ")",
            ]
        scales = [record["scale"] for record in loras] + [1.0]
        target = "pipe" if networks == 1 else f"pipe.{network}"
        if loras:
            lines.append(f"{target}.set_adapters({list(files)!r}, {scales!r})")
    return lines


def latents_shape(model):
    """Of one sample, as the pipeline takes it: in some, tokens of one or of 2 x 2 latents."""
    first = model.get("experts", [model])[0]
    shape = first["shape"]
    if first["adapter"] == "ltx-video":
        channels, *grid = shape
        return 1, math.prod(grid), channels
    packed = ("flux", "flux-kontext", "chroma", "qwen-image", "qwen-image-edit")
    if first["adapter"] in (*packed, "qwen-image-edit-plus"):
        channels, height, width = shape
        return 1, height * width // 4, 4 * channels
    return 1, *shape


def absent_arguments(index):
    """Arguments for components that the pipeline has not, but does not count as optional."""
    import diffusers

    optional = getattr(diffusers, index["_class_name"])._optional_components
    names = [name for name, value in index.items() if value == ABSENT and name not in optional]
    return "".join(f"{name}=None, " for name in names)


def use_of_a_network(record, plain):
    """Paragraphs on a folder that is a network only, or several of them."""
    model = record.get("model", {})
    where = "python sample.py RUN"
    notes = []
    if plain.get("reason"):
        notes.append(f"No pipeline of diffusers samples it ({plain['reason']}); `{where}` does.")
    folder, kind = network_of_card(model)
    if kind is not None:
        lines = [
            f"from diffusers import {kind}",
            "",
            f'net = {kind}.from_pretrained("{folder}").eval()',
        ]
        notes.append("```python\n" + "\n".join(lines) + "\n```")
        first = model.get("experts", [model])[0]
        notes.append(
            f"The network's output is `{first.get('prediction')}` (common/schedules.py), its "
            f"samples are {first.get('shape')}."
        )
    if not plain.get("reason"):
        notes.append(f"`{where}` makes pictures of it; distill.json has the steps.")
    return notes


NETWORKS = dict(  # diffusers classes of the networks in folders of our own format
    dit="DiTTransformer2DModel", edm="UNet2DModel"
)


def network_of_card(model):
    """-> folder and diffusers class of the (first) network; None: no class of diffusers."""
    folder = "."
    if "experts" in model:
        folder = "expert-0"
        model = model["experts"][0]
    return folder, None if "lora" in model else NETWORKS.get(model.get("adapter"))


# ---- training, measured values -------------------------------------------------------------------


def training_of(record):
    t = record.get("training", {})
    lines = [f"    {without_paths(t['command'])}"] if "command" in t else []
    facts = dict(iterations=t.get("iterations"), images=t.get("images_seen"))
    facts |= dict(batch=t.get("batch"), processes=t.get("world"), passes=t.get("dtype"))
    facts |= dict(hardware=t.get("hardware"), revision=record.get("revision"))
    found = [f"{name} {value}" for name, value in facts.items() if value is not None]
    return "\n".join([*lines, *([""] if lines else []), ", ".join(found) + "."])


def without_paths(command):
    """A command in which paths have lost their folders."""
    words = [Path(word).name if "/" in word else word for word in command.split(" ")]
    return " ".join(words)


def measured(metrics):
    rows = ["| metric | value |", "|---|---|"]
    for name in METRICS:
        if metrics.get(name) is not None:
            rows.append(f"| {name} | {metrics[name]:.4g} |")
    return "\n".join([*rows, "", f"Protocol: {metrics.get('protocol')}; n = {metrics.get('n')}."])


# ---- safetensors ---------------------------------------------------------------------------------


def make_metadata(record):
    """{text: text} for the header of a student's safetensors files."""
    training = record.get("training", {})
    loras = record.get("teacher_lora")
    found = {
        "distill.method": record["method"],
        "distill.teacher": teacher_name(record),
        "distill.nfe": str(record["nfe"]),
        "distill.sampler": json.dumps(record["sampler"], sort_keys=True),
    }
    if loras:
        found["distill.teacher_lora"] = json.dumps(loras, sort_keys=True)
    if "revision" in record:
        found["distill.revision"] = record["revision"]
    first = models_of(record)[0]
    architecture = ARCHITECTURES.get(first.get("adapter"))
    if architecture and first.get("prediction") != "v":  # ModelSpec has names for these only
        lora = is_lora(record)
        height, width = first["image"][-2:]
        found |= {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": architecture + ("/lora" if lora else ""),
            "modelspec.implementation": KOHYA if lora and architecture in UNETS else "diffusers",
            "modelspec.title": f"{teacher_name(record)}, {record['nfe']} steps, {record['method']}",
            "modelspec.resolution": f"{width}x{height}",
            "modelspec.usage_hint": f"{record['nfe']} steps, cfg 1",
        }
        if "date" in training:
            found["modelspec.date"] = training["date"][:10]
        if first["prediction"] in PREDICTIONS:
            found["modelspec.prediction_type"] = PREDICTIONS[first["prediction"]]
    return found
