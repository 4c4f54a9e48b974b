"""Trains the `emoji` teachers: a small text-to-image model in formats of diffusers, on 7,562 emoji of 64 x 64 pixels (common/emoji.py), with what is needed to
measure its samples. Stages, each from what the one before left in --out; a stage that was cut off goes on with --resume.

    python -m recipes.emoji_teacher --out out/teacher-emoji vae            # AutoencoderKL, 64x64x3 to 16x16x4
    python -m recipes.emoji_teacher --out out/teacher-emoji unet           # tokenizer, CLIP text model and UNet, trained together: StableDiffusionPipeline
    python -m recipes.emoji_teacher --out out/teacher-emoji flow           # an SD3 transformer on the same text model and VAE: StableDiffusion3Pipeline
    python -m recipes.emoji_teacher --out out/teacher-emoji classifier     # features of `fd`, category and subcategory of an image
    python -m recipes.emoji_teacher --out out/teacher-emoji save           # writes the teacher: half precision, teacher.json, sample picture
    python -m recipes.emoji_teacher --out out/teacher-emoji images         # PNGs with captions, for --data of losses that need images

Losses: VAE, L1 + L2 of pixels, half the L1 of their differences to the neighbours, 1e-4 of the KL per latent; UNet, eps prediction on the schedule of SD 1.5 with min-SNR weight (arXiv 2303.09556)
    L = mean min(SNR + f, 5) / SNR |eps(x_t, t, c) - eps|^2,    c the empty prompt with probability --drop, f = --floor:
the weight of an error of x0 is then min(SNR + f, 5), and not next to nothing at the noise levels where the words decide what will be seen;
flow, as common/pretrain.py, with times shifted to s t / (1 + (s - 1) t), s = --shift.
"""

import argparse
import copy
import hashlib
import json
import math
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from common import fid
from common.ema import EMA
from common.errors import UserError, launch
from common.features import SmallCNN
from common.files import ROOT, atomic, read_json, write_json
from common.report import save_grid
from common.rng import BatchRandom, derive_seed
from recipes.emoji_data import SIDE, caption, load
from recipes.pretrain import jitter

SIDE, TOKENS, STAGES = SIDE // 4, 24, 3  # of the latents; of a prompt; of the classifier


class Nets(torch.nn.ModuleDict):
    def copy(self):
        return copy.deepcopy(self)


def fit(name, nets, loss, iters, lr, args, half_life=None):
    """Minimises loss(draw, it) by AdamW over all parameters of `nets` (ModuleDict), bf16 autocast inside; warm-up, then linear decay over the second half.
    Returns the weight average. Every few minutes everything is saved, for --resume, which gives what one run would have given."""
    path, ema, start, first = (
        Path(args.out) / f"{name}.ckpt",
        EMA(nets, half_life or iters * args.batch / 20),
        time.time(),
        0,
    )
    opt, spent = (
        torch.optim.AdamW(
            nets.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        ),
        0.0,
    )
    if args.resume and path.is_file():
        state = torch.load(path, weights_only=True)
        nets.load_state_dict(state["nets"])
        ema.model.load_state_dict(state["ema"])
        opt.load_state_dict(state["opt"])
        first, spent, ema.images = state["it"], state["seconds"], state["it"] * args.batch

    def save(it):
        with atomic(path) as f:
            torch.save(
                dict(
                    nets=nets.state_dict(),
                    ema=ema.model.state_dict(),
                    opt=opt.state_dict(),
                    it=it,
                    seconds=spent + time.time() - start,
                ),
                f,
            )

    print(
        f"{name}: {sum(p.numel() for p in nets.parameters()) / 1e6:.2f}M parameters, iterations {first} to {iters} of {args.batch}",
        flush=True,
    )
    last, total = time.time(), 0.0
    with open(Path(args.out) / "log.jsonl", "a") as log:
        for it in (bar := tqdm(range(first, iters), desc=name, mininterval=10)):
            rate = min(1, (it + 1) / 200) * min(1, (1 - it / iters) / 0.5 + 0.01)
            for g in opt.param_groups:
                g["lr"] = lr * rate
            value = loss(BatchRandom(args.seed, it, args.batch), it)
            value.backward()
            torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            ema.update(args.batch)
            total += value.item()
            if (it + 1) % 50 == 0:
                log.write(
                    json.dumps(
                        dict(
                            stage=name,
                            it=it + 1,
                            loss=total / 50,
                            seconds=round(spent + time.time() - start, 1),
                        )
                    )
                    + "\n"
                )
                log.flush()
                bar.set_postfix(loss=f"{total / 50:.4f}", refresh=False)
                total = 0.0
            if time.time() - last > args.save_minutes * 60:
                save(it + 1)
                last = time.time()
    save(iters)
    return ema.model, round(spent + time.time() - start)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def pick(draw, data, more=1.0):
    """Indices of one batch, by the images' weights times `more`, without the held-out ones."""
    return torch.multinomial(data.weight * more * ~data.held, draw.total, generator=draw.gen)


