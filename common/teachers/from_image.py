"""Teachers whose condition has an image: the source of an edit, or the first frame of a video.

Their prompts come with --data, as lines of metadata.jsonl (data/image_folder.py). The source is cut
to the format of the samples and has the size in pixels that the pipeline gives it. Its latents are
encoded by the pipeline together with the text, and kept in the same cache.

The null condition has another text and the same source, as the guided pass of the pipelines.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from common.distributed import on_rank0
from common.errors import UserError
from common.files import read_json
from data.image_file import READER, read_image
from data.image_folder import read_edits


class ImagePrompt(NamedTuple):
    """A prompt with its source image."""

    text: str
    file: str  # path of the source
    digest: str  # sha256 of its bytes
    size: tuple  # (height, width) in pixels that the source is read at
    negative: str | None = None  # of --negative-prompt, where the null condition sees the source
    frames: int = 1  # of the samples

    @property
    def key(self):
        """What the embedding depends on."""
        return [READER, self.text, self.digest, *self.size, self.negative, self.frames]


def read_image_prompts(name, cls, prompts, data, shape, vae, negative):
    """-> list of ImagePrompt, a row for each text; (target or None, its texts) of each edit.

    name: of the teacher. prompts: list of (text, file of the source), of str (--prompts) or None.
    data: folder of --data, or None. shape: (height, width, frames) of the samples. vae: its
    configuration. negative: of --negative-prompt.
    UserError: no folder, not one of edits, --prompts instead.
    """
    if prompts and isinstance(prompts[0], str):
        raise UserError(
            f"--prompts: expected --data FOLDER for {name}, whose prompts come with images "
            "(docs/data.md)"
        )
    if prompts:
        pairs, targets = prompts, []
    elif data is None:
        raise UserError(
            f"--data: expected a folder of source images and prompts for {name}, a teacher that "
            "takes an image with each prompt (metadata.jsonl, docs/data.md), found none"
        )
    else:
        edits = read_edits(data)
        pairs = [(text, edit.source) for edit in edits for text in edit.texts]
        targets = [(edit.target, edit.texts) for edit in edits]
    files = list(dict.fromkeys(str(file) for _, file in pairs))
    digests = dict(zip(files, on_rank0(lambda: [digest_of_file(file) for file in files])))
    *size, frames = shape
    facts = (tuple(cls.source_size(size, vae)), negative if cls.null_sees_source else None, frames)
    prompts = [ImagePrompt(text, str(file), digests[str(file)], *facts) for text, file in pairs]
    return prompts, targets


def digest_of_file(path):
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as e:
        raise UserError(f"{path}: expected an image, found: {e.strerror}") from None


def read_source(prompt):
    """Source of an ImagePrompt as a PIL image of its size. UserError: not readable."""
    try:
        pixels = read_image(prompt.file, 3, prompt.size)
    except ValueError as e:
        raise UserError(
            f"{prompt.file}: expected an image that can be read, found: {str(e)[:100]}"
        ) from None
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


class FromImage:
    """First base of a teacher class that takes an image. cond["source"]: its latents [B, C, h, w].

    The class behind it in the order of bases is the one for text alone.
    """

    takes_image = True
    kept = ("source",)  # names in cond that the null condition of `null` does not have
    null_sees_source = False  # the text of the null condition has another embedding with it
    image_prompts = ()  # list of ImagePrompt, one a row of `table`

    @classmethod
    def sample_shape(cls, c, size, frames):
        """(height, width, frames) of the samples in pixels. c: configuration of the network. size,
        frames: of the flags, or None."""
        return *(size or cls.built_for), 1

    @classmethod
    def source_size(cls, size, vae):
        """[height, width] in pixels that the pipeline gives a source of the samples' format.

        size: [height, width] of the samples. vae: configuration of the VAE.
        """
        raise NotImplementedError

    @classmethod
    def text_pipeline(cls, folder, dtype, **parts):
        index = read_json(Path(folder) / "model_index.json")
        vae = cls.load_vae(Path(folder), dtype, index["vae"][1])
        return super().text_pipeline(folder, dtype, vae=vae, **parts)

    @classmethod
    def embed(cls, pipe, prompts):
        if prompts is None:
            return super().embed(pipe, None)
        sources = [read_source(prompt) for prompt in prompts]
        texts = [prompt.text for prompt in prompts]
        return super().embed(pipe, texts) | cls.embed_sources(pipe, sources, prompts[0].frames)

    @classmethod
    def embed_negative(cls, pipe, text):
        return super().embed(pipe, [text])

    @classmethod
    def embed_sources(cls, pipe, sources, frames):
        """What PIL images add to embeddings. source: latents [n, C, h, w], as the pipeline encodes
        them. frames: of the samples."""
        latents = []
        for source in sources:
            pixels = pipe.image_processor.preprocess(source, source.height, source.width)
            pixels = pixels.to(pipe.device, pipe.vae.dtype)
            latents.append(cls.encode_source(pipe, pixels))
        return dict(source=torch.cat(latents))

    @classmethod
    def encode_source(cls, pipe, pixels):
        """pixels: [1, 3, H, W] in [-1, 1] -> latents [1, C, h, w]."""
        return pipe._encode_vae_image(pixels, None)

    @property
    def source_pixels(self):
        """(height, width) of the sources."""
        return tuple(self.source_size(self.image_shape[-2:], self.vae.config))

    def config(self):
        return super().config() | dict(source=list(self.source_pixels))

    def source_shapes(self):
        height, width = self.source_pixels
        scale = self.vae_scale
        return dict(source=(self.shape[0], height // scale, width // scale))

    def attach(self, folder, table, prompts, negative=None):
        self.image_prompts = prompts
        texts = [getattr(prompt, "text", prompt) for prompt in prompts]
        super().attach(folder, table, texts, negative)

    def null(self, n):
        return {name: v for name, v in super().null(n).items() if name not in self.kept}

    def with_source(self, texts, file):
        """Prompts with one source -> list of ImagePrompt."""
        negative = self.negative if self.null_sees_source else None
        frames = self.frames if self.video else 1
        what = (str(file), digest_of_file(file), self.source_pixels, negative, frames)
        return [ImagePrompt(text, *what) for text in texts]

    def load_image_folder(self, folder, say=print):
        targets = [target for target, _ in self.captioned[0]]
        missing = targets.count(None)
        if missing:
            raise UserError(
                f"--data {folder}: expected for these flags the result of each edit (file_name in "
                f"metadata.jsonl), found none in {missing} of {len(targets)} lines"
            )
        return super().load_image_folder(folder, say)

    def source_pictures(self, labels):
        """Sources of rows of `table`, uint8 [n, 3, H, W] at the size of the samples."""
        size = tuple(self.image_shape[-2:])
        return torch.stack([read_image(self.image_prompts[i].file, 3, size) for i in labels])

    def to_feature_map(self, h):
        # the tokens of the sample, then those of the source
        if isinstance(h, tuple):  # blocks of joint attention return (text tokens, image tokens)
            h = h[-1]
        tokens = self.shape[-2] * self.shape[-1] // self.packed**2
        return super().to_feature_map(h[:, :tokens])
