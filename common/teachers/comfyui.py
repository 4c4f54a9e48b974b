"""A student in ComfyUI: the sampler's settings, and a workflow in its API format.

As in plain.py the settings are tried, not assumed: ComfyUI's loop, in own words, runs with the stub
of a Trace, and what does not give the sampler's own samples is not written. docs/comfyui.md says
where the files go, and what was compared with the program's own code.
"""

import math

import torch

from common.teachers.plain import TOLERANCE, relative

WORKFLOW = "comfyui.json"
TABLE = dict(T=1000, beta_start=0.00085, beta_end=0.012, kind="scaled_linear")  # of its SD models

# Kind of the teacher -> its parts. `networks`: which of the student's files it loads.
KINDS = dict(
    sd15=dict(latents="EmptyLatentImage"),
    sdxl=dict(latents="EmptyLatentImage"),
    sd3=dict(
        latents="EmptySD3LatentImage",
        shift="ModelSamplingSD3",
        clip=("TripleCLIPLoader", ["clip_l", "clip_g", "t5xxl"], None),
    ),
    flux=dict(
        latents="EmptySD3LatentImage",
        shift="ModelSamplingFlux",
        clip=("DualCLIPLoader", ["clip_l", "t5xxl"], "flux"),
        vae=True,
    ),
    wan=dict(
        latents="EmptyHunyuanLatentVideo",
        shift="ModelSamplingSD3",
        clip=("CLIPLoader", ["umt5_xxl"], "wan"),
        vae=True,
        lora_only=True,
        other_channels=[48],  # of Wan 2.2 5B, whose latents are another node's
    ),
)
KINDS["qwen-image"] = dict(
    latents="EmptySD3LatentImage",
    shift="ModelSamplingAuraFlow",
    clip=("CLIPLoader", ["qwen_2.5_vl_7b"], "qwen_image"),
    vae=True,
)
KINDS["z-image"] = KINDS["qwen-image"] | dict(clip=("CLIPLoader", ["qwen_3_4b"], "lumina2"))


# ---- the sampler ---------------------------------------------------------------------------------


def find_comfyui(student, found):
    """-> dict of the sampler's settings in ComfyUI, or None if none gives the same samples.

    student: Pipeline, the first one of several experts. found: its Trace. Entries: sampler, lcm or
    euler; sigmas, falling to 0; simple: the scheduler of this name has them, with `shift` of a
    flow; split: the step at which the second of two experts begins. whole.py adds text_loras:
    whether each --teacher-lora changes text encoders.
    """
    kind = KINDS.get(student.adapter)
    vp = student.schedule.unit_norm
    if kind is None or (kind.get("lora_only") and not student.lora):
        return None
    if student.shape[0] in kind.get("other_channels", []):
        return None
    if vp and (student.schedule.config | TABLE != student.schedule.config or not is_usual(student)):
        return None
    t = torch.tensor(found.times, dtype=torch.float64)
    sigmas = student.schedule.sigma(t) / student.schedule.alpha(t) if vp else t
    sigmas = [round(s, 8) for s in sigmas.tolist()] + [0.0]
    if sigmas != sorted(set(sigmas), reverse=True):
        return None
    settings = dict(sampler="lcm" if found.stochastic or len(t) == 1 else "euler", sigmas=sigmas)
    if relative(simulate(student, found, settings), found.sample) > TOLERANCE:
        return None
    experts = [step["expert"] for step in found.steps]
    if max(experts):
        settings["split"] = experts.index(1)
    shift = None if vp else fit_shift(found.times, kind)
    settings["simple"] = found.times == simple_indices(len(t)) if vp else shift is not None
    if shift is not None:
        settings["shift"] = shift
    return settings


def is_usual(student):
    """Does ComfyUI know this UNet's prediction, and noise levels that do not end in pure noise?"""
    return student.prediction in ("eps", "v") and "last_alpha2" not in student.schedule.config


def simple_indices(n, length=1000):
    """Entries of ComfyUI's table of noise levels that its scheduler `simple` takes, as floats."""
    return [float(length - 1 - int(i * (length / n))) for i in range(n)]


