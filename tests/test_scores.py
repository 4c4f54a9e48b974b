"""tools/scores.py: scores and features against transformers' own and against sums by hand."""

import argparse
import json
import math
import re
import shutil
import socket

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import scorers
from helpers.pipelines import clip_tokenizer
from PIL import Image

import eval as script
from common import fid
from common.errors import UserError
from common.files import ROOT
from common.teachers.load import load_teacher
from common.teachers.prompt_files import read_prompts
from tools.measure import list_images, mean_cosine, to_square, vendi_score
from tools.scores import DinoExtractor, Scores, TextScore

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
PROMPTS = ["a red heart", "x", "a text that has far more letters than the encoder has places"]
SHAPES = [(3, 40, 50), (3, 50, 33), (3, 32, 32), (1, 28, 28)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models.clip, models.dino: folders of tiny networks."""
    home = tmp_path_factory.mktemp("scorers")
    names = argparse.Namespace(clip=home / "tiny-clip", dino=home / "tiny-dino")
    for path in vars(names).values():
        path.mkdir()
    scorers.clip_model(names.clip)
    scorers.dino_model(names.dino)
    return names


def images_of(shape, n=3):
    """Smooth random pictures: white noise would all look alike to a network."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    small = torch.rand(n, shape[0], 4, 4, generator=generator) * 255
    return F.interpolate(small, shape[1:], mode="bilinear").to(torch.uint8)


def picture(image):
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).convert("RGB")