def factors(data, pairs):
    """--more -> float [n]: how many times as often as by its weight an image is drawn. Only training asks; prompts and statistics stay as they are."""
    more = torch.ones(len(data.weight))
    for pair in pairs:
        name, _, factor = pair.rpartition("=")
        chosen = torch.tensor(
            [
                name in (data.names[c], data.kinds[k], *phrases)
                for c, k, phrases in zip(data.label, data.kind, data.nouns)
            ]
        )
        if not chosen.any() or not re.fullmatch(r"[0-9]+(\.[0-9]+)?", factor) or float(factor) == 0:
            raise UserError(
                f"--more {pair}: expected NAME=FACTOR, a factor above 0 and an emoji or one of {', '.join(data.names + data.kinds)}"
            )
        more[chosen] *= float(factor)
    return more


def make_vae(width=(24, 48, 64)):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=list(width),
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * len(width),
        up_block_types=["UpDecoderBlock2D"] * len(width),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def train_vae(data, args):
    torch.manual_seed(derive_seed(args.seed, 11))
    nets = Nets(dict(vae=make_vae(args.vae_width)))
    vae = nets["vae"]
    torch.nn.init.constant_(
        vae.quant_conv.bias[4:].detach(), -6.0
    )  # hardly any noise at first: with unit noise L1 stays at the median image, white

    def loss(draw, it):
        x = data.images[pick(draw, data)].float() / 127.5 - 1
        with autocast():
            mean, logvar = vae.quant_conv(vae.encoder(x)).float().chunk(2, 1)
            logvar = logvar.clamp(-30, 20)
            z = mean + (logvar / 2).exp() * draw.randn(*mean.shape[1:])
            y = vae.decoder(vae.post_quant_conv(z)).float()
        error = y - x
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.abs().mean() + error.square().mean() + 0.5 * edges + 1e-4 * kl

    nets, seconds = fit("vae", nets, loss, args.iters or 1500, args.lr or 2e-3, args)
    vae = nets["vae"].eval()
    standardise(vae, data.images)
    vae.save_pretrained(Path(args.out) / "vae", safe_serialization=True)
    picture(vae, data, args)
    return seconds


@torch.no_grad()
def encode(vae, images):
    return torch.cat(
        [vae.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in images.split(64)]
    )


@torch.no_grad()
def standardise(vae, images):
    """Gives every latent channel mean 0 and variance 1 over the images, by the 1x1 convolutions beside the latents: pipelines know one scale for all four."""
    z = encode(vae, images[::7])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    after, before = vae.quant_conv, vae.post_quant_conv
    n = len(mean)
    before.bias += before.weight[:, :, 0, 0] @ mean
    before.weight *= std.view(1, n, 1, 1)
    after.weight[:n] /= std.view(n, 1, 1, 1)
    after.bias[:n] = (after.bias[:n] - mean) / std
    after.bias[n:] -= 2 * std.log()


