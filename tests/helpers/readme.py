"""README's lines that load students in plain diffusers, run here on tiny folders."""

import json
import warnings

import torch

import dmd2
from common.teachers.hub import HUB

PROMPTS = ["a red heart", "dog", "pizza 7"]  # the first is README's

FULL = """
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained("out/dmd2-sdxl/student", torch_dtype=torch.bfloat16)
pipe = StableDiffusionXLPipeline.from_pretrained(
    "stabilityai/stable-diffusion-xl-base-1.0", unet=unet, torch_dtype=torch.bfloat16
).to("cuda")
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
image = pipe("a red heart", timesteps=[999, 749, 499, 249], guidance_scale=0).images[0]
"""
LORA = """
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline

pipe = StableDiffusionXLPipeline.from_pretrained(
    "stabilityai/stable-diffusion-xl-base-1.0", torch_dtype=torch.bfloat16
).to("cuda")
pipe.load_lora_weights("out/dmd2-sdxl/student")
pipe.fuse_lora()  # may be left out: adds the adapters to the weights, so that they cost nothing
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
image = pipe("a red heart", timesteps=[999, 749, 499, 249], guidance_scale=0).images[0]
"""
FLOW = """
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

net = SD3Transformer2DModel.from_pretrained("out/dmd2-sd3/student", torch_dtype=torch.bfloat16)
pipe = StableDiffusion3Pipeline.from_pretrained(
    "stabilityai/stable-diffusion-3-medium-diffusers", transformer=net, torch_dtype=torch.bfloat16
).to("cuda")
pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
image = pipe("a red heart", sigmas=[1.0, 0.75, 0.5, 0.25], guidance_scale=1).images[0]
"""

# What README says in words: other pipelines by other names, a flow model as LoRA.
FLOW_LORA = """
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

pipe = SanaPipeline.from_pretrained(
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers", torch_dtype=torch.bfloat16
).to("cuda")
pipe.load_lora_weights("out/dmd2-sana/student")
pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
image = pipe(
    "a red heart",
    sigmas=[1.0, 0.75, 0.5, 0.25],
    guidance_scale=1,
    complex_human_instruction=None,
).images[0]
"""
STUDENTS = ["out/dmd2-sdxl/student", "out/dmd2-sd3/student", "out/dmd2-sana/student"]


def renamed(code, names):
    """code with each name replaced. names: {as it stands: as it is to be}."""
    for old, new in names.items():
        code = code.replace(old, new)
    return code


SD15 = {
    "StableDiffusionXLPipeline": "StableDiffusionPipeline",
    HUB["sdxl"]: HUB["sd15"],
    "guidance_scale=0": "guidance_scale=1",
}
SD3 = {
    "SanaPipeline": "StableDiffusion3Pipeline",
    HUB["sana"]: HUB["sd3"],
    "complex_human_instruction=None,": "",
}
SANA = {
    "StableDiffusion3Pipeline": "SanaPipeline",
    HUB["sd3"]: HUB["sana"],
    "SD3Transformer2DModel": "SanaTransformer2DModel",
    "guidance_scale=1": "guidance_scale=1, complex_human_instruction=None",
}
SNIPPETS = {  # (teacher, as LoRA): code
    ("sdxl", False): FULL,
    ("sdxl", True): LORA,
    ("sd15", False): renamed(FULL, SD15),
    ("sd15", True): renamed(LORA, SD15),
    ("emoji", False): renamed(FULL, SD15),
    ("emoji", True): renamed(LORA, SD15),
    ("sd3", False): FLOW,
    ("sd3", True): renamed(FLOW_LORA, SD3),
    ("sana", False): renamed(FLOW, SANA),
    ("sana", True): FLOW_LORA,
}


def one_step(code):
    return renamed(code, {"[999, 749, 499, 249]": "[999]", "[1.0, 0.75, 0.5, 0.25]": "[1.0]"})


def run_snippet(code, student, teacher_folder, size, z, seed=7):
    """The latents that a snippet makes from noise z; further noise is of the seed.

    Folders take the place of its names. Settings of the tiny pipelines are added to its calls.
    """
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in STUDENTS:
        code = code.replace(f'"{name}"', repr(str(student)))
    hub = next(name for name in HUB.values() if f'"{name}"' in code)
    code = code.replace(f'"{hub}"', f"{str(teacher_folder)!r}, **missing")
    code = code.replace("bfloat16", "float32").replace('.to("cuda")', "")
    options = 'latents=z, output_type="latent", height=size, width=size'
    if "Sana" in code:
        options += ", use_resolution_binning=False"
    code = code.replace('"a red heart"', f'"a red heart", {options}')
    code = code.replace(
        "image = pipe(",
        "pipe.set_progress_bar_config(disable=True)\ntorch.manual_seed(seed)\nimage = pipe(",
    )
    index = json.loads((teacher_folder / "model_index.json").read_text())
    missing = {key: None for key, value in index.items() if value == [None, None]}
    names = dict(z=z, seed=seed, size=size, missing=missing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, names)
    return names["image"]


def same_picture(name, nfe, teacher, student, folder, teacher_folder, lora, sampler=None):
    """A snippet gives the latents of our own sampler, from the same noise.

    folder: of the student. sampler: of its distill.json.
    """
    z = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(1))
    cond = teacher.encode([0])

    def ours(model):
        torch.manual_seed(7)
        return dmd2.sample(model, z, cond, nfe, lambda: torch.randn_like(z), **(sampler or {}))

    code = SNIPPETS[name, lora]
    if nfe == 1:
        code = one_step(code)
    theirs = run_snippet(code, folder, teacher_folder, teacher.image_shape[-1], z)
    expected = ours(student)
    assert (theirs - expected).norm() < 1e-4 * expected.norm()
    # the student has learnt something, so that equal pictures are no accident
    assert (ours(teacher) - expected).norm() > 1e-2 * expected.norm()
