"""Trains the `emoji` teachers: small text-to-image models in the formats of diffusers.

The data are 7,562 emoji of 64 x 64 pixels (recipes/emoji_data.py). Each stage starts from what
earlier stages left in --out. --resume continues an interrupted stage.

Usage:
    # AutoencoderKL, 64 x 64 x 3 to 16 x 16 x 4
    python -m recipes.emoji_teacher --out out/teacher-emoji vae
    # tokenizer, CLIP text encoder and UNet, trained together: StableDiffusionPipeline
    python -m recipes.emoji_teacher --out out/teacher-emoji unet
    # SD3 transformer with the same text encoder and VAE: StableDiffusion3Pipeline
    python -m recipes.emoji_teacher --out out/teacher-emoji flow
    # features for the metric `fd`, category and subcategory of an image
    python -m recipes.emoji_teacher --out out/teacher-emoji classifier
    # the teacher: half precision, teacher.json, sample picture
    python -m recipes.emoji_teacher --out out/teacher-emoji save
    # PNGs with captions: --data of losses that need images
    python -m recipes.emoji_teacher --out out/teacher-emoji images
The commands of the embedded teachers are in assets/emoji/README.md and assets/emoji-flow/README.md.

Losses:
    vae    L1 + L2 of the pixels + 1/2 L1 of their differences to neighbours + 1e-4 KL per latent
    unet   mean min(SNR + f, 5) / SNR |eps(x_t, t, c) - eps|^2,  schedule of SD 1.5,  f = --floor
    flow   mean |v(x_t, t, c) - (eps - x0)|^2,  t = s u / (1 + (s - 1) u),  u = sigmoid(N(0, 1)),
           s = --shift
c is the empty prompt with probability --drop. The loss of the UNet weights an error of x0 by
min(SNR + f, 5). Without f (min-SNR, arXiv 2303.09556) the weight is almost 0 at the noise levels
where the prompt decides what will be seen.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import re
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from common import fid
from common.distributed import bar_interval
from common.errors import UserError, launch
from common.features import SmallCNN
from common.files import ROOT, atomic, read_json, save_weights, write_json
from common.rng import BatchRandom, derive_seed
from recipes.classifier import random_affine
from recipes.emoji_data import SIDE, load_emoji, make_caption
from recipes.emoji_nets import (
    TOKENS,
    load_part,
    make_pipeline,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    make_unet,
    make_vae,
    tokenize,
)
from recipes.pretrain import learning_rate
from training.ema import EMA
from training.report import save_grid

CLASSIFIER_STAGES = 3  # of SmallCNN: 64 pixels to 8
SAMPLE_PROMPTS = (
    "red heart",
    "pizza",
    "dog face",
    "flag of france",
    "rocket",
    "smiling face with sunglasses",
    "red apple",
    "woman farmer with medium dark skin",
)


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        prog="python -m recipes.emoji_teacher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("stage", choices=list(STAGES))
    add("--source", help="folder with the two .tgz of npm; default: npm pack fetches them")
    add("--out", default=str(ROOT / "out" / "teacher-emoji"))
    add("--iters", type=int)
    add("--batch", type=int, default=32)
    add("--lr", type=float)
    add("--seed", type=int, default=0)
    add("--save-minutes", type=float, default=4, help="between checkpoints")
    add("--resume", action="store_true", help="continue an interrupted stage")
    add("--vae-width", type=int, nargs="+", default=[24, 48, 64])
    add("--text-width", type=int, default=128)
    add("--start", help="unet, flow: teacher folder to continue from (unet: and its text encoder)")
    add("--drop", type=float, default=0.1, help="unet, flow: share of empty captions")
    add(
        "--more",
        nargs="+",
        default=[],
        metavar="NAME=FACTOR",
        help="unet, flow: draw a category, a subcategory or one emoji FACTOR times as often, "
        "such as 'Food & Drink=4' pizza=2",
    )
    add("--width", type=int, nargs="+", default=[64, 112, 112], help="unet: multiples of 16")
    add("--floor", type=float, default=0.3, help="unet: least weight of a squared error of x0")
    add("--flow-width", type=int, default=160, help="flow: a multiple of 32")
    add("--depth", type=int, default=4, help="flow: blocks")
    add("--shift", type=float, default=2.0, help="flow: shift of the times towards noise")
    add("--net", choices=["unet", "flow"], default="unet", help="save: which teacher")
    add("--to", help="save, images: folder; default OUT/teacher, OUT/images")
    add("--prompts", type=int, default=2000, help="save: captions in prompts.txt")
    add(
        "--cfg",
        type=float,
        nargs="+",
        default=[1.0, 2.0, 4.0, 7.5],
        help="save: guidance scales of the sample picture's rows",
    )
    return p.parse_args(argv)


# ---- training loop -------------------------------------------------------------------------------


class Nets(torch.nn.ModuleDict):
    def copy(self):
        return copy.deepcopy(self)


def fit(name, nets, loss, iters, lr, args):
    """Minimises loss(draw, it) over all parameters of `nets`. -> weight average, seconds.

    draw: BatchRandom of iteration `it`. Everything is saved every --save-minutes; with --resume an
    interrupted stage ends with the weights that it would have had without the interruption.
    """
    path = Path(args.out) / f"{name}.ckpt"
    ema = EMA(nets, iters * args.batch / 20)
    opt = torch.optim.AdamW(
        nets.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    parts = dict(nets=nets, ema=ema, opt=opt)
    first = 0
    start = time.time()  # minus the seconds of earlier sessions
    if args.resume and path.is_file():
        saved = torch.load(path, weights_only=True)
        for key, part in parts.items():
            part.load_state_dict(saved[key])
        first = saved["it"]
        start -= saved["seconds"]

    def save(it):
        state = {key: part.state_dict() for key, part in parts.items()}
        with atomic(path) as f:
            torch.save(state | dict(it=it, seconds=time.time() - start), f)

    millions = sum(p.numel() for p in nets.parameters()) / 1e6
    print(
        f"{name}: {millions:.2f}M parameters, iterations {first} to {iters} of {args.batch}",
        flush=True,
    )
    last_save = time.time()
    total = 0.0  # of the losses since the last line of the log
    bar = tqdm(range(first, iters), desc=name, mininterval=bar_interval())
    with open(Path(args.out) / "log.jsonl", "a") as log:
        for it in bar:
            for group in opt.param_groups:
                group["lr"] = lr * learning_rate(it, iters)
            value = loss(BatchRandom(args.seed, it, args.batch), it)
            value.backward()
            torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            ema.update(args.batch)
            total += value.item()
            if (it + 1) % 50 == 0:
                seconds = round(time.time() - start, 1)
                line = dict(stage=name, it=it + 1, loss=total / 50, seconds=seconds)
                log.write(json.dumps(line) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{total / 50:.4f}", refresh=False)
                total = 0.0
            if time.time() - last_save > args.save_minutes * 60:
                save(it + 1)
                last_save = time.time()
    save(iters)
    return ema.model, round(time.time() - start)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


# ---- batches -------------------------------------------------------------------------------------


def draw_images(draw, data, factors=1.0):
    """Indices of one batch, by weight times `factors` [n], without held-out images."""
    weight = data.weight * factors * ~data.held_out
    return torch.multinomial(weight, draw.batch, generator=draw.generator)


def draw_captioned(draw, data, args, factors):
    """Indices of one batch and their captions, some of which are empty."""
    index = draw_images(draw, data, factors)
    uniform = torch.rand(args.batch, 4, generator=draw.generator).tolist()
    captions = []
    for i, u in zip(index.tolist(), uniform):
        captions.append("" if u[3] < args.drop else make_caption(data, i, u))
    return index, captions


def parse_more(pairs, data):
    """--more -> float [n], factors on how often each image is drawn. UserError."""
    factors = torch.ones(len(data))
    for pair in pairs:
        name, _, number = pair.rpartition("=")
        named = [
            name in (data.categories[c], data.kinds[k], *phrases)
            for c, k, phrases in zip(data.category, data.kind, data.phrases)
        ]
        is_positive = re.fullmatch(r"[0-9]+(\.[0-9]+)?", number) and float(number) > 0
        if not any(named) or not is_positive:
            raise UserError(
                f"--more {pair}: expected NAME=FACTOR, a factor above 0 and an emoji or one of "
                f"{', '.join(data.categories + data.kinds)}"
            )
        factors[torch.tensor(named)] *= float(number)
    return factors


def reference_indices(data):
    """Indices of the images that samples are compared with, each kept with probability equal to its
    weight in training, none of them held out.
    """
    uniform = torch.rand(len(data), generator=torch.Generator().manual_seed(0))
    return ((uniform < data.weight) & ~data.held_out).nonzero()[:, 0]


# ---- autoencoder ---------------------------------------------------------------------------------


def train_vae(data, args):
    torch.manual_seed(derive_seed(args.seed, 11))
    nets = Nets(dict(vae=make_vae(args.vae_width)))
    vae = nets["vae"]
    # Start with hardly any noise: with unit noise L1 stays at the median image, which is white.
    torch.nn.init.constant_(vae.quant_conv.bias[4:].detach(), -6.0)

    def loss(draw, it):
        x = data.images[draw_images(draw, data)].float() / 127.5 - 1
        with autocast():
            mean, logvar = vae.quant_conv(vae.encoder(x)).float().chunk(2, 1)
            logvar = logvar.clamp(-30, 20)
            z = mean + (logvar / 2).exp() * draw.randn(*mean.shape[1:])
            y = vae.decoder(vae.post_quant_conv(z)).float()
        error = y - x
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.abs().mean() + error.square().mean() + 0.5 * edges + 1e-4 * kl

    nets, _ = fit("vae", nets, loss, args.iters or 1500, args.lr or 2e-3, args)
    vae = nets["vae"].eval()
    standardise(vae, data.images)
    vae.save_pretrained(Path(args.out) / "vae", safe_serialization=True)
    reconstruction_picture(vae, data, args)


@torch.no_grad()
def encode(vae, images):
    """uint8 images [n, 3, 64, 64] -> modes of their latents [n, 4, 16, 16]."""
    parts = [part.float() / 127.5 - 1 for part in images.split(64)]
    return torch.cat([vae.encode(part).latent_dist.mode() for part in parts])


@torch.no_grad()
def standardise(vae, images):
    """Gives each latent channel mean 0 and variance 1 over the images.

    It changes the 1x1 convolutions before and after the latents, since pipelines have only one
    scaling factor for all four channels.
    """
    z = encode(vae, images[::7])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    n = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std.view(1, n, 1, 1)
    # outputs of `before`: n means, then n log variances
    before.weight[:n] /= std.view(n, 1, 1, 1)
    before.bias[:n] = (before.bias[:n] - mean) / std
    before.bias[n:] -= 2 * std.log()


@torch.no_grad()
def reconstruction_picture(vae, data, args):
    """vae.png: 32 images above their reconstructions."""
    generator = torch.Generator().manual_seed(args.seed)
    index = torch.randperm(len(data), generator=generator)[:32]
    x = data.images[index]
    decoded = vae.decode(encode(vae, x)).sample
    y = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    error = (x.float() - y.float()).abs().mean()
    print(f"vae: mean absolute error {error:.2f} of 255", flush=True)
    rows = []
    for a, b in zip(x.split(16), y.split(16)):
        rows += [("images", a), ("reconstructed", b)]
    save_grid(Path(args.out) / "vae.png", rows)


# ---- denoisers -----------------------------------------------------------------------------------


def train_unet(data, args):
    torch.manual_seed(derive_seed(args.seed, 12))
    out = Path(args.out)
    latents = encode(load_part(out, "vae").eval(), data.images)
    if args.start:
        # The tokenizer is the teacher's too: trained again, it may break ties between equally
        # frequent pairs in another way.
        tokenizer = load_part(args.start, "tokenizer")
        text_encoder = load_part(args.start, "text_encoder").train()
        unet = load_part(args.start, "unet").train()
        shutil.copytree(Path(args.start) / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    else:
        tokenizer = make_tokenizer(tokenizer_captions(data), out / "tokenizer")
        tokenizer.save_pretrained(out / "tokenizer")
        text_encoder = make_text_encoder(tokenizer, args.text_width)
        unet = make_unet(tuple(args.width), args.text_width)
    nets = Nets(dict(text=text_encoder, unet=unet))
    alphas = make_scheduler().alphas_cumprod
    factors = parse_more(args.more, data)

    def loss(draw, it):
        index, captions = draw_captioned(draw, data, args, factors)
        ids = tokenize(tokenizer, captions)
        x0 = latents[index]
        eps = draw.randn(*latents.shape[1:])
        t = draw.randint(0, len(alphas))
        a = alphas[t].view(-1, 1, 1, 1)
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
        snr = a / (1 - a)
        # On CPUs the backward pass of fused attention is slow in bf16.
        with autocast(), sdpa_kernel(SDPBackend.MATH):
            prediction = nets["unet"](x_t, t, nets["text"](ids)[0]).sample
        weight = (snr + args.floor).clamp(max=5) / snr
        return (weight * (prediction.float() - eps).square()).mean()

    nets, _ = fit("unet", nets, loss, args.iters or 8000, args.lr or 8e-4, args)
    nets["text"].save_pretrained(out / "text_encoder", safe_serialization=True)
    nets["unet"].save_pretrained(out / "unet", safe_serialization=True)


def tokenizer_captions(data):
    """Three captions of each image, in different words: the text that the tokenizer learns from."""
    choices = ((0, 0, 0), (0.99, 0.49, 0.99), (0.75, 0.99, 0.99))
    captions = []
    for i in (~data.held_out).nonzero()[:, 0].tolist():
        captions += [make_caption(data, i, u) for u in choices]
    return captions


class RepeatLastToken(TorchFunctionMode):
    """Inside this context the last token of every attention counts n times.

    SD3's pipeline appends many equal tokens of zeros in place of T5's text. They have no position
    and stay equal in all layers, so one with its attention weight times n replaces n exactly.
    """

    def __init__(self, n):
        super().__init__()
        self.n = n

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key = args[:2]
            bias = torch.zeros(key.shape[-2])
            bias[-1] = math.log(self.n)
            mask = bias.to(query.dtype).expand(query.shape[-2], -1)
            kwargs = kwargs | dict(attn_mask=mask)
        return func(*args, **kwargs)


def train_flow(data, args):
    torch.manual_seed(derive_seed(args.seed, 17))
    out = Path(args.out)
    if args.start:
        net = load_part(args.start, "transformer").train()
    else:
        net = make_transformer(args.flow_width, args.depth, args.text_width)
    nets = Nets(dict(transformer=net))
    latents = encode(load_part(out, "vae").eval(), data.images)
    pipe = make_pipeline(out, net, args.shift)
    factors = parse_more(args.more, data)

    def loss(draw, it):
        index, captions = draw_captioned(draw, data, args, factors)
        with torch.no_grad():  # the text encoders are frozen
            text, _, pooled, _ = pipe.encode_prompt(
                captions, captions, captions, device="cpu", do_classifier_free_guidance=False
            )
        x0 = latents[index]
        eps = draw.randn(*latents.shape[1:])
        u = draw.randn(1)[:, 0].sigmoid()
        t = args.shift * u / (1 + (args.shift - 1) * u)
        s = t.view(-1, 1, 1, 1)
        x_t = (1 - s) * x0 + s * eps
        # Versions of diffusers append 256 tokens of zeros, or as many as the text has.
        zeros = (256, TOKENS)[it % 2]
        with autocast(), sdpa_kernel(SDPBackend.MATH), RepeatLastToken(zeros):
            velocity = nets["transformer"](
                x_t,
                encoder_hidden_states=text[:, : TOKENS + 1],
                pooled_projections=pooled,
                timestep=1000 * t,
            ).sample
        return (velocity.float() - (eps - x0)).square().mean()

    nets, _ = fit("flow", nets, loss, args.iters or 8000, args.lr or 1e-3, args)
    nets["transformer"].save_pretrained(out / "transformer", safe_serialization=True)


# ---- classifier ----------------------------------------------------------------------------------


def train_classifier(data, args):
    """SmallCNN on the subcategories. A category is recognised where its subcategory is."""
    torch.manual_seed(derive_seed(args.seed, 13))
    out = Path(args.out)
    unseen = one_style_held_out(data)
    train = dataclasses.replace(data, held_out=unseen | data.held_out)
    cnn = SmallCNN(3, SIDE, len(data.kinds), stages=CLASSIFIER_STAGES)
    nets = Nets(dict(cnn=cnn))

    def loss(draw, it):
        index = draw_images(draw, train)
        torch.manual_seed(derive_seed(args.seed, it, 14))  # for `random_affine`
        x = random_affine(data.images[index])
        with autocast():
            _, logits = nets["cnn"](x)
        return F.cross_entropy(logits.float(), data.kind[index], label_smoothing=0.05)

    _, seconds = fit("classifier", nets, loss, args.iters or 1000, args.lr or 3e-3, args)
    # The network and not its weight average, because batch norm has statistics of the network.
    # Weights are rounded first, as they are in the file.
    cnn = cnn.half().float().eval()
    half = {k: v.half() if v.is_floating_point() else v for k, v in cnn.state_dict().items()}
    save_weights(out / "classifier.safetensors", half)

    with torch.no_grad():
        outputs = [cnn(part) for part in data.images.split(250)]
    features, logits = (torch.cat(parts) for parts in zip(*outputs))
    predicted = logits.argmax(1)
    category = torch.tensor(category_of_kinds(data))[predicted]
    correct = torch.stack([category == data.category, predicted == data.kind]).float()
    sets = dict(held_out=unseen, all=~data.held_out, held_out_tones=data.held_out)
    agreement = {}
    for name, rows in sets.items():
        agreement[name] = [round(share, 4) for share in correct[:, rows].mean(1).tolist()]
    print(f"classifier: share of correct categories and subcategories: {agreement}", flush=True)
    write_json(out / "classifier.json", dict(agreement=agreement, seconds=seconds))

    features = features[reference_indices(data)]
    stats = fid.Stats(features.shape[1])
    stats.update(features)
    mu, sigma = stats.mean_cov()
    fid.save_stats(out / "stats.npz", mu, sigma, stats.n, "emoji-cnn", features)


def one_style_held_out(data):
    """bool [n]: of one emoji in ten all images in one of the two styles."""
    held_out = []
    for code, style in zip(data.codes, data.styles):
        number = hashlib.sha256(code.encode()).digest()[0] % 20
        held_out.append(number == (10 if style == "noto" else 0))
    return torch.tensor(held_out)


def category_of_kinds(data):
    """Number of the category of each subcategory."""
    return [int(data.category[data.kind == k][0]) for k in range(len(data.kinds))]


# ---- the finished teacher ------------------------------------------------------------------------


def save(data, args):
    """The teacher's folder: a pipeline in half precision, prompts with the subcategories that their
    images should show, classifier and statistics.
    """
    out = Path(args.out)
    to = Path(args.to or out / "teacher")
    save_pipeline(out, to, args)
    for file in ("classifier.safetensors", "stats.npz"):
        shutil.copyfile(out / file, to / file)
    prompts = sample_prompt_kinds(data)
    number = args.prompts - len(prompts)
    seen = shuffled_captions(data, reference_indices(data), args.seed)
    prompts |= dict(list(seen.items())[:number])
    held_out = shuffled_captions(data, data.held_out.nonzero()[:, 0], args.seed)
    write_lines(to / "prompts.txt", prompts)
    write_lines(to / "held_out.txt", held_out)
    write_json(to / "labels.json", prompts | held_out)

    evaluation = dict(
        protocol="emoji-cnn",
        classifier="classifier.safetensors",
        reference="stats.npz",
        names=data.categories,
        kinds=data.kinds,
        groups=category_of_kinds(data),
        stages=CLASSIFIER_STAGES,
        labels="labels.json",
        agreement_of_images=read_json(out / "classifier.json")["agreement"],
    )
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    log = [line for line in log if line["stage"] in ("vae", "unet", "classifier", args.net)]
    info = dict(
        name="emoji" if args.net == "unet" else "emoji-flow",
        evaluation=evaluation,
        seconds={line["stage"]: line["seconds"] for line in log},
        iterations={line["stage"]: line["it"] for line in log},
    )
    write_json(to / "teacher.json", info)
    sample_picture(to, args)


def save_pipeline(out, to, args):
    """A pipeline in half precision that all supported versions of transformers load."""
    net = load_part(out, "unet" if args.net == "unet" else "transformer")
    pipe = make_pipeline(out, net, args.shift)
    pipe.to(torch.float16).save_pretrained(to, safe_serialization=True)
    for path in [*to.glob("*/config.json"), to / "model_index.json"]:
        config = read_json(path)
        config.pop("_name_or_path", None)  # a folder of this machine
        if path.parent.name.startswith("text_encoder"):
            config["dtype"] = "float32"  # transformers 5 would load in half precision
        write_json(path, config)
    for path in to.glob("text_encoder*/model.safetensors"):
        # transformers 5 writes names without this prefix, which older versions do not load
        tensors = {}
        for name, tensor in load_file(path).items():
            tensors[name if name.startswith("text_") else f"text_model.{name}"] = tensor
        save_file(tensors, path, metadata={"format": "pt"})
    for folder in to.glob("tokenizer*"):
        # transformers 5 writes another file instead of these two, which older versions need
        shutil.copy(out / "tokenizer" / "vocab.json", folder)
        shutil.copy(out / "tokenizer" / "merges.txt", folder)


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))


def sample_prompt_kinds(data):
    """Number of the subcategory of each of SAMPLE_PROMPTS, by the longest phrase it starts with."""
    kinds = {}
    for phrases, kind in zip(data.phrases, data.kind):
        kinds |= dict.fromkeys(phrases, int(kind))
    found = {}
    for prompt in SAMPLE_PROMPTS:
        matches = [phrase for phrase in kinds if prompt.startswith(phrase)]
        if matches:
            found[prompt] = kinds[max(matches, key=len)]
    return found


def shuffled_captions(data, index, seed):
    """One caption of each image -> number of its subcategory, shuffled, each caption once."""
    generator = torch.Generator().manual_seed(derive_seed(seed, 15))
    index = index[torch.randperm(len(index), generator=generator)].tolist()
    uniform = torch.rand(len(index), 3, generator=generator).tolist()
    return {make_caption(data, i, u): int(data.kind[i]) for i, u in zip(index, uniform)}


@torch.no_grad()
def sample_picture(folder, args, steps=25):
    """samples.png: a row of SAMPLE_PROMPTS for each --cfg, by plain diffusers."""
    from diffusers import DiffusionPipeline

    # diffusers loads SD3 without its third text encoder only if its parts are given as None
    index = read_json(folder / "model_index.json")
    absent = {name: None for name, value in index.items() if value == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for cfg in args.cfg:
        images = pipe(
            list(SAMPLE_PROMPTS),
            height=SIDE,
            width=SIDE,
            num_inference_steps=steps,
            guidance_scale=cfg,
            generator=torch.Generator().manual_seed(args.seed),
            output_type="np",
        ).images
        images = torch.from_numpy((images * 255).round().astype("uint8")).permute(0, 3, 1, 2)
        rows.append((f"{steps} steps, w = {cfg:g}", images))
    save_grid(Path(args.out) / "samples.png", rows)


def write_images(data, args):
    """A folder for --data: the images that samples are compared with, and metadata.jsonl."""
    to = Path(args.to or Path(args.out) / "images")
    to.mkdir(parents=True, exist_ok=True)
    index = reference_indices(data).tolist()
    generator = torch.Generator().manual_seed(derive_seed(args.seed, 16))
    uniform = torch.rand(len(index), 3, generator=generator).tolist()
    lines = []
    for i, u in zip(index, uniform):
        file = f"{i:05d}.png"
        Image.fromarray(data.images[i].permute(1, 2, 0).numpy()).save(to / file)
        lines.append(json.dumps(dict(file_name=file, text=make_caption(data, i, u))))
    write_lines(to / "metadata.jsonl", lines)


STAGES = dict(
    vae=train_vae,
    unet=train_unet,
    flow=train_flow,
    classifier=train_classifier,
    save=save,
    images=write_images,
)


def main(argv=None):
    args = parse_args(argv)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    start = time.time()
    STAGES[args.stage](load_emoji(args.source), args)
    print(f"{args.stage}: {time.time() - start:.0f} s, in {args.out}")


if __name__ == "__main__":
    launch(main)
