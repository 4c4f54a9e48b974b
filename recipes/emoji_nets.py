"""Networks of the `emoji` teachers, in the formats of diffusers and transformers."""

import json
from pathlib import Path

import torch

from common.errors import UserError, first_line
from recipes.emoji_data import SIDE

LATENT_SIDE = SIDE // 4
TOKENS = 24  # of a prompt


def load_part(folder, part):
    """One component of a pipeline from its subfolder. UserError."""
    import diffusers
    import transformers

    classes = dict(
        vae=diffusers.AutoencoderKL,
        unet=diffusers.UNet2DConditionModel,
        transformer=diffusers.SD3Transformer2DModel,
        text_encoder=transformers.CLIPTextModel,
        tokenizer=transformers.CLIPTokenizer,
    )
    options = {} if part == "tokenizer" else dict(use_safetensors=True)
    try:
        return classes[part].from_pretrained(Path(folder) / part, **options)
    except (OSError, ValueError) as e:
        raise UserError(
            f"--out or --start, {folder}: {part}: expected what an earlier stage leaves there, "
            f"found: {first_line(e)[:200]}"
        ) from None


def make_vae(width):
    """Autoencoder 64 x 64 x 3 -> 16 x 16 x 4. width: channels of its three levels."""
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


# ---- text ----------------------------------------------------------------------------------------


def make_tokenizer(captions, folder, merges=1400):
    """CLIP's tokenizer with merges that are learnt from these captions, written into the folder."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    # byte-pair encoding of words, which CLIP splits in this way
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Regex(r"[a-z]+|[0-9]|[^\sa-z0-9]+")
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Split(words, "removed", invert=True)
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 64 + merges,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    pairs = json.loads(bpe.to_str())["model"]["merges"]
    # older versions of tokenizers write a pair as one string
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in pairs]

    # CLIP's vocabulary: bytes, bytes that end a word, merges, start and end of the text
    vocab = list(alphabet)
    vocab += [a + "</w>" for a in alphabet]
    vocab += [a + b for a, b in pairs]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {word: i for i, word in enumerate(dict.fromkeys(vocab))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(numbers, ensure_ascii=False))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in pairs)]
    (folder / "merges.txt").write_text("".join(f"{line}\n" for line in lines))
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=TOKENS,
        pad_token="<|endoftext|>",
    )


def tokenize(tokenizer, captions):
    """-> int64 [n, TOKENS]."""
    return tokenizer(
        captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def make_text_encoder(tokenizer, width, depth=2):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModel(config)


def with_projection(text_encoder):
    """The same encoder in the class that SD3 needs; its projection is the identity."""
    from transformers import CLIPTextModelWithProjection

    old = text_encoder.config
    config = type(old)(**old.to_dict() | dict(projection_dim=old.hidden_size))
    model = CLIPTextModelWithProjection(config)
    # transformers before 5 has one more level
    inner = getattr(text_encoder, "text_model", text_encoder)
    model.text_model.load_state_dict(inner.state_dict())
    torch.nn.init.eye_(model.text_projection.weight)
    return model.eval()


# ---- denoisers -----------------------------------------------------------------------------------


def make_scheduler():
    """The noise schedule of Stable Diffusion 1.5."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_unet(width, text_width):
    """width: channels of each level, multiples of 16."""
    from diffusers import UNet2DConditionModel

    n = len(width)
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=4,
        out_channels=4,
        block_out_channels=width,
        layers_per_block=1,
        cross_attention_dim=text_width,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")[:n],
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")[-n:],
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_transformer(width, depth, text_width):
    """width: a multiple of 32."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=depth,
        num_attention_heads=width // 32,
        attention_head_dim=32,
        joint_attention_dim=2 * text_width,
        caption_projection_dim=width,
        pooled_projection_dim=2 * text_width,
        pos_embed_max_size=LATENT_SIDE,
        qk_norm="rms_norm",
    )


def make_pipeline(folder, net, shift):
    """diffusers' pipeline around a UNet or a flow transformer, with the other parts of a folder."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        StableDiffusion3Pipeline,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    vae = load_part(folder, "vae")
    text_encoder = load_part(folder, "text_encoder")
    tokenizer = load_part(folder, "tokenizer")
    if isinstance(net, UNet2DConditionModel):
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=net,
            scheduler=make_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    vae.register_to_config(shift_factor=0.0)  # SD3's pipeline adds it to the latents
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=with_projection(text_encoder),
        text_encoder_2=with_projection(text_encoder),
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=net,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )
