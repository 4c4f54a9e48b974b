"""The `emoji` teachers: data from two made-up packages, every stage of the training at a tiny size,
and the shipped folders. recipes/emoji_data.py, emoji_nets.py, emoji_teacher.py, npm.py."""

import io
import json
import re
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from helpers import pipelines
from PIL import Image
from safetensors.torch import load_file

from common import fid, metrics
from common.errors import UserError
from common.features import ClassifierExtractor, read_prompt_classes
from common.files import ROOT, read_json, write_json
from common.rng import BatchRandom
from common.sampling import teacher_sample
from common.teachers.load import load_teacher
from data.image_folder import read_captions
from recipes import emoji_data, emoji_teacher
from recipes.emoji_data import (
    SKIN_TONES,
    STYLES,
    entry_weights,
    is_held_out,
    load_emoji,
    make_caption,
)
from recipes.emoji_nets import (
    load_part,
    make_scheduler,
    make_transformer,
    make_vae,
    tokenize,
    with_projection,
)
from recipes.emoji_teacher import (
    RepeatLastToken,
    category_of_kinds,
    draw_images,
    encode,
    parse_more,
    reference_indices,
    standardise,
)

TONES = list(SKIN_TONES)
PAIRS = [f"{a}-{b}" for a in TONES for b in TONES if a != b]
PEOPLE = "People & Body"
ENTRIES = [  # name, short names, category, subcategory, skin tones
    ("HEAVY BLACK HEART", ["heart"], "Smileys & Emotion", "heart", []),
    ("SLICE OF PIZZA", ["pizza"], "Food & Drink", "food-prepared", []),
    ("DOG FACE", ["dog"], "Animals & Nature", "animal-mammal", []),
    ("DOG", ["dog2"], "Animals & Nature", "animal-mammal", []),
    ("United States Flag", ["us", "flag-us"], "Flags", "country-flag", []),
    ("NEGATIVE SQUARED LATIN CAPITAL LETTER A", ["a"], "Symbols", "alphanum", []),
    ("THUMBS UP SIGN", ["+1", "thumbsup"], PEOPLE, "hand", TONES),
    ("WOMAN FARMER", ["female-farmer"], PEOPLE, "person-role", TONES),
    ("KISS: MAN, MAN", ["man-kiss-man"], PEOPLE, "family", PAIRS),
    ("EMOJI MODIFIER FITZPATRICK TYPE-3", ["skin-tone-3"], "Component", "skin-tone", []),
]
IMAGES_PER_STYLE = 9 + 5 + 5 + 20  # without tone; farmer, thumbs; kiss


# ---- made-up packages ----------------------------------------------------------------------------


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def package_files(vendor, blue):
    """{path: bytes} of a package. Every image is an opaque rectangle of its own colour."""
    table, files = [], {}
    for i, (name, short_names, category, subcategory, tones) in enumerate(ENTRIES):
        code = f"{i:04X}"
        image = f"{code.lower()}.png"
        variants = {tone: dict(image=f"{code.lower()}-{tone.lower()}.png") for tone in tones}
        entry = dict(
            name=name,
            unified=code,
            short_names=short_names,
            category=category,
            subcategory=subcategory,
            image=image,
            skin_variations=variants,
        )
        table.append(entry)
        for j, file in enumerate([image, *(v["image"] for v in variants.values())]):
            pixels = np.zeros((64, 64, 4), np.uint8)
            pixels[8:40, 8:40] = [20 * i, 200 - 8 * j, blue, 255]
            files[f"package/img/{vendor}/64/{file}"] = png(pixels)
    files["package/emoji.json"] = json.dumps(table).encode()
    files["package/img/sheets/64.png"] = b"not wanted"
    return files


def write_packages(folder, change=None):
    """Two .tgz as npm makes them. change(vendor, files) spoils what is packed: {path: bytes or
    TarInfo}. -> folder"""
    folder.mkdir(parents=True, exist_ok=True)
    for i, vendor in enumerate(STYLES):
        files = package_files(vendor, blue=120 * i)
        if change:
            change(vendor, files)
        with tarfile.open(folder / f"emoji-datasource-{vendor}-16.0.0.tgz", "w:gz") as tar:
            for path, content in files.items():
                if isinstance(content, tarfile.TarInfo):
                    tar.addfile(content)
                    continue
                info = tarfile.TarInfo(path)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_packages(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def data(source):
    return load_emoji(source)


# ---- captions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, phrases",
    [
        ("0000", ["red heart", "heart"]),
        ("0001", ["slice of pizza", "pizza"]),
        ("0002", ["dog face"]),  # the short name "dog" is another emoji's name
        ("0003", ["dog"]),
        (
            "0004",
            ["flag of united states", "united states flag", "flag of the united states"],
        ),
        ("0005", ["a button", "letter a button"]),
        ("0006", ["thumbs up"]),
        ("0007", ["woman farmer"]),
        ("0008", ["kiss man man", "man kiss man"]),
    ],
)
def test_phrases_are_what_people_type(data, code, phrases):
    assert data.phrases[data.codes.index(code)] == phrases


