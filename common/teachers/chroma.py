"""Chroma: FLUX.1's network without guidance input, pooled text or modulation layers.

One small network, the approximator, makes the modulations of all blocks from the time and from the
number of the modulation. New inputs of a student are added to its first layer.
"""

import torch

from common.teachers.configuration import FLOW_SCHEDULER
from common.teachers.flow import Flux, grid_positions, pack, unpack
from common.teachers.pipeline import Pipeline


class Chroma(Pipeline):
    """Chroma1, on packed latents, guided by the empty prompt.

    The mask keeps the text and the first token behind it. As in the pipeline, it is a number that
    is added to the logits of attention: 1 or 0, in the dtype of the activations.
    """

    adapter = "chroma"
    pipeline = "ChromaPipeline"
    most_tokens = dict(tokenizer=512)
    network_class = "ChromaTransformer2DModel"
    packed = Flux.packed
    expected = dict(scheduler=FLOW_SCHEDULER)
    without = Flux.without
    passes_sigmas = True
    unguided = dict(guidance_scale=1.0)
    mask = None  # [B, tokens of text and image], of a pass
    patch = Flux.patch
    latent_shape = Flux.latent_shape
    make_schedule = Flux.make_schedule
    feature_layers = Flux.feature_layers

    @classmethod
    def embed(cls, pipe, prompts):
        text, _, mask, *_ = pipe.encode_prompt(
            prompts or [""], device=pipe.device, do_classifier_free_guidance=False
        )
        return dict(text=text, mask=mask)

    @classmethod
    def text_shapes(cls, c):
        return dict(text=(512, c.joint_attention_dim), mask=(512,))

    def predict(self, x, t, cond):
        h, w = x.shape[-2:]
        text = cond["text"].to(x.dtype)
        image = torch.ones(len(x), h * w // 4, dtype=x.dtype, device=x.device)
        self.mask = torch.cat([cond["mask"].to(x.dtype), image], 1)
        out = self.net(
            pack(x),
            encoder_hidden_states=text,
            timestep=t,
            img_ids=grid_positions(h, w, x.device),
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
            attention_mask=self.mask,
            return_dict=False,
        )[0]
        return unpack(out, h, w)

    def checkpoint_activations(self):
        super().checkpoint_activations()
        checkpoint = self.net._gradient_checkpointing_func
        single = set(self.net.single_transformer_blocks)

        def with_mask(block, *args):
            # diffusers 0.42 forgets the mask of these blocks where it checkpoints them
            return checkpoint(block, *args, *([self.mask] if block in single else []))

        self.net._gradient_checkpointing_func = with_mask

    def time_embedders(self):
        return [self.time_layer()], self.net.config.approximator_hidden_dim

    def time_layer(self):
        return self.net.distilled_guidance_layer.in_proj

    def to_feature_map(self, h):
        if torch.is_tensor(h):  # of a single block: the text, then the image
            h = h[:, -self.shape[-2] * self.shape[-1] // 4 :]
        return super().to_feature_map(h)
