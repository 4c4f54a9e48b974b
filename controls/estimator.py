"""Networks that compute a condition: a depth estimator, a CLIP image encoder (--control-model)."""

from pathlib import Path

import torch

from common.errors import UserError, first_line
from common.files import read_json

# The controls that need a network, and what it is.
ESTIMATORS = {"depth": "a depth estimator", "image": "a CLIP vision encoder with projection"}


class Estimator:
    """The frozen network in --control-model, with its preprocessing.

    size: (height, width) of its input in pixels; mean, std: of its normalisation, [3, 1, 1].
    """

    def __init__(self, name, folder):
        self.net = load_estimator(name, folder)
        path = Path(folder) / "preprocessor_config.json"
        config = read_json(path, "--control-model") if path.exists() else {}
        if name == "depth":
            size = config["size"] if isinstance(config.get("size"), dict) else {}
            self.size = (size.get("height", 384), size.get("width", 384))
            mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's
        else:
            self.size = (self.net.config.image_size, self.net.config.image_size)
            mean = [0.48145466, 0.4578275, 0.40821073]  # CLIP's
            std = [0.26862954, 0.26130258, 0.27577711]
        self.mean = three_numbers(config.get("image_mean", mean), f"{path}: image_mean")
        self.std = three_numbers(config.get("image_std", std), f"{path}: image_std")

    def __call__(self, rgb):
        """rgb: [n, 3, *size] in [0, 1] -> output of the network."""
        self.net.to(rgb.device)
        return self.net((rgb - self.mean.to(rgb)) / self.std.to(rgb))


def three_numbers(value, where):
    is_list = isinstance(value, list) and len(value) == 3
    if not is_list or not all(isinstance(v, (int, float)) for v in value):
        raise UserError(f"{where}: expected three numbers, found {value!r}")
    return torch.tensor(value, dtype=torch.float32).view(3, 1, 1)


def load_estimator(name, folder):
    """Only safetensors are read, and no code in the folder is run."""
    import transformers

    expected = f"--control-model {folder}: expected"
    what = ESTIMATORS[name]
    if not Path(folder).is_dir():
        raise UserError(f"{expected} a folder of transformers with {what}, found none")
    cls = transformers.AutoModelForDepthEstimation
    if name == "image":
        cls = transformers.CLIPVisionModelWithProjection
        kind = read_json(Path(folder) / "config.json", "--control-model").get("model_type")
        if kind not in ("clip_vision_model", "clip"):
            raise UserError(f"{expected} {what} of transformers, found model_type {kind!r}")
    try:
        net, info = cls.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as e:  # transformers raises many kinds for folders of other things
        reason = f"{type(e).__name__}: {first_line(e)[:200]}"
        raise UserError(f"{expected} {what} of transformers: {reason}") from None
    # missing weights would be random; depth estimators may lack some that they do not use
    if name == "image" and info["missing_keys"]:
        missing = sorted(info["missing_keys"])[0]
        raise UserError(f"{expected} all weights of {what}, {missing} is missing")
    return net.eval().requires_grad_(False)
