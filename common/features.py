"""Features of images in which samples are compared with a reference."""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from common import fid
from common.errors import UserError
from common.files import read_json
from data.images import load_images


class Extractor:
    """Features of images, and the reference that samples are compared with.

    A subclass defines __call__(images uint8 [n, C, H, W]) -> (features float32 [n, dims], class
    logits [n, classes] or None), both on the CPU, and sets `protocol`, the name of its features,
    and `device`.
    """

    metric = "fd"  # "fid" only for the public Inception weights
    dims = None
    shape = None  # [C, H, W] of the images that it takes; None: RGB of any size
    reference = None  # dict with mu [dims] and sigma [dims, dims]; None: nothing to compare with
    reference_name = None
    reference_features = None  # [m, dims]; None: only statistics are known

    def set_reference(self, stats, name, features=None):
        """features: of single reference images. KID, precision and recall need them."""
        self.reference = stats
        self.reference_name = name
        self.reference_features = features
        if features is not None:
            # files are sorted by class, but the first n have to be a sample of all classes
            generator = torch.Generator().manual_seed(0)
            self.reference_features = features[torch.randperm(len(features), generator=generator)]

    def describe(self, n, source):
        """The protocol in one line: everything that changes the number."""
        if self.reference is None:
            return f"{self.protocol} uint8 n={n} {source} no reference"
        return f"{self.metric} {self.protocol} uint8 n={n} {source} ref={self.reference_name}"

    def real_features(self, n):
        """Features of the first n reference images, of all classes; None if there are no images."""
        return None if self.reference_features is None else self.reference_features[:n]


class ClassifierExtractor(Extractor):
    """The protocol that a teacher brings: a small classifier and the statistics of its data."""

    dims = 64

    def __init__(self, teacher):
        info = teacher.evaluation
        is_text = teacher.prompts is not None
        required = ["protocol", "classifier", "reference", "names"]
        required += ["kinds", "groups", "labels"] if is_text else ["images"]
        for key in required:
            if key not in info:
                raise UserError(
                    f"{teacher.folder / 'teacher.json'}: evaluation.{key} is missing, "
                    "so this teacher's samples cannot be measured"
                )
        self.protocol = info["protocol"]
        self.shape = torch.Size(teacher.image_shape)
        self.device = next(teacher.parameters()).device
        kinds = info["kinds"] if is_text else info["names"]  # classes of the classifier
        self.net = SmallCNN(self.shape[0], self.shape[-1], len(kinds), stages=info.get("stages", 2))
        load_classifier(self.net, teacher.folder / info["classifier"])
        self.net.to(self.device)

        self.prompt_classes = None  # class of each prompt, -1 where it is unknown
        self.groups = None  # group of each class: the classes of `names`
        if is_text:
            path = teacher.folder / info["labels"]
            self.prompt_classes = read_prompt_classes(path, teacher.prompts, len(kinds))
            self.groups = torch.tensor(info["groups"])

        stats = fid.load_stats(teacher.folder / info["reference"])
        self.set_reference(stats, stats["n"], stats["features"])
        self.teacher = teacher

    def set_reference(self, stats, name, features=None):
        super().set_reference(stats, name, features)
        self.teacher = None  # the reference is not the teacher's own data

    @torch.no_grad()
    def __call__(self, images):
        features, logits = self.net(images.to(self.device))
        return features.float().cpu(), logits.float().cpu()

    def reference_images(self):
        """The teacher's data set, if it is the reference and comes with the teacher; else None."""
        if self.teacher is None or "images" not in self.teacher.evaluation:
            return None
        return load_images(None, self.teacher, lambda line: None)

    def image_features(self, images):
        return torch.cat([self(part)[0] for part in images.split(500)])

    def real_features(self, n):
        if self.reference_features is None:
            data = self.reference_images()
            if data is not None:
                first = data.order(0, 0)[:n]
                self.reference_features = self.image_features(data.images[first])
        return super().real_features(n)

    def for_labels(self, labels):
        """This extractor with the reference images of these labels only; None if there are few."""
        data = self.reference_images()
        if data is None:
            return None
        images = data.images[torch.isin(data.labels, torch.as_tensor(labels))]
        if len(images) <= self.dims:  # their covariance would be singular
            return None
        features = self.image_features(images)
        stats = fid.Stats(self.dims)
        stats.update(features)
        mu, sigma = stats.mean_cov()
        part = copy.copy(self)
        part.set_reference(dict(mu=mu, sigma=sigma, n=len(features)), len(features), features)
        return part

    def classes(self, labels):
        """Class that belongs to each label [n], or to the prompt of that number; -1: unknown."""
        return labels if self.prompt_classes is None else self.prompt_classes[labels.cpu()]

    def label_agreement(self, predicted, labels):
        """Where the predicted classes [n] are those of the labels [n]: dict of float64 [n], 0 or 1.

        agreement: of the class, or of its group if classes have groups; then agreement_kind is of
        the class itself. nan where the class of a prompt is unknown; {} if all are unknown.
        """
        expected = self.classes(labels)
        if (expected < 0).all():
            return {}

        def equal(a, b):
            return torch.where(expected < 0, torch.nan, (a == b).double())

        if self.groups is None:
            return dict(agreement=equal(predicted, expected))
        return dict(
            agreement=equal(self.groups[predicted], self.groups[expected]),
            agreement_kind=equal(predicted, expected),
        )


def load_classifier(net, path):
    try:
        net.load_state_dict(load_file(path))
    except Exception as e:  # safetensors and torch raise several types for damaged files
        raise UserError(
            f"{path}: expected the safetensors of the classifier ({type(e).__name__})"
        ) from None
    net.eval()


def read_prompt_classes(path, prompts, classes):
    """Class of each prompt, int64 [n], from a JSON object {prompt: class}; -1 for other prompts."""
    known = read_json(path)
    for prompt, value in known.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < classes:
            raise UserError(
                f"{path}: {prompt[:80]!r}: expected a number below {classes}, "
                f"found {str(value)[:80]!r}"
            )
    return torch.tensor([known.get(prompt, -1) for prompt in prompts])


class SmallCNN(nn.Module):
    """Classifier of small images. Its penultimate layer is the feature space of `fd`.

    Input: uint8 [B, C, H, W], H and W divisible by 2^stages.
    Output: features float32 [B, dim], logits float32 [B, classes].
    """

    def __init__(self, channels=1, size=28, classes=10, width=32, dim=64, stages=2):
        super().__init__()
        blocks = []
        c_in = channels
        for stage in range(stages):
            c_out = width * 2**stage
            blocks += [conv_block(c_in, c_out, stride=1), conv_block(c_out, c_out, stride=2)]
            c_in = c_out
        self.body = nn.Sequential(*blocks)
        self.feat = nn.Linear(c_in * (size // 2**stages) ** 2, dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images):
        x = images.float().div(127.5).sub(1)
        features = self.feat(self.body(x).flatten(1))
        return features, self.head(F.relu(features))


def conv_block(c_in, c_out, stride):
    conv = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())