@torch.no_grad()
def picture(vae, data, args):
    """Images of both styles above their reconstructions."""
    index = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(args.seed))[
        :32
    ]
    x = data.images[index]
    y = ((vae.decode(encode(vae, x)).sample / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    print(f"vae: mean absolute error {(x.float() - y.float()).abs().mean():.2f} of 255", flush=True)
    save_grid(
        Path(args.out) / "vae.png",
        [
            row
            for i in (0, 16)
            for row in (("images", x[i : i + 16]), ("reconstructed", y[i : i + 16]))
        ],
    )


def train_classifier(data, args):
    """SmallCNN on the subcategories; that of the category is its subcategory's. Held out: for one emoji of ten, one of its two styles, all skin tones."""
    torch.manual_seed(derive_seed(args.seed, 13))
    out = Path(args.out)
    hold = torch.tensor(
        [
            hashlib.sha256(b.encode()).digest()[0] % 20 == (s == "noto") * 10
            for b, s in zip(data.base, data.style)
        ]
    )
    nets = Nets(dict(cnn=SmallCNN(3, SIDE, len(data.kinds), stages=STAGES)))
    kept = SimpleNamespace(weight=data.weight, held=hold | data.held)

    def loss(draw, it):
        index = pick(draw, kept)
        torch.manual_seed(derive_seed(args.seed, it, 14))  # of `jitter`
        x = jitter(data.images[index])
        with autocast():
            logits = nets["cnn"](x)[1]
        return F.cross_entropy(logits.float(), data.kind[index], label_smoothing=0.05)

    _, seconds = fit("classifier", nets, loss, args.iters or 1000, args.lr or 3e-3, args)
    cnn = (
        nets["cnn"].half().float().eval()
    )  # as it is stored; its running statistics are its own, so no weight average
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in cnn.state_dict().items()},
        out / "classifier.safetensors",
    )
    with torch.no_grad():
        features, logits = (
            torch.cat(a) for a in zip(*[cnn(part) for part in data.images.split(250)])
        )
    group = torch.tensor(groups(data))
    right = torch.stack(
        [group[logits.argmax(1)] == data.label, logits.argmax(1) == data.kind]
    ).float()
    shares = {
        name: [round(v, 4) for v in right[:, rows].mean(1).tolist()]
        for name, rows in dict(held_out=hold, all=~data.held, held_out_tones=data.held).items()
    }
    print(f"classifier: share right of category and subcategory: {shares}", flush=True)
    stats, rows = fid.Stats(features.shape[1]), reference(data)
    stats.update(features[rows])
    mu, sigma = stats.mean_cov()
    fid.save_stats(out / "stats.npz", mu, sigma, stats.n, "emoji-cnn", features[rows])
    write_json(out / "classifier.json", dict(agreement=shares, seconds=seconds))
    return seconds


def groups(data):
    """Category of each subcategory."""
    return [int(data.label[data.kind == k][0]) for k in range(len(data.kinds))]


def reference(data):
    """Indices of the images that samples are compared with: each with a chance of its weight in training, none that is held out."""
    chance = torch.rand(len(data.images), generator=torch.Generator().manual_seed(0))
    return ((chance < data.weight) & ~data.held).nonzero()[:, 0]