def find(data, code, skin_tones, style="noto"):
    """Index of an image."""
    wanted = (code, skin_tones, style)
    return list(zip(data.codes, data.skin_tones, data.styles)).index(wanted)


@pytest.mark.parametrize(
    "u, caption",
    [
        ([0, 0, 0.9], "woman farmer with medium dark skin, twemoji style"),
        ([0.9, 0.99, 0.1], "an emoji of woman farmer, medium dark skin"),
    ],
)
def test_caption_with_a_skin_tone(data, u, caption):
    i = find(data, "0007", ["medium dark"], "twemoji")
    assert make_caption(data, i, u) == caption


def test_caption_with_two_skin_tones(data):
    i = find(data, "0008", ["light", "dark"])
    assert make_caption(data, i, [0, 0, 0]) == "kiss man man with light and dark skin"


# ---- images and weights --------------------------------------------------------------------------


def test_every_image_of_both_packages_is_read(data):
    assert data.images.shape == (2 * IMAGES_PER_STYLE, 3, 64, 64)
    assert data.styles.count("noto") == IMAGES_PER_STYLE
    assert data.styles.count("twemoji") == IMAGES_PER_STYLE


def test_components_are_left_out(data):
    assert "Component" not in data.categories


def test_images_are_on_white(data):
    assert (data.images[:, :, 0] == 255).all()
    assert data.images[0, :, 20, 20].tolist() == [0, 200, 0]


def test_categories_of_the_subcategories(data):
    expected = {kind: category for _, _, category, kind, _ in ENTRIES}
    found = [data.categories[i] for i in category_of_kinds(data)]
    assert found == [expected[kind] for kind in data.kinds]


def test_all_skin_tones_weigh_half_and_twemoji_half_of_noto(data):
    """Nine emoji of which the flag weighs half, three with skin tones; both styles."""
    assert data.weight.sum() == pytest.approx((8.5 + 1.5) * 1.5)


@pytest.mark.parametrize(
    "names, category, weights",
    [
        (["MAN FARMER", "WOMAN FARMER", "FARMER"], PEOPLE, [1 / 3] * 3),
        (["MAN", "WOMAN"], PEOPLE, [1, 1]),
        (["KISS: MAN, WOMAN", "KISS: MAN, MAN"], PEOPLE, [1 / 2] * 2),
        (["France Flag"], "Flags", [0.5]),
        (["MANS SHOE", "WOMANS HAT"], "Objects", [1, 1]),
    ],
)
def test_genders_weigh_as_one_and_flags_half(names, category, weights):
    table = [dict(name=name, category=category) for name in names]
    assert entry_weights(table) == weights


@pytest.fixture
def some_held_out(source, monkeypatch):
    """The heart, and the farmer with dark skin."""

    def choose(code, skin_tones):
        return code == "0000" or (code == "0007" and skin_tones == ["dark"])

    monkeypatch.setattr(emoji_data, "is_held_out", choose)
    return load_emoji(source)


def test_both_styles_are_held_out(some_held_out):
    index = some_held_out.held_out.nonzero()[:, 0]
    found = [(some_held_out.styles[i], some_held_out.codes[i]) for i in index]
    expected = [("noto", "0000"), ("noto", "0007"), ("twemoji", "0000"), ("twemoji", "0007")]
    assert found == expected


def test_held_out_images_are_never_drawn(some_held_out):
    drawn = torch.cat([draw_images(BatchRandom(0, it, 64), some_held_out) for it in range(40)])
    assert not some_held_out.held_out[drawn].any()
    assert len(drawn.unique()) > 50


def test_held_out_images_are_no_reference(some_held_out):
    assert not some_held_out.held_out[reference_indices(some_held_out)].any()


def test_about_one_pair_in_25_is_held_out():
    pairs = [is_held_out(f"{i:04X}", [tone]) for i in range(400) for tone in SKIN_TONES.values()]
    assert 0.03 < np.mean(pairs) < 0.05


def test_only_single_skin_tones_are_held_out():
    assert not any(is_held_out(f"{i:04X}", []) for i in range(400))
    assert not any(is_held_out(f"{i:04X}", ["light", "dark"]) for i in range(400))


# ---- broken and foreign packages -----------------------------------------------------------------


def symbolic_link(vendor, files):
    path = f"package/img/{vendor}/64/0001.png"
    link = tarfile.TarInfo(path)
    link.type = tarfile.SYMTYPE
    link.linkname = "/etc/passwd"
    files[path] = link


