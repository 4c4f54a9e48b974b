"""Stable Diffusion 1.x, 2.x and SDXL: UNets on the noise schedule of DDPM."""

import torch

from common.files import WEIGHTS
from common.teachers.configuration import VP_SCHEDULER, release, vp_schedule
from common.teachers.pipeline import Pipeline, channel_stats

IGNORED_INPUT = "time_embedding.cond_proj.weight"  # see `without_guidance`
PREDICTIONS = dict(epsilon="eps", v_prediction="v", sample="x0")  # diffusers' names -> ours


class SD15(Pipeline):
    """Stable Diffusion 1.x and 2.x. The null prompt is the empty one."""

    adapter = "sd15"
    pipeline = "StableDiffusionPipeline"
    network_class = "UNet2DConditionModel"
    part = "unet"
    lora_names = "kohya"
    without = ("safety_checker", "feature_extractor", "image_encoder")
    unguided = dict(guidance_scale=1.0)
    expected = dict(
        scheduler=dict(VP_SCHEDULER, clip_sample=[False, True]),  # its pipeline sets it to false
        network=dict(
            time_cond_proj_dim=[None],  # a guidance scale as input, of LCM
            class_embed_type=[None],
            num_class_embeds=[None],
            encoder_hid_dim_type=[None, "text_proj"],
            addition_embed_type=[None, "text"],
        ),
    )

    def __init__(self, net, vae, scheduler, size=None):
        prediction = PREDICTIONS[scheduler.get("prediction_type", "epsilon")]
        super().__init__(net, vae, scheduler, size, prediction)

    def make_schedule(self, scheduler, shape, c):
        return vp_schedule(scheduler)

    @classmethod
    def load_net(cls, folder, dtype, part=""):
        net = super().load_net(folder, dtype, part)
        if not part and net.config.time_cond_proj_dim is not None:  # see without_guidance
            net.time_embedding.cond_proj = None
            net.register_to_config(time_cond_proj_dim=None)
        return net

    def call_options(self):
        options = super().call_options()
        if not self.lora:
            del options["guidance_scale"]  # see without_guidance
        return options

    def without_guidance(self, files):
        # Pipelines do not guide UNets that take the guidance scale as an input. This one has such
        # an input, of the least size that diffusers can make, and ignores it: its weights are 0.
        size = 4
        config = dict(files["config.json"], time_cond_proj_dim=size)
        zeros = torch.zeros(self.net.time_embedding.linear_1.in_features, size)
        tensors = files[WEIGHTS] | {IGNORED_INPUT: zeros}
        return files | {"config.json": config, WEIGHTS: tensors}

    @classmethod
    def embed(cls, pipe, prompts):
        return dict(text=pipe.encode_prompt(prompts or [""], pipe.device, 1, False)[0])

    @classmethod
    def text_shapes(cls, c):
        return dict(text=(77, c.cross_attention_dim))

    def predict(self, x, t, cond):
        return self.net(x, t, encoder_hidden_states=cond["text"].to(x.dtype), return_dict=False)[0]

    @classmethod
    def default_size(cls, c):
        # Its pipeline takes sizes below 64 in files from before version 0.9 for mistakes.
        version = getattr(c, "_diffusers_version", None)
        small = isinstance(c.sample_size, int) and c.sample_size < 64
        if small and version is not None and release(version) < (0, 9):
            return 64, 64
        return super().default_size(c)

    def time_embedders(self):
        embedder = self.net.time_embedding
        return [embedder], embedder.linear_2.out_features

    def time_layer(self):
        return self.net.time_embedding.linear_2

    def feature_layers(self, depths=(0.5,)):
        # the bottleneck, whatever the depths; small UNets end in a block of the way down
        return [self.net.mid_block or self.net.down_blocks[-1]]

    def to_feature_map(self, h):
        return h[0] if isinstance(h, tuple) else h  # blocks of the way down return more

    def latent_stats(self):
        return 0.0, self.vae.config.scaling_factor  # shift_factor is not used by this pipeline


class SDXL(SD15):
    """SDXL: two text encoders, a pooled embedding, and sizes and crop as numbers.

    Quirk of the original pipeline that is reproduced here: the null prompt is all zeros
    (force_zeros_for_empty_prompt), not the embedding of the empty prompt.
    """

    adapter = "sdxl"
    pipeline = "StableDiffusionXLPipeline"
    without = ("feature_extractor", "image_encoder")
    expected = dict(
        scheduler=VP_SCHEDULER,
        network=SD15.expected["network"] | dict(addition_embed_type=["text_time"]),
    )
    default_size = Pipeline.default_size

    @classmethod
    def embed(cls, pipe, prompts):
        text, null, pooled, null_pooled = pipe.encode_prompt(
            prompts or [""], device=pipe.device, do_classifier_free_guidance=True
        )
        if prompts is None:
            return dict(text=null, pooled=null_pooled)
        return dict(text=text, pooled=pooled)

    @classmethod
    def text_shapes(cls, c):
        pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        return dict(text=(77, c.cross_attention_dim), pooled=(pooled,))

    def predict(self, x, t, cond):
        height, width = self.image_shape[1:]
        # original size, top left corner of the crop, target size
        ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=x.dtype)
        ids = ids.to(x.device, non_blocking=True).expand(len(x), 6)
        return self.net(
            x,
            t,
            encoder_hidden_states=cond["text"].to(x.dtype),
            added_cond_kwargs=dict(text_embeds=cond["pooled"].to(x.dtype), time_ids=ids),
            return_dict=False,
        )[0]

    def latent_stats(self):
        c = self.vae.config
        if getattr(c, "latents_mean", None) is None or getattr(c, "latents_std", None) is None:
            return super().latent_stats()
        mean, inverse_std = channel_stats(self.vae, self.shape)
        return mean, inverse_std * c.scaling_factor
