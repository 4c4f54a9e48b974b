"""tools/video.py: numbers of made-up videos, animated files; eval.py and sample.py on a student of
Wan."""

import json

import numpy as np
import pytest
import torch
from helpers import scorers
from PIL import Image, ImageSequence

import eval as script
import sample
from common.teachers.load import load_teacher
from tools.pictures import captioned, sample_rows
from tools.scores import DinoExtractor, NoFeatures, TextScore
from tools.video import FrameExtractor, frames_of, key_frames, save_video, temporal_metrics

# ---- numbers -------------------------------------------------------------------------------------


def moving_square(speed, side=4, frames=5, height=8, width=24):
    """A white square on black that moves to the right. uint8 [1, 3, F, H, W]"""
    video = torch.zeros(1, 3, frames, height, width, dtype=torch.uint8)
    for i in range(frames):
        video[:, :, i, 2 : 2 + side, i * speed : i * speed + side] = 255
    return video


def numbers(videos):
    return {name: values.tolist() for name, values in temporal_metrics(videos).items()}


def test_a_still_video_has_neither():
    still = torch.randint(256, (2, 3, 1, 6, 7), dtype=torch.uint8).expand(-1, -1, 4, -1, -1)
    assert numbers(still) == dict(motion=[0, 0], flicker=[0, 0])


@pytest.mark.parametrize("speed", [1, 2])
def test_a_moving_square(speed):
    """Each step its front gains, and its back loses, 4 x speed pixels of 8 x 24."""
    (motion,), (flicker,) = numbers(moving_square(speed)).values()
    assert motion == pytest.approx(2 * 4 * speed / (8 * 24))
    assert flicker == 0


def test_a_square_that_jumps_flickers():
    """It moves by its size: 16 pixels are white in one frame only, and so in all three triples."""
    (motion,), (flicker,) = numbers(moving_square(speed=4)).values()
    assert motion == pytest.approx(2 * 16 / (8 * 24))
    assert flicker == pytest.approx(16 / (8 * 24))


def test_alternating_frames_and_a_ramp():
    """Levels 100 and 151 by turns: both are 0.2. Each frame brighter by 51: no flicker."""
    levels = torch.tensor([[100, 151, 100, 151], [0, 51, 102, 153]], dtype=torch.uint8)
    videos = levels[:, None, :, None, None].expand(-1, 3, -1, 5, 5)
    found = numbers(videos)
    assert found["motion"] == pytest.approx([0.2, 0.2])
    assert found["flicker"] == pytest.approx([0.2, 0])


@pytest.mark.parametrize("frames", [1, 2])
def test_too_few_frames_are_no_division_by_zero(frames):
    (motion,), (flicker,) = numbers(moving_square(1, frames=frames)).values()
    assert flicker == 0
    assert (motion > 0) == (frames == 2)


# ---- files ---------------------------------------------------------------------------------------


def read_frames(path):
    with Image.open(path) as image:
        frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)  # [C, F, H, W]


def test_animated_files(tmp_path):
    """WebP keeps every pixel; GIF shows the same frames in 256 colours."""
    video = moving_square(2)[0]
    save_video(tmp_path / "a.webp", video)
    assert torch.equal(read_frames(tmp_path / "a.webp"), video)
    save_video(tmp_path / "a.gif", video)
    assert torch.equal(read_frames(tmp_path / "a.gif"), video)
    with Image.open(tmp_path / "a.webp") as image:
        image.load()
        assert image.info["loop"] == 0
        assert round(1000 / image.info["duration"]) == 16


def test_grids_of_videos(tmp_path):
    videos = torch.cat([moving_square(1), moving_square(2)])
    sample_rows(tmp_path / "x.webp", [("moves", videos)])
    sheets = read_frames(tmp_path / "x.webp")
    assert len(sheets[0]) == 5
    assert len({sheet.numpy().tobytes() for sheet in sheets.transpose(0, 1)}) == 5
    sample_rows(tmp_path / "x.png", [("moves", videos)])
    rows = key_frames(videos)
    assert torch.equal(rows[1, :, 8:16], videos[1, :, 2])
    with Image.open(tmp_path / "x.png") as image:
        assert image.height > 3 * 8 * 2  # three frames, enlarged

    frames = [[Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(3)]] * 2
    captioned(tmp_path / "y.gif", frames, ["a", "b"], ["", ""])
    assert len(read_frames(tmp_path / "y.gif")[0]) == 3
    captioned(tmp_path / "y.png", frames, ["a", "b"], ["", ""])
    with Image.open(tmp_path / "y.png") as image:
        assert image.getpixel((20, 20)) == (40, 0, 0)  # of the middle


