"""The text-to-image teacher `emoji`: captions and archives of two made-up packages, every stage of its training at a tiny size, and what its folder gives."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from helpers import pipelines
from PIL import Image

from common import fid, metrics
from common.errors import UserError
from common.features import ClassifierExtractor, read_prompt_classes
from common.files import ROOT, read_json, write_json
from common.image_folder import read_captions
from common.rng import BatchRandom
from common.sampling import teacher_sample
from common.teachers.load import load_teacher
from recipes.emoji_data import SETS, SKIN, caption, held_out, load, rarity
from recipes.emoji_teacher import (
    Repeated,
    encode,
    factors,
    groups,
    load,
    main,
    make_scheduler,
    make_transformer,
    make_vae,
    pick,
    projected,
    reference,
    standardise,
    tokens,
)
from recipes.pretrain import main

TONES = {t: t for t in SKIN}
ENTRIES = [  # name, short names, category, subcategory, tones
    ("HEAVY BLACK HEART", ["heart"], "Smileys & Emotion", "heart", ()),
    ("SLICE OF PIZZA", ["pizza"], "Food & Drink", "food-prepared", ()),
    ("DOG FACE", ["dog"], "Animals & Nature", "animal-mammal", ()),
    ("DOG", ["dog2"], "Animals & Nature", "animal-mammal", ()),
    ("United States Flag", ["us", "flag-us"], "Flags", "country-flag", ()),
    ("NEGATIVE SQUARED LATIN CAPITAL LETTER A", ["a"], "Symbols", "alphanum", ()),
    ("THUMBS UP SIGN", ["+1", "thumbsup"], "People & Body", "hand", TONES),
    ("WOMAN FARMER", ["female-farmer"], "People & Body", "person-role", TONES),
    (
        "KISS: MAN, MAN",
        ["man-kiss-man"],
        "People & Body",
        "family",
        [f"{a}-{b}" for a in TONES for b in TONES if a != b],
    ),
    ("EMOJI MODIFIER FITZPATRICK TYPE-3", ["skin-tone-3"], "Component", "skin-tone", ()),
]


def packages(folder, change=lambda name, files: None):
    """Two .tgz as npm makes them. change(name, files): spoils what is packed, dict of path -> bytes or TarInfo."""
    folder.mkdir(exist_ok=True)
    for which, name in enumerate(SETS):
        table, files = [], {}
        for i, (title, shorts, category, kind, tones) in enumerate(ENTRIES):
            row = dict(
                name=title,
                unified=f"{i:04X}",
                short_names=shorts,
                category=category,
                subcategory=kind,
                image=f"{i:04x}.png",
            )
            row["skin_variations"] = {t: dict(image=f"{i:04x}-{t.lower()}.png") for t in tones}
            table.append(row)
            for j, image in enumerate(
                [row["image"], *(v["image"] for v in row["skin_variations"].values())]
            ):
                pixels = np.zeros((64, 64, 4), np.uint8)
                pixels[8:40, 8:40] = [20 * i, 200 - 8 * j, 120 * which, 255]
                Image.fromarray(pixels).save(stream := io.BytesIO(), "PNG")
                files[f"package/img/{name}/64/{image}"] = stream.getvalue()
        files["package/emoji.json"] = json.dumps(table).encode()
        files["package/img/sheets/64.png"] = b"not wanted"
        change(name, files)
        with tarfile.open(folder / f"emoji-datasource-{name}-16.0.0.tgz", "w:gz") as tar:
            for path, content in files.items():
                info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(path)
                info.size = 0 if content is info else len(content)
                tar.addfile(info, None if content is info else io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return packages(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def data(source):
    return load(source)


def test_captions_say_what_people_type(data):
    said = {data.base[i]: data.nouns[i] for i in range(len(data.images))}
    assert said["0000"] == ["red heart", "heart"] and said["0001"] == ["slice of pizza", "pizza"]
    assert said["0002"] == ["dog face"] and said["0003"] == [
        "dog"
    ]  # the short name "dog" of the face is the other's name
    assert (
        said["0004"] == ["flag of united states", "united states flag", "flag of the united states"]
        and "letter a button" in said["0005"]
    )
    assert (
        said["0006"] == ["thumbs up"]
        and said["0007"] == ["woman farmer"]
        and said["0008"] == ["kiss man man", "man kiss man"]
    )
    farmer = next(
        i
        for i in range(len(data.images))
        if data.base[i] == "0007" and data.skin[i] == ["medium dark"] and data.style[i] == "twemoji"
    )
    assert caption(data, farmer, [0, 0, 0.9]) == "woman farmer with medium dark skin, twemoji style"
    assert caption(data, farmer, [0.9, 0.99, 0.1]) == "an emoji of woman farmer, medium dark skin"
    pair = next(i for i in range(len(data.images)) if data.skin[i] == ["light", "dark"])
    assert caption(data, pair, [0, 0, 0]) == "kiss man man with light and dark skin"


def test_images_are_on_white_and_variants_weigh_as_one(data):
    assert (
        "Component" not in data.names
        and len(data.images) == 2 * (9 + 5 + 5 + 20)
        and data.images.shape[1:] == (3, 64, 64)
    )
    assert (data.images[:, :, 0] == 255).all() and data.images[0, :, 20, 20].tolist() == [0, 200, 0]
    assert data.weight.sum() == pytest.approx((8.5 + 1.5) * 1.5) and (
        data.style.count("noto"),
        data.style.count("twemoji"),
    ) == (39, 39)
    assert groups(data) == [
        data.names.index(next(c for _, _, c, k, _ in ENTRIES if k == kind)) for kind in data.kinds
    ]


def test_genders_weigh_as_one_and_flags_half():
    entry = lambda name, category="People & Body": dict(name=name, category=category)
    table = [
        entry("MAN FARMER"),
        entry("WOMAN FARMER"),
        entry("FARMER"),
        entry("MAN"),
        entry("WOMAN"),
        entry("KISS: MAN, WOMAN"),
        entry("KISS: MAN, MAN"),
        entry("France Flag", "Flags"),
        entry("MANS SHOE", "Objects"),
        entry("WOMANS HAT", "Objects"),
    ]
    assert rarity(table) == [1 / 3] * 3 + [1, 1] + [1 / 2] * 2 + [0.5, 1, 1]


def test_held_out_compositions_are_never_drawn(source, monkeypatch):
    monkeypatch.setattr(
        emoji, "held_out", lambda base, skin: base == "0000" or base == "0007" and skin == ["dark"]
    )
    data = load(source)
    assert [(data.base[i], data.style[i]) for i in data.held.nonzero()[:, 0]] == [
        (b, style) for style in ("noto", "twemoji") for b in ("0000", "0007")
    ]
    drawn = torch.cat([pick(BatchRandom(0, it, 64), data) for it in range(40)])
    assert (
        not data.held[drawn].any()
        and len(drawn.unique()) > 50
        and not data.held[reference(data)].any()
    )


def test_about_one_pair_of_25_is_held_out():
    pairs = [held_out(f"{i:04X}", [tone]) for i in range(400) for tone in SKIN.values()]
    assert (
        0.03 < np.mean(pairs) < 0.05
        and not held_out("0000", [])
        and not any(held_out(f"{i}", ["light", "dark"]) for i in range(200))
    )


def link(name, target="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda name, files: files.update(
                {f"package/img/{name}/64/0001.png": link(f"package/img/{name}/64/0001.png")}
            ),
            "no plain file",
        ),
        (
            lambda name, files: files.update({f"package/img/{name}/64/0001.png": b"no picture"}),
            "expected a PNG",
        ),
        (lambda name, files: files.update({"package/emoji.json": b"[1, 2"}), "expected emoji.json"),
        (
            lambda name, files: files.update({"package/emoji.json": b'[{"name": "X"}]'}),
            "expected emoji.json",
        ),
        (lambda name, files: files.pop("package/emoji.json"), "expected emoji.json"),
        (
            lambda name, files: [files.pop(k) for k in list(files) if k.endswith(".png")],
            "expected images",
        ),
    ],
)
def test_a_spoiled_archive_is_one_line(tmp_path, change, words):
    with pytest.raises(UserError, match=words) as e:
        load(packages(tmp_path / "bad", change))
    assert "\n" not in str(e.value)


def test_paths_out_of_the_archive_are_nothing_and_other_files_one_line(tmp_path, data, monkeypatch):
    def change(name, files):
        files["package/../../evil.png"], files["/tmp/evil/emoji.json"] = b"x", b"x"
        files[f"package/img/{name}/64/../../evil.png"] = b"x"

    assert torch.equal(
        load(
            packages(tmp_path / "a" / "b" if (tmp_path / "a").mkdir() is None else None, change)
        ).images,
        data.images,
    )
    assert [p.name for p in tmp_path.rglob("*") if "evil" in p.name] == []
    for archive in (tmp_path / "a" / "b").iterdir():
        archive.write_bytes(b"not a tar")
    with pytest.raises(UserError, match="expected a .tgz of npm, found something else"):
        load(tmp_path / "a" / "b")
    with pytest.raises(UserError, match="found neither"):
        load(tmp_path / "nothing")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm pack emoji-datasource-google: expected the package"):
        load(None)


def test_an_unpacked_folder_gives_the_same(tmp_path, source, data):
    for name in SETS:
        with tarfile.open(source / f"emoji-datasource-{name}-16.0.0.tgz") as tar:
            for member in tar:
                path = tmp_path / f"emoji-datasource-{name}" / member.name.removeprefix("package/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
    again = load(tmp_path)
    order = lambda d: sorted(range(len(d.base)), key=lambda i: (d.style[i], d.base[i], d.skin[i]))
    assert (
        torch.equal(again.images[order(again)], data.images[order(data)])
        and again.names == data.names
    )


SMALL = [
    "--batch",
    "4",
    "--vae-width",
    "8",
    "8",
    "8",
    "--width",
    "16",
    "16",
    "16",
    "--text-width",
    "16",
]


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    """A teacher of two iterations."""
    out = tmp_path_factory.mktemp("emoji")
    for stage in ("vae", "unet", "classifier", "save"):
        more = ["--cfg", "2"] if stage == "save" else ["--iters", "2", *SMALL]
        main(["emoji", stage, "--source", str(source), "--out", str(out), *more])
    return out


def test_the_folder_is_a_pipeline_of_diffusers_and_a_teacher(folder, tmp_path, data):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder / "teacher")
    pipe.set_progress_bar_config(disable=True)
    assert (
        pipe("red heart", num_inference_steps=2).images[0].size == (64, 64)
        and (folder / "samples.png").exists()
    )
    assert (
        pipe.tokenizer("red heart").input_ids
        == type(pipe.tokenizer)(
            *(str(folder / "teacher" / "tokenizer" / f) for f in ("vocab.json", "merges.txt")),
            model_max_length=24,
        )("red heart").input_ids
    )
    teacher = load_teacher(str(folder / "teacher"), text=dict(cache=tmp_path / "cache"))
    assert (
        teacher.adapter == "sd15"
        and teacher.shape == (4, 16, 16)
        and teacher.prompts[0] == "red heart"
        and teacher.evaluation["names"] == data.names
    )
    text = pipe.encode_prompt(["red heart", "pizza"], "cpu", 1, False)[0]
    names = models.load_file(folder / "teacher" / "text_encoder" / "model.safetensors")
    assert all(
        k.startswith("text_model.") for k in names
    )  # as in SD's own files: transformers 4 would leave others out
    stored = load(folder, "text_encoder")(tokens(pipe.tokenizer, ["red heart"]))[0]
    assert torch.allclose(text[:1], stored, atol=5e-3)
    assert torch.allclose(
        teacher.encode([0, teacher.prompts.index("pizza")])["text"], text, atol=1e-5
    )
    sampler = lambda m, z, c, noise: teacher_sample(m, z, c, 1)
    result = metrics.evaluate(sampler, teacher, teacher, 70)
    assert (
        result["protocol"] == f"fd emoji-cnn uint8 n=70 seed=0 ref={len(reference(data))}"
        and result["fd"] > 0
        and "precision" in result
    )
    assert 0 <= result["agreement_kind"] <= result["agreement"] <= 1
    # prompts of the user's: only those that are known count
    own = load_teacher(
        str(folder / "teacher"),
        text=dict(prompts=["red heart", "no such thing"], cache=tmp_path / "cache"),
    )
    extractor = ClassifierExtractor(own)
    heart, labels = data.kinds.index("heart"), torch.tensor([0, 1, 0, 1])
    right = extractor.label_agreement(
        torch.tensor([heart, heart, data.kinds.index("food-prepared"), 0]), labels
    )
    assert [right[k].nansum().item() for k in ("agreement", "agreement_kind")] == [1, 1] and right[
        "agreement"
    ].isnan().tolist() == [False, True, False, True]
    assert extractor.label_agreement(torch.tensor([0]), torch.tensor([1])) == {}


def test_the_flow_teacher_shares_text_model_and_autoencoder(folder, source, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    common = ["--source", str(source), "--out", str(folder)]
    main(["flow", *common, "--iters", "2", *SMALL, "--flow-width", "32", "--depth", "2"])
    main(["save", *common, "--net", "flow", "--to", str(tmp_path / "flow"), "--cfg", "2"])
    pipe = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "flow", text_encoder_3=None, tokenizer_3=None
    )
    pipe.set_progress_bar_config(disable=True)
    assert pipe("red heart", num_inference_steps=2).images[0].size == (64, 64)
    teacher = load_teacher(
        str(tmp_path / "flow"), text=dict(prompts=["red heart", "pizza"], cache=tmp_path / "cache")
    )
    assert (
        teacher.adapter == "sd3"
        and teacher.schedule.config == dict(name="flow", shift=2.0)
        and ClassifierExtractor(teacher).protocol == "emoji-cnn"
    )
    said = projected(load(folder, "text_encoder"))(
        tokens(pipe.tokenizer, ["red heart"]), output_hidden_states=True
    )
    text, pooled = teacher.encode([0])["text"], teacher.encode([0])["pooled"]
    assert (
        torch.allclose(text[:, :24], torch.cat([said.hidden_states[-2]] * 2, -1), atol=5e-3)
        and not text[:, 24:].any()
    )
    assert torch.allclose(pooled, torch.cat([said.text_embeds] * 2, -1), atol=5e-3)


@pytest.mark.parametrize("n", [24, 256])
def test_one_token_that_counts_n_times_is_n_equal_tokens(n):
    torch.manual_seed(0)
    net = make_transformer(32, 2, 16)
    for p in net.parameters():  # gates start at zero
        torch.nn.init.normal_(p, std=0.2)
    x, text, pooled = torch.randn(2, 4, 16, 16), torch.randn(2, 24, 32), torch.randn(2, 32)
    ask = lambda zeros: (
        net(
            x,
            encoder_hidden_states=torch.cat([text, torch.zeros(2, zeros, 32)], 1),
            pooled_projections=pooled,
            timestep=torch.tensor([300.0, 700.0]),
        ).sample
    )
    with Repeated(n):
        one = ask(1)
    full = ask(n)
    assert torch.allclose(
        one, full, rtol=1e-3, atol=1e-4 * full.abs().max().item()
    ) and not torch.allclose(ask(1), full, rtol=1e-2, atol=1e-2 * full.abs().max().item())


def test_flow_training_sees_both_numbers_of_zeros_and_goes_on_from_a_teacher(
    folder, source, tmp_path, monkeypatch
):
    out, seen, real = tmp_path / "out", [], Repeated
    shutil.copytree(folder, out)
    make, texts = make_transformer, []

    def watched(*args):
        net = make(*args)
        net.register_forward_pre_hook(
            lambda module, args, kwargs: texts.append(kwargs["encoder_hidden_states"]),
            with_kwargs=True,
        )
        return net

    monkeypatch.setattr(training, "make_transformer", watched)
    monkeypatch.setattr(training, "Repeated", lambda n: seen.append(n) or real(n))
    small = [
        "flow",
        "--source",
        str(source),
        "--out",
        str(out),
        *SMALL,
        "--flow-width",
        "32",
        "--depth",
        "1",
    ]
    main([*small, "--iters", "2"])
    assert seen == [256, 24] and all(
        t.shape[1] == 25 and not t[:, -1].any() and t[:, :-1].abs().sum(2).all() for t in texts
    )  # what counts more often is the zeros
    shutil.copytree(out, tmp_path / "first")
    before = load(tmp_path / "first", "transformer").state_dict()
    main([*small, "--iters", "1", "--lr", "1e-12", "--start", str(tmp_path / "first")])
    after = load(out, "transformer").state_dict()
    assert all(torch.allclose(after[k], v, atol=1e-6) for k, v in before.items())
    main([*small, "--iters", "1", "--lr", "1e-12", "--seed", "1"])
    assert not all(
        torch.allclose(load(out, "transformer").state_dict()[k], v, atol=1e-3)
        for k, v in before.items()
    )


def test_agreement_of_the_category_forgives_a_neighbour(folder, tmp_path, data):
    teacher = load_teacher(
        str(folder / "teacher"),
        text=dict(prompts=["dog face", "woman farmer with medium dark skin"], cache=tmp_path),
    )
    hand = data.kinds.index("hand")  # of the farmer's category
    right = ClassifierExtractor(teacher).label_agreement(
        torch.tensor([hand, hand]), torch.tensor([0, 1])
    )
    assert right["agreement"][1] == 1 and right["agreement_kind"][1] == 0


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(groups=[0]), "groups: expected"),
        (dict(stages=0), "stages: expected"),
        (dict(labels="../labels.json"), "labels: expected"),
        (dict(kinds="x"), "kinds: expected"),
    ],
)
def test_a_spoiled_evaluation_is_one_line(folder, tmp_path, change, words):
    shutil.copytree(folder / "teacher", tmp_path / "t")
    info = read_json(tmp_path / "t" / "teacher.json")
    info["evaluation"] |= change
    write_json(tmp_path / "t" / "teacher.json", info)
    with pytest.raises(UserError, match=words):
        load_teacher(
            str(tmp_path / "t"), text=dict(prompts=["red heart"], cache=tmp_path / "cache")
        )


def test_labels_and_features_are_checked(folder, tmp_path):
    write_json(tmp_path / "labels.json", {"red heart": 99})
    with pytest.raises(UserError, match="expected a number below 5, found '99'"):
        read_prompt_classes(tmp_path / "labels.json", ["red heart"], 5)
    fid.save_stats(tmp_path / "s.npz", np.zeros(4), np.eye(4), 9, "p", torch.ones(9, 3))
    with pytest.raises(UserError, match="features float16"):
        fid.load_stats(tmp_path / "s.npz")
    fid.save_stats(
        tmp_path / "s.npz", np.zeros(4), np.eye(4), 9, "p", torch.full((9, 4), torch.inf)
    )
    with pytest.raises(UserError, match="nan or inf"):
        fid.load_stats(tmp_path / "s.npz")


def test_a_training_that_was_cut_off_goes_on_as_if_it_had_not_been(
    folder, source, tmp_path, monkeypatch
):
    flags = ["unet", "--source", str(source), "--iters", "4", *SMALL, "--save-minutes", "0"]
    one, two = tmp_path / "one", tmp_path / "two"
    for out in (one, two):
        shutil.copytree(folder / "vae", out / "vae")
    main([*flags, "--out", str(one)])
    pick, calls = pick, []

    def cut_off(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pick(*args)

    monkeypatch.setattr(training, "pick", cut_off)
    with pytest.raises(KeyboardInterrupt):
        main([*flags, "--out", str(two)])
    main([*flags, "--out", str(two), "--resume"])
    assert len(calls) == 5  # two, the one that was cut off, and the last two
    for part in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        a, b = (models.load_file(out / part) for out in (one, two))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_training_goes_on_from_a_teacher_s_folder(folder, source, tmp_path):
    shutil.copytree(folder / "vae", tmp_path / "vae")
    flags = [
        "unet",
        "--source",
        str(source),
        "--out",
        str(tmp_path),
        "--iters",
        "1",
        *SMALL,
        "--lr",
        "1e-9",
        "--start",
    ]
    main([*flags, str(folder / "teacher")])
    for part in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        a, b = (
            {
                k.removeprefix("text_model."): v.float()
                for k, v in models.load_file(out / part).items()
            }
            for out in (tmp_path, folder / "teacher")
        )
        assert set(a) == set(b) and all(torch.allclose(a[k], b[k], atol=1e-6) for k in b)
    with pytest.raises(UserError, match="--start, .*nothing: tokenizer: expected"):
        main([*flags, str(tmp_path / "nothing")])
    for file in (
        "vocab.json",
        "merges.txt",
    ):  # the words of the teacher's, whatever a tokenizer trained on this machine would know
        assert (tmp_path / "tokenizer" / file).read_bytes() == (
            folder / "teacher" / "tokenizer" / file
        ).read_bytes()


def test_some_kinds_can_be_drawn_more_often(data):
    more = factors(data, ["Food & Drink=4", "food-prepared=2.5"])
    assert factors(data, ["pizza=3"]).tolist() == [
        3 if "pizza" in nouns else 1 for nouns in data.nouns
    ]
    kinds, food = (
        data.kind == data.kinds.index("food-prepared"),
        data.label == data.names.index("Food & Drink"),
    )
    assert (
        kinds.any()
        and (more[kinds] == 10).all()
        and (more[food & ~kinds] == 4).all()
        and (more[~food] == 1).all()
    )
    draw = lambda more: torch.cat(
        [pick(BatchRandom(0, it, 1), data, more) for it in range(2000)]
    )  # one at a time: a batch has no image twice
    share = lambda index: food[index].float().mean().item()
    weight = data.weight * ~data.held
    expected = (weight * more * food).sum() / (weight * more).sum()
    assert share(draw(more)) == pytest.approx(expected.item(), abs=0.04) and share(
        draw(1.0)
    ) == pytest.approx((weight * food).sum().item() / weight.sum().item(), abs=0.04)
    for wrong in (
        "food=2",
        "Food & Drink",
        "Food & Drink=0",
        "Food & Drink=-1",
        "Food & Drink=nan",
        "=2",
    ):
        with pytest.raises(UserError, match="--more .*expected NAME=FACTOR"):
            factors(data, [wrong])


@pytest.mark.parametrize("stage", ["unet", "flow", "classifier"])
def test_only_teachers_are_trained_on_what_more_says(stage, folder, source, tmp_path, monkeypatch):
    out, seen, real = tmp_path / "out", [], pick
    shutil.copytree(folder, out)
    monkeypatch.setattr(
        training,
        "pick",
        lambda draw, data, more=None: (
            seen.append(more) or real(draw, data, 1.0 if more is None else more)
        ),
    )
    main(
        [
            stage,
            "--source",
            str(source),
            "--out",
            str(out),
            "--iters",
            "1",
            *SMALL,
            "--more",
            "Food & Drink=4",
        ]
    )
    data = load(source)
    assert len(seen) == 1 and (
        seen[0] is None
        if stage == "classifier"
        else torch.equal(seen[0], factors(data, ["Food & Drink=4"]))
    )


def test_images_with_captions_for_losses_that_need_them(source, tmp_path, data):
    main(["images", "--source", str(source), "--out", str(tmp_path)])
    found = read_captions(tmp_path / "images")
    assert [int(path.stem) for path, _ in found] == reference(data).tolist()
    for path, text in found:
        i = int(path.stem)
        assert any(noun in text for noun in data.nouns[i]) and all(
            tone in text for tone in data.skin[i]
        )
        assert np.array_equal(np.asarray(Image.open(path)), data.images[i].permute(1, 2, 0))


@pytest.mark.slow
def test_a_student_of_it_is_trained_resumed_and_measured(folder, source, scripts, tmp_path):
    """The path of a text-to-image user: the teacher's own prompts, embeddings and latents of images kept on disk, a GAN loss, export, metrics."""
    scripts.load(*pipelines.MODULES)
    main(["images", "--source", str(source), "--out", str(tmp_path)])
    args = [
        "--teacher",
        folder / "teacher",
        "--data",
        tmp_path / "images",
        "--cache-prompts",
        tmp_path / "cache",
        "--gan",
        "--nfe",
        2,
        "--cfg",
        3,
        "--batch",
        4,
    ]
    scripts.run("dmd2.py", *args, "--smoke", "--out", tmp_path / "run")
    found = read_json(tmp_path / "run" / "metrics.json")
    assert (
        found["fd"] > 0
        and found["n"] == 64
        and 0 <= found["agreement_kind"] <= found["agreement"] <= 1
        and 0 <= found["coverage"] <= 1
    )
    scripts.run(
        "dmd2.py",
        *args,
        "--iters",
        4,
        "--log-every",
        1,
        "--eval-n",
        64,
        "--resume",
        "--out",
        tmp_path / "run",
    )
    assert read_json(tmp_path / "run" / "metrics.json")["it"] == 4
    p = scripts.run(
        "eval.py",
        tmp_path / "run",
        "--n",
        70,
        "--cache-prompts",
        tmp_path / "cache",
        "--out",
        tmp_path / "e.jsonl",
    )
    best = [
        "--best-of",
        2,
        "--teacher-nfe",
        1,
        "--cfg",
        1,
        "--n",
        8,
        "--batch",
        8,
        "--cache-prompts",
        tmp_path / "cache",
        "--out",
        tmp_path / "b.jsonl",
    ]
    assert "teacher best-of-2 run" in scripts.run("eval.py", tmp_path / "run", *best).out
    (tmp_path / "p.txt").write_text("red heart\nno such thing\n")
    assert (
        "found 'no such thing'"
        in scripts.run(
            "eval.py", tmp_path / "run", *best, "--prompts", tmp_path / "p.txt", code=2
        ).err
    )
    assert "agreement_kind" in p.out and json.loads((tmp_path / "e.jsonl").read_text())[
        "protocol"
    ].startswith("fd emoji-cnn uint8 n=70")


