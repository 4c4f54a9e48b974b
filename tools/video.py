"""Videos in eval.py and sample.py: how much moves, how much flickers, frames for the metrics of
images, animated pictures."""

from pathlib import Path

import torch

from common.features import Extractor
from common.files import atomic
from training.report import to_image

ANIMATED = {".webp": "WEBP", ".gif": "GIF"}
FPS = 16  # Wan's


# ---- numbers -------------------------------------------------------------------------------------


def temporal_metrics(videos):
    """uint8 [n, C, F, H, W] -> dict of float64 [n], in parts of the range from black to white.

    With d the difference of a pixel from one frame to the next:
    motion: mean |d|. 0 for a still video. It grows with what moves, by how much, and its contrast;
    VBench's dynamic degree is another number, of optical flow.
    flicker: mean of min(|d|, |d'|) over consecutive differences of opposite signs, 0 elsewhere:
    what a pixel gains and loses again in the next frame. 0 for what moves by up to half its size.
    """
    d = (videos[:, :, 1:].float() - videos[:, :, :-1].float()) / 255
    first, second = d[:, :, :-1], d[:, :, 1:]
    back = torch.minimum(first.abs(), second.abs()) * (first * second < 0)
    values = dict(motion=d.abs(), flicker=back)
    # of one or two frames there is nothing to average
    return {name: x.flatten(1).double().sum(1) / max(x[0].numel(), 1) for name, x in values.items()}


class FrameExtractor(Extractor):
    """An extractor of images for the frames of videos."""

    def __init__(self, extractor):
        self.extractor = extractor
        self.metric = extractor.metric
        self.dims = extractor.dims
        self.device = extractor.device
        self.protocol = f"frames {extractor.protocol}"

    def __call__(self, videos):
        """uint8 [n, C, F, H, W] -> features [n, F, D]; images as those of the extractor."""
        if videos.ndim == 4:  # of a reference
            return self.extractor(videos)
        features, _ = self.extractor(frames_of(videos))
        return features.unflatten(0, videos.shape[:3:2]), None


def frames_of(videos):
    """uint8 [n, C, F, H, W] -> [n F, C, H, W], the frames of a video one after the other."""
    return videos.transpose(1, 2).flatten(0, 1)


# ---- pictures ------------------------------------------------------------------------------------


def is_animated(path):
    return Path(path).suffix.lower() in ANIMATED


def key_frames(videos):
    """First, middle and last frame, one below the other: uint8 [n, C, F, H, W] -> [n, C, H', W]."""
    count = videos.shape[2]
    shown = dict.fromkeys((0, count // 2, count - 1))  # without repeats
    return torch.cat([videos[:, :, i] for i in shown], 2)


def save_video(path, video):
    """Animated WebP (lossless) or GIF of a video uint8 [C, F, H, W]."""
    save_animation(path, [to_image(frame) for frame in video.transpose(0, 1)])


def save_animation(path, frames, seconds=1 / FPS):
    """frames: list of PIL images of one size. seconds: how long a frame is shown, or a list."""
    kind = ANIMATED[Path(path).suffix.lower()]
    options = dict(lossless=True) if kind == "WEBP" else {}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as f:
        several = isinstance(seconds, list)
        duration = [round(1000 * s) for s in seconds] if several else round(1000 * seconds)
        frames[0].save(
            f, kind, save_all=True, append_images=frames[1:], duration=duration, loop=0, **options
        )