def fit_shift(times, kind):
    """The shift of a flow with which `simple` has these times to 1e-6, or None."""
    length = 10000 if kind["shift"] == "ModelSamplingFlux" else 1000
    u = [(i + 1) / length for i in simple_indices(len(times), length)]
    shift = 1.0
    if len(times) > 1:
        shift = times[1] * (1 - u[1]) / (u[1] * (1 - times[1]))
    shift = round(shift, 7)
    shifted = [shift * v / (1 + (shift - 1) * v) for v in u]
    same = max(abs(a - b) for a, b in zip(shifted, times, strict=True)) < 1e-6
    return shift if same else None


@torch.no_grad()
def simulate(student, found, settings):
    """ComfyUI's loop with the stub -> its samples.

    Of a UNet x is data + sigma noise; the network gets x / sqrt(1 + sigma^2) and the index of the
    nearest entry of the table as its time. Of a flow x is (1 - sigma) data + sigma noise, and sigma
    is the time.
    """
    vp = student.schedule.unit_norm
    sigmas = settings["sigmas"]
    if vp:
        every = torch.arange(1000, dtype=torch.float64)
        table = (student.schedule.sigma(every) / student.schedule.alpha(every)).log()
    x = found.z * first_scale(sigmas[0], vp, float(table[-1].exp()) if vp else 1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.randn_like(found.z)  # what `trace` drew first
        for sigma, following in zip(sigmas, sigmas[1:]):
            norm = math.sqrt(1 + sigma**2) if vp else 1.0
            t = int((table - math.log(sigma)).abs().argmin()) if vp else sigma
            out = found.stub(x / norm, t)
            x0 = x - sigma * out
            if student.prediction == "v":
                x0 = x / norm**2 - sigma / norm * out
            if following == 0:
                x = x0
            elif settings["sampler"] == "euler":
                x = x0 + (x - x0) * following / sigma
            else:
                data = 1.0 if vp else 1 - following
                x = data * x0 + following * torch.randn_like(x)
    return x


def first_scale(sigma, vp, largest):
    """Factor on the first noise. At the largest sigma of a UNet its input is pure noise."""
    if vp and (sigma > largest or math.isclose(sigma, largest, rel_tol=1e-5)):
        return math.sqrt(1 + sigma**2)
    return sigma


# ---- the workflow --------------------------------------------------------------------------------


def student_name(record):
    """Name of the student's file in ComfyUI's folders, without its ending."""
    teacher = record["teacher"].rstrip("/").split("/")[-1]
    return f"{teacher}-{record['method']}-{record['nfe']}"


def make_workflow(record, prompt):
    """-> workflow in ComfyUI's API format, {number: node}. record: distill.json of a student whose
    `plain` has an entry `comfyui`.

    Names of files are to be chosen in the loaders; those of the student are `student_name`.
    """
    settings = record["plain"]["comfyui"]
    model = record["model"]
    experts = model.get("experts", [model])
    first = experts[0]
    kind = KINDS[first["adapter"]]
    nodes = {}

    def add(class_type, **inputs):
        nodes[str(len(nodes) + 1)] = dict(class_type=class_type, inputs=inputs)
        return str(len(nodes))

    whole = "lora" not in first
    names = [f"{student_name(record)}{f'-{i}' if len(experts) > 1 else ''}" for i in (0, 1)]
    checkpoint = None
    if not kind.get("vae"):
        checkpoint = add("CheckpointLoaderSimple", ckpt_name="teacher.safetensors")
    clip = [add_clip(add, *kind["clip"]), 0] if "clip" in kind else [checkpoint, 1]
    models = []
    for i in range(len(experts)):
        if whole:
            net = [add_network(add, f"{names[i]}.safetensors"), 0]
        else:
            base = [checkpoint, 0]
            if checkpoint is None:
                base = [add_network(add, f"teacher{f'-{i}' if i else ''}.safetensors"), 0]
            file = f"{names[i]}.safetensors"
            lora = add("LoraLoaderModelOnly", model=base, lora_name=file, strength_model=1.0)
            net = [lora, 0]
        # whole weights contain the teacher's LoRA, but ComfyUI's text encoders do not
        user_loras = zip(record.get("teacher_lora", []), settings.get("text_loras", []))
        for style, changes_text in user_loras:
            if whole and not changes_text:
                continue
            strength = style["scale"]
            options = dict(lora_name=style["file"], strength_clip=strength)
            options["strength_model"] = 0.0 if whole else strength
            style = add("LoraLoader", model=net, clip=clip, **options)
            net, clip = [style, 0], [style, 1]
        models.append(add_sampling(add, net, first, kind, settings))

    vae = [checkpoint, 2]
    if kind.get("vae"):
        vae = [add("VAELoader", vae_name="vae.safetensors"), 0]
    text = [add("CLIPTextEncode", text=prompt, clip=clip), 0]
    if "guidance" in first:
        text = [add("FluxGuidance", conditioning=text, guidance=first["guidance"]), 0]
    latents = [add(kind["latents"], **latent_size(first)), 0]
    samples = [add_sampler(add, models, text, latents, settings), 0]
    images = [add("VAEDecode", samples=samples, vae=vae), 0]
    if len(first["image"]) == 4:
        options = dict(fps=16.0, lossless=False, quality=90, method="default")
        add("SaveAnimatedWEBP", images=images, filename_prefix=names[0], **options)
    else:
        add("SaveImage", images=images, filename_prefix=names[0])
    return nodes


def add_network(add, file):
    return add("UNETLoader", unet_name=file, weight_dtype="default")


def add_clip(add, loader, names, kind):
    keys = ["clip_name"] if len(names) == 1 else [f"clip_name{i + 1}" for i in range(len(names))]
    inputs = {key: f"{name}.safetensors" for key, name in zip(keys, names, strict=True)}
    return add(loader, **inputs, **(dict(type=kind) if kind else {}))


def add_sampling(add, net, first, kind, settings):
    """The node that sets the shift of a flow, or the prediction v of a UNet. -> a link."""
    if first["prediction"] == "v":
        return [add("ModelSamplingDiscrete", model=net, sampling="v_prediction", zsnr=False), 0]
    if "shift" not in settings:
        return net
    shift = settings["shift"]
    if kind["shift"] != "ModelSamplingFlux":
        return [add(kind["shift"], model=net, shift=shift), 0]
    mu = round(math.log(shift), 8)  # its shift is exp(mu), here at all sizes
    height, width = first["image"][-2:]
    size = dict(width=width, height=height)
    return [add("ModelSamplingFlux", model=net, max_shift=mu, base_shift=mu, **size), 0]


def latent_size(first):
    height, width = first["image"][-2:]
    size = dict(width=width, height=height, batch_size=1)
    return size | (dict(length=first["image"][1]) if len(first["image"]) == 4 else {})


def add_sampler(add, models, text, latents, settings):
    """Sampler and steps. cfg 1 means no guidance: the negative prompt is not evaluated."""
    n = len(settings["sigmas"]) - 1
    both = dict(positive=text, negative=text, cfg=1.0)
    split = settings.get("split")
    if settings["simple"]:
        grid = dict(steps=n, sampler_name=settings["sampler"], scheduler="simple")
        if split is None:
            options = dict(both, seed=0, denoise=1.0, **grid)
            return add("KSampler", model=models[0], latent_image=latents, **options)
        for i, model in enumerate(models):
            latents = [
                add(
                    "KSamplerAdvanced",
                    model=model,
                    latent_image=latents,
                    add_noise="disable" if i else "enable",
                    noise_seed=i,
                    start_at_step=split if i else 0,
                    end_at_step=n if i else split,
                    return_with_leftover_noise="disable" if i else "enable",
                    **both,
                    **grid,
                ),
                0,
            ]
        return latents[0]
    sampler = [add("KSamplerSelect", sampler_name=settings["sampler"]), 0]
    text_of_sigmas = ", ".join(f"{s:.8f}" for s in settings["sigmas"])
    sigmas = [add("ManualSigmas", sigmas=text_of_sigmas), 0]
    parts = [sigmas]
    if split is not None:
        divide = add("SplitSigmas", sigmas=sigmas, step=split)
        parts = [[divide, 0], [divide, 1]]
    for i, (model, part) in enumerate(zip(models, parts)):
        options = dict(both, add_noise=i == 0, noise_seed=i, sampler=sampler, sigmas=part)
        latents = [add("SamplerCustom", model=model, latent_image=latents, **options), 0]
    return latents[0]
