"""Lumina-Image 2.0: text and image in one sequence, the text without padding.

Its network's time runs from 0 (noise) to 1, and its output is x0 - eps. Its pipeline counts the
channels of the latents as tokens for a dynamic time shift, which its own scheduler does not use.
"""

import torch

from common.model import layers_at
from common.teachers.configuration import FLOW_SCHEDULER, flow_schedule
from common.teachers.flow import KeptLength


class Lumina2(KeptLength):
    """Lumina-Image 2.0. Prompts follow the pipeline's system prompt; a negative prompt has none and
    the null prompt is the empty one. The guided velocity is scaled row by row of a latent channel,
    as in its pipeline (cfg_normalization)."""

    adapter = "lumina2"
    pipeline = "Lumina2Pipeline"
    most_tokens = dict(tokenizer=256)
    network_class = "Lumina2Transformer2DModel"
    expected = dict(scheduler=FLOW_SCHEDULER)
    passes_sigmas = True
    unguided = dict(guidance_scale=1.0)
    dense = True  # times of 0..1
    text_lengths = None  # [B], of the samples of a pass

    def make_schedule(self, scheduler, shape, c):
        return flow_schedule(scheduler, tokens=shape[0])

    @classmethod
    def embed(cls, pipe, prompts):
        if prompts is None:
            return cls.embed_negative(pipe, "")
        text, mask, _, _ = pipe.encode_prompt(prompts, False, device=pipe.device)
        return dict(text=text, mask=mask)

    @classmethod
    def embed_negative(cls, pipe, text):
        text, mask = pipe._get_gemma_prompt_embeds([text], device=pipe.device)
        return dict(text=text, mask=mask)

    @classmethod
    def text_shapes(cls, c):
        return dict(text=(256, c.cap_feat_dim), mask=(256,))

    def predict(self, x, t, cond):
        self.text_lengths = cond["mask"].sum(1)
        out = self.net(
            x,
            timestep=1 - t,
            encoder_hidden_states=cond["text"].to(x.dtype),
            encoder_attention_mask=cond["mask"],
            return_dict=False,
        )[0]
        return -out

    def lengths(self, v):
        return v.norm(dim=-1, keepdim=True)

    def time_embedders(self):
        embedder = self.net.time_caption_embed.timestep_embedder
        return [embedder], embedder.linear_2.out_features

    def time_layer(self):
        return self.net.time_caption_embed.timestep_embedder.linear_2

    def feature_layers(self, depths=(0.5,)):
        return layers_at(self.net.layers, depths)

    def to_feature_map(self, h):
        # A sample's image follows its text, whose length differs between samples.
        tokens = self.shape[-2] * self.shape[-1] // self.net.config.patch_size**2
        places = self.text_lengths[:, None] + torch.arange(tokens, device=h.device)
        image = h.gather(1, places[..., None].expand(-1, -1, h.shape[-1]))
        return super().to_feature_map(image)
