"""Stable Diffusion 1.x, 2.x and SDXL: UNets on the noise schedule of DDPM."""

from common.teachers.pipeline import Pipeline, vp_schedule

PREDICTIONS = dict(epsilon="eps", v_prediction="v", sample="x0")  # diffusers' names -> ours


class SD15(Pipeline):
    """Stable Diffusion 1.x and 2.x. The null prompt is the empty one."""

    adapter = "sd15"
    pipeline = "StableDiffusionPipeline"
    network_class = "UNet2DConditionModel"
    part = "unet"
    without = ("safety_checker", "feature_extractor", "image_encoder")

    def __init__(self, net, vae, scheduler, size=None):
        prediction = PREDICTIONS[scheduler.get("prediction_type", "epsilon")]
        super().__init__(net, vae, scheduler, size, prediction)

    def make_schedule(self, scheduler, shape, c):
        return vp_schedule(scheduler)

    @classmethod
    def embed(cls, pipe, prompts):
        return dict(text=pipe.encode_prompt(prompts or [""], pipe.device, 1, False)[0])

    def predict(self, x, t, cond):
        return self.net(x, t, encoder_hidden_states=cond["text"].to(x.dtype), return_dict=False)[0]

    def time_embedders(self):
        embedder = self.net.time_embedding
        return [embedder], embedder.linear_2.out_features

    def feature_layers(self, depths=(0.5,)):
        return [self.net.mid_block]  # the bottleneck, whatever the depths


class SDXL(SD15):
    """SDXL: two text encoders, a pooled embedding, and sizes and crop as numbers.

    Quirk of the original pipeline that is reproduced here: the null prompt is all zeros
    (force_zeros_for_empty_prompt), not the embedding of the empty prompt.
    """

    adapter = "sdxl"
    pipeline = "StableDiffusionXLPipeline"
    without = ("feature_extractor", "image_encoder")

    @classmethod
    def embed(cls, pipe, prompts):
        text, null, pooled, null_pooled = pipe.encode_prompt(
            prompts or [""], device=pipe.device, do_classifier_free_guidance=True
        )
        if prompts is None:
            return dict(text=null, pooled=null_pooled)
        return dict(text=text, pooled=pooled)

    def predict(self, x, t, cond):
        height, width = self.image_shape[1:]
        # original size, top left corner of the crop, target size
        ids = x.new_tensor([[height, width, 0, 0, height, width]]).expand(len(x), 6)
        return self.net(
            x,
            t,
            encoder_hidden_states=cond["text"].to(x.dtype),
            added_cond_kwargs=dict(text_embeds=cond["pooled"].to(x.dtype), time_ids=ids),
            return_dict=False,
        )[0]
