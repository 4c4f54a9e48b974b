"""Qwen-Image-Edit and -Plus: Qwen-Image that edits an image, which its text encoder sees as well.

Not reproduced: the pipelines read the source with the processor in the folder, which needs
torchvision, for videos that nobody gives it. Here it is its image processor and the tokenizer.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from common.errors import require
from common.teachers.configuration import FLOW_SCHEDULER
from common.teachers.flow import QwenImage
from common.teachers.from_image import FromImage, read_source

IMAGE = "<|image_pad|>"  # stands for the image in a prompt, once for each of its tokens


class Processor:
    """Text with one IMAGE for each image, and the images -> input of Qwen2.5-VL.

    folder: of the pipeline. tokenizer: of the pipeline.
    """

    def __init__(self, folder, tokenizer):
        from transformers import Qwen2VLImageProcessor

        self.image_processor = Qwen2VLImageProcessor.from_pretrained(f"{folder}/processor")
        self.tokenizer = tokenizer

    def __call__(self, text, images, padding, return_tensors):
        from transformers import BatchFeature

        seen = self.image_processor(images=images, return_tensors=return_tensors)
        merged = self.image_processor.merge_size**2  # patches of a token
        counts = iter((seen["image_grid_thw"].prod(1) // merged).tolist())
        whole = []
        for words in text:
            start, *rest = words.split(IMAGE)
            whole.append(start + "".join(IMAGE * next(counts) + part for part in rest))
        tokens = self.tokenizer(whole, padding=padding, return_tensors=return_tensors)
        return BatchFeature({**tokens, **seen})


class QwenImageEdit(FromImage, QwenImage):
    """Qwen-Image-Edit. The null prompt is a blank with the same source, in text and tokens; its
    embedding depends on the source, so each prompt has one of its own."""

    adapter = "qwen-image-edit"
    pipeline = "QwenImageEditPipeline"
    most_tokens = {}
    without = ("processor",)
    built_for = (1024, 1024)
    null_sees_source = True
    kept = ("source", "text", "mask", "null_text", "null_mask")
    image_tokens = 37**2  # of the source in the text: 1024 / 28, rounded, squared

    @classmethod
    def source_size(cls, size, vae):
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as module

        width, height, _ = module.calculate_dimensions(1024 * 1024, size[1] / size[0])
        return height, width

    @classmethod
    def text_pipeline(cls, folder, dtype, **parts):
        pipe = super().text_pipeline(folder, dtype, **parts)
        pipe.processor = Processor(folder, pipe.tokenizer)
        return pipe

    @classmethod
    def embed(cls, pipe, prompts):
        if prompts is None:
            return {}  # it depends on the source
        sources = [read_source(prompt) for prompt in prompts]
        texts = [prompt.text for prompt in prompts]
        texts += [" " if prompt.negative is None else prompt.negative for prompt in prompts]
        pairs = zip(texts, [*sources, *sources])
        found = [cls.embed_text(pipe, text, source) for text, source in pairs]
        lengths = torch.tensor([len(text) for text in found])
        text, null_text = pad_sequence(found, batch_first=True).chunk(2)
        mask = torch.arange(text.shape[1]) < lengths[:, None]
        mask, null_mask = mask.long().to(text.device).chunk(2)
        cond = dict(text=text, mask=mask, null_text=null_text, null_mask=null_mask)
        return cond | cls.embed_sources(pipe, sources, 1)

    @classmethod
    def embed_negative(cls, pipe, text):
        return {}  # see embed

    @classmethod
    def embed_text(cls, pipe, text, source):
        """Embedding [length, width] of a text and what the encoder sees of a source."""
        return pipe.encode_prompt([text], cls.seen(pipe, source), device=pipe.device)[0][0]

    @classmethod
    def seen(cls, pipe, source):
        return source

    @classmethod
    def text_shapes(cls, c):
        length = 512 + cls.image_tokens
        text, mask = (length, c.joint_attention_dim), (length,)
        return dict(text=text, mask=mask, null_text=text, null_mask=mask)

    @classmethod
    def encode_source(cls, pipe, pixels):
        return super().encode_source(pipe, pixels[:, :, None])[:, :, 0]  # a video of one frame

    def unconditional(self, cond, n):
        null = super().unconditional(cond, n)
        return null | dict(text=cond["null_text"], mask=cond["null_mask"])

    def images(self, x, cond):
        return [x, cond["source"].to(x.dtype)]


class QwenImageEditPlus(QwenImageEdit):
    """Qwen-Image-Edit-2509 and -2511, with one source. The encoder sees a smaller copy of it.

    -2511 (zero_cond_t) gives the tokens of the source the time 0.
    """

    adapter = "qwen-image-edit-plus"
    pipeline = "QwenImageEditPlusPipeline"
    expected = dict(
        scheduler=FLOW_SCHEDULER,
        network=QwenImage.expected["network"] | dict(zero_cond_t=[False, True]),
    )
    image_tokens = 14**2

    def extend(self, *names):
        require(
            not names or not self.net.config.zero_cond_t,
            f"--teacher: {self.pipeline} with zero_cond_t: expected a method without further "
            f"inputs of the network, found {', '.join(names)}: the network has two times already",
        )
        return super().extend(*names)

    @classmethod
    def source_size(cls, size, vae):
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

        width, height = module.calculate_dimensions(module.VAE_IMAGE_SIZE, size[1] / size[0])
        return height, width

    @classmethod
    def seen(cls, pipe, source):
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

        ratio = source.width / source.height
        width, height = module.calculate_dimensions(module.CONDITION_IMAGE_SIZE, ratio)
        return [pipe.image_processor.resize(source, height, width)]