class Exact(torch.nn.Module):
    """Answers with `answer` of what the network is given, times in its own units."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, t=None, text=None, timestep=None, **kw):
        return type("Out", (), dict(sample=self.answer(x, t if timestep is None else timestep)))


@pytest.mark.parametrize("stage", ["unet", "flow"])
def test_losses_are_zero_for_the_exact_answer_and_weighted_as_said(
    folder, source, tmp_path, monkeypatch, stage
):
    x0, abar = (
        torch.linspace(-1, 1, 4 * 16 * 16).view(1, 4, 16, 16),
        make_scheduler().alphas_cumprod,
    )
    monkeypatch.setattr(training, "encode", lambda vae, images: x0.expand(len(images), -1, -1, -1))
    kept = {}

    def fit(name, nets, loss, *rest):
        kept.update(nets=nets, loss=loss)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", fit)
    for part in ("vae", "tokenizer", "text_encoder"):
        shutil.copytree(folder / part, tmp_path / part)
    with pytest.raises(KeyboardInterrupt):
        main(
            [
                stage,
                "--source",
                str(source),
                "--out",
                str(tmp_path),
                *SMALL,
                "--flow-width",
                "32",
                "--depth",
                "1",
                "--batch",
                "16",
            ]
        )

    def eps(x, t, error=0.0):
        a = abar[t].view(-1, 1, 1, 1)
        snr = a / (1 - a)
        return (x - a.sqrt() * x0) / (1 - a).sqrt() + error * (
            snr / (snr + 0.3).clamp(max=5)
        ).sqrt()

    velocity = lambda x, t, error=0.0: (x - x0) / (t.view(-1, 1, 1, 1) / 1000) + error
    answer, net = (eps, "unet") if stage == "unet" else (velocity, "transformer")
    for error, expected in ((0.0, 0.0), (0.5, 0.25)):
        kept["nets"][net] = Exact(lambda x, t: answer(x, t, error))
        assert kept["loss"](BatchRandom(0, 0, 16), 0).item() == pytest.approx(expected, abs=1e-4)


def test_flow_times_are_shifted_towards_noise(folder, source, monkeypatch, tmp_path):
    times = []
    monkeypatch.setattr(
        training, "make_transformer", lambda *a: Exact(lambda x, t: times.append(t / 1000) or x)
    )

    def fit(name, nets, loss, *rest):
        nets["transformer"].config = type("C", (), dict(joint_attention_dim=32))
        for it in range(60):
            loss(BatchRandom(0, it, 16), it)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", fit)
    monkeypatch.setattr(
        training,
        "pipeline",
        lambda *a: type(
            "P", (), dict(encode_prompt=lambda self, *a, **k: (torch.zeros(1, 280, 1),) * 4)
        )(),
    )
    with pytest.raises(KeyboardInterrupt):
        main(
            [
                "flow",
                "--source",
                str(source),
                "--out",
                str(folder),
                *SMALL,
                "--batch",
                "16",
                "--shift",
                "3",
            ]
        )
    assert torch.cat(times).median().item() == pytest.approx(0.75, abs=0.03)  # 3 / 2 / (1 + 2 / 2)


def test_loss_of_the_autoencoder(source, tmp_path, monkeypatch):
    """For a decoder that is wrong by 0.4 on the left half, and latents of mean 2 and variance exp(-3)."""

    class Vae(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.quant_conv = torch.nn.Conv2d(1, 8, 1)

    def fit(name, nets, loss, *rest):
        vae = nets["vae"]
        assert vae.quant_conv.bias[4:].eq(-6).all()
        wrong = torch.zeros(64)
        wrong[:32] = 0.4
        del vae.quant_conv
        vae.encoder = lambda x: setattr(vae, "seen", x)
        vae.quant_conv = lambda h: torch.cat(
            [torch.full((4, 4, 16, 16), 2.0), torch.full((4, 4, 16, 16), -3.0)], 1
        )
        vae.post_quant_conv = lambda z: z.std().item()
        vae.decoder = lambda spread: (
            vae.seen + wrong if 0.15 < spread < 0.3 else None
        )  # exp(-1.5) = 0.22
        found.append(loss(BatchRandom(0, 0, 4), 0).item())
        raise KeyboardInterrupt

    found = []
    monkeypatch.setattr(training, "make_vae", lambda width: Vae())
    monkeypatch.setattr(training, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        main(["vae", "--source", str(source), "--out", str(tmp_path), "--batch", "4"])
    kl = 0.5 * (2**2 + np.exp(-3) - 1 + 3)
    assert found[0] == pytest.approx(0.2 + 0.08 + 0.5 * 0.4 / 63 + 1e-4 * kl, abs=1e-5)


def test_standardised_latents_decode_to_the_same_images():
    torch.manual_seed(0)
    vae, images = (
        make_vae((8, 8, 8)).eval(),
        torch.randint(0, 256, (14, 3, 64, 64), dtype=torch.uint8),
    )
    for p in (vae.quant_conv.bias, vae.post_quant_conv.bias):
        torch.nn.init.normal_(p)
    with torch.no_grad():
        before = vae.encode(images.float() / 127.5 - 1).latent_dist
        picture, std = (
            vae.decode(before.mode()).sample,
            encode(vae, images[::7]).std((0, 2, 3)).view(1, -1, 1, 1),
        )
        standardise(vae, images)
        after = vae.encode(images.float() / 127.5 - 1).latent_dist
        z = encode(vae, images[::7])
        assert torch.allclose(
            vae.decode(after.mode()).sample, picture, atol=1e-4
        ) and torch.allclose(after.std * std, before.std, rtol=1e-4)
    assert z.mean((0, 2, 3)).abs().max() < 1e-4 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-4


# ---- what is shipped --------------------------------------------------------------------------------------------------------------------------


def test_the_shipped_teacher_draws_what_it_is_told(tmp_path):
    """In plain diffusers, seen by the shipped classifier; our loader finds the same folder by its name."""
    from diffusers import StableDiffusionPipeline

    teacher, prompts = (
        load_teacher("emoji", text=dict(cache=tmp_path)),
        ["red heart", "dog face", "flag of france", "woman farmer with medium dark skin"],
    )
    pipe = StableDiffusionPipeline.from_pretrained(teacher.folder)
    pipe.set_progress_bar_config(disable=True)
    assert (
        teacher.folder == ROOT / "assets" / "emoji"
        and teacher.prompts[0] == "red heart"
        and teacher.dtype == torch.float32
    )
    images = pipe(
        prompts,
        num_inference_steps=12,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    extractor = ClassifierExtractor(teacher)
    _, logits = extractor.net(
        torch.from_numpy((images * 255).round().astype("uint8")).permute(0, 3, 1, 2)
    )
    assert [extractor.teacher.evaluation["kinds"][i] for i in logits.argmax(1)] == [
        "heart",
        "animal-mammal",
        "country-flag",
        "person-role",
    ]
    sizes = [
        f.stat().st_size
        for part in ("unet", "vae", "text_encoder")
        for f in (teacher.folder / part).glob("*.safetensors")
    ]
    assert sum(sizes) <= 12e6


def test_the_shipped_flow_teacher_draws_what_it_is_told(tmp_path):
    """The same for its sibling in SD3's format: in plain diffusers, which has no third text encoder to load."""
    from diffusers import StableDiffusion3Pipeline

    teacher, prompts = (
        load_teacher("emoji-flow", text=dict(cache=tmp_path)),
        ["red heart", "dog face", "flag of france", "smiling face with sunglasses"],
    )
    pipe = StableDiffusion3Pipeline.from_pretrained(
        teacher.folder, text_encoder_3=None, tokenizer_3=None
    )
    pipe.set_progress_bar_config(disable=True)
    assert (
        teacher.adapter == "sd3"
        and teacher.folder == ROOT / "assets" / "emoji-flow"
        and teacher.prompts == load_teacher("emoji", text=dict(cache=tmp_path)).prompts
    )
    images = pipe(
        prompts,
        num_inference_steps=12,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    extractor = ClassifierExtractor(teacher)
    _, logits = extractor.net(
        torch.from_numpy((images * 255).round().astype("uint8")).permute(0, 3, 1, 2)
    )
    assert [extractor.teacher.evaluation["kinds"][i] for i in logits.argmax(1)] == [
        "heart",
        "animal-mammal",
        "country-flag",
        "face-glasses",
    ]
    sizes = [
        f.stat().st_size
        for part in ("transformer", "vae", "text_encoder", "text_encoder_2")
        for f in (teacher.folder / part).glob("*.safetensors")
    ]
    assert sum(sizes) <= 12e6