def no_picture(vendor, files):
    files[f"package/img/{vendor}/64/0001.png"] = b"no picture"


def half_a_json(vendor, files):
    files["package/emoji.json"] = b"[1, 2"


def json_without_fields(vendor, files):
    files["package/emoji.json"] = b'[{"name": "X"}]'


def no_json(vendor, files):
    del files["package/emoji.json"]


def no_images(vendor, files):
    for path in list(files):
        if path.endswith(".png"):
            del files[path]


@pytest.mark.parametrize(
    "change, message",
    [
        (symbolic_link, "no plain file"),
        (no_picture, "expected a PNG"),
        (half_a_json, "expected emoji.json"),
        (json_without_fields, "expected emoji.json"),
        (no_json, "expected emoji.json"),
        (no_images, "expected images"),
    ],
)
def test_a_broken_package_is_refused_in_one_line(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        load_emoji(write_packages(tmp_path, change))
    assert "\n" not in str(error.value)


def test_paths_that_leave_the_archive_are_not_read(tmp_path, data):
    def change(vendor, files):
        files["package/../../evil.png"] = b"x"
        files["/tmp/evil/emoji.json"] = b"x"
        files[f"package/img/{vendor}/64/../../evil.png"] = b"x"

    found = load_emoji(write_packages(tmp_path / "a" / "b", change))
    assert torch.equal(found.images, data.images)
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]


def test_an_archive_of_another_format_is_refused(tmp_path):
    for archive in write_packages(tmp_path).iterdir():
        archive.write_bytes(b"not a tar")
    with pytest.raises(UserError, match="expected a .tgz of npm, found something else"):
        load_emoji(tmp_path)


def test_a_folder_without_packages_is_refused(tmp_path):
    with pytest.raises(UserError, match="found neither"):
        load_emoji(tmp_path)


def test_npm_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm pack emoji-datasource-google: expected the package"):
        load_emoji(None)


