"""A style LoRA for --teacher-lora, made from nothing but a text-to-image teacher.

The teacher's own samples are printed in blue ink: their brightness becomes a colour between ink and
white. Adapters learn the result by the teacher's training loss. Guidance needs the null prompt in
the same style, so one prompt in ten is left out.

    python -m recipes.style_lora --teacher emoji --out out/ink
    # -> out/ink/pytorch_lora_weights.safetensors, out/ink/images.png, of which it has learnt
    python dmd2.py --teacher emoji --teacher-lora out/ink/pytorch_lora_weights.safetensors --lora 8
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from common.errors import launch, require
from common.files import write_folder
from common.rng import BatchRandom
from common.sampling import generate, teacher_sample
from common.schedules import add_noise, expand
from common.teachers.load import load_teacher
from tools.pictures import captioned
from training.report import to_image

INK = (25.0, 45.0, 150.0)  # red, green, blue of the darkest places
STEPS = 16  # of the teacher's samples


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        prog="recipes.style_lora",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = p.add_argument
    add("--teacher", default="emoji", help="a text-to-image teacher [emoji]")
    add("--out", default="out/ink", help="folder of the file [out/ink]")
    add("--images", type=int, default=32, help="samples of the teacher to learn from [32]")
    add("--cfg", type=float, default=3.5, help="their guidance scale [3.5]")
    add("--rank", type=int, default=8, help="of the adapters [8]")
    add("--iters", type=int, default=500, help="iterations [500]")
    add("--batch", type=int, default=8, help="images of an iteration [8]")
    add("--lr", type=float, default=3e-3, help="of Adam [0.003]")
    add("--dtype", default="fp32", choices=["fp32", "bf16"], help="of network passes [fp32]")
    add("--seed", type=int, default=0, help="of all random numbers [0]")
    args = p.parse_args(argv)
    for name in ("images", "rank", "iters", "batch"):
        value = getattr(args, name)
        require(value >= 1, f"--{name}: expected at least 1, found {value}")
    return args


def ink(images):
    """uint8 images [n, 3, H, W] -> the same printed in ink on white."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # of brightness, ITU-R BT.601
    light = (images.float() * weights).sum(1, keepdim=True) / 255
    dark = torch.tensor(INK).view(1, 3, 1, 1)
    return (255 * light + dark * (1 - light)).round().to(torch.uint8)


def make_images(teacher, args):
    """Samples of the teacher for its first prompts in the style: uint8 images [n, 3, H, W]."""
    sampler = lambda model, z, cond, noise: teacher_sample(model, z, cond, STEPS, args.cfg)
    batches = generate(sampler, teacher, args.images, args.seed, batch=16)
    return torch.cat([ink(teacher.decode(x)) for _, _, x in batches])


def train(teacher, latents, args):
    """-> student with adapters, and the losses. latents: of image i, whose prompt has number i."""
    spec = dict(rank=args.rank, alpha=args.rank, targets=None, seed=args.seed, flag="--rank")
    student = teacher.copy(spec)
    optimizer = torch.optim.Adam(student.parameters(), args.lr)
    grid = teacher.schedule.grid(1000)
    losses = []
    for it in tqdm(range(args.iters), desc="style"):
        draw = BatchRandom(args.seed, it, args.batch)
        index = draw.randint(0, len(latents))
        cond = teacher.encode(index % teacher.classes)
        cond = teacher.drop_condition(cond, draw.rand() < 0.1)
        t = grid[draw.randint(0, len(grid))]
        alpha, sigma = teacher.schedule.alpha(t), teacher.schedule.sigma(t)
        x = latents[index]
        x_t = add_noise(x, alpha, sigma, draw.randn_like(x))
        error = student(x_t, alpha, sigma, cond) - x
        weight = teacher.native_loss_weight(alpha, sigma)  # of the teacher's own training loss
        loss = (expand(weight, x) * error.square()).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return student, losses


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    dtypes = dict(fp32=torch.float32, bf16=torch.bfloat16)
    teacher = load_teacher(args.teacher, dtype=dtypes[args.dtype])
    found = type(teacher).__name__
    ok = teacher.prompts is not None and not teacher.video
    require(ok, f"--teacher {args.teacher}: expected one of text to image, found {found}")
    images = make_images(teacher, args)
    out.mkdir(parents=True, exist_ok=True)
    names = [teacher.prompts[i % teacher.classes] for i in range(min(10, len(images)))]
    captioned(out / "images.png", [to_image(image) for image in images[:10]], names, [""] * 10)
    with torch.no_grad():
        latents = teacher.encode_images(images)
    student, losses = train(teacher, latents.float(), args)
    write_folder(out, student.network_files())
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    print(f"style: {out}, loss {first:.4f} in the first tenth, {last:.4f} in the last")


if __name__ == "__main__":
    launch(main)
