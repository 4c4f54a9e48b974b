"""tools/page.py and tools/svg.py: the page is read again by a parser; no browser."""

import base64
import html.parser
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from helpers.cases import SCRIPTS
from PIL import Image

from common.errors import UserError
from tools import page as page_module
from tools.page import alarms_of, band_of, healthy, main, read_run, spread_evenly
from tools.svg import HEIGHT, LEFT, MOST_POINTS, WIDTH, curves, number, thinned
from training.alarm import FIGURES

EVIL = "<script>alert(1)</script>\"&'"
VOID = {"meta", "img", "input", "br"}


class Page(html.parser.HTMLParser):
    """Tags in order with their attributes, text by tag; fails for tags that do not fit."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += f"{data}\n"

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def make_run(home, method="dmd2", teacher="mnist", lines=12, grids=(1, 10, 20), **flags):
    """A folder as a run of dmd2 leaves it, with numbers that are made up."""
    (home / "samples").mkdir(parents=True)
    flags = dict(teacher=teacher, iters=200, clip=10.0, cfg=1.5, ratio=3, lr=1e-3) | flags
    start = dict(first=0, flags=flags, method=method, revision="abc123", date="2026-11-29")
    start |= dict(versions=dict(torch="2.13.0"), command=["dmd2.py", "--iters", "200"])
    start["plan"] = dict(preset="mnist", data="prompts in x" if teacher == "sdxl" else "")
    (home / "run.jsonl").write_text(json.dumps(start) + "\n")
    log = []
    for i in range(lines):
        line = dict(it=10 * i, images=640 * i, skipped=0, lr=1e-3, dm=0.5 + 0.01 * i)
        line |= dict(fake=None if i == 4 else 0.3, alarms=[], time=dict(seconds=i))
        if i % 2 == 0:
            line |= dict(diversity=0.2, contrast=1.0, shift=0.0)
        log.append(json.dumps(line) + "\n")
    (home / "log.jsonl").write_text("".join(log))
    for it in grids:
        Image.new("L", (70, 40), it).save(home / "samples" / f"{it:08d}.png")
    result = dict(it=200, nfe=1, fd=15.83, recall=0.5, n=5000, protocol="fd mnist-cnn")
    (home / "eval.jsonl").write_text(json.dumps(result) + "\n")
    return home


def made(tmp_path, *runs):
    out = tmp_path / "page.html"
    main([*map(str, runs), "--out", str(out)])
    return out.read_text()


# ---- the page ------------------------------------------------------------------------------------


def test_a_page_is_whole_and_needs_no_network(tmp_path):
    text = made(tmp_path, make_run(tmp_path / "run"))
    found = Page(text)
    addresses = [a[key] for _, a in found.tags for key in ("src", "href") if key in a]
    assert addresses
    assert all(address.startswith("data:image/") for address in addresses)
    assert "://" not in text
    (policy,) = [a["content"] for a in found.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    for heading in ("Alarms", "Pictures", "Metrics", "Curves", "What ran", "Next"):
        assert f"<h2>{heading}</h2>" in text


def test_what_ran_and_what_to_do_next(tmp_path):
    run = make_run(tmp_path / "my run")
    text = Page(made(tmp_path, run)).text
    assert "111 of 200 in the log" in text
    assert "revision abc123" in text
    assert "torch 2.13.0" in text
    assert f"python dmd2.py --resume --out '{run}' --iters N" in text
    assert f"python sample.py '{run}' --labels 0 1" in text
    assert "iters\n200\n" in text  # of all flags


def test_prompts_for_a_text_to_image_teacher(tmp_path):
    text = Page(made(tmp_path, make_run(tmp_path / "run", teacher="sdxl"))).text
    assert '"a prompt"' in text
    assert "--labels" not in text


def test_alarms(tmp_path):
    """Diversity 0.2 from the start: at iteration 20 the first that counts, at 40 the second."""
    run = make_run(tmp_path / "run")
    ((name, it, _, off),) = alarms_of(read_run(run))
    assert (name, it, off) == ("alike", 40, None)
    found = Page(made(tmp_path, run))
    assert [a.get("class") for a in found.all("li")] == ["bad"]
    assert "raise --ratio" in found.text


def test_an_alarm_that_is_off_again(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "log.jsonl", "a") as f:
        f.write(json.dumps(dict(it=120, diversity=0.9)) + "\n")
    ((_, it, _, off),) = alarms_of(read_run(run))
    assert (it, off) == (40, 120)
    assert Page(made(tmp_path, run)).all("li") == [{"class": "past"}]


def test_a_healthy_run_says_so(tmp_path):
    run = make_run(tmp_path / "run", lines=2)
    assert "No alarm in 2 lines of the log." in Page(made(tmp_path, run)).text


def test_pictures_have_a_slider(tmp_path):
    found = Page(made(tmp_path, make_run(tmp_path / "run")))
    images = found.all("img")
    assert [a["data-it"] for a in images] == ["1", "10", "20"]
    assert ["hidden" in a for a in images] == [True, True, False]
    (control,) = found.all("input")
    assert (control["max"], control["value"]) == ("2", "2")
    for image, value in zip(images, (1, 10, 20)):
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)) == value


def test_a_page_of_many_large_pictures_is_small(tmp_path):
    """Noise, which does not compress: 40 grids of 8 pictures of 512 pixels, 7 MB each as PNG."""
    run = make_run(tmp_path / "run", grids=())
    noise = torch.randint(0, 256, (600, 4112, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(run / "samples" / "00000001.png", compress_level=0)
    for it in range(2, 41):
        (run / "samples" / f"{it:08d}.png").hardlink_to(run / "samples" / "00000001.png")
    text = made(tmp_path, run)
    assert len(text) < 5e6
    shown = Page(text).all("img")
    assert len(shown) >= 2
    assert (shown[0]["data-it"], shown[-1]["data-it"]) == ("1", "40")
    picture = Image.open(io.BytesIO(base64.b64decode(shown[0]["src"].split(",")[1])))
    assert picture.width == page_module.WIDEST


def test_a_picture_that_is_none_is_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "samples" / "00000010.png").write_bytes(b"\x89PNG half")
    assert [a["data-it"] for a in Page(made(tmp_path, run)).all("img")] == ["1", "20"]


def test_results_stand_beside_the_teachers(tmp_path):
    text = Page(made(tmp_path, make_run(tmp_path / "run"))).text
    assert "teacher mnist, w = 1.5\n16\n6.71\n" in text
    assert "run, iteration 200\n1\n15.83\n" in text


def test_a_dry_run(tmp_path):
    run = make_run(tmp_path / "run")
    dry = dict(peak=2 * 10**9, at_rest=10**9, parts={EVIL: 5 * 10**8}, tflop_per_iteration=4.34)
    (run / "dryrun.json").write_text(json.dumps(dry))
    found = Page(made(tmp_path, run))
    assert "4.34 TFLOP" in found.text
    assert f"at the peak: {EVIL}" in found.text


def test_two_runs(tmp_path):
    """A curve of each in every panel; a colour and a heading of each in every part."""
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=1e-4)]
    found = Page(made(tmp_path, *runs))
    lines = found.all("polyline")
    # dm; fake, which null cuts in two
    assert [a["stroke"] for a in lines].count(page_module.COLOURS[0]) == len(lines) / 2
    assert found.text.count("\na\n") >= 4


def test_what_a_file_says_is_text(tmp_path):
    """Names, flags, plans, versions, teachers: nothing of them becomes a tag."""
    run = make_run(tmp_path / "run", teacher=EVIL, method=EVIL, prompts=EVIL)
    start = json.loads((run / "run.jsonl").read_text())
    start |= dict(plan={EVIL: EVIL}, versions={EVIL: EVIL}, command=[EVIL], revision=EVIL)
    changed = json.dumps(start | dict(first=10, changed={EVIL: [EVIL, EVIL]}))
    (run / "run.jsonl").write_text(f"{json.dumps(start)}\n{changed}\n")
    line = dict(it=120, **{EVIL: 1.0}, diversity=0.1)
    with open(run / "log.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")
    (run / "eval.jsonl").write_text(json.dumps(dict(it=1, fd=EVIL, protocol=EVIL, n=EVIL)) + "\n")
    found = Page(made(tmp_path, run))
    assert len(found.all("script")) == 1  # the slider's
    assert found.text.count("<script>alert(1)</script>") >= 8


def test_a_run_that_has_just_begun(tmp_path):
    run = make_run(tmp_path / "run", lines=0, grids=())
    (run / "eval.jsonl").unlink()
    text = Page(made(tmp_path, run)).text
    assert "No line in the log yet." in text
    assert "No pictures yet." in text


def test_half_a_line_is_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "log.jsonl", "a") as f:
        f.write('{"it": 120, "dm"')
    assert "111 of 200" in Page(made(tmp_path, run)).text


def test_the_default_place(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    main([str(run)])
    assert capsys.readouterr().out.startswith(f"{run / 'report.html'}, ")
    Page((run / "report.html").read_text())


def test_mistakes(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="expected the folder of a run with run.jsonl"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="expected up to 6 runs, found 7"):
        main([str(run)] * 7)
    with pytest.raises(UserError, match="--out .*: not written"):
        main([str(run), "--out", str(tmp_path / "none" / "x.html")])
    (run / "log.jsonl").write_text('{"it": "x"}\n{"it": 1}\n')
    with pytest.raises(UserError, match="log.jsonl: line 1: expected a JSON object with `it`"):
        main([str(run)])


# ---- healthy values ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts, band",
    [
        (["0.61 (0.53 to 0.66), 0.30; 1.51 at iteration 0"], (0.30, 0.66)),
        (["-0.77 to -0.71"], (-0.77, -0.71)),
        (["0.29", "1e-3"], (1e-3, 0.29)),
        (["not measured"], None),
        (["about 1"], None),
        (["0.16 at the start, 0.08 to 0.12 later"], None),
    ],
)
def test_band(texts, band):
    assert band_of(texts) == band


def test_healthy_values_of_a_page():
    """Rows of two names: the values of the second stand behind "and"."""
    found = healthy("dmd2", "mnist")
    assert band_of(found["dm"][1]) == (0.24, 0.66)
    assert band_of(found["real_gap"][1]) == (0.026, 0.036)
    assert band_of(found["fake_gap"][1]) == (0.024, 0.032)
    assert "raise --ratio" in found["fake_gap"][2].replace("`", "")
    assert healthy("dmd2", "sdxl")["dm"][1] == []
    assert healthy("../README", "mnist") == {}


NOT_ON_MNIST = ("anyflow",)  # it has values of the toy only


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_methods_page_has_healthy_values(script):
    teacher = "toy" if script in NOT_ON_MNIST else "mnist"
    bands = [band_of(values) for _, values, _ in healthy(script, teacher).values()]
    assert sum(band is not None for band in bands) >= 4
    assert all(low <= high for low, high in filter(None, bands))


def test_figures_of_pictures_are_explained_and_have_limits():
    assert set(page_module.figures_of_pictures()) == set(FIGURES)
    assert set(page_module.LIMITS) == set(FIGURES)


# ---- curves --------------------------------------------------------------------------------------


def polylines(svg):
    return [
        [tuple(map(float, p.split(","))) for p in points.split()]
        for points in re.findall(r'<polyline points="([^"]*)"', svg)
    ]


def test_a_curve():
    ((first, middle, last),) = polylines(curves([[(0, 1.0), (50, 2.0), (100, 3.0)]], ["red"]))
    assert first[0] == LEFT
    assert last[0] == WIDTH - 8
    assert middle[0] == pytest.approx((first[0] + last[0]) / 2, abs=0.1)
    assert middle[1] == pytest.approx((first[1] + last[1]) / 2, abs=0.1)
    assert first[1] > last[1]  # up is more
    assert all(0 <= y <= HEIGHT for _, y in (first, middle, last))


def test_a_wide_range_is_logarithmic():
    ((first, middle, last),) = polylines(curves([[(0, 1.0), (1, 10.0), (2, 100.0)]], ["red"]))
    assert middle[1] == pytest.approx((first[1] + last[1]) / 2, abs=0.1)


def test_null_and_nan_break_a_curve():
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 1.0), (4, 1.5), (5, math.nan), (6, 3.0)]
    svg = curves([points], ["red"])
    assert [len(piece) for piece in polylines(svg)] == [2, 2]
    assert svg.count("<circle") == 1
    assert "nan" not in svg


def test_a_band():
    svg = curves([[(0, 0.0), (10, 10.0)]], ["red"], band=(2.5, 5.0))
    y, height = map(
        float, re.search(r'y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', svg).groups()
    )
    ((first, last),) = polylines(svg)
    assert y == pytest.approx((first[1] + last[1]) / 2, abs=0.1)
    assert height == pytest.approx((first[1] - last[1]) / 4, abs=0.1)


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [None], [-1e-9, 1e9], [1e-30, 1.0]])
@pytest.mark.parametrize("band", [None, (0.0, 1.0), (-5.0, 1e12)])
def test_no_values_break_it(values, band):
    svg = curves([list(enumerate(values))], ["red"], band)
    numbers = re.findall(r' (?:x|y|width|height|cx|cy|x1|x2|y1|y2)="([^"]*)"', svg)
    assert all(math.isfinite(float(n)) and float(n) >= -1 for n in numbers)


def test_long_curves_are_thinned():
    points = [(i, float(i)) for i in range(10 * MOST_POINTS + 7)]
    few = thinned(points)
    assert len(few) <= MOST_POINTS + 1
    assert (few[0], few[-1]) == (points[0], points[-1])
    assert spread_evenly(list(range(100)), 4) == [0, 33, 66, 99]


@pytest.mark.parametrize(
    "value, text", [(0.5, "0.5"), (1680.0, "1.7e3"), (8.67e-5, "8.7e-5"), (-0.74, "-0.74")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_the_page_names_no_other_place():
    """What the page loads stands in it."""
    text = Path(page_module.__file__).read_text()
    assert "http://" not in text
    assert "https://" not in text