def test_an_unpacked_folder_gives_the_same(tmp_path, source, data):
    for vendor in STYLES:
        folder = tmp_path / f"emoji-datasource-{vendor}"
        with tarfile.open(source / f"emoji-datasource-{vendor}-16.0.0.tgz") as tar:
            for member in tar:
                path = folder / member.name.removeprefix("package/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
    unpacked = load_emoji(tmp_path)

    def sorted_images(emoji):  # files of a folder have no order
        keys = list(zip(emoji.styles, emoji.codes, emoji.skin_tones))
        return emoji.images[sorted(range(len(keys)), key=keys.__getitem__)]

    assert torch.equal(sorted_images(unpacked), sorted_images(data))
    assert unpacked.categories == data.categories


# ---- a teacher of two iterations -----------------------------------------------------------------

TINY_VAE = ["--vae-width", 8, 8, 8]
TINY_UNET = ["--width", 16, 16, 16, "--text-width", 16]
TINY = ["--batch", 4, *TINY_VAE, *TINY_UNET]
TINY_FLOW = ["--flow-width", 32, "--depth", 1]


def run_stage(stage, source, out, *flags):
    argv = [stage, "--source", source, "--out", out, *flags]
    emoji_teacher.main([str(word) for word in argv])


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    """--out of all stages for the UNet; its subfolder teacher/ is the teacher."""
    out = tmp_path_factory.mktemp("emoji")
    for stage in ("vae", "unet", "classifier"):
        run_stage(stage, source, out, "--iters", 2, *TINY)
    run_stage("save", source, out, "--cfg", 2)
    return out


def load(path, prompts=None, cache=None):
    text = dict(cache=cache)
    if prompts:
        text["prompts"] = prompts
    return load_teacher(str(path), text=text)


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    return load(folder / "teacher", cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder / "teacher")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_folder_is_a_pipeline_of_diffusers(pipe):
    assert pipe("red heart", num_inference_steps=2).images[0].size == (64, 64)


def test_a_sample_picture_is_written(folder):
    assert (folder / "samples.png").exists()


def test_the_tokenizer_of_the_two_old_files_is_the_same(folder, pipe):
    files = [folder / "teacher" / "tokenizer" / name for name in ("vocab.json", "merges.txt")]
    old = type(pipe.tokenizer)(*map(str, files), model_max_length=24)
    assert pipe.tokenizer("red heart").input_ids == old("red heart").input_ids


def test_names_of_the_text_encoder_are_those_of_transformers_4(folder):
    """Names as in Stable Diffusion's own files. transformers 4 ignores others."""
    names = load_file(folder / "teacher" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)


def test_the_text_encoder_is_the_trained_one(folder, pipe):
    found = pipe.encode_prompt(["red heart"], "cpu", 1, False)[0]
    ids = tokenize(pipe.tokenizer, ["red heart"])
    trained = load_part(folder, "text_encoder")(ids)[0]
    assert torch.allclose(found, trained, atol=5e-3)  # half precision


def test_the_folder_is_a_teacher(teacher, data):
    assert teacher.adapter == "sd15"
    assert teacher.shape == (4, 16, 16)
    assert teacher.prompts[0] == "red heart"
    assert teacher.evaluation["names"] == data.categories


def test_the_teacher_encodes_prompts_as_the_pipeline_does(teacher, pipe):
    text = pipe.encode_prompt(["red heart", "pizza"], "cpu", 1, False)[0]
    found = teacher.encode([0, teacher.prompts.index("pizza")])["text"]
    assert torch.allclose(found, text, atol=1e-5)


def test_samples_of_the_teacher_are_measured(teacher, data):
    def sampler(model, z, cond, noise):
        return teacher_sample(model, z, cond, 1)

    result = metrics.evaluate(sampler, teacher, teacher, 70)
    reference = len(reference_indices(data))
    assert result["protocol"] == f"fd emoji-cnn uint8 n=70 seed=0 ref={reference}"
    assert result["fd"] > 0
    assert "precision" in result
    assert 0 <= result["agreement_kind"] <= result["agreement"] <= 1


def test_agreement_counts_only_known_prompts(folder, data, tmp_path):
    own = load(folder / "teacher", ["red heart", "no such thing"], tmp_path)
    heart = data.kinds.index("heart")
    other = data.kinds.index("food-prepared")
    predicted, labels = torch.tensor([heart, heart, other, 0]), torch.tensor([0, 1, 0, 1])
    agreement = ClassifierExtractor(own).label_agreement(predicted, labels)
    assert agreement["agreement"].isnan().tolist() == [False, True, False, True]
    assert agreement["agreement"].nansum() == 1
    assert agreement["agreement_kind"].nansum() == 1


def test_no_agreement_without_a_known_prompt(folder, tmp_path):
    own = load(folder / "teacher", ["no such thing"], tmp_path)
    found = ClassifierExtractor(own).label_agreement(torch.tensor([0]), torch.tensor([0]))
    assert found == {}


def test_agreement_of_the_category_forgives_a_neighbour(folder, data, tmp_path):
    prompts = ["dog face", "woman farmer with medium dark skin"]
    own = load(folder / "teacher", prompts, tmp_path)
    hand = data.kinds.index("hand")  # of the farmer's category
    found = ClassifierExtractor(own).label_agreement(torch.tensor([hand]), torch.tensor([1]))
    assert found["agreement"].tolist() == [1]
    assert found["agreement_kind"].tolist() == [0]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(groups=[0]), "groups: expected"),
        (dict(stages=0), "stages: expected"),
        (dict(labels="../labels.json"), "labels: expected"),
        (dict(kinds="x"), "kinds: expected"),
    ],
)
def test_a_broken_evaluation_is_refused(folder, tmp_path, change, message):
    shutil.copytree(folder / "teacher", tmp_path / "t")
    info = read_json(tmp_path / "t" / "teacher.json")
    info["evaluation"] |= change
    write_json(tmp_path / "t" / "teacher.json", info)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "t", ["red heart"], tmp_path / "cache")


def test_a_class_number_beyond_the_classes_is_refused(tmp_path):
    write_json(tmp_path / "labels.json", {"red heart": 99})
    with pytest.raises(UserError, match="expected a number below 5, found '99'"):
        read_prompt_classes(tmp_path / "labels.json", ["red heart"], 5)


@pytest.mark.parametrize(
    "features, message",
    [
        (torch.ones(9, 3), "features float16"),
        (torch.full((9, 4), torch.inf), "nan or inf"),
    ],
)
def test_broken_features_of_the_reference_are_refused(tmp_path, features, message):
    fid.save_stats(tmp_path / "s.npz", np.zeros(4), np.eye(4), 9, "p", features)
    with pytest.raises(UserError, match=message):
        fid.load_stats(tmp_path / "s.npz")


def test_images_with_captions_for_losses_that_need_them(source, tmp_path, data):
    run_stage("images", source, tmp_path)
    found = read_captions(tmp_path / "images")
    index = [int(path.stem) for path, _ in found]
    assert index == reference_indices(data).tolist()
    for i, (path, (caption,)) in zip(index, found):
        assert any(phrase in caption for phrase in data.phrases[i])
        assert all(tone in caption for tone in data.skin_tones[i])
        assert np.array_equal(np.asarray(Image.open(path)), data.images[i].permute(1, 2, 0))


# ---- the flow teacher ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flow_folder(folder, source, tmp_path_factory):
    out = tmp_path_factory.mktemp("flow") / "out"
    shutil.copytree(folder, out)
    run_stage("flow", source, out, "--iters", 2, *TINY, "--flow-width", 32, "--depth", 2)
    run_stage("save", source, out, "--net", "flow", "--to", out / "flow", "--cfg", 2)
    return out / "flow"


