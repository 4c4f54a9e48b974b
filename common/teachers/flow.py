"""Flow transformers for images: Stable Diffusion 3, SANA, FLUX.1, Qwen-Image and Z-Image.

Quirks of the original pipelines that are reproduced here:
- FLUX and Qwen-Image convert the time to the dtype of the activations. In bf16, times near 1 have
  only 256 values.
- Qwen-Image scales its guided velocity (`KeptLength`). Z-Image counts its guidance scale from
  0 (`ZImage`). SANA is used without its "complex human instruction".

Not reproduced, since it is a matter of the solver and not of the network: Qwen-Image's scheduler
stretches its table of sigmas to end at 0.02 (shift_terminal). Our grid has only the time shift.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.utils.rnn import pad_sequence

from common.files import read_json
from common.model import layers_at
from common.schedules import equal_snr, expand
from common.teachers.configuration import FLOW_SCHEDULER, flow_schedule
from common.teachers.from_image import FromImage
from common.teachers.pipeline import Pipeline, channel_stats


class SD3(Pipeline):
    """Stable Diffusion 3 and 3.5. Without its third text encoder (T5), zeros take the place."""

    adapter = "sd3"
    pipeline = "StableDiffusion3Pipeline"
    text_needs_network = True  # the width of the zeros
    most_tokens = dict(tokenizer_3=256)
    network_class = "SD3Transformer2DModel"
    expected = dict(scheduler=FLOW_SCHEDULER)
    without = ("feature_extractor", "image_encoder")
    unguided = dict(guidance_scale=1.0)

    def make_schedule(self, scheduler, shape, c):
        return flow_schedule(scheduler, tokens=shape[-1] * shape[-2] // c.patch_size**2)

    @classmethod
    def text_pipeline(cls, folder, dtype):
        # Where T5 is missing, the pipeline takes the width of its zeros from the network.
        pipe = super().text_pipeline(folder, dtype)
        config = read_json(Path(folder) / cls.part / "config.json")
        pipe.transformer = SimpleNamespace(config=SimpleNamespace(**config), dtype=dtype)
        return pipe

    @classmethod
    def embed(cls, pipe, prompts):
        prompts = prompts or [""]
        text, _, pooled, _ = pipe.encode_prompt(
            prompts, prompts, prompts, device=pipe.device, do_classifier_free_guidance=False
        )
        return dict(text=text, pooled=pooled)

    @classmethod
    def text_shapes(cls, c):
        # 77 tokens of CLIP, 256 of T5
        return dict(text=(333, c.joint_attention_dim), pooled=(c.pooled_projection_dim,))

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

    def time_layer(self):
        return self.net.time_text_embed.timestep_embedder.linear_2


class Sana(Pipeline):
    """SANA: linear attention on latents of a 32x autoencoder, Gemma embeddings with a mask."""

    adapter = "sana"
    pipeline = "SanaPipeline"
    most_tokens = dict(tokenizer=300)
    network_class = "SanaTransformer2DModel"
    expected = dict(
        scheduler=dict(FLOW_SCHEDULER, use_dynamic_shifting=[False]),
        network=dict(guidance_embeds=[False]),  # SANA-Sprint's input
    )
    unguided = dict(
        guidance_scale=1.0,
        complex_human_instruction=None,  # it would be put before the prompt
        use_resolution_binning=False,
    )

    @classmethod
    def output_channels(cls, c):
        return [c.in_channels, 2 * c.in_channels, None]

    def make_schedule(self, scheduler, shape, c):
        return flow_schedule(scheduler)

    @classmethod
    def embed(cls, pipe, prompts):
        text, mask, _, _ = pipe.encode_prompt(
            prompts or [""], False, device=pipe.device, complex_human_instruction=None
        )
        return dict(text=text, mask=mask)

    @classmethod
    def text_shapes(cls, c):
        return dict(text=(300, c.caption_channels), mask=(300,))

    @property
    def timestep_scale(self):
        """1, or 0.001 in SANA-Sprint's teachers, whose networks get times of 0..1."""
        return getattr(self.net.config, "timestep_scale", 1.0)  # absent in older configurations

    @property
    def dense(self):
        return self.timestep_scale == 0.001

    def predict(self, x, t, cond):
        out = self.net(
            x,
            encoder_hidden_states=cond["text"].to(x.dtype),
            encoder_attention_mask=cond["mask"],
            timestep=t * 1000 * self.timestep_scale,
            return_dict=False,
        )[0]
        return out[:, : self.shape[0]]  # without the learned variance, where there is one

    def time_embedders(self):
        c = self.net.config
        embedder = self.net.time_embed.emb.timestep_embedder
        return [embedder], c.num_attention_heads * c.attention_head_dim

    def time_layer(self):
        return self.net.time_embed.emb.timestep_embedder.linear_2