def short_side_cropped(image, side=scorers.SIDE):
    """CLIP's resize by pillow alone: bicubic, short side to `side`, middle, normalised."""
    image = picture(image)
    scale = side / min(image.size)
    width, height = (max(side, int(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return normalised(image)


def long_side_padded(image, side=scorers.SIDE):
    """HPSv2's: the long side to `side`, black around."""
    image = picture(image)
    scale = side / max(image.size)
    width, height = (round(length * scale) for length in image.size)
    square = np.zeros((side, side, 3), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    small = np.asarray(image.resize((width, height), Image.BICUBIC))
    square[top : top + height, left : left + width] = small
    return normalised(square)


def normalised(image, mean=MEAN, std=STD):
    pixels = (np.asarray(image) / 255 - mean) / std
    return torch.from_numpy(pixels).permute(2, 0, 1).float()


def logits(folder, pixels, prompts):
    """transformers' own logits of image i and prompt i, and its scale."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = clip_tokenizer(folder)(
        prompts, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        output = model(pixel_values=pixels, **tokens)
    return output.logits_per_image.diagonal().double(), model.logit_scale.exp().item()


# ---- formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_clip_and_pickscore_are_logits_of_transformers(models, shape):
    images = images_of(shape)
    pixels = torch.stack([short_side_cropped(image) for image in images])
    expected, scale = logits(models.clip, pixels, PROMPTS)
    pick = TextScore("--pickscore", models.clip, "pickscore", "cpu")
    assert torch.allclose(pick.pixels(images), pixels, atol=1e-5)
    assert torch.allclose(pick(images, PROMPTS), expected, rtol=1e-5, atol=1e-5)
    clip = TextScore("--clip", models.clip, "clip_score", "cpu")
    assert torch.allclose(clip(images, PROMPTS), 100 * expected / scale, rtol=1e-5, atol=1e-4)
    assert expected.std() > 0.1 * scale / 100


def test_pixels_are_those_of_the_folders_processor(models):
    processor = transformers.AutoImageProcessor.from_pretrained(models.clip, use_fast=False)
    score = TextScore("--clip", models.clip, "clip_score", "cpu")
    for shape in SHAPES:
        images = images_of(shape)
        own = processor([picture(image) for image in images], return_tensors="pt")["pixel_values"]
        assert torch.allclose(score.pixels(images), own, atol=1e-6)
    assert "bicubic-short32-crop32x32 x100" in score.protocol


def test_a_prefix_stands_before_each_prompt(models):
    images = images_of((3, 32, 32))
    plain = TextScore("--clip", models.clip, "clip_score", "cpu")
    prefixed = TextScore("--clip", models.clip, "clip_score", "cpu", "a pic")
    prompts = [f"a pic {prompt}" for prompt in PROMPTS]
    assert torch.equal(prefixed(images, PROMPTS), plain(images, prompts))
    assert not torch.allclose(prefixed(images, PROMPTS), plain(images, PROMPTS))
    assert prefixed.protocol == plain.protocol + " prefix='a pic'"


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_hps_sees_the_whole_image(models, shape):
    images = images_of(shape)
    pixels = torch.stack([long_side_padded(image) for image in images])
    expected, scale = logits(models.clip, pixels, PROMPTS)
    found = TextScore("--hps", models.clip, "hps", "cpu")(images, PROMPTS)
    assert torch.allclose(found, 100 * expected / scale, rtol=1e-5, atol=1e-4)


def open_clip_weights():
    """Random tensors under open_clip's names, for the sizes of scorers.clip_model."""
    g = torch.Generator().manual_seed(3)

    def tensor(*shape):
        return torch.randn(*shape, generator=g) * 0.3

    def norm(name):
        return {f"{name}.weight": 1 + tensor(32), f"{name}.bias": tensor(32)}

    weights = {
        "positional_embedding": tensor(16, 32),
        "text_projection": tensor(32, 24),
        "logit_scale": torch.tensor(2.0),
        "attn_mask": torch.full((16, 16), -math.inf).triu(1),
        "visual.class_embedding": tensor(32),
        "visual.positional_embedding": tensor(17, 32),
        "visual.proj": tensor(32, 24),
        "visual.conv1.weight": tensor(32, 3, 8, 8),
        "token_embedding.weight": tensor(80, 32),
    }
    weights |= norm("visual.ln_pre") | norm("visual.ln_post") | norm("ln_final")
    for tower in ("", "visual."):
        for i in range(2):
            block = f"{tower}transformer.resblocks.{i}"
            weights |= norm(f"{block}.ln_1") | norm(f"{block}.ln_2")
            weights |= {
                f"{block}.attn.in_proj_weight": tensor(96, 32),
                f"{block}.attn.in_proj_bias": tensor(96),
                f"{block}.attn.out_proj.weight": tensor(32, 32),
                f"{block}.attn.out_proj.bias": tensor(32),
                f"{block}.mlp.c_fc.weight": tensor(64, 32),
                f"{block}.mlp.c_fc.bias": tensor(64),
                f"{block}.mlp.c_proj.weight": tensor(32, 64),
                f"{block}.mlp.c_proj.bias": tensor(32),
            }
    return weights


def open_clip_cosines(w, pixels, tokens):
    """CLIP of arXiv 2103.00020 by hand. tokens: int64 [n, L], of which the last is the end."""

    def norm(x, name):
        return F.layer_norm(x, (32,), w[f"{name}.weight"], w[f"{name}.bias"])

    def blocks(x, tower, causal):
        for i in range(2):
            block = f"{tower}transformer.resblocks.{i}"
            h = norm(x, f"{block}.ln_1")
            h = F.linear(h, w[f"{block}.attn.in_proj_weight"], w[f"{block}.attn.in_proj_bias"])
            heads = (part.unflatten(2, (2, 16)).transpose(1, 2) for part in h.chunk(3, 2))
            h = F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2).flatten(2)
            x = x + F.linear(
                h, w[f"{block}.attn.out_proj.weight"], w[f"{block}.attn.out_proj.bias"]
            )
            h = norm(x, f"{block}.ln_2")
            h = F.gelu(F.linear(h, w[f"{block}.mlp.c_fc.weight"], w[f"{block}.mlp.c_fc.bias"]))
            x = x + F.linear(h, w[f"{block}.mlp.c_proj.weight"], w[f"{block}.mlp.c_proj.bias"])
        return x

    x = F.conv2d(pixels, w["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([w["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = blocks(norm(x + w["visual.positional_embedding"], "visual.ln_pre"), "visual.", False)
    image = norm(x[:, 0], "visual.ln_post") @ w["visual.proj"]
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"][: tokens.shape[1]]
    text = norm(blocks(x, "", True)[:, -1], "ln_final") @ w["text_projection"]
    return F.cosine_similarity(image, text)


def test_published_weights_of_hps(models, tmp_path):
    """HPS_v2.1_compressed.pt has open_clip's names, in half precision."""
    weights = open_clip_weights()
    folder = shutil.copytree(models.clip, tmp_path / "hps")
    half = {name: tensor.half() for name, tensor in weights.items()}
    torch.save(dict(state_dict=half), folder / "HPS_v2.1_compressed.pt")
    weights = {name: tensor.float() for name, tensor in half.items()}
    images = images_of((3, 40, 50))
    found = TextScore("--hps", folder, "hps", "cpu")(images, ["heart"] * 3)
    tokens = torch.tensor(clip_tokenizer(tmp_path)(["heart"] * 3).input_ids)
    pixels = torch.stack([long_side_padded(image) for image in images])
    expected = 100 * open_clip_cosines(weights, pixels, tokens).double()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-3)
    assert expected.std() > 1


def test_dino_features_are_its_class_token(models):
    images = images_of((3, 40, 50))
    extractor = DinoExtractor(models.dino, "cpu")
    features, labels = extractor(images)
    net = transformers.Dinov2Model.from_pretrained(models.dino).eval()
    resized = [picture(image).resize((224, 224), Image.BICUBIC) for image in images]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = torch.stack([normalised(image, mean, std) for image in resized])
    with torch.no_grad():
        expected = net(pixel_values=pixels).last_hidden_state[:, 0]
    assert torch.allclose(features, expected, atol=1e-5)
    assert labels is None
    assert features.std(0).mean() > 0.01
    assert extractor.protocol.startswith("tiny-dino-")


def test_vendi_counts_different_images():
    """n of orthogonal features, 1 of equal ones; exp of the entropy of groups."""
    eye = 3 * torch.eye(3, dtype=torch.float64)
    assert vendi_score(eye) == pytest.approx(3)
    assert vendi_score(eye[[0, 0, 0]]) == pytest.approx(1)
    entropy = -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)
    assert vendi_score(eye[[0, 0, 1]]) == pytest.approx(math.exp(entropy))
    assert mean_cosine(eye[[0, 0, 1]]) == pytest.approx(1 / 3)


# ---- eval.py -------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, capsys):
    """run(*flags) -> the JSON object of the last line."""

    def go(*flags):
        capsys.readouterr()
        flags = [*flags, "--out", tmp_path / "eval.jsonl", "--device", "cpu"]
        script.main([str(flag) for flag in [*flags, "--cache-prompts", tmp_path / "prompts"]])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return go


def make_student(folder, source, prompts, tmp_path):
    """A one-step student that is the teacher itself, and the file of its prompts."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts))
    text = dict(prompts=str(file), cache=tmp_path / "prompts")
    teacher = load_teacher(str(source), text=text)
    info = dict(method="dmd2", teacher=str(source), nfe=1, cfg=1.0, sampler={})
    teacher.copy().save(folder / "student", info)
    return folder, file


@pytest.mark.parametrize("name", ["sd15", pytest.param("emoji", marks=pytest.mark.slow)])
def test_scores_of_a_student(models, run, folders, tmp_path, name):
    """All flags at once; then the saved images, measured as a folder, have the same scores."""
    source = ROOT / "assets" / "emoji" if name == "emoji" else folders(name)
    prompts = ["red heart", "a rocket", "pizza"]
    student, file = make_student(tmp_path / "run", source, prompts, tmp_path)
    scores = ["--prompts", file, "--clip", models.clip, "--pickscore", models.clip]
    scores += ["--hps", models.clip]
    flags = ["--dino", models.dino, "--per-prompt", 2, "--n", 8, "--save-images", tmp_path / "png"]
    found = run(student, *scores, *flags)
    assert 1 <= found["vendi"] <= 2
    assert -1 <= found["similarity"] <= 1
    assert "fd" not in found
    model, *parts = found["protocol"].split("; ")
    assert model.startswith("tiny-dino-") and model.endswith("n=8 seed=0 no reference")
    assert [part.split(" ")[0] for part in parts] == ["clip_score", "pickscore", "hps"]

    again = run("--images", tmp_path / "png", *scores)
    for key in ("clip_score", "pickscore", "hps"):
        assert again[key] == pytest.approx(found[key], abs=1e-5)
    files = sorted((tmp_path / "png").iterdir())
    pixels = torch.stack([short_side_cropped(data_of(path)) for path in files])
    expected, _ = logits(models.clip, pixels, [prompts[i % 3] for i in range(8)])
    assert found["pickscore"] == pytest.approx(expected.mean().item(), abs=1e-5)

    same = run(
        "--images", tmp_path / "png", "--dino", models.dino, "--ref-images", tmp_path / "png"
    )
    assert same["fd"] == pytest.approx(0, abs=1e-6)
    assert same["precision"] == same["recall"] == same["coverage"] == 1


def data_of(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_kept_results_are_of_the_same_scores(models, run, folders, tmp_path):
    """sd15 brings no classifier, and scores need none."""
    student, file = make_student(tmp_path / "run", folders("sd15"), ["red", "blue"], tmp_path)
    flags = [student, "--prompts", file, "--n", 8, "--compare", "--teacher-nfe", 1, "--cfg", 1]
    flags += ["--grid", tmp_path / "x.png"]
    first, second = (run(*flags, "--clip", models.clip)["results"] for _ in range(2))
    assert first == second  # with their dates: the second call measures nothing
    (other, _) = run(*flags, "--pickscore", models.clip)["results"]
    assert "clip_score" in first[0] and "clip_score" not in other
    assert "no features" in other["protocol"]
    assert "pickscore" in (tmp_path / "x.md").read_text()


def test_the_middle_square_as_dmd2_cuts_it(models, run, tmp_path):
    """Samples and references; kept statistics know their square."""
    image = images_of((3, 40, 50), 1)
    by_pillow = picture(image[0]).crop((5, 0, 45, 40)).resize((16, 16), Image.LANCZOS)
    found = to_square(image, 16)
    assert np.array_equal(found[0].permute(1, 2, 0), np.asarray(by_pillow))
    assert torch.equal(to_square(found, 16), found)
    assert to_square(images_of((1, 28, 28), 2), 8).shape == (2, 1, 8, 8)

    for name, shape in dict(A=(3, 40, 50), B=(3, 33, 30)).items():
        (tmp_path / name).mkdir()
        for i, image in enumerate(images_of(shape, 20)):
            picture(image).save(tmp_path / name / f"{i:02d}.png")
    flags = ["--images", tmp_path / "A", "--dino", models.dino]
    reference, kept = ["--ref-images", tmp_path / "B"], tmp_path / "b.npz"
    first = run(*flags, *reference, "--square", 16, "--save-ref", kept)
    extractor = DinoExtractor(models.dino, "cpu")
    features = [
        extractor(to_square(images_of(shape, 20), 16))[0] for shape in ((3, 40, 50), (3, 33, 30))
    ]
    stats = [(x.double().mean(0), x.double().T.cov()) for x in features]
    assert first["fd"] == pytest.approx(fid.frechet(*stats[0], *stats[1]), rel=1e-6)
    assert first["protocol"].startswith("fd square16-lanczos tiny-dino-")

    again = run(*flags, "--ref", kept, "--square", 16)
    assert again["fd"] == pytest.approx(first["fd"], rel=1e-9)
    assert "precision" in first and "precision" not in again
    with pytest.raises(UserError, match="expected statistics of tiny-dino-.*found those of square"):
        run(*flags, "--ref", kept)
    whole = run(*flags, *reference)
    assert abs(whole["fd"] / first["fd"] - 1) > 1e-3

    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    scores = ["--images", tmp_path / "A", "--prompts", tmp_path / "prompts.txt"]
    found = run(*scores, "--clip", models.clip, "--square", 16)
    score = TextScore("--clip", models.clip, "clip_score", "cpu")
    expected = score(to_square(images_of((3, 40, 50), 20), 16), [*"abc"] * 6 + [*"ab"])
    assert found["clip_score"] == pytest.approx(expected.mean().item(), abs=1e-6)


PAGE = (ROOT / "docs" / "evaluate.md").read_text()


def test_images_in_the_layout_of_geneval(folders, monkeypatch, tmp_path):
    """The block of docs/evaluate.md: four images of each prompt, all different."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    make_student(tmp_path / "out" / "dmd2-sdxl", folders("sd15"), ["a"], tmp_path)
    lines = [json.dumps(dict(tag="counting", prompt=prompt)) + "\n" for prompt in ("a cat", "two")]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    found = sorted((tmp_path / "geneval").rglob("*.png"))
    names = [str(path.relative_to(tmp_path / "geneval")) for path in found]
    assert names == [f"0000{i}/samples/000{j}.png" for i in (0, 1) for j in range(4)]
    assert (tmp_path / "geneval" / "00001" / "metadata.jsonl").read_text() == lines[1]
    assert len({path.read_bytes() for path in found}) == 8


def test_prompts_and_images_of_mjhq(monkeypatch, tmp_path):
    """The block of docs/evaluate.md: file i has prompt i."""
    (block,) = re.findall(r"<<'EOF'\n(.*?)EOF", PAGE, re.S)
    rows = {"b0": dict(category="food", prompt="a cake"), "a1": dict(category="art", prompt="x")}
    (tmp_path / "meta_data.json").write_text(json.dumps(rows))
    for name, row in rows.items():
        folder = tmp_path / "mjhq30k_imgs" / row["category"]
        folder.mkdir(parents=True)
        (folder / f"{name}.jpg").write_text(name)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert read_prompts(tmp_path / "mjhq.jsonl") == ["a cake", "x"]
    files = list_images("--images", tmp_path / "mjhq", n=2)
    assert [path.read_text() for path in files] == ["b0", "a1"]


# ---- mistakes ------------------------------------------------------------------------------------


def no_socket(*args, **kwargs):
    raise AssertionError("a socket was opened")


@pytest.mark.parametrize("name", ["/none/clip", "./none", "a/b/c", "tests/none", "clip"])
def test_a_folder_that_is_not_there(monkeypatch, name):
    """tests/none could be a repository, but tests/ is a folder here."""
    monkeypatch.setattr(socket, "socket", no_socket)
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=f"^--clip {name}: expected a folder .* found neither$"):
        TextScore("--clip", name, "clip_score", "cpu")
    with pytest.raises(UserError, match="found neither"):
        DinoExtractor(name, "cpu")


def test_a_hub_name_is_downloaded(monkeypatch, models, tmp_path):
    """Only then, and only files that are no pickles."""
    import huggingface_hub

    asked = []
    home = tmp_path / "models--owner--clip" / "snapshots" / "0a1b"
    shutil.copytree(models.clip, home)

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(home)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    score = TextScore("--clip", "owner/clip", "clip_score", "cpu")
    assert score.protocol.startswith("clip_score owner/clip-")
    ((name, patterns),) = asked
    assert name == "owner/clip"
    assert not [p for p in patterns if p.endswith((".bin", ".pt", "*"))]


def test_other_models_are_refused_by_name(models, tmp_path):
    with pytest.raises(UserError, match="expected a model of the type clip, found 'dinov2'"):
        TextScore("--clip", models.dino, "clip_score", "cpu")
    with pytest.raises(UserError, match="type dinov2 or dinov2_with_registers, found 'clip'"):
        DinoExtractor(models.clip, "cpu")
    pickled = shutil.copytree(models.clip, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="expected a CLIPModel"):
        TextScore("--clip", pickled, "clip_score", "cpu")
    (pickled / "HPS_v2.1_compressed.pt").write_bytes(b"no weights")
    with pytest.raises(UserError, match="expected HPSv2's checkpoint of plain tensors"):
        TextScore("--hps", pickled, "hps", "cpu")


def test_missing_weights_are_no_random_ones(models, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models.clip, tmp_path / "half")
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="visual_projection.weight"):
        TextScore("--clip", folder, "clip_score", "cpu")


def test_without_transformers(monkeypatch, models):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    args = argparse.Namespace(clip=str(models.clip), clip_prefix=None, square=None)
    with pytest.raises(UserError, match="^--clip: expected transformers"):
        Scores(args, "cpu")


MISTAKES = {
    "out/x --clip-prefix a": "--clip-prefix means something only with --clip",
    "out/x --dino D --inception F --ref R": "expected one kind of features",
    "--images A --clip D": "--clip, --pickscore and --hps with --images: expected --prompts",
    "--images A --dino D": "--dino with --images: needs a reference",
    "--images A": "or --clip DIR",
    "out/x --square 256": "--square: needs --inception, --dino or a score",
    "out/x --save-ref f.npz": "--save-ref means something only with --ref-images",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_flags_that_have_no_effect(flags):
    with pytest.raises(UserError, match=MISTAKES[flags].replace("(", r"\(")):
        script.parse_args(flags.split())


def test_labels_have_no_scores(models, run):
    flags = ["--teacher", "mnist", "--nfe", 1, "--n", 8]
    with pytest.raises(UserError, match="expected a text-to-image teacher, found mnist"):
        run(*flags, "--clip", models.clip)
    with pytest.raises(UserError, match="toy: its samples are points"):
        run("--teacher", "toy", "--dino", models.dino)
