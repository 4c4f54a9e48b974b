"""HunyuanImage 2.1: text to image on latents of a 32x autoencoder.

Two texts go into its network: the prompt by a Qwen2.5-VL, and what stands in quotes by a ByT5,
letter by letter. Both are padded to a fixed length with a mask; here the padding is cut off.

From the seventh step on its pipeline guides by an average over the steps before (AdaptiveProjected-
MixGuidance). That is a matter of the solver: the guidance here is that of its first six steps. In
bf16 its pipeline rounds the times to 256 values near 1000, which is not reproduced either.
"""

import math

from common.model import layers_at
from common.teachers.configuration import FLOW_SCHEDULER, flow_schedule
from common.teachers.pipeline import Pipeline


def cut_padding(text, mask):
    """Without the columns that no row needs. text: [n, tokens, width], mask: [n, tokens]."""
    tokens = max(int(mask.sum(1).max()), 1)
    return text[:, :tokens], mask[:, :tokens].long()


class HunyuanImage(Pipeline):
    """HunyuanImage 2.1, guided by the empty prompt in its template. Its distilled version, with
    inputs for a second time and a guidance scale, is a few-step student."""

    adapter = "hunyuan-image"
    pipeline = "HunyuanImagePipeline"
    most_tokens = dict(tokenizer=1000, tokenizer_2=math.inf)  # the second reads quotes only
    network_class = "HunyuanImageTransformer2DModel"
    expected = dict(
        scheduler=FLOW_SCHEDULER, network=dict(use_meanflow=[False], guidance_embeds=[False])
    )
    guiders = ("guider", "ocr_guider")
    without = guiders
    since = (0, 36)
    built_for = (2048, 2048)
    passes_sigmas = True

    @staticmethod
    def scale(c):
        return c.spatial_compression_ratio

    def make_schedule(self, scheduler, shape, c):
        return flow_schedule(scheduler)

    @classmethod
    def embed(cls, pipe, prompts):
        prompts = prompts or [""]
        text, mask, glyphs, glyph_mask = pipe.encode_prompt(
            prompts, device=pipe.device, batch_size=len(prompts)
        )
        text, mask = cut_padding(text, mask)
        glyphs, glyph_mask = cut_padding(glyphs, glyph_mask)
        return dict(text=text, mask=mask, glyphs=glyphs.to(text.dtype), glyph_mask=glyph_mask)

    @classmethod
    def text_shapes(cls, c):
        text = dict(text=(1000, c.text_embed_dim), mask=(1000,))
        return text | dict(glyphs=(128, c.text_embed_2_dim), glyph_mask=(128,))

    def predict(self, x, t, cond):
        return self.net(
            x,
            timestep=t * 1000,
            encoder_hidden_states=cond["text"].to(x.dtype),
            encoder_attention_mask=cond["mask"],
            encoder_hidden_states_2=cond["glyphs"].to(x.dtype),
            encoder_attention_mask_2=cond["glyph_mask"],
            return_dict=False,
        )[0]

    def time_embedders(self):
        embedder = self.net.time_guidance_embed
        return [embedder], embedder.timestep_embedder.linear_2.out_features

    def time_layer(self):
        return self.net.time_guidance_embed.timestep_embedder.linear_2

    def feature_layers(self, depths=(0.5,)):
        blocks = [*self.net.transformer_blocks, *self.net.single_transformer_blocks]
        return layers_at(blocks, depths)

    def to_feature_map(self, h):
        return super().to_feature_map(h[0])  # of (image tokens, text tokens)
