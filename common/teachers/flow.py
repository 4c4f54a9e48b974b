"""Adapters of newer flow transformers: FLUX.1 and Qwen-Image, which pack their latents, Z-Image, and Wan 2.1 and 2.2 for video. The second half of
common/teachers.py, which imports this file at its end; import that one.

What is odd about them and kept: FLUX and Qwen-Image turn their time into the dtype of the activations, so that under bf16 passes it has 256 values near 1,
in their pipelines as here. What is left to the pipelines: their solvers and sigma tables. UniPC of Wan rounds times down to integers; Qwen-Image's scheduler
stretches its table to end at 0.02 (shift_terminal), while `schedule.grid` has the shift alone.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.utils.rnn import pad_sequence

from common.files import read_json
from common.model import layers_at
from common.schedules import equal_snr, expand
from common.teachers.pipeline import Pipeline, channel_stats, flow_schedule


class SD3(Pipeline):
    """Stable Diffusion 3 and 3.5. A missing third encoder (T5) is zeros, as in the pipeline."""

    adapter, pipeline, network = "sd3", "StableDiffusion3Pipeline", "SD3Transformer2DModel"
    without = (
        "feature_extractor",
        "image_encoder",
    )

    def make_schedule(self, scheduler, shape, c):
        return flow_schedule(scheduler, shape[-1] * shape[-2] // c.patch_size**2)

    @classmethod
    def text_pipeline(cls, folder, dtype):
        pipe = super().text_pipeline(folder, dtype)
        config = read_json(Path(folder) / cls.part / "config.json")
        pipe.transformer = SimpleNamespace(
            config=SimpleNamespace(**config), dtype=dtype
        )  # the stand-in of a missing T5 asks for a dimension
        return pipe

    @classmethod
    def text(cls, pipe, prompts):
        prompts = prompts or [""]
        text, _, pooled, _ = pipe.encode_prompt(
            prompts, prompts, prompts, device=pipe.device, do_classifier_free_guidance=False
        )
        return dict(text=text, pooled=pooled)

    def predict(self, x, t, cond):
        return self.net(
            x,
            encoder_hidden_states=cond["text"].to(x.dtype),
            pooled_projections=cond["pooled"].to(x.dtype),
            timestep=t * 1000,
            return_dict=False,
        )[0]

    def time_embedders(self):
        return [self.net.time_text_embed], self.net.inner_dim


class Sana(Pipeline):
    """SANA: linear-attention transformer on a 32x autoencoder, Gemma embeddings with a mask. No complex human instruction."""

    adapter, pipeline, network = "sana", "SanaPipeline", "SanaTransformer2DModel"

    def make_schedule(self, scheduler, shape, c):
        return flow_schedule(scheduler)

    @classmethod
    def text(cls, pipe, prompts):
        text, mask, _, _ = pipe.encode_prompt(
            prompts or [""], False, device=pipe.device, complex_human_instruction=None
        )
        return dict(text=text, mask=mask)

    def predict(self, x, t, cond):
        t = t * 1000 * getattr(self.net.config, "timestep_scale", 1.0)
        out = self.net(
            x,
            encoder_hidden_states=cond["text"].to(x.dtype),
            encoder_attention_mask=cond["mask"],
            timestep=t,
            return_dict=False,
        )[0]
        return out[:, : self.shape[0]]  # a learned variance is left out

    def time_embedders(self):
        c = self.net.config
        return [
            self.net.time_embed.emb.timestep_embedder
        ], c.num_attention_heads * c.attention_head_dim


def pack(x):
    """[B, C, H, W] -> tokens [B, H W / 4, 4 C] of 2 x 2 latents each."""
    b, c, h, w = x.shape
    return (
        x.reshape(b, c, h // 2, 2, w // 2, 2)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(b, h * w // 4, 4 * c)
    )


def unpack(y, h, w):
    b, _, c = y.shape
    return (
        y.reshape(b, h // 2, w // 2, c // 4, 2, 2)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(b, c // 4, h, w)
    )


class Flux(Pipeline):
    """FLUX.1. The dev model is distilled from guidance: the scale is an input of the network, `guidance` here (--embedded-guidance), 3.5 as in a plain call of its
    pipeline; a student is told the one it was trained with. `guided` is guidance on top of it, true_cfg_scale of the pipeline, by the empty prompt; w = 1 is the model as it is
    meant. schnell has no such input."""

    adapter, pipeline, network = "flux", "FluxPipeline", "FluxTransformer2DModel"
    without, settings = ("feature_extractor", "image_encoder"), ("guidance",)
    guidance = 3.5

    def latent_shape(self, c, size):
        return (
            c.in_channels // 4,
            *((128, 128) if size is None else (n // self.vae_scale for n in size)),
        )

    @classmethod
    def patch(cls, c):
        return 2  # packed

    def make_schedule(self, scheduler, shape, c):
        return flow_schedule(scheduler, shape[-1] * shape[-2] // 4)

    @classmethod
    def text(cls, pipe, prompts):
        text, pooled, _ = pipe.encode_prompt(prompts or [""], None, device=pipe.device)
        return dict(text=text, pooled=pooled)

    def predict(self, x, t, cond):
        h, w = x.shape[-2:]
        ids = torch.zeros(h // 2, w // 2, 3, device=x.device)
        ids[..., 1], ids[..., 2] = (
            torch.arange(h // 2, device=x.device)[:, None],
            torch.arange(w // 2, device=x.device),
        )
        guidance = (
            torch.full((len(x),), float(self.guidance), device=x.device)
            if self.net.config.guidance_embeds
            else None
        )
        out = self.net(
            pack(x),
            encoder_hidden_states=cond["text"].to(x.dtype),
            pooled_projections=cond["pooled"].to(x.dtype),
            timestep=t,
            guidance=guidance,
            img_ids=ids.view(-1, 3),
            txt_ids=torch.zeros(cond["text"].shape[1], 3, device=x.device),
            return_dict=False,
        )[0]
        return unpack(out, h, w)

    def time_embedders(self):
        return [self.net.time_text_embed], self.net.inner_dim

    def feature_layers(self, depths=(0.5,)):
        return layers_at(
            [*self.net.transformer_blocks, *self.net.single_transformer_blocks], depths
        )

    def config(self):
        return super().config() | dict(guidance=self.guidance)


class QwenImage(Pipeline):
    """Qwen-Image: packed latents, text with a mask, a video autoencoder for single pictures. Null: a blank, the negative prompt of the model's own examples."""

    adapter, pipeline, network = "qwen-image", "QwenImagePipeline", "QwenImageTransformer2DModel"
    since = 0, 37  # older ones look at the padding
    latent_shape = Flux.latent_shape
    make_schedule = Flux.make_schedule
    time_embedders = Flux.time_embedders

    @classmethod
    def text(cls, pipe, prompts):
        text, mask = pipe.encode_prompt(
            prompts or [" "], device=pipe.device, max_sequence_length=512
        )
        return dict(
            text=text,
            mask=torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
            if mask is None
            else mask.long(),
        )

    def predict(self, x, t, cond):
        h, w = x.shape[-2:]
        text, size = cond["text"].to(x.dtype), [[(1, h // 2, w // 2)]] * len(x)
        out = self.net(
            pack(x),
            encoder_hidden_states=text,
            encoder_hidden_states_mask=cond["mask"],
            timestep=t,
            img_shapes=size,
            return_dict=False,
        )[0]
        return unpack(out, h, w)

    def guided(self, x_t, alpha, sigma, cond, w):
        """Guidance as its pipeline does it: afterwards the velocity is scaled, token by token, to the length of the conditional one. Not linear in w."""
        if w in (0, 1):
            return super().guided(x_t, alpha, sigma, cond, w)
        c, u = (y.double() for y in self.cond_and_uncond(x_t, alpha, sigma, cond))
        x = x_t.double() * expand(equal_snr(self.schedule, alpha, sigma)[3], x_t)
        v, g = pack(x - c), pack(x - u - w * (c - u))  # velocities times sigma
        g = g * (v.norm(dim=-1, keepdim=True) / g.norm(dim=-1, keepdim=True)).nan_to_num(
            1.0
        )  # 0 / 0 at sigma = 0
        return (x - unpack(g, *x_t.shape[-2:])).to(x_t.dtype)

    @staticmethod
    def scale(c):
        return 2 ** len(c.temperal_downsample)

    def latent_stats(self):
        return channel_stats(self.vae, self.shape)

    def from_vae(self, z):
        return super().from_vae(z[:, :, None])[:, :, 0]

    def to_vae(self, y):
        return super().to_vae(y[:, :, None])[:, :, 0]


class ZImage(Pipeline):
    """Z-Image: the time of its network runs from 0, noise, to 1, and its output is x0 - eps. Prompts of any length without padding. guidance_scale of its
    pipeline is w - 1: c + scale (c - u)."""

    adapter, pipeline, network, since = (
        "z-image",
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        (0, 36),
    )

    built_for, make_schedule = (1024, 1024), Flux.make_schedule

    @classmethod
    def text(cls, pipe, prompts):
        each, _ = pipe.encode_prompt(
            list(prompts or [""]), device=pipe.device, do_classifier_free_guidance=False
        )  # a copy: the list is written to
        return dict(
            text=pad_sequence(each, batch_first=True), length=torch.tensor([len(e) for e in each])
        )

    def predict(self, x, t, cond):
        text = [e[:n].to(x.dtype) for e, n in zip(cond["text"], cond["length"].tolist())]
        out = self.net(list(x[:, :, None].unbind()), 1 - t, text, return_dict=False)[0]
        return -torch.stack(list(out))[:, :, 0]

    def time_embedders(self):
        return [self.net.t_embedder], self.net.t_embedder.mlp[-1].out_features

    def feature_layers(self, depths=(0.5,)):
        return layers_at(self.net.layers, depths)

    def to_feature_map(self, h):  # image tokens come first, then what pads them, then the text
        return super().to_feature_map(h[:, : self.shape[-2] * self.shape[-1] // 4])