def make_tokenizer(captions, folder, merges=1400):
    """CLIP's tokenizer with merges of these captions instead of the web's: bytes, bytes that end a word, merges, the two marks."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Split(tokenizers_regex(), "removed", invert=True)
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=len(alphabet) + 64 + merges,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    pairs = [
        tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair)
        for pair in json.loads(bpe.to_str())["model"]["merges"]
    ]
    vocab = [
        *alphabet,
        *(a + "</w>" for a in alphabet),
        *(a + b for a, b in pairs),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({word: i for i, word in enumerate(dict.fromkeys(vocab))}, ensure_ascii=False)
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs))
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=TOKENS,
        pad_token="<|endoftext|>",
    )


def tokenizers_regex():
    from tokenizers import Regex

    return Regex(r"[a-z]+|[0-9]|[^\sa-z0-9]+")  # how CLIP splits lower-case text into words


def make_text(tokenizer, width, depth):
    from transformers import CLIPTextConfig, CLIPTextModel

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )


def make_unet(width, text_width):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=4,
        out_channels=4,
        block_out_channels=width,
        layers_per_block=1,
        cross_attention_dim=text_width,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")[: len(width)],
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")[-len(width) :],
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def load_part(folder, part):
    """One component of a pipeline, as a stage has left it."""
    import diffusers
    import transformers

    kinds = dict(
        vae=diffusers.AutoencoderKL,
        unet=diffusers.UNet2DConditionModel,
        transformer=diffusers.SD3Transformer2DModel,
        text_encoder=transformers.CLIPTextModel,
        tokenizer=transformers.CLIPTokenizer,
    )
    try:
        return kinds[part].from_pretrained(
            Path(folder) / part, **({} if part == "tokenizer" else dict(use_safetensors=True))
        )
    except (OSError, ValueError) as e:
        raise UserError(
            f"--out or --start, {folder}: {part}: expected what an earlier stage leaves there, found: {' '.join(str(e).split())[:200]}"
        ) from None


def draw_captions(draw, data, args, more):
    """Images (indices) of one batch and their captions, some of these empty."""
    index, u = pick(draw, data, more), torch.rand(args.batch, 4, generator=draw.gen).tolist()
    return index, [
        "" if r[3] < args.drop else caption(data, i, r) for i, r in zip(index.tolist(), u)
    ]


def tokens(tokenizer, captions):
    return tokenizer(
        captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def train_unet(data, args):
    torch.manual_seed(derive_seed(args.seed, 12))
    out = Path(args.out)
    latents = encode(load_part(out, "vae").eval(), data.images)
    if args.start:  # with its own tokenizer: another training of it breaks ties between equally frequent pairs another way
        tokenizer, nets = (
            load_part(args.start, "tokenizer"),
            Nets(
                dict(
                    text=load_part(args.start, "text_encoder").train(),
                    unet=load_part(args.start, "unet").train(),
                )
            ),
        )
        shutil.copytree(Path(args.start) / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    else:
        every = [
            caption(data, i, [u, v, w])
            for i in range(len(data.images))
            if not data.held[i]
            for u, v, w in ((0, 0, 0), (0.99, 0.49, 0.99), (0.75, 0.99, 0.99))
        ]
        tokenizer = make_tokenizer(every, out / "tokenizer")
        tokenizer.save_pretrained(out / "tokenizer")
        nets = Nets(
            dict(
                text=make_text(tokenizer, args.text_width, 2),
                unet=make_unet(tuple(args.width), args.text_width),
            )
        )
    abar, more = make_scheduler().alphas_cumprod, factors(data, args.more)

    def loss(draw, it):
        index, captions = draw_captions(draw, data, args, more)
        ids = tokens(tokenizer, captions)
        x0, eps, t = latents[index], draw.randn(*latents.shape[1:]), draw.randint(0, len(abar))
        a = abar[t].view(-1, 1, 1, 1)
        x_t, snr = a.sqrt() * x0 + (1 - a).sqrt() * eps, a / (1 - a)
        with (
            autocast(),
            sdpa_kernel(SDPBackend.MATH),
        ):  # the backward of the fused one is slow in bf16 on a CPU
            out = nets["unet"](x_t, t, nets["text"](ids)[0]).sample
        return ((snr + args.floor).clamp(max=5) / snr * (out.float() - eps).square()).mean()

    nets, seconds = fit("unet", nets, loss, args.iters or 8000, args.lr or 8e-4, args)
    nets["text"].save_pretrained(out / "text_encoder", safe_serialization=True)
    nets["unet"].save_pretrained(out / "unet", safe_serialization=True)
    return seconds


def projected(text):
    """The text model as SD3 wants it: with a projection of the pooled state, here the identity."""
    from transformers import CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection(
        type(text.config)(**text.config.to_dict() | dict(projection_dim=text.config.hidden_size))
    )
    model.text_model.load_state_dict(
        getattr(text, "text_model", text).state_dict()
    )  # transformers before 5 has one more level
    torch.nn.init.eye_(model.text_projection.weight)
    return model.eval()


def make_transformer(width, depth, text_width):
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=depth,
        num_attention_heads=width // 32,
        attention_head_dim=32,
        joint_attention_dim=2 * text_width,
        caption_projection_dim=width,
        pooled_projection_dim=2 * text_width,
        pos_embed_max_size=SIDE,
        qk_norm="rms_norm",
    )


class Repeated(TorchFunctionMode):
    """Inside it, the last token of every attention counts n times: a token of zeros instead of the n in T5's place. They carry no position, so they stay equal."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            bias = torch.zeros(args[1].shape[-2])
            bias[-1] = math.log(self.n)
            kwargs = kwargs | dict(attn_mask=bias.to(args[0].dtype).expand(args[0].shape[-2], -1))
        return func(*args, **kwargs)


