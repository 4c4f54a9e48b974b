"""What README promises, run as written; links and paths of all pages."""

import ast
import re

import pytest
import torch
import yaml  # comes with transformers
from helpers import readme
from helpers.cases import SCRIPTS
from helpers.source import FOLDERS, source_files

import dmd2
from common.files import ROOT
from common.teachers.load import load_teacher


def code_blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


CODE_BLOCKS = code_blocks("README.md")  # FULL, then the one that test_sample.py runs
TRAVEL = code_blocks("docs/travel.md")  # LORA, FLOW, and the one of mnist
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "tests/README.md",
    *[f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")],
    *[str(page.relative_to(ROOT)) for page in (ROOT / "assets").rglob("*.md")],
]
EXAMPLES = ["docs/mine.md", "tests/test_mine.py"]  # of CONTRIBUTING.md


def test_a_student_loads_in_plain_diffusers(tmp_path, monkeypatch):
    """The block of mnist, with the embedded teacher saved as a student, makes the images of our own
    sampler."""
    teacher = load_teacher("mnist")
    teacher.copy().save(tmp_path / "out" / "dmd2-mnist" / "student", dict(method="dmd2"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    with torch.no_grad():
        exec(TRAVEL[2], names)

    torch.manual_seed(0)
    z = torch.randn(10, 1, 28, 28)
    cond = teacher.encode(torch.arange(10))
    ours = teacher.decode(dmd2.sample(teacher, z, cond, 1, None))
    difference = (ours.int() - names["images"].int()).abs().max()
    assert difference <= 1  # one grey level: round-off
    assert ours.float().std() > 50  # not an empty image


@pytest.mark.parametrize(
    "block, name", [(CODE_BLOCKS[0], "FULL"), (TRAVEL[0], "LORA"), (TRAVEL[1], "FLOW")]
)
def test_blocks_for_pipelines_are_tested(block, name):
    """They are the code of helpers/readme.py, which tests run on tiny pipelines."""
    assert ast.dump(ast.parse(block)) == ast.dump(ast.parse(getattr(readme, name)))


def test_the_count_of_flops(capsys):
    """The block of docs/scale.md prints the figure of its table, TFLOPs of a pass of SDXL."""
    (block,) = code_blocks("docs/scale.md")
    exec(block, {})
    expected = block.split("# ")[-1].strip()
    assert f"{float(capsys.readouterr().out):.2f}" == expected
    assert f"| SDXL, 1024 px | 2.57B | {expected} |" in (ROOT / "docs" / "scale.md").read_text()


def test_there_is_no_other_block():
    assert len(CODE_BLOCKS) == 2
    assert len(TRAVEL) == 3


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_no_half_of_a_merge_is_left(page):
    assert not re.search(r"^(<{7}|={7}|>{7})( |$)", (ROOT / page).read_text(), re.M)


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page):
    folder = (ROOT / page).parent
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    missing = [link for link in links if not (folder / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    """Paths of this repository in backticks, and modules of `python -m`."""
    text = (ROOT / page).read_text()
    packages = "|".join(FOLDERS)
    paths = re.findall(rf"`((?:{packages}|tests|docs|assets)/[\w/.-]+)`", text)
    for module in re.findall(rf"python -m ((?:{packages})\.[a-z_.]+)", text):
        paths.append(module.replace(".", "/") + ".py")
    missing = [path for path in paths if not (ROOT / path).exists() and path not in EXAMPLES]
    assert not missing


def test_the_assets_page_describes_the_embedded_teacher():
    teacher = load_teacher("mnist")
    page = (ROOT / "assets" / "README.md").read_text()
    parameters = sum(p.numel() for p in teacher.parameters())
    accuracy = teacher.evaluation["held_out_accuracy"]
    assert f"{parameters:,} parameters" in page
    assert f"{accuracy:.1%}" in page
    assert accuracy >= 0.97


def test_the_embedded_teacher_is_small():
    weights = ROOT / "assets" / "mnist" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 8 * 2**20


# ---- papers --------------------------------------------------------------------------------------

ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")


def references():
    """{arXiv id: fields} of docs/references.bib; a field's lines are joined."""
    found = {}
    text = (ROOT / "docs" / "references.bib").read_text()
    for kind, key, body in re.findall(r"@(\w+)\{(\w+),\n(.*?)\n\}", text, re.S):
        fields = re.findall(r"^  (\w+) = \{(.*?)\},$", body, re.M | re.S)
        entry = {name: " ".join(value.split()) for name, value in fields}
        assert entry["eprint"] not in found, f"{key}: {entry['eprint']} is there twice"
        found[entry["eprint"]] = entry | dict(kind=kind, key=key)
    assert len(found) == text.count("\n@")
    return found


def venue(entry):
    """ICML 2024, or arXiv 2025"""
    name = re.search(r"\((\w+)\)$", entry.get("booktitle", ""))
    return f"{name[1] if name else entry.get('journal', 'arXiv')} {entry['year']}"


def test_papers_that_are_named_are_in_the_references():
    """All ids in code and pages, and no entry that nothing names."""
    named = set()
    for path in [*source_files().values(), *(ROOT / page for page in PAGES)]:
        named |= set(ARXIV.findall(path.read_text()))
    assert named == set(references())


def test_references_are_complete():
    for entry in references().values():
        where = dict(inproceedings="booktitle", article="journal", misc="eprint")[entry["kind"]]
        for field in ("title", "author", "year", "eprint", where):
            assert entry.get(field), f"{entry['key']}: {field}"
        assert entry["archiveprefix"] == "arXiv"
        # an id begins with the year and month of its first version
        assert 2000 + int(entry["eprint"][:2]) <= int(entry["year"]), entry["key"]
        assert all(", " in name for name in entry["author"].split(" and ")), entry["key"]
    keys = [entry["key"] for entry in references().values()]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_and_its_page_cite_the_paper_as_published(script):
    """First author, conference and year, in the first lines of both."""
    doc = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text()))
    page = (ROOT / "docs" / f"{script}.md").read_text()
    for text in (doc.split("\n\n")[0], page.split("\n\n")[1].split(" Script: ")[0]):
        entry = references()[ARXIV.search(text)[0]]
        assert entry["author"].split(",")[0] in text
        assert venue(entry) in text
        assert f"{script}.py" in entry["note"]


def test_the_repositorys_own_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    for field in ("cff-version", "message", "title", "authors"):  # what the format demands
        assert citation[field]
    changes = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## (\d[\d.]*)", changes, re.M)
    assert citation["version"] == released[0]