@pytest.fixture(scope="module")
def flow_teacher(flow_folder, tmp_path_factory):
    return load(flow_folder, ["red heart", "pizza"], tmp_path_factory.mktemp("cache"))


def load_sd3(folder):
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_flow_folder_is_a_pipeline_of_diffusers(flow_folder):
    images = load_sd3(flow_folder)("red heart", num_inference_steps=2).images
    assert images[0].size == (64, 64)


def test_the_flow_folder_is_a_teacher(flow_teacher):
    assert flow_teacher.adapter == "sd3"
    assert flow_teacher.schedule.config == dict(name="flow", shift=2.0)
    assert ClassifierExtractor(flow_teacher).protocol == "emoji-cnn"


def test_the_flow_teacher_has_the_unets_text_encoder_twice(folder, flow_folder, flow_teacher):
    encoder = with_projection(load_part(folder, "text_encoder"))
    ids = tokenize(load_part(flow_folder, "tokenizer"), ["red heart"])
    expected = encoder(ids, output_hidden_states=True)
    cond = flow_teacher.encode([0])
    text = torch.cat([expected.hidden_states[-2]] * 2, -1)
    assert torch.allclose(cond["text"][:, :24], text, atol=5e-3)
    assert not cond["text"][:, 24:].any()  # in place of T5
    assert torch.allclose(cond["pooled"], torch.cat([expected.text_embeds] * 2, -1), atol=5e-3)


@pytest.mark.parametrize("n", [24, 256])
def test_one_token_that_counts_n_times_equals_n_tokens(n):
    torch.manual_seed(0)
    net = make_transformer(32, 2, 16)
    for p in net.parameters():  # gates start at zero
        torch.nn.init.normal_(p, std=0.2)
    x, text, pooled = torch.randn(2, 4, 16, 16), torch.randn(2, 24, 32), torch.randn(2, 32)

    def output(zeros):
        tokens = torch.cat([text, torch.zeros(2, zeros, 32)], 1)
        time = torch.tensor([300.0, 700.0])
        return net(x, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=time).sample

    expected = output(n)
    scale = expected.abs().max().item()
    with RepeatLastToken(n):
        assert torch.allclose(output(1), expected, rtol=1e-3, atol=1e-4 * scale)
    assert not torch.allclose(output(1), expected, rtol=1e-2, atol=1e-2 * scale)


@pytest.fixture
def work(folder, tmp_path):
    """A copy of `folder` in which stages can run again."""
    shutil.copytree(folder, tmp_path / "out")
    return tmp_path / "out"


def test_flow_training_alternates_between_24_and_256_tokens_of_zeros(work, source, monkeypatch):
    numbers, texts = [], []

    class Recorded(RepeatLastToken):
        def __init__(self, n):
            super().__init__(n)
            numbers.append(n)

    def make_recorded(*args):
        net = make_transformer(*args)
        net.register_forward_pre_hook(
            lambda module, args, kwargs: texts.append(kwargs["encoder_hidden_states"]),
            with_kwargs=True,
        )
        return net

    monkeypatch.setattr(emoji_teacher, "make_transformer", make_recorded)
    monkeypatch.setattr(emoji_teacher, "RepeatLastToken", Recorded)
    run_stage("flow", source, work, *TINY, *TINY_FLOW, "--iters", 2)
    assert numbers == [256, 24]
    for text in texts:
        assert text.shape[1] == 25
        assert not text[:, -1].any()  # the token that is repeated
        assert text[:, :-1].abs().sum(2).all()


def test_flow_training_starts_from_a_teacher(work, source, tmp_path):
    def train(*flags):
        run_stage("flow", source, work, *TINY, *TINY_FLOW, *flags)
        return load_part(work, "transformer").state_dict()

    before = train("--iters", 2)
    first = tmp_path / "first"
    shutil.copytree(work, first)
    after = train("--iters", 1, "--lr", 1e-12, "--start", first)
    assert all(torch.allclose(after[name], v, atol=1e-6) for name, v in before.items())
    other = train("--iters", 1, "--lr", 1e-12, "--seed", 1)
    assert not all(torch.allclose(other[name], v, atol=1e-3) for name, v in before.items())


# ---- training ------------------------------------------------------------------------------------

UNET_FILES = ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")


