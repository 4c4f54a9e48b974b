"""SD 1.x, 2.x and SDXL."""

from common.teachers.pipeline import Pipeline, vp_schedule


class SD15(Pipeline):
    """Stable Diffusion 1.x, 2.x. Null: the empty prompt."""

    adapter, pipeline, part, network = (
        "sd15",
        "StableDiffusionPipeline",
        "unet",
        "UNet2DConditionModel",
    )
    without = (
        "safety_checker",
        "feature_extractor",
        "image_encoder",
    )

    def __init__(self, net, vae, scheduler, size=None):
        kinds = dict(epsilon="eps", v_prediction="v", sample="x0")
        super().__init__(
            net, vae, scheduler, size, kinds[scheduler.get("prediction_type", "epsilon")]
        )

    def make_schedule(self, scheduler, shape, c):
        return vp_schedule(scheduler)

    @classmethod
    def text(cls, pipe, prompts):
        return dict(text=pipe.encode_prompt(prompts or [""], pipe.device, 1, False)[0])

    def predict(self, x, t, cond):
        return self.net(x, t, encoder_hidden_states=cond["text"].to(x.dtype), return_dict=False)[0]

    def time_embedders(self):
        return [self.net.time_embedding], self.net.time_embedding.linear_2.out_features

    def feature_layers(self, depths=(0.5,)):  # one, whatever the depths: the bottleneck
        return [self.net.mid_block]


class SDXL(SD15):
    """SDXL: two text encoders, pooled embedding, size and crop as numbers. Null: zeros (force_zeros_for_empty_prompt), as its pipeline has it."""

    adapter, pipeline = "sdxl", "StableDiffusionXLPipeline"
    without = (
        "feature_extractor",
        "image_encoder",
    )

    @classmethod
    def text(cls, pipe, prompts):
        text, null, pooled, null_pooled = pipe.encode_prompt(
            prompts or [""], device=pipe.device, do_classifier_free_guidance=True
        )
        return dict(text=text, pooled=pooled) if prompts else dict(text=null, pooled=null_pooled)

    def predict(self, x, t, cond):
        h, w = self.image_shape[1:]
        ids = x.new_tensor([[h, w, 0, 0, h, w]]).expand(
            len(x), 6
        )  # original size, crop, target size
        added = dict(text_embeds=cond["pooled"].to(x.dtype), time_ids=ids)
        return self.net(
            x,
            t,
            encoder_hidden_states=cond["text"].to(x.dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