def train_flow(data, args):
    torch.manual_seed(derive_seed(args.seed, 17))
    out = Path(args.out)
    net = (
        load_part(args.start, "transformer").train()
        if args.start
        else make_transformer(args.flow_width, args.depth, args.text_width)
    )
    latents, nets = encode(load_part(out, "vae").eval(), data.images), Nets(dict(transformer=net))
    pipe, more = pipeline(out, nets["transformer"], args.shift), factors(data, args.more)

    def loss(draw, it):
        index, captions = draw_captions(draw, data, args, more)
        with torch.no_grad():  # both encoders, here equal, side by side, and zeros in place of T5
            text, _, pooled, _ = pipe.encode_prompt(
                captions, captions, captions, device="cpu", do_classifier_free_guidance=False
            )
        x0, eps, t = latents[index], draw.randn(*latents.shape[1:]), draw.randn(1)[:, 0].sigmoid()
        t = args.shift * t / (1 + (args.shift - 1) * t)
        x_t = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * eps
        # diffusers has changed how many zeros: as many as tokens before, 256 now
        with autocast(), sdpa_kernel(SDPBackend.MATH), Repeated((256, TOKENS)[it % 2]):
            v = nets["transformer"](
                x_t,
                encoder_hidden_states=text[:, : TOKENS + 1],
                pooled_projections=pooled,
                timestep=1000 * t,
            ).sample
        return (v.float() - (eps - x0)).square().mean()

    nets, seconds = fit("flow", nets, loss, args.iters or 8000, args.lr or 1e-3, args)
    nets["transformer"].save_pretrained(out / "transformer", safe_serialization=True)
    return seconds


EIGHT = (
    "red heart",
    "pizza",
    "dog face",
    "flag of france",
    "rocket",
    "smiling face with sunglasses",
    "red apple",
    "woman farmer with medium dark skin",
)


def captions_of(data, rows, seed):
    """One caption of each image, its subcategory beside it, shuffled, without doubles."""
    g = torch.Generator().manual_seed(derive_seed(seed, 15))
    rows = [rows[i] for i in torch.randperm(len(rows), generator=g).tolist()]
    return {
        caption(data, i, u): int(data.kind[i])
        for i, u in zip(rows, torch.rand(len(rows), 3, generator=g).tolist())
    }