def test_an_interrupted_stage_resumes_as_if_nothing_had_happened(
    folder, source, tmp_path, monkeypatch
):
    flags = ["--iters", 4, *TINY, "--save-minutes", 0]
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    for out in (whole, interrupted):
        shutil.copytree(folder / "vae", out / "vae")
    run_stage("unet", source, whole, *flags)

    calls = []

    def interrupt_in_the_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw_images(*args)

    monkeypatch.setattr(emoji_teacher, "draw_images", interrupt_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_stage("unet", source, interrupted, *flags)
    run_stage("unet", source, interrupted, *flags, "--resume")
    assert len(calls) == 5  # two, the interrupted one, and the last two
    for file in UNET_FILES:
        expected, found = load_file(whole / file), load_file(interrupted / file)
        assert all(torch.equal(found[name], v) for name, v in expected.items())


def test_unet_training_starts_from_a_teacher(folder, source, tmp_path):
    shutil.copytree(folder / "vae", tmp_path / "vae")
    start = folder / "teacher"
    run_stage("unet", source, tmp_path, "--iters", 1, *TINY, "--lr", 1e-9, "--start", start)

    def tensors(path):
        return {name.removeprefix("text_model."): v.float() for name, v in load_file(path).items()}

    for file in UNET_FILES:
        found, expected = tensors(tmp_path / file), tensors(start / file)
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], v, atol=1e-6) for name, v in expected.items())
    # the teacher's own words, whatever a tokenizer that is trained here would contain
    for file in ("tokenizer/vocab.json", "tokenizer/merges.txt"):
        assert (tmp_path / file).read_bytes() == (start / file).read_bytes()


def test_a_start_that_is_no_teacher_is_refused(work, source, tmp_path):
    with pytest.raises(UserError, match="--start, .*nothing: tokenizer: expected"):
        run_stage("unet", source, work, *TINY, "--start", tmp_path / "nothing")


def test_more_multiplies_factors_of_categories_and_subcategories(data):
    factors = parse_more(["Food & Drink=4", "food-prepared=2.5"], data)
    food = data.category == data.categories.index("Food & Drink")
    prepared = data.kind == data.kinds.index("food-prepared")
    assert prepared.any()
    assert (factors[prepared] == 10).all()
    assert (factors[food & ~prepared] == 4).all()
    assert (factors[~food] == 1).all()


def test_more_of_one_emoji(data):
    expected = [3 if "pizza" in phrases else 1 for phrases in data.phrases]
    assert parse_more(["pizza=3"], data).tolist() == expected


def test_shares_of_drawn_images_follow_the_factors(data):
    food = data.category == data.categories.index("Food & Drink")
    weight = data.weight * ~data.held_out

    def drawn_share(factors):
        # one at a time: a batch has no image twice
        draws = [draw_images(BatchRandom(0, it, 1), data, factors) for it in range(2000)]
        return food[torch.cat(draws)].float().mean().item()

    def expected_share(factors):
        return ((weight * factors * food).sum() / (weight * factors).sum()).item()

    for factors in (parse_more(["Food & Drink=10"], data), torch.ones(len(data))):
        assert drawn_share(factors) == pytest.approx(expected_share(factors), abs=0.04)


@pytest.mark.parametrize(
    "pair",
    [
        "food=2",
        "Food & Drink",
        "Food & Drink=0",
        "Food & Drink=-1",
        "Food & Drink=nan",
        "=2",
    ],
)
def test_more_that_names_nothing_or_has_no_factor_is_refused(data, pair):
    with pytest.raises(UserError, match="--more .*expected NAME=FACTOR"):
        parse_more([pair], data)


@pytest.mark.parametrize("stage", ["unet", "flow", "classifier"])
def test_more_changes_what_teachers_are_trained_on(stage, work, source, data, monkeypatch):
    """The classifier's data stay as they are."""
    factors = []

    def recorded(draw, data, given=None):
        factors.append(given)
        return draw_images(draw, data) if given is None else draw_images(draw, data, given)

    monkeypatch.setattr(emoji_teacher, "draw_images", recorded)
    run_stage(stage, source, work, "--iters", 1, *TINY, "--more", "Food & Drink=4")
    assert len(factors) == 1
    if stage == "classifier":
        assert factors[0] is None
    else:
        assert torch.equal(factors[0], parse_more(["Food & Drink=4"], data))


@pytest.mark.slow
def test_a_student_is_trained_resumed_and_measured(folder, source, scripts, tmp_path):
    """As a user of a text-to-image teacher does: cached prompts and latents, images with captions,
    a GAN loss, export, metrics of several samplers."""
    scripts.load(*pipelines.MODULES)
    run_stage("images", source, tmp_path)
    run, cache = tmp_path / "run", ["--cache-prompts", tmp_path / "cache"]
    flags = ["--teacher", folder / "teacher", "--data", tmp_path / "images", *cache, "--out", run]
    flags += ["--gan", "--nfe", 2, "--cfg", 3, "--batch", 4]
    scripts.run("dmd2.py", *flags, "--smoke")
    found = read_json(run / "metrics.json")
    assert found["fd"] > 0
    assert found["n"] == 64
    assert 0 <= found["agreement_kind"] <= found["agreement"] <= 1
    assert 0 <= found["coverage"] <= 1

    scripts.run("dmd2.py", *flags, "--iters", 4, "--log-every", 1, "--eval-n", 64, "--resume")
    assert read_json(run / "metrics.json")["it"] == 4

    result = tmp_path / "eval.jsonl"
    p = scripts.run("eval.py", run, "--n", 70, *cache, "--out", result)
    assert "agreement_kind" in p.out
    assert json.loads(result.read_text())["protocol"].startswith("fd emoji-cnn uint8 n=70")

    best = ["--best-of", 2, "--teacher-nfe", 1, "--cfg", 1, "--n", 8, "--batch", 8, *cache]
    best += ["--out", tmp_path / "best.jsonl"]
    assert "teacher best-of-2 run" in scripts.run("eval.py", run, *best).out
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red heart\nno such thing\n")
    p = scripts.run("eval.py", run, *best, "--prompts", prompts, code=2)
    assert "found 'no such thing'" in p.err


