"""HunyuanVideo 1.5: text and video in one sequence, one token per 16x16x4 latent.

Its network is also that of image to video: latents of a first frame, a mask and tokens of an image
are inputs. In text to video they are zeros, and the tokens are masked, so here there are none.
"""

import math
from pathlib import Path

import torch

from common.files import read_json
from common.teachers.configuration import FLOW_SCHEDULER, flow_schedule
from common.teachers.hunyuan_image import cut_padding
from common.teachers.video import Video


class HunyuanVideo15(Video):
    """HunyuanVideo 1.5, text to video. Texts in quotation marks are also read by ByT5, letter by
    letter. The guidance of its pipeline is a component, `guider`, and no argument of its call."""

    adapter = "hunyuanvideo-1.5"
    pipeline = "HunyuanVideo15Pipeline"
    most_tokens = dict(tokenizer=1000, tokenizer_2=math.inf)  # ByT5 reads quoted words only
    network_class = "HunyuanVideo15Transformer3DModel"
    expected = dict(
        scheduler=dict(FLOW_SCHEDULER, use_dynamic_shifting=[False]),
        network=dict(use_meanflow=[False], patch_size_t=[1]),
    )
    since = (0, 36)
    passes_sigmas = True

    @classmethod
    def made_for(cls, c):
        from diffusers.pipelines.hunyuan_video1_5.image_processor import (
            HunyuanVideo15ImageProcessor,
        )

        size = HunyuanVideo15ImageProcessor().calculate_default_height_width(9, 16, c.target_size)
        return *size, 121

    @staticmethod
    def scale(c):
        return c.spatial_compression_ratio

    @staticmethod
    def frame_step(c):
        return c.temporal_compression_ratio

    @classmethod
    def input_channels(cls, latents):
        return 2 * latents + 1  # with those of a first frame, and a mask

    @classmethod
    def output_channels(cls, c):
        return [c.in_channels // 2]

    def make_schedule(self, scheduler, shape, c):
        return flow_schedule(scheduler)

    @classmethod
    def text_pipeline(cls, folder, dtype):
        # The pipeline reads the configuration of its VAE when it is made.
        from diffusers import AutoencoderKLHunyuanVideo15

        with torch.device("meta"):
            config = read_json(Path(folder) / "vae" / "config.json")
            vae = AutoencoderKLHunyuanVideo15.from_config(config)
        pipe = super().text_pipeline(folder, dtype, vae=vae)
        pipe.vae = None
        return pipe

    @classmethod
    def embed(cls, pipe, prompts):
        prompts = prompts or [""]
        text, mask, glyphs, glyph_mask = pipe.encode_prompt(
            prompts, device=pipe.device, batch_size=len(prompts)
        )
        text, mask = cut_padding(text, mask)
        glyphs, glyph_mask = cut_padding(glyphs, glyph_mask)
        return dict(text=text, mask=mask, glyphs=glyphs, glyph_mask=glyph_mask)

    @classmethod
    def text_shapes(cls, c):
        return dict(
            text=(1000, c.text_embed_dim),
            mask=(1000,),
            glyphs=(256, c.text_embed_2_dim),
            glyph_mask=(256,),
        )

    def predict(self, x, t, cond):
        first_frame_and_mask = x.new_zeros(len(x), self.shape[0] + 1, *x.shape[2:])
        return self.net(
            torch.cat([x, first_frame_and_mask], 1),
            timestep=t * 1000,
            encoder_hidden_states=cond["text"].to(x.dtype),
            encoder_attention_mask=cond["mask"],
            encoder_hidden_states_2=cond["glyphs"].to(x.dtype),
            encoder_attention_mask_2=cond["glyph_mask"],
            image_embeds=x.new_zeros(len(x), 0, self.net.config.image_embed_dim),
            return_dict=False,
        )[0]

    def time_embedders(self):
        embedder = self.net.time_embed.timestep_embedder
        return [embedder], embedder.linear_2.out_features

    def time_layer(self):
        return self.net.time_embed.timestep_embedder.linear_2

    def latent_stats(self):
        return 0.0, self.vae.config.scaling_factor

    def call_options(self):
        height, width = self.image_shape[-2:]
        return dict(height=height, width=width, num_frames=self.frames)

    def further_files(self):
        guider = dict(_class_name="ClassifierFreeGuidance", guidance_scale=1.0)
        return {"guider/guider_config.json": guider}
