"""Teachers of the tiny pipelines, and the pipelines: both must make the same samples."""

import json
import math
import shutil

import diffusers
import numpy as np
import torch
from PIL import Image

from common.schedules import EDM, VP, Flow, TrigFlow
from common.teachers.flow import pack, unpack
from common.teachers.load import load_pipeline

PROMPTS = ["a red heart on the left of a dog", "dog", "pizza 7"]
NEGATIVE = "blurred 9, and more of it"
OLDER = ["sd15", "sdxl", "sd3", "sana", "sprint"]
NEWER = ["flux", "chroma", "flux2", "klein", "hunyuan", "lumina", "qwen", "zimage"]
NEWER += ["wan", "wan22", "wan5b"]
NEWER += ["sanavideo", "ltx", "hunyuanvideo"]
SIZE = dict(  # flags of teachers whose networks have no size of their own
    flux=dict(size=16),
    chroma=dict(size=16),
    flux2=dict(size=16),
    klein=dict(size=16),
    hunyuan=dict(size=16),
    qwen=dict(size=16),
    zimage=dict(size=16),
    wan=dict(size=32, frames=5),
    wan22=dict(size=32, frames=5),
    wan5b=dict(size=32, frames=5),
    sanavideo=dict(size=64, frames=5),
    ltx=dict(size=64, frames=5),
    hunyuanvideo=dict(size=16, frames=5),
)
# adapters whose pipelines guide by true_cfg_scale, and only with a negative prompt
TRUE_CFG = ("flux", "flux-kontext", "qwen-image", "qwen-image-edit", "qwen-image-edit-plus")
PACKED = (*TRUE_CFG, "chroma")  # whose pipelines work on packed latents
FLUX2 = ("flux2", "flux2-klein")  # whose pipelines take our samples, and denoise their pixels
TOKENS = (*FLUX2, "ltx-video")  # whose schedulers get a sample's pixels as tokens
# whose pipelines give their scheduler sigmas of their own
OWN_SIGMAS = (*PACKED, *TOKENS, "z-image", "lumina2", "hunyuan-image", "hunyuanvideo-1.5")


def quiet(*text):
    pass


def load(folders, name, prompts=PROMPTS, **options):
    """The teacher of a tiny pipeline."""
    options = SIZE.get(name, {}) | options
    return load_pipeline(
        str(folders(name)), prompts=prompts, cache=folders.cache, say=quiet, **options
    )


def changed(*changes, seed=0, flag="--small"):
    """What --small gives to Model.copy. changes: KEY=VALUE."""
    return dict(changes=list(changes), seed=seed, flag=flag)


def size_flags(name):
    """Flags of SIZE for a script."""
    flags = []
    for flag, value in SIZE.get(name, {}).items():
        flags += [f"--{flag}", value]
    return flags


def copy_of(folders, name, tmp_path):
    """A copy of a tiny pipeline's folder, to be spoilt."""
    return shutil.copytree(folders(name), tmp_path / "copy")


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return float((a - b).norm() / b.norm())


# ---- the pipelines of diffusers ------------------------------------------------------------------


def plain_pipeline(model, folder):
    """The pipeline in `folder`, loaded by diffusers."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = [part for part, value in index.items() if value == [None, None]]
    pipe = getattr(diffusers, model.pipeline).from_pretrained(folder, **dict.fromkeys(absent))
    pipe.set_progress_bar_config(disable=True)
    if model.adapter == "hunyuanvideo-1.5":  # less padding, which is masked: faster
        pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 64, 32
        pipe.vision_num_semantic_tokens = 8
    return pipe


def run_pipeline(model, pipe, prompts, z, steps, w, output_type="latent", **options):
    """pipe(...) from noise z with guidance w in our convention -> latents as ours, or images."""
    name = model.adapter
    height, width = model.image_shape[-2:]
    negative = model.negative
    if name in TRUE_CFG and negative is None:
        negative = "" if name.startswith("flux") else " "
    if w > 1 and negative is not None:
        negatives = [negative] * len(prompts)
        if name == "flux2-klein":  # its pipeline takes embeddings only
            options["negative_prompt_embeds"] = pipe.encode_prompt(negatives)[0]
        else:
            options["negative_prompt"] = negatives
    if name in TRUE_CFG:
        options["true_cfg_scale"] = w
        if name.startswith("flux"):
            options.setdefault("guidance_scale", model.guidance)
    elif name == "hunyuan-image":  # its guidance is components of the pipeline
        for part in model.guiders:
            setattr(pipe, part, getattr(pipe, part).new(guidance_scale=w))
    elif name == "hunyuanvideo-1.5":
        pipe.guider = pipe.guider.new(guidance_scale=w)
    elif name == "flux2":  # its pipeline has no guidance but the network's input
        options.setdefault("guidance_scale", model.guidance)
    else:
        options["guidance_scale"] = w - 1 if name == "z-image" else w
    if model.video:
        options[model.frames_argument] = model.frames
    if name in ("sana", "sana-video"):
        options |= dict(complex_human_instruction=None, use_resolution_binning=False)
    out = pipe(
        prompt=list(prompts),  # a copy: Z-Image's pipeline writes to it
        height=height,
        width=width,
        num_inference_steps=steps,
        latents=to_argument(model, z),
        output_type=output_type,
        **options,
    )
    out = out.frames if model.video else out.images
    return from_output(model, out) if output_type == "latent" else out


def to_argument(model, z):
    """Noise as the pipeline takes it in `latents`."""
    if model.adapter == "ltx-video":
        return to_tokens(model, z).contiguous()
    return pack(z) if model.adapter in PACKED else z


def from_output(model, y):
    """The pipeline's output of output_type="latent" as our samples."""
    if model.adapter == "flux2-klein":  # what the VAE decodes
        shift, scale = model.latent_stats()
        return (torch.nn.functional.pixel_unshuffle(y, 2) - shift) * scale
    return from_tokens(model, y)