@pytest.mark.slow
def test_sid_with_the_gan_moves_the_student(folder, source, scripts, tmp_path):
    """The preset's warm-up of the discriminator once outlasted the run, and the student that was
    exported was the teacher."""
    scripts.load(*pipelines.MODULES)
    run_stage("images", source, tmp_path)
    run = tmp_path / "run"
    flags = ["--gan", "--data", tmp_path / "images", "--cache-prompts", tmp_path / "cache"]
    flags += ["--iters", 2, "--batch", 4, "--eval-n", 0, "--log-every", 1, "--out", run]
    p = scripts.run("sid.py", "--teacher", folder / "teacher", *flags)
    assert re.search("preset +emoji", p.out)
    assert "adv" in (run / "log.jsonl").read_text()
    network = Path("unet", "diffusion_pytorch_model.safetensors")
    student = load_file(run / "student" / network)
    teacher = load_file(folder / "teacher" / network)
    assert any(not torch.equal(student[name], v) for name, v in teacher.items())


# ---- losses --------------------------------------------------------------------------------------


class Stopped(Exception):
    """Ends a stage where its training would begin."""


def loss_of_stage(monkeypatch, stage, source, out, *flags):
    """-> the networks and the loss function that a stage gives to `fit`."""
    found = {}

    def stop(name, nets, loss, *args):
        found.update(nets=nets, loss=loss)
        raise Stopped

    monkeypatch.setattr(emoji_teacher, "fit", stop)
    with pytest.raises(Stopped):
        run_stage(stage, source, out, *TINY_VAE, *TINY_UNET, *TINY_FLOW, *flags)
    return found["nets"], found["loss"]


class Denoiser(torch.nn.Module):
    """Network with function(x, t) as output; t in the network's own units."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, t=None, text=None, timestep=None, **kwargs):
        return SimpleNamespace(sample=self.function(x, t if timestep is None else timestep))


X0 = torch.linspace(-1, 1, 4 * 16 * 16).view(1, 4, 16, 16)


def exact_eps(x, t, error):
    """eps for the image X0, with an error of x0 as large as min-SNR's weight makes `error`."""
    alphas = make_scheduler().alphas_cumprod
    a = alphas[t].view(-1, 1, 1, 1)
    snr = a / (1 - a)
    eps = (x - a.sqrt() * X0) / (1 - a).sqrt()
    return eps + error * (snr / (snr + 0.3).clamp(max=5)).sqrt()


def exact_velocity(x, t, error):
    return (x - X0) / (t.view(-1, 1, 1, 1) / 1000) + error


@pytest.mark.parametrize(
    "stage, net, exact",
    [("unet", "unet", exact_eps), ("flow", "transformer", exact_velocity)],
)
@pytest.mark.parametrize("error", [0.0, 0.5])
def test_loss_is_the_weighted_squared_error(stage, net, exact, error, work, source, monkeypatch):
    """0 for the exact output, and error^2 if the error is divided by the root of the weight."""
    monkeypatch.setattr(
        emoji_teacher, "encode", lambda vae, images: X0.expand(len(images), 4, 16, 16)
    )
    nets, loss = loss_of_stage(monkeypatch, stage, source, work, "--batch", 16)
    nets[net] = Denoiser(lambda x, t: exact(x, t, error))
    assert loss(BatchRandom(0, 0, 16), 0).item() == pytest.approx(error**2, abs=1e-4)


def test_flow_times_are_shifted_towards_noise(work, source, monkeypatch):
    flags = ["--batch", 16, "--shift", 3]
    nets, loss = loss_of_stage(monkeypatch, "flow", source, work, *flags)
    times = []

    def record(x, t):
        times.append(t / 1000)
        return x

    nets["transformer"] = Denoiser(record)
    for it in range(60):
        loss(BatchRandom(0, it, 16), it)
    # median of u is 1/2, and 3 / 2 / (1 + 2 / 2) = 3/4
    assert torch.cat(times).median().item() == pytest.approx(0.75, abs=0.03)