def pack(x):
    """[B, C, H, W] -> tokens [B, H W / 4, 4 C], each a square of 2 x 2 latents."""
    b, c, h, w = x.shape
    squares = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(b, h * w // 4, 4 * c)


def unpack(y, h, w):
    """Inverse of `pack`, for H = h and W = w."""
    b, _, c = y.shape
    squares = y.reshape(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(b, c // 4, h, w)


def grid_positions(h, w, device):
    """Places of the tokens of h x w latents in FLUX.1: (unused, row, column), [h w / 4, 3]."""
    places = torch.zeros(h // 2, w // 2, 3, device=device)
    places[..., 1] = torch.arange(h // 2, device=device)[:, None]
    places[..., 2] = torch.arange(w // 2, device=device)
    return places.view(-1, 3)


def positions_of(x, number):
    """The same for a latent image [B, C, H, W]: (number of the image, row, column)."""
    places = grid_positions(*x.shape[-2:], x.device)
    places[:, 0] = number
    return places


class Flux(Pipeline):
    """FLUX.1, on packed latents.

    FLUX.1-dev is distilled from guidance: the scale is an input of its network. Here it is the
    attribute `guidance` (--embedded-guidance), by default 3.5 as in its pipeline; a student keeps
    the value that it was trained with. `guided` is guidance on top of that, by the empty prompt,
    called true_cfg_scale in the pipeline; w = 1 is the normal use. FLUX.1-schnell lacks this input.
    """

    adapter = "flux"
    pipeline = "FluxPipeline"
    most_tokens = dict(tokenizer_2=512)
    network_class = "FluxTransformer2DModel"
    packed = 2  # by `pack`
    expected = dict(scheduler=FLOW_SCHEDULER)
    without = ("feature_extractor", "image_encoder")
    settings = ("guidance",)
    guidance = 3.5
    passes_sigmas = True

    def latent_shape(self, c, size):
        channels = c.in_channels // 4
        if size is None:
            return channels, 128, 128
        height, width = size
        return channels, height // self.vae_scale, width // self.vae_scale

    @classmethod
    def patch(cls, c):
        return cls.packed  # the configuration says 1

    def make_schedule(self, scheduler, shape, c):
        return flow_schedule(scheduler, tokens=shape[-1] * shape[-2] // 4)

    @classmethod
    def embed(cls, pipe, prompts):
        text, pooled, _ = pipe.encode_prompt(prompts or [""], None, device=pipe.device)
        return dict(text=text, pooled=pooled)

    @classmethod
    def text_shapes(cls, c):
        return dict(text=(512, c.joint_attention_dim), pooled=(c.pooled_projection_dim,))

    def images(self, x, cond):
        """Images [B, C, h, w] that the network is given, first the samples."""
        return [x]

    def predict(self, x, t, cond):
        h, w = x.shape[-2:]
        images = self.images(x, cond)
        guidance = None
        if self.net.config.guidance_embeds:
            guidance = torch.full((len(x),), float(self.guidance), device=x.device)
        out = self.net(
            torch.cat([pack(image) for image in images], 1),
            encoder_hidden_states=cond["text"].to(x.dtype),
            pooled_projections=cond["pooled"].to(x.dtype),
            timestep=t,
            guidance=guidance,
            img_ids=torch.cat([positions_of(image, i) for i, image in enumerate(images)]),
            txt_ids=torch.zeros(cond["text"].shape[1], 3, device=x.device),
            return_dict=False,
        )[0]
        return unpack(out[:, : h * w // 4], h, w)

    def time_embedders(self):
        return [self.net.time_text_embed], self.net.inner_dim

    def time_layer(self):
        return self.net.time_text_embed.timestep_embedder.linear_2

    def feature_layers(self, depths=(0.5,)):
        blocks = [*self.net.transformer_blocks, *self.net.single_transformer_blocks]
        return layers_at(blocks, depths)

    def config(self):
        return super().config() | dict(guidance=self.guidance)

    def call_options(self):
        options = super().call_options()
        if self.net.config.guidance_embeds:
            options["guidance_scale"] = self.guidance
        return options


class FluxKontext(FromImage, Flux):
    """FLUX.1 Kontext: FLUX.1 that edits an image, whose tokens follow those of the sample.

    The pipeline gives a source that size of a list, about 1024 x 1024 pixels, whose format is the
    nearest, whatever size the samples have.
    """

    adapter = "flux-kontext"
    pipeline = "FluxKontextPipeline"
    built_for = (1024, 1024)

    @classmethod
    def source_size(cls, size, vae):
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        ratio = size[1] / size[0]
        unit = cls.scale(vae) * cls.packed
        sizes = [(abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS]
        _, width, height = min(sizes)
        return height // unit * unit, width // unit * unit

    def images(self, x, cond):
        return [x, cond["source"].to(x.dtype)]

    def call_options(self):
        options = super().call_options()
        if "height" in options:  # the pipeline enlarges or reduces all samples to this area
            options["max_area"] = options["height"] * options["width"]
        return options


class KeptLength(Pipeline):
    """Guidance that is not linear in w: parts of the guided velocity are scaled to the length of
    the same parts of the conditional one."""

    def lengths(self, v):
        """Length of the part that each number of v [B, C, H, W] belongs to, to broadcast over v."""
        raise NotImplementedError

    def guided(self, x_t, alpha, sigma, cond, w):
        if w in (0, 1):
            return super().guided(x_t, alpha, sigma, cond, w)
        c, u = (y.double() for y in self.cond_and_uncond(x_t, alpha, sigma, cond))
        scale = equal_snr(self.schedule, alpha, sigma)[3]
        x = x_t.double() * expand(scale, x_t)
        v_cond = x - c  # velocities times sigma
        v_guided = x - u - w * (c - u)
        ratio = self.lengths(v_cond) / self.lengths(v_guided)
        v_guided = v_guided * ratio.nan_to_num(1.0)  # 0 / 0 at sigma = 0
        return (x - v_guided).to(x_t.dtype)


class QwenImage(KeptLength):
    """Qwen-Image: packed latents of a video autoencoder, text with a mask.

    The null prompt is a blank, the negative prompt of the model's own examples.
    """

    adapter = "qwen-image"
    pipeline = "QwenImagePipeline"
    most_tokens = dict(tokenizer=512)
    network_class = "QwenImageTransformer2DModel"
    packed = 2
    expected = dict(
        scheduler=FLOW_SCHEDULER,
        network=dict(  # inputs of models that edit images or make layers
            guidance_embeds=[False],
            zero_cond_t=[False],
            use_additional_t_cond=[False],
            use_layer3d_rope=[False],
        ),
    )
    since = (0, 37)  # older versions attend to the padding of prompts
    passes_sigmas = True
    latent_shape = Flux.latent_shape
    make_schedule = Flux.make_schedule
    time_embedders = Flux.time_embedders
    time_layer = Flux.time_layer

    @classmethod
    def output_channels(cls, c):
        return [c.in_channels // cls.packed**2]

    @classmethod
    def embed(cls, pipe, prompts):
        text, mask = pipe.encode_prompt(
            prompts or [" "], device=pipe.device, max_sequence_length=512
        )
        if mask is None:  # all tokens count
            mask = torch.ones(text.shape[:2], device=text.device)
        return dict(text=text, mask=mask.long())

    @classmethod
    def text_shapes(cls, c):
        return dict(text=(512, c.joint_attention_dim), mask=(512,))

    def images(self, x, cond):
        """Images [B, C, h, w] that the network is given, first the samples."""
        return [x]

    def predict(self, x, t, cond):
        h, w = x.shape[-2:]
        images = self.images(x, cond)
        out = self.net(
            torch.cat([pack(image) for image in images], 1),
            encoder_hidden_states=cond["text"].to(x.dtype),
            encoder_hidden_states_mask=cond["mask"],
            timestep=t,
            img_shapes=[[(1, i.shape[-2] // 2, i.shape[-1] // 2) for i in images]] * len(x),
            return_dict=False,
        )[0]
        return unpack(out[:, : h * w // 4], h, w)

    def lengths(self, v):
        # of each token, a square of 2 x 2 latents
        lengths = pack(v).norm(dim=-1, keepdim=True)
        return unpack(lengths.expand(-1, -1, 4), *v.shape[-2:])

    @staticmethod
    def scale(c):
        return 2 ** len(c.temperal_downsample)

    def latent_stats(self):
        return channel_stats(self.vae, self.shape)

    def from_vae(self, z):
        return super().from_vae(z[:, :, None])[:, :, 0]  # a video of one frame

    def to_vae(self, images):
        return super().to_vae(images[:, :, None])[:, :, 0]


class ZImage(Pipeline):
    """Z-Image: prompts of any length without padding.

    Its network's time runs from 0 (noise) to 1, and its output is x0 - eps. guidance_scale of its
    pipeline is w - 1: it computes c + scale (c - u).
    """

    adapter = "z-image"
    pipeline = "ZImagePipeline"
    most_tokens = dict(tokenizer=512)
    network_class = "ZImageTransformer2DModel"
    expected = dict(
        scheduler=FLOW_SCHEDULER,
        network=dict(all_patch_size=[[2]], all_f_patch_size=[[1]], siglip_feat_dim=[None]),
    )
    since = (0, 36)
    built_for = (1024, 1024)
    passes_sigmas = True  # diffusers 0.36 to 0.38 do not
    unguided = dict(guidance_scale=0.0)
    on_host = ("length",)
    make_schedule = Flux.make_schedule

    @classmethod
    def embed(cls, pipe, prompts):
        # A copy of the list, because encode_prompt writes to it.
        texts, _ = pipe.encode_prompt(
            list(prompts or [""]), device=pipe.device, do_classifier_free_guidance=False
        )
        lengths = torch.tensor([len(text) for text in texts])
        return dict(text=pad_sequence(texts, batch_first=True), length=lengths)

    @classmethod
    def text_shapes(cls, c):
        return dict(text=(512, c.cap_feat_dim), length=())

    def predict(self, x, t, cond):
        lengths = cond["length"].tolist()
        texts = [text[:n].to(x.dtype) for text, n in zip(cond["text"], lengths)]
        images = list(x[:, :, None].unbind())  # with a dimension for frames
        out = self.net(images, 1 - t, texts, return_dict=False)[0]
        return -torch.stack(list(out))[:, :, 0]

    def time_embedders(self):
        embedder = self.net.t_embedder
        return [embedder], embedder.mlp[-1].out_features

    def time_layer(self):
        return self.net.t_embedder.mlp[-1]

    def feature_layers(self, depths=(0.5,)):
        return layers_at(self.net.layers, depths)

    def to_feature_map(self, h):
        # Image tokens come first, then their padding, then the text.
        return super().to_feature_map(h[:, : self.shape[-2] * self.shape[-1] // 4])
