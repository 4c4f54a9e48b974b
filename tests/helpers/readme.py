"""README's lines that load students in plain diffusers, run here on tiny folders."""

import warnings

import torch
from helpers.cards import our_latents, relative, same_as_card

import dmd2
from common.files import read_json
from common.teachers.card import absent_arguments

PROMPTS = ["a red heart", "dog", "pizza 7"]  # the first is README's

FULL = """
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    "out/dmd2-sdxl/student", torch_dtype=torch.bfloat16
).to("cuda")
image = pipe("a red heart", num_inference_steps=4).images[0]
"""
LORA = """
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    "out/dmd2-sdxl/student", torch_dtype=torch.bfloat16
).to("cuda")
pipe.load_lora_weights("out/dmd2-sdxl/student")
pipe.fuse_lora()  # may be left out: adds the adapters to the weights, so that they cost nothing
image = pipe("a red heart", num_inference_steps=4, guidance_scale=1).images[0]
"""
FLOW = """
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    "out/dmd2-sd3/student", torch_dtype=torch.bfloat16
).to("cuda")
image = pipe("a red heart", num_inference_steps=4, guidance_scale=1).images[0]
"""
BLOCKS = dict(sdxl=(FULL, LORA), sd15=(FULL, LORA), emoji=(FULL, LORA), sd3=(FLOW, None))


def run_block(code, student, size, nfe, z, seed=7):
    """The latents that a block makes from noise z; further noise is of the seed.

    student: folder in the place of its name. Settings of the tiny pipelines are added to its calls.
    """
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    absent = absent_arguments(read_json(student / "model_index.json"))
    for name in ("out/dmd2-sdxl/student", "out/dmd2-sd3/student"):
        code = code.replace(f'"{name}", torch_dtype', f'"{student}", {absent}torch_dtype')
        code = code.replace(f'"{name}"', f'"{student}"')
    code = code.replace("bfloat16", "float32").replace('.to("cuda")', "")
    code = code.replace("num_inference_steps=4", f"num_inference_steps={nfe}")
    options = 'latents=z, output_type="latent", height=size, width=size'
    code = code.replace('"a red heart"', f'"a red heart", {options}')
    quiet = "pipe.set_progress_bar_config(disable=True)"
    code = code.replace("image = pipe(", f"{quiet}\ntorch.manual_seed(seed)\nimage = pipe(")
    names = dict(z=z, seed=seed, size=size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, names)
    return names["image"]


def same_picture(name, nfe, teacher, student, folder, lora, sampler=None):
    """README's block, where it has one for this teacher, and the card give our sampler's latents.

    folder: of the student. sampler: of its distill.json.
    """
    sampler = sampler or {}
    same_as_card(folder, teacher, student, dmd2.sample, nfe, PROMPTS[0], 0, **sampler)
    block = BLOCKS.get(name, (None, None))[lora]
    if block:
        z = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(1))
        expected = our_latents(dmd2.sample, student, z, teacher.encode([0]), nfe, **sampler)
        theirs = run_block(block, folder, teacher.image_shape[-1], nfe, z)
        assert relative(theirs, expected) < 1e-4