def to_tokens(model, x):
    """Our samples as the pipeline's scheduler gets them."""
    if model.adapter in TOKENS:
        return x.flatten(2).transpose(1, 2)
    return to_argument(model, x)


def from_tokens(model, y):
    if model.adapter in TOKENS:
        return y.transpose(1, 2).unflatten(2, model.shape[1:])
    return unpack(y, *model.shape[-2:]) if model.adapter in PACKED else y


def as_tensor(image):
    """A PIL image, or the list of them of a video -> uint8 [3, (frames,) H, W]."""
    frames = [np.array(frame) for frame in image] if isinstance(image, list) else np.array(image)
    return torch.from_numpy(np.array(frames)).movedim(-1, 0)


# ---- the pipeline's loop with our model ----------------------------------------------------------


@torch.no_grad()
def sample_as_pipeline(model, scheduler, z, cond, steps, w, view=None):
    """The sampling loop of a pipeline, with `model.guided` in the place of its network.

    view: another schedule, in whose coordinates the model is evaluated where it has the level.
    -> latents, sigma of the levels that were evaluated in the view
    """
    options = {}
    if model.adapter in OWN_SIGMAS:
        options = dict(sigmas=np.linspace(1, 1 / steps, steps), mu=mu_of(model, scheduler, steps))
    elif scheduler.config.get("use_dynamic_shifting"):
        options = dict(num_inference_steps=steps, mu=mu_of(model, scheduler, steps))
    scheduler.set_timesteps(**(options or dict(num_inference_steps=steps)))
    x = z * getattr(scheduler, "init_noise_sigma", 1.0)
    viewed = []
    for i, t in enumerate(scheduler.timesteps):
        a, s = level_of(model, scheduler, i, t)
        if view is not None and reaches(view, a.double(), s):
            viewed.append(float(s))
            x0 = guided_in_view(model, view, x, a, s, cond, w)
        else:
            x0 = model.guided(x, a, s, cond, w)
        x0 = x0.double()
        if model.adapter in ("sd15", "sdxl", "dit-latent"):
            out = (x.double() - a * x0) / s  # eps
        else:
            out = (x.double() - x0) / s  # velocity
        x = scheduler.step(out.float(), t, x, return_dict=False)[0]
    return x, viewed


def mu_of(model, scheduler, steps):
    """The number that stands for the model's time shift in diffusers."""
    if model.adapter in FLUX2:  # it depends on the number of steps there
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(model.shape[-1] * model.shape[-2], steps)
    shift = model.schedule.shift
    return shift if scheduler.config.get("time_shift_type") == "linear" else math.log(shift)


def level_of(model, scheduler, i, t):
    """alpha, sigma of a scheduler's step i at its time t."""
    if model.adapter == "sdxl":  # Euler's coordinates: alpha is 1
        return torch.tensor(1.0), scheduler.sigmas[i].double()
    if model.adapter in ("sd15", "dit-latent"):
        return model.schedule.alpha(t), model.schedule.sigma(t)
    # The scheduler's time, not its sigma: the times of SANA and Wan are rounded down to integers.
    s = t.double() / 1000
    return 1 - s, s


def reaches(schedule, a, s):
    """Has a schedule this noise level? EDM and VP end before pure noise and before clean data."""
    t = schedule.t_from_snr((a / s) ** 2)
    a2, s2 = schedule.alpha(t), schedule.sigma(t)
    # sine of the angle between (a, s) and (a2, s2), up to the rounding of t to float32
    return abs(a2 * s - a * s2) < 1e-5 * torch.hypot(a, s) * torch.hypot(a2, s2)


def guided_in_view(model, view, x, a, s, cond, w):
    """model.guided for the same point, scaled into another schedule."""
    t = view.t_from_snr((a / s) ** 2)
    a2, s2 = view.alpha(t), view.sigma(t)
    scale = s2 / s if s > a else a2 / a
    return model.guided((x * scale).float(), a2, s2, cond, w)


def check_other_views(model, theirs, scheduler, z, cond, steps, w):
    """The samples are the same when the model is evaluated in the coordinates of any schedule."""
    for view in (Flow(), TrigFlow(), EDM(), VP()):
        if view.config["name"] == model.schedule.config["name"]:
            continue
        x, viewed = sample_as_pipeline(model, scheduler, z, cond, steps, w, view)
        assert relative(x, theirs) < 1e-5, view.config
        if isinstance(view, (Flow, TrigFlow)):
            assert len(viewed) == steps, viewed  # they have every level
        else:
            assert len(viewed) >= steps - 2, viewed


# ---- images --------------------------------------------------------------------------------------


def draw(path, size=(20, 20), color=(200, 200, 200)):
    """Writes an RGB image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def write_captioned(home, n=5):
    """n images in two folders, image i with the caption "word i" -> home."""
    for i in range(n):
        path = home / "deep" / f"{i}.png" if i % 2 else home / f"{i}.jpg"
        draw(path, (20 + i, 17), (40 * i, 99, 10))
        path.with_suffix(".txt").write_text(f"word {i}\n")
    return home