def pipeline(out, net, shift):
    """The parts that the stages have left in `out`, around a UNet or a flow transformer."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        StableDiffusion3Pipeline,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    vae, text, tokenizer = (
        load_part(out, "vae"),
        load_part(out, "text_encoder"),
        load_part(out, "tokenizer"),
    )
    if isinstance(net, UNet2DConditionModel):
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=text,
            tokenizer=tokenizer,
            unet=net,
            scheduler=make_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    vae.register_to_config(shift_factor=0.0)  # which this pipeline adds
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=projected(text),
        text_encoder_2=projected(text),
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=net,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )


def save(data, args):
    """The teacher's folder: a pipeline in half precision, prompts with what shall be seen on their pictures, classifier and statistics."""
    start, out, to = time.time(), Path(args.out), Path(args.to or Path(args.out) / "teacher")
    name = "emoji" if args.net == "unet" else "emoji-flow"
    pipe = pipeline(
        out, load_part(out, dict(unet="unet", flow="transformer")[args.net]), args.shift
    )
    pipe.to(torch.float16).save_pretrained(to, safe_serialization=True)
    for config in [*to.glob("*/config.json"), to / "model_index.json"]:
        write_json(
            config,
            {
                k: v for k, v in read_json(config).items() if k != "_name_or_path"
            }  # a folder of this machine
            | (dict(dtype="float32") if config.parent.name.startswith("text_encoder") else {}),
        )  # what transformers 5 loads in, as diffusers does the rest
    for file in to.glob(
        "text_encoder*/model.safetensors"
    ):  # under the names that every version of transformers reads; 5 writes shorter ones
        tensors = {
            k if k.startswith("text_") else f"text_model.{k}": v for k, v in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
    for words in to.glob(
        "tokenizer*"
    ):  # transformers before 5 reads these two files, from 5 on it writes another
        shutil.copy(out / "tokenizer" / "vocab.json", words)
        shutil.copy(out / "tokenizer" / "merges.txt", words)
    for file in ("classifier.safetensors", "stats.npz"):
        shutil.copyfile(out / file, to / file)
    nouns = {noun: int(kind) for nouns, kind in zip(data.nouns, data.kind) for noun in nouns}
    first = {
        text: nouns[max((noun for noun in nouns if text.startswith(noun)), key=len)]
        for text in EIGHT
        if any(map(text.startswith, nouns))
    }
    seen, unseen = (
        captions_of(data, rows.tolist(), args.seed)
        for rows in (reference(data), data.held.nonzero()[:, 0])
    )
    seen = first | dict(list(seen.items())[: args.prompts - len(first)])
    for file, lines in dict(prompts=seen, held_out=unseen).items():
        (to / f"{file}.txt").write_text("".join(f"{line}\n" for line in lines))
    write_json(to / "labels.json", seen | unseen)
    known = read_json(out / "classifier.json")
    evaluation = dict(
        protocol="emoji-cnn",
        classifier="classifier.safetensors",
        reference="stats.npz",
        names=data.names,
        kinds=data.kinds,
        groups=groups(data),
        stages=STAGES,
        labels="labels.json",
        agreement_of_images=known["agreement"],
    )
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    log = [line for line in log if line["stage"] in ("vae", "unet", "classifier", args.net)]
    write_json(
        to / "teacher.json",
        dict(
            name=name,
            evaluation=evaluation,
            seconds={line["stage"]: line["seconds"] for line in log},
            iterations={line["stage"]: line["it"] for line in log},
        ),
    )
    samples(to, args)
    return round(time.time() - start)


def write_images(data, args):
    """A folder for --data of the scripts: the images that samples are compared with, each with a caption."""
    from PIL import Image

    start, to, rows = (
        time.time(),
        Path(args.to or Path(args.out) / "images"),
        reference(data).tolist(),
    )
    to.mkdir(parents=True, exist_ok=True)
    u = torch.rand(
        len(rows), 3, generator=torch.Generator().manual_seed(derive_seed(args.seed, 16))
    ).tolist()
    for i in rows:
        Image.fromarray(data.images[i].permute(1, 2, 0).numpy()).save(to / f"{i:05d}.png")
    lines = [
        json.dumps(dict(file_name=f"{i:05d}.png", text=caption(data, i, chosen)))
        for i, chosen in zip(rows, u)
    ]
    (to / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return round(time.time() - start)


@torch.no_grad()
def samples(folder, args, steps=25):
    """samples.png: the first prompts in plain diffusers."""
    from diffusers import DiffusionPipeline

    absent = {
        k: None for k, v in read_json(folder / "model_index.json").items() if v == [None, None]
    }  # which diffusers wants to hear of SD3's third encoder
    pipe = DiffusionPipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for cfg in args.cfg:
        pictures = pipe(
            list(EIGHT),
            height=SIDE,
            width=SIDE,
            num_inference_steps=steps,
            guidance_scale=cfg,
            generator=torch.Generator().manual_seed(args.seed),
            output_type="np",
        ).images
        rows.append(
            (
                f"{steps} steps, w = {cfg:g}",
                torch.from_numpy((pictures * 255).round().astype("uint8")).permute(0, 3, 1, 2),
            )
        )
    save_grid(Path(args.out) / "samples.png", rows)


def main(argv=None):
    p = argparse.ArgumentParser(
        prog="python -m recipes.emoji_teacher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("stage", choices=["vae", "unet", "flow", "classifier", "save", "images"])
    p.add_argument(
        "--source",
        help="folder with emoji-datasource-google-VERSION.tgz and -twitter-; default: npm pack fetches them",
    )
    p.add_argument("--out", default=str(ROOT / "out" / "teacher-emoji"))
    p.add_argument("--iters", type=int)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--lr", type=float)
    p.add_argument("--vae-width", type=int, nargs="+", default=[24, 48, 64])
    p.add_argument(
        "--width",
        type=int,
        nargs="+",
        default=[64, 112, 112],
        help="of the UNet's levels, multiples of 16",
    )
    p.add_argument("--text-width", type=int, default=128)
    p.add_argument(
        "--start",
        help="unet, flow: folder of a teacher whose network (unet: and text model) is trained on",
    )
    p.add_argument(
        "--more",
        nargs="+",
        default=[],
        metavar="NAME=FACTOR",
        help="unet, flow: draw a category, a subcategory or one emoji FACTOR times as often, such as 'Food & Drink=4' pizza=2",
    )
    p.add_argument(
        "--floor", type=float, default=0.3, help="least weight of a squared error of x0, UNet"
    )
    p.add_argument(
        "--flow-width", type=int, default=160, help="of the flow transformer, a multiple of 32"
    )
    p.add_argument("--depth", type=int, default=4, help="of the flow transformer")
    p.add_argument("--shift", type=float, default=2.0, help="of the flow's times, towards noise")
    p.add_argument(
        "--net", choices=["unet", "flow"], default="unet", help="save: which of the two teachers"
    )
    p.add_argument("--drop", type=float, default=0.1, help="share of captions that are empty")
    p.add_argument("--to", help="save, images: folder; default OUT/teacher, OUT/images")
    p.add_argument("--prompts", type=int, default=2000, help="save: captions in prompts.txt")
    p.add_argument(
        "--cfg",
        type=float,
        nargs="+",
        default=[1.0, 2.0, 4.0, 7.5],
        help="save: guidance of the sample picture's rows",
    )
    p.add_argument("--save-minutes", type=float, default=4, help="between checkpoints")
    p.add_argument("--resume", action="store_true")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    data = load(args.source)
    seconds = dict(
        vae=train_vae,
        unet=train_unet,
        flow=train_flow,
        classifier=train_classifier,
        save=save,
        images=write_images,
    )[args.stage](data, args)
    print(f"{args.stage}: {seconds} s, in {args.out}")


if __name__ == "__main__":
    launch(main)