# ---- a student of Wan ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wan(folders, tmp_path_factory):
    """A two-step student, 16 x 24 pixels and 5 frames; the file of its prompts; tiny CLIP, DINO."""
    home = tmp_path_factory.mktemp("wan")
    source = folders("wan")
    (home / "prompts.txt").write_text("a cat\na red ball\n")
    flags = dict(prompts=str(home / "prompts.txt"), size=[16, 24], frames=5)
    teacher = load_teacher(str(source), text=dict(flags, cache=home / "cache"))
    info = dict(method="dmd2", teacher=str(source), nfe=2, cfg=1.0, sampler={}, flags=flags)
    teacher.copy().save(home / "run" / "student", info)
    for name in ("clip", "dino"):
        (home / name).mkdir()
    scorers.clip_model(home / "clip")
    scorers.dino_model(home / "dino")
    return home


def test_frames_are_measured_as_images(wan):
    extractor = DinoExtractor(wan / "dino", "cpu")
    videos = torch.randint(256, (2, 3, 4, 16, 24), dtype=torch.uint8)
    features, _ = FrameExtractor(extractor)(videos)
    assert features.shape == (2, 4, 16)
    alone, _ = extractor(videos[1, :, 2:3].transpose(0, 1))
    assert torch.allclose(features[1, 2], alone[0], atol=1e-5)
    assert torch.equal(frames_of(videos)[6], videos[1, :, 2])
    assert FrameExtractor(NoFeatures("cpu"))(videos)[0].shape == (2, 4, 0)


def test_eval_of_a_student(wan, tmp_path, capsys):
    """Numbers of the saved videos, computed again; the grid moves."""
    flags = [wan / "run", "--n", 8, "--out", tmp_path / "eval.jsonl", "--device", "cpu"]
    flags += ["--cache-prompts", wan / "cache", "--save-images", tmp_path / "videos"]
    flags += ["--dino", wan / "dino", "--per-prompt", 2, "--clip", wan / "clip"]
    flags += ["--grid", tmp_path / "grid.webp", "--teacher-nfe", 1]
    script.main([str(flag) for flag in flags])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])

    files = sorted((tmp_path / "videos").iterdir())
    assert [path.name for path in files] == [f"{i:06d}.webp" for i in range(8)]
    videos = torch.stack([read_frames(path) for path in files])
    assert videos.shape == (8, 3, 5, 16, 24)
    expected = {name: values.mean().item() for name, values in temporal_metrics(videos).items()}
    assert found["motion"] == pytest.approx(expected["motion"], rel=1e-6)
    assert found["flicker"] == pytest.approx(expected["flicker"], rel=1e-6)
    assert found["motion"] > 0
    assert found["distinct"] == 8

    features = DinoExtractor(wan / "dino", "cpu")(frames_of(videos))[0].view(8, 5, 16)
    pairs = torch.cosine_similarity(features[:, 1:], features[:, :-1], dim=2)
    assert found["frame_similarity"] == pytest.approx(pairs.mean().item(), abs=1e-5)
    prompts = [["a cat", "a red ball"][i % 2] for i in range(8) for _ in range(5)]
    scores = TextScore("--clip", wan / "clip", "clip_score", "cpu")(frames_of(videos), prompts)
    assert found["clip_score"] == pytest.approx(scores.mean().item(), abs=1e-4)
    assert 1 <= found["vendi"] <= 2
    assert found["protocol"].startswith("frames dino-")
    assert len(read_frames(tmp_path / "grid.webp")[0]) == 5


def test_compare_of_a_student_and_its_teacher(wan, tmp_path, capsys):
    """Without any model for features: motion beside the teacher's, and an animated picture."""
    flags = [wan / "run", "--n", 8, "--out", tmp_path / "eval.jsonl", "--device", "cpu"]
    flags += ["--cache-prompts", wan / "cache", "--compare", "--teacher-nfe", 2]
    script.main([str(flag) for flag in flags])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [result["method"] for result in results] == ["teacher", "dmd2"]
    assert all(result["motion"] > 0 and "fd" not in result for result in results)
    assert "motion" in (tmp_path / "compare.md").read_text()
    assert len(read_frames(tmp_path / "compare.webp")[0]) == 5


def test_sample_of_a_student(wan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["a cat", "--n", 2, "--seed", 3, "--cache-prompts", wan / "cache", "--dir", "d"]
    sample.main([str(flag) for flag in [wan / "run", *flags, "--out", "x.gif"]])
    sampler = sample.load(wan / "run", cache_prompts=wan / "cache", prompts=["a cat"])
    (video,) = sampler(["a cat"], seed=4)
    assert len(video) == 5
    saved = read_frames(tmp_path / "d" / "a-cat-seed4.webp")
    expected = torch.from_numpy(np.stack([np.array(frame) for frame in video]))
    assert (saved.permute(1, 2, 3, 0).int() - expected.int()).abs().max() <= 1
    assert len(read_frames("x.gif")[0]) == 5