def test_loss_of_the_autoencoder(source, tmp_path, monkeypatch):
    """Of a decoder that is wrong by 0.4 in the left half, and latents with mean 2 and variance
    exp(-3)."""
    nets, loss = loss_of_stage(monkeypatch, "vae", source, tmp_path, "--batch", 4)
    vae = nets["vae"]
    seen = {}

    def encoder(x):
        seen["x"] = x

    def quant_conv(h):
        mean = torch.full((4, 4, 16, 16), 2.0)
        return torch.cat([mean, torch.full((4, 4, 16, 16), -3.0)], 1)

    def decoder(z):
        assert 0.15 < z.std() < 0.3  # exp(-3 / 2) = 0.22
        wrong = torch.zeros(64)
        wrong[:32] = 0.4
        return seen["x"] + wrong

    functions = dict(
        encoder=encoder, quant_conv=quant_conv, post_quant_conv=lambda z: z, decoder=decoder
    )
    for name, function in functions.items():
        delattr(vae, name)
        setattr(vae, name, function)
    l1, l2, edge, kl = 0.2, 0.08, 0.4 / 63, 0.5 * (2**2 + np.exp(-3) - 1 + 3)
    expected = l1 + l2 + 0.5 * edge + 1e-4 * kl
    assert loss(BatchRandom(0, 0, 4), 0).item() == pytest.approx(expected, abs=1e-5)


def test_latents_start_with_hardly_any_noise(source, tmp_path, monkeypatch):
    nets, _ = loss_of_stage(monkeypatch, "vae", source, tmp_path)
    assert nets["vae"].quant_conv.bias[4:].eq(-6).all()


@torch.no_grad()
def test_standardised_latents_decode_to_the_same_images():
    torch.manual_seed(0)
    vae = make_vae((8, 8, 8)).eval()
    for bias in (vae.quant_conv.bias, vae.post_quant_conv.bias):
        torch.nn.init.normal_(bias)
    images = torch.randint(0, 256, (14, 3, 64, 64), dtype=torch.uint8)
    pixels = images.float() / 127.5 - 1
    before = vae.encode(pixels).latent_dist
    decoded = vae.decode(before.mode()).sample
    std = encode(vae, images[::7]).std((0, 2, 3))

    standardise(vae, images)
    after = vae.encode(pixels).latent_dist
    z = encode(vae, images[::7])
    assert z.mean((0, 2, 3)).abs().max() < 1e-4
    assert (z.std((0, 2, 3)) - 1).abs().max() < 1e-4
    assert torch.allclose(vae.decode(after.mode()).sample, decoded, atol=1e-4)
    assert torch.allclose(after.std * std.view(1, -1, 1, 1), before.std, rtol=1e-4)


# ---- the shipped folders -------------------------------------------------------------------------


def load_shipped(name):
    if name == "emoji-flow":
        return load_sd3(ROOT / "assets" / name)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(ROOT / "assets" / name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SHIPPED = {
    "emoji": {
        "red heart": "heart",
        "dog face": "animal-mammal",
        "flag of france": "country-flag",
        "woman farmer with medium dark skin": "person-role",
    },
    "emoji-flow": {
        "red heart": "heart",
        "dog face": "animal-mammal",
        "flag of france": "country-flag",
        "smiling face with sunglasses": "face-glasses",
    },
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("shipped")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_teacher_draws_what_the_prompt_says(name, cache):
    """Sampled by plain diffusers, recognised by the shipped classifier."""
    images = load_shipped(name)(
        list(SHIPPED[name]),
        num_inference_steps=12,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    images = torch.from_numpy((images * 255).round().astype("uint8")).permute(0, 3, 1, 2)
    teacher = load(name, cache=cache)
    _, logits = ClassifierExtractor(teacher)(images)
    kinds = teacher.evaluation["kinds"]
    assert [kinds[i] for i in logits.argmax(1)] == list(SHIPPED[name].values())


@pytest.mark.parametrize("name, adapter", [("emoji", "sd15"), ("emoji-flow", "sd3")])
def test_a_shipped_teacher_is_found_by_its_name(name, adapter, cache):
    teacher = load(name, cache=cache)
    assert teacher.folder == ROOT / "assets" / name
    assert teacher.adapter == adapter
    assert teacher.prompts[0] == "red heart"
    assert teacher.dtype == torch.float32


def test_both_shipped_teachers_have_the_same_prompts(cache):
    assert load("emoji", cache=cache).prompts == load("emoji-flow", cache=cache).prompts


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_teacher_is_small(name):
    files = [f for f in (ROOT / "assets" / name).glob("*/*.safetensors")]
    assert sum(f.stat().st_size for f in files) <= 12e6
