"""Wan 2.1 and 2.2: text to video, and image to video.

Wan 2.2 5B has a VAE of its own, with 48 channels and 16 pixels per latent. Its pipeline gives every
token a time (expand_timesteps), all equal in text to video: one time per sample is the same.

Not reproduced, since it is a matter of the solver and not of the network: the UniPC scheduler of
Wan's pipeline rounds times down to integers.
"""

from types import MethodType

import torch

from common.errors import require
from common.model import layers_at
from common.routed import ByLevel
from common.teachers.configuration import FLOW_SCHEDULER, flow_schedule
from common.teachers.from_image import FromImage
from common.teachers.video import Video

CHANNELS_5B = 48  # of the latents of Wan 2.2 5B


class Wan(Video):
    """Wan 2.2 A14B has one network for high noise and one for low noise: a ByLevel that changes at
    the pipeline's boundary_ratio, with one w for both."""

    adapter = "wan"
    lora_names = "wan"
    pipeline = "WanPipeline"
    most_tokens = dict(tokenizer=512)
    network_class = "WanTransformer3DModel"
    expected = dict(scheduler=dict(FLOW_SCHEDULER, use_dynamic_shifting=[False]))
    without = ("transformer_2",)
    since = (0, 37)  # older versions need a further package for text
    call_defaults = (480, 832, 81)
    takes_sigmas = False
    unguided = dict(guidance_scale=1.0)
    second_network = "transformer_2"

    @classmethod
    def made_for(cls, c):
        return (704, 1280, 121) if c.in_channels == CHANNELS_5B else cls.call_defaults

    @staticmethod
    def pixel_channels(c):
        return 3 * (c.patch_size or 1) ** 2  # the VAE of 5B takes squares of pixels

    def make_schedule(self, scheduler, shape, c):
        return flow_schedule(scheduler)

    @classmethod
    def networks(cls, index):
        absent = [None, None]
        if index.get("boundary_ratio") is None or index.get("transformer_2", absent) == absent:
            return [cls.part]
        return [cls.part, "transformer_2"]

    def with_experts(self, folder, index, dtype):
        parts = self.networks(index)
        if len(parts) == 1:
            return self
        # The first expert has t >= s, so the change is just below sigma / alpha of t = s.
        s = float(index["boundary_ratio"])
        ratio = torch.tensor(s / (1 - s), dtype=torch.float64)
        boundary = torch.nextafter(ratio, torch.zeros_like(ratio))
        second = self.with_network(self.load_net(folder, dtype, parts[1]))
        second.read_weights = self.weights_of(folder, parts[1])
        model = ByLevel([self, second], [float(boundary)])
        model.folder = self.folder
        return model

    @classmethod
    def embed(cls, pipe, prompts):
        text, _ = pipe.encode_prompt(
            prompts or [""],
            do_classifier_free_guidance=False,
            max_sequence_length=512,
            device=pipe.device,
        )
        return dict(text=text)

    @classmethod
    def text_shapes(cls, c):
        return dict(text=(512, c.text_dim))

    def predict(self, x, t, cond):
        text = cond["text"].to(x.dtype)
        return self.net(x, timestep=t * 1000, encoder_hidden_states=text, return_dict=False)[0]

    def time_embedders(self):
        embedder = self.net.condition_embedder.time_embedder
        return [embedder], embedder.linear_2.out_features

    def time_layer(self):
        return self.net.condition_embedder.time_embedder.linear_2

    def feature_layers(self, depths=(0.5,)):
        return layers_at(self.net.blocks, depths)


class WanImage(FromImage, Wan):
    """Wan 2.1 and 2.2 A14B, image to video: the source is the first frame.

    cond["source"]: [B, 4 + C, F, h, w], further channels of the network's input: the latents of a
    video that goes on in grey, behind a mask of the frames that are given. cond["seen"]: what the
    image encoder of Wan 2.1 makes of the source.
    """

    adapter = "wan-image"
    pipeline = "WanImageToVideoPipeline"
    kept = ("source", "seen")

    @classmethod
    def sample_shape(cls, c, size, frames):
        height, width, own_frames = cls.made_for(c)
        return *(size or (height, width)), frames or own_frames

    @classmethod
    def source_size(cls, size, vae):
        return tuple(size)

    @classmethod
    def input_channels(cls, latents):
        return 2 * latents + 4  # four of the mask

    @classmethod
    def output_channels(cls, c):
        return [(c.in_channels - 4) // 2]

    @classmethod
    def text_pipeline(cls, folder, dtype, **parts):
        from diffusers import WanPipeline

        pipe = super().text_pipeline(folder, dtype, **parts)
        # The same code, but this pipeline's own does not run without the package ftfy.
        pipe._get_t5_prompt_embeds = MethodType(WanPipeline._get_t5_prompt_embeds, pipe)
        return pipe

    @classmethod
    def embed_sources(cls, pipe, sources, frames):
        found = dict(source=[], seen=[])
        for source in sources:
            size = (source.height, source.width)
            pixels = pipe.video_processor.preprocess(source, *size).to(pipe.device)
            # The noise is not used, and not drawn.
            shape = (1, pipe.vae.config.z_dim, *size, frames, torch.float32, pipe.device, None)
            _, latents = pipe.prepare_latents(pixels, *shape, latents=pixels.new_zeros(1))
            found["source"].append(latents)
            if pipe.image_encoder is not None:
                found["seen"].append(pipe.encode_image(source, pipe.device))
        return {name: torch.cat(rows) for name, rows in found.items() if rows}

    def source_shapes(self):
        mask = self.vae.config.scale_factor_temporal
        shapes = dict(source=(mask + self.shape[0], *self.shape[1:]))
        if self.net.config.image_dim is not None:
            shapes["seen"] = (257, self.net.config.image_dim)  # a class token and 16 x 16 patches
        return shapes

    def source_pictures(self, labels):
        """As tall as the pictures of samples, which have several frames."""
        shown = dict.fromkeys((0, self.frames // 2, self.frames - 1))
        return torch.cat([super().source_pictures(labels)] * len(shown), 2)

    @classmethod
    def networks(cls, index):
        require(
            not index.get("expand_timesteps"),
            f"--teacher: model_index.json: expand_timesteps: expected false for {cls.pipeline}, "
            "found true: times that differ between tokens are not supported",
        )
        return super().networks(index)

    def predict(self, x, t, cond):
        seen = cond.get("seen")
        return self.net(
            torch.cat([x, cond["source"].to(x.dtype)], 1),
            timestep=t * 1000,
            encoder_hidden_states=cond["text"].to(x.dtype),
            encoder_hidden_states_image=None if seen is None else seen.to(x.dtype),
            return_dict=False,
        )[0]

    to_feature_map = Wan.to_feature_map  # the source adds channels, not tokens
