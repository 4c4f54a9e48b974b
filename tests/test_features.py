"""common/features.py: the classifier of a teacher, its reference, agreement with labels."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from common import fid
from common.errors import UserError
from common.features import ClassifierExtractor, SmallCNN, read_prompt_classes
from common.files import ROOT
from common.teachers.load import load_teacher
from data.images import load_images

MNIST = ROOT / "assets" / "mnist"


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("mnist")


@pytest.fixture
def extractor(teacher):
    return ClassifierExtractor(teacher)


@pytest.mark.parametrize("channels, size, stages", [(1, 28, 2), (3, 64, 3)])
def test_shapes(channels, size, stages):
    images = torch.zeros(2, channels, size, size, dtype=torch.uint8)
    features, logits = SmallCNN(channels, size, classes=7, stages=stages).eval()(images)
    assert features.shape == (2, 64)
    assert logits.shape == (2, 7)


def test_the_reference_is_that_of_the_teachers_images(teacher, extractor):
    stats = fid.Stats(64)
    stats.update(extractor.image_features(load_images(None, teacher).images))
    mu, cov = stats.mean_cov()
    assert extractor.reference_name == stats.n == 5000
    assert torch.allclose(extractor.reference["mu"], mu, atol=1e-4)
    assert torch.allclose(extractor.reference["sigma"], cov, atol=1e-4)


def test_the_classifier_knows_the_digits(teacher, extractor):
    data = load_images(None, teacher)
    _, logits = extractor(data.images[::50])
    assert (logits.argmax(1) == data.labels[::50]).float().mean() > 0.98


def test_real_features_are_of_all_classes(teacher, extractor):
    """Files come class by class; the first features are those of a fixed shuffle."""
    data = load_images(None, teacher)
    first = data.order(0, 0)[:100]
    assert torch.equal(extractor.real_features(100), extractor.image_features(data.images[first]))
    assert len(data.labels[first].unique()) == 10


def test_features_of_another_reference_are_mixed(extractor):
    features = torch.arange(1000.0)[:, None]
    extractor.set_reference(extractor.reference, "x", features)
    assert 300 < extractor.real_features(100).mean() < 700


def test_statistics_alone_have_no_features(extractor):
    extractor.set_reference(extractor.reference, "x")
    assert extractor.real_features(100) is None
    assert extractor.describe(8, "here") == "fd mnist-cnn uint8 n=8 here ref=x"


def test_the_reference_of_some_labels(teacher, extractor):
    data = load_images(None, teacher)
    rows = (data.labels == 3) | (data.labels == 4)
    part = extractor.for_labels([3, 4])
    features = extractor.image_features(data.images[rows])
    assert part.reference_name == int(rows.sum())
    assert torch.allclose(part.reference["mu"], features.double().mean(0))
    assert extractor.reference_name == 5000  # unchanged


def test_too_few_images_of_some_labels(extractor, monkeypatch):
    """64 features of 64 images or less: a singular covariance."""
    few = SimpleNamespace(images=torch.zeros(64, 1, 28, 28), labels=torch.zeros(64))
    monkeypatch.setattr("common.features.load_images", lambda *args: few)
    assert extractor.for_labels([0]) is None


def test_other_references_have_no_labels(extractor):
    extractor.set_reference(extractor.reference, "x", torch.zeros(100, 64))
    assert extractor.for_labels([0]) is None


# ---- agreement -----------------------------------------------------------------------------------


def test_agreement_with_labels(extractor):
    agreement = extractor.label_agreement(torch.tensor([1, 2, 3]), torch.tensor([1, 0, 3]))
    assert {k: v.tolist() for k, v in agreement.items()} == dict(agreement=[1, 0, 1])


def test_agreement_with_prompts(extractor):
    """Five classes in two groups. Prompt 0 is of class 0, prompt 1 of class 4, 2 is unknown."""
    extractor.groups = torch.tensor([0, 0, 0, 1, 1])
    extractor.prompt_classes = torch.tensor([0, 4, -1])
    predicted, prompts = torch.tensor([0, 2, 3, 1]), torch.tensor([0, 0, 1, 2])
    found = extractor.label_agreement(predicted, prompts)
    assert found["agreement"][:3].tolist() == [1, 1, 1]
    assert found["agreement_kind"][:3].tolist() == [1, 0, 0]
    assert found["agreement"].isnan().tolist() == [False, False, False, True]


def test_agreement_with_unknown_prompts(extractor):
    extractor.prompt_classes = torch.tensor([-1, -1])
    assert extractor.label_agreement(torch.tensor([0]), torch.tensor([1])) == {}


def test_classes_of_prompts(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text('{"red heart": 3, "pizza": 0}')
    assert read_prompt_classes(path, ["pizza", "dog", "red heart"], 5).tolist() == [0, -1, 3]


@pytest.mark.parametrize("value", ["5", "-1", "true", '"3"', "null"])
def test_bad_classes_of_prompts(tmp_path, value):
    path = tmp_path / "labels.json"
    path.write_text(f'{{"red heart": {value}}}')
    with pytest.raises(UserError, match="labels.json: 'red heart': expected a number below 5"):
        read_prompt_classes(path, ["pizza"], 5)


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["protocol", "classifier", "reference", "names", "images"])
def test_what_is_missing_is_named(teacher, monkeypatch, key):
    evaluation = {k: v for k, v in teacher.evaluation.items() if k != key}
    monkeypatch.setattr(teacher, "evaluation", evaluation)
    with pytest.raises(UserError, match=f"teacher.json: evaluation.{key} is missing"):
        ClassifierExtractor(teacher)


@pytest.mark.parametrize("name, content", [("classifier", b"no tensors"), ("other", b"")])
def test_damaged_classifier(teacher, monkeypatch, tmp_path, name, content):
    for path in MNIST.glob("stats.npz"):
        shutil.copy(path, tmp_path)
    (tmp_path / f"{name}.safetensors").write_bytes(content)
    monkeypatch.setattr(teacher, "folder", tmp_path)
    with pytest.raises(UserError, match="expected the safetensors of the classifier"):
        ClassifierExtractor(teacher)
