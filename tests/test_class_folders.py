"""data/class_folders.py: labels of class folders, matched by name with the teacher's classes."""

import json
import shutil
import unicodedata
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.teachers.load import load_teacher
from data.class_folders import SPLITS, class_folders, index_synsets, simplify
from data.image_folder import read_captions
from data.images import load_images
from tools.measure import list_images

DIGITS = "zero one two three four five six seven eight nine".split()


def quiet(line):
    pass


def write(home, *names, n=1):
    """A folder with n images in a subfolder of each name -> home."""
    for name in names:
        (home / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.new("L", (8, 8), 99).save(home / name / f"{i}.png")
    return home


def teacher(classes, *names):
    """A teacher that knows these names: a str, or a list of synonyms, for each class."""
    synonyms = [[name] if isinstance(name, str) else name for name in names]
    return SimpleNamespace(classes=classes, class_names=lambda: synonyms)


def labels(home, teacher):
    """-> {name of a folder: its label}, as the files have them; and the line that says it."""
    lines = []
    files, found, names = class_folders(home, teacher, lines.append)
    result = {path.parent.name: int(label) for path, label in zip(files, found, strict=True)}
    assert list(result) == names  # in the order of the labels
    assert list(result.values()) == sorted(result.values())
    return result, lines[0]


def refusal(home, teacher):
    with pytest.raises(UserError) as e:
        class_folders(home, teacher, quiet)
    assert str(e.value).startswith(f"--data {home}: expected")
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- numbers -------------------------------------------------------------------------------------


def test_numbers_are_the_labels(tmp_path):
    home = write(tmp_path / "set", *map(str, range(12)))
    expected = {str(i): i for i in range(12)}
    assert labels(home, teacher(12))[0] == expected
    assert labels(home, None)[0] == expected  # a new teacher: by value, not '1', '10', '11', '2'


def test_a_few_numbers_of_many(tmp_path):
    home = write(tmp_path / "set", "007", "300", "42")
    found, line = labels(home, teacher(1000))
    assert found == {"007": 7, "42": 42, "300": 300}
    assert line == f"{home}: labels (3 of 1000 classes): 007 -> 7, 42 -> 42, 300 -> 300"


def test_numbers_out_of_range(tmp_path):
    home = write(tmp_path / "set", *map(str, range(1, 11)))
    says = refusal(home, teacher(10))
    assert (
        "numbered from 0 to 9; found 1 of 10 that are neither: '10'; matched: 1 -> 1, 2 -> 2"
        in says
    )


def test_a_number_that_is_a_name_is_a_name(tmp_path):
    """A teacher of the classes 3, 5, 8: folder 5 has label 1, and there is no class 0."""
    known = teacher(3, "3", "5", "8")
    assert labels(write(tmp_path / "a", "5", "008"), known)[0] == {"5": 1, "008": 2}
    assert "(3, 5, 8)" in refusal(write(tmp_path / "b", "0"), known)


def test_one_number_twice(tmp_path):
    home = write(tmp_path / "set", "7", "07")
    for t in (teacher(10), None):
        assert "found '07' and '7' for the same" in refusal(home, t)


def test_many_classes(tmp_path):
    """More than fit into a byte."""
    names = [f"c{i:03d}" for i in range(300)]
    home = write(tmp_path / "set", *names)
    assert labels(home, None)[0] == {name: i for i, name in enumerate(names)}
    assert labels(home, teacher(300, *names))[0]["c299"] == 299
    shutil.rmtree(home / "c000")
    assert labels(home, teacher(300, *names))[0]["c299"] == 299
    line = labels(home, teacher(300, *names))[1]
    assert line.endswith("c007 -> 7, c008 -> 8, ..., c299 -> 299")


# ---- names ---------------------------------------------------------------------------------------


def test_names_of_the_teacher(tmp_path):
    home = write(tmp_path / "set", *DIGITS)
    found, _ = labels(home, teacher(10, *DIGITS))
    assert found == {name: i for i, name in enumerate(DIGITS)}


@pytest.mark.parametrize(
    "name, label",
    [
        ("Great_White-Shark", 0),
        ("great white shark, white shark", 0),
        ("white shark", 0),
        ("Tench", 1),
        ("Tinca_tinca", 1),
        (unicodedata.normalize("NFD", "café"), 2),
        ("C++", 3),
        ("c", 4),
    ],
)
def test_synonyms_and_spelling(name, label, tmp_path):
    known = teacher(
        5,
        ["great white shark, white shark", "great white shark", "white shark"],
        ["tench", "Tinca tinca"],
        "café",
        "C++",
        "c",
    )
    assert labels(write(tmp_path / "set", name), known)[0] == {name: label}


def test_a_name_of_two_classes(tmp_path):
    known = teacher(3, "crane", "tench", "crane")
    says = refusal(write(tmp_path / "a", "Crane", "tench"), known)
    assert "'Crane' (the name of classes [0, 2]: use the number); matched: tench -> 1" in says
    assert labels(write(tmp_path / "b", "2", "tench"), known)[0] == {"tench": 1, "2": 2}


def test_a_typo(tmp_path):
    says = refusal(write(tmp_path / "set", "tenhc", "goldfish"), teacher(2, "tench", "goldfish"))
    assert "named like the teacher's classes (tench, goldfish), or numbered from 0 to 1" in says
    assert "'tenhc', did you mean tench?; matched: goldfish -> 1" in says


def test_two_folders_of_one_class(tmp_path):
    says = refusal(write(tmp_path / "set", "cat", "Cat_"), teacher(2, "cat", "dog"))
    assert "one subfolder per class, found 'Cat_' and 'cat' for the same" in says


def test_names_that_the_teacher_cannot_know(tmp_path):
    """All of its classes have one order; of some of them nobody knows which."""
    home = write(tmp_path / "set", "bear", "apple", "cat")
    assert labels(home, teacher(3))[0] == dict(apple=0, bear=1, cat=2)
    says = refusal(home, teacher(4))
    assert "numbered from 0 to 3; found 3 of 3 that are neither: 'apple'; 'bear'; 'cat'" in says
    assert "at most 2 class subfolders" in refusal(home, teacher(2))
    write(home, "3")
    assert "matched: 3 -> 3" in refusal(home, teacher(4))  # numbers and other names


def test_names_must_be_as_many_as_classes(tmp_path):
    says = refusal(write(tmp_path / "set", "a"), teacher(3, "a", "b"))
    assert "names for its 3 classes, found 2" in says


def test_simplify():
    assert simplify("  A__b-c ") == "a b c"
    assert simplify("000") == "0"
    assert simplify("+") == "+"  # nothing would be left


# ---- ImageNet ------------------------------------------------------------------------------------


def test_the_list_of_synsets():
    """Known labels of three (0, 217, 482), and the rule: the place in sorted order."""
    synsets = index_synsets()
    assert len(synsets) == 1000
    assert list(synsets) == sorted(synsets)
    assert list(synsets.values()) == list(range(1000))
    assert [synsets[name] for name in ("n01440764", "n02102040", "n02979186")] == [0, 217, 482]
    assert synsets["n15075141"] == 999


@pytest.mark.parametrize("known", [(), [f"name {i}" for i in range(1000)]])
def test_some_synsets(known, tmp_path):
    home = write(tmp_path / "set", "n02979186", "n01440764", "n02102040-English_springer")
    expected = {"n01440764": 0, "n02102040-English_springer": 217, "n02979186": 482}
    assert labels(home, teacher(1000, *known))[0] == expected


def test_other_synsets(tmp_path):
    """One of ImageNet's 20,000 others; and the sorted order of 1,000 names is not ImageNet's."""
    says = refusal(write(tmp_path / "a", "n01440764", "n00007846"), teacher(1000))
    assert "named by ImageNet's synsets (n01440764); found 1 of 2" in says
    assert "'n00007846'" in says
    home = write(tmp_path / "b", *(f"class {i}" for i in range(1000)))
    assert "found 1000 of 1000 that are neither" in refusal(home, teacher(1000))
    # nine digits, or a teacher of something else
    assert "n014407640" in refusal(write(tmp_path / "c", "n014407640"), teacher(1000))
    assert "n01440764" in refusal(write(tmp_path / "d", "n01440764"), teacher(10))


# ---- junk ----------------------------------------------------------------------------------------


def add_junk(home):
    """What computers leave in folders; each with something that looks like an image."""
    for name in ("__MACOSX", "@eaDir", ".thumbnails", ".ipynb_checkpoints", "lost+found"):
        write(home, name)
    first = next(path for path in sorted(home.iterdir()) if path.name.isalpha())
    for folder in (home, first):
        (folder / "._0.png").write_bytes(b"\0\5\26\7")
        for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
            (folder / name).write_bytes(b"x")
    write(first, "@eaDir", "__MACOSX")
    return home


def test_junk_is_no_class_and_no_image(tmp_path):
    home = add_junk(write(tmp_path / "set", "apple", "bear"))
    (home / "empty").mkdir()
    (home / "apple" / "a.heic").write_bytes(b"x")
    (home / "b.zip").write_bytes(b"x")
    notes = Counter()
    files, found, names = class_folders(home, None, quiet, notes)
    assert [str(path.relative_to(home)) for path in files] == ["apple/0.png", "bear/0.png"]
    assert found.tolist() == [0, 1]
    assert dict(+notes) == {
        "folders without images": 1,
        "left out (.heic is not read)": 1,
        "left out (.zip is not read)": 1,
    }


def test_junk_is_not_measured(tmp_path):
    home = add_junk(write(tmp_path / "set", "apple", "bear", n=4))
    files = list_images("--images", home)
    assert {path.parent.name for path in files} == {"apple", "bear"}
    assert len(files) == 8


def test_junk_needs_no_captions(tmp_path):
    home = add_junk(write(tmp_path / "set", "apple"))
    (home / "apple" / "0.txt").write_text("an apple")
    assert read_captions(home) == [(home / "apple" / "0.png", ["an apple"])]


def test_images_beside_the_class_folders(tmp_path):
    home = write(tmp_path / "set", "a", "b")
    write(tmp_path, "set", n=5)
    notes = Counter()
    files, _, names = class_folders(home, teacher(2), quiet, notes)
    assert len(files) == 2
    assert notes["left out beside the class folders"] == 5


def test_no_class_folders(tmp_path):
    home = write(tmp_path, "set", n=3) / "set"
    for t in (None, teacher(1), teacher(0)):
        files, found, names = class_folders(home, t, quiet)
        assert (len(files), found.tolist(), names) == (3, [0, 0, 0], ["set"])
    says = refusal(home, teacher(10))
    assert "a subfolder for each of the 10 classes of this teacher, found 3 images" in says


@pytest.mark.parametrize("names", [["train", "test"], ["Train", "val"], ["train"]])
def test_parts_of_a_download(names, tmp_path):
    home = tmp_path / "set"
    for name in names:
        write(home / name, "cat", "dog")
    for t in (None, teacher(2), teacher(2, "cat", "dog")):
        says = refusal(home, t)
        assert "the parts of a download" in says
        assert f"choose one: --data {home / sorted(names)[0]}" in says
    assert labels(home / names[0], teacher(2, "cat", "dog"))[0] == dict(cat=0, dog=1)


def test_a_class_may_be_called_train(tmp_path):
    home = write(tmp_path / "set", "bus", "train")
    assert labels(home, None)[0] == dict(bus=0, train=1)
    home = write(tmp_path / "other", "train")
    assert labels(home, teacher(2, "bus", "train"))[0] == dict(train=1)
    assert "train" in SPLITS


# ---- teachers ------------------------------------------------------------------------------------


def write_digits(home, digits, name, n=20):
    source = load_images(None, load_teacher("mnist"))
    for digit in digits:
        (home / name(digit)).mkdir(parents=True)
        for i, image in enumerate(source.images[source.labels == digit][:n]):
            Image.fromarray(image[0].numpy()).save(home / name(digit) / f"{i:02d}.png")
    return home


def test_some_digits_of_mnist(tmp_path):
    mnist = load_teacher("mnist")
    source = load_images(None, mnist)
    lines = []
    found = load_images(str(write_digits(tmp_path / "set", (3, 4, 5), str)), mnist, lines.append)
    assert found.labels.tolist() == [3] * 20 + [4] * 20 + [5] * 20
    assert torch.equal(found.images[20:40], source.images[source.labels == 4][:20])
    assert lines[0].endswith("labels (3 of 10 classes): 3 -> 3, 4 -> 4, 5 -> 5")
    home = write_digits(tmp_path / "words", (3, 4), DIGITS.__getitem__)
    with pytest.raises(UserError, match="'four'; 'three'; matched: none"):
        load_images(str(home), mnist, quiet)


def test_images_for_a_teacher_of_points(tmp_path):
    with pytest.raises(UserError, match="this teacher's samples are points"):
        load_images(str(write(tmp_path / "set", "0")), load_teacher("toy"), quiet)


@pytest.fixture
def dit(folders, tmp_path):
    """A function: a tiny DiT whose model_index.json has this id2label (None: none)."""

    def make(id2label):
        home = shutil.copytree(folders("dit"), tmp_path / "dit", dirs_exist_ok=True)
        path = home / "model_index.json"
        index = json.loads(path.read_text())
        if id2label is not None:
            index["id2label"] = id2label
        path.write_text(json.dumps(index))
        return load_teacher(str(home), text=dict(cache=tmp_path / "cache", say=quiet))

    return make


def test_names_of_a_pipeline(dit, tmp_path):
    """DiTPipeline has the names of ImageNet's classes, several for one class, with commas."""
    classes = dit(None).classes
    synonyms = {str(i): f"class {i}, name of {i}" for i in range(classes)}
    synonyms["2"] = "tench, Tinca tinca"
    model = dit(synonyms)
    home = write(tmp_path / "set", "tinca-tinca", "Class 1")
    images = load_images(str(home), model, quiet)
    assert images.names == ["Class 1", "tinca-tinca"]
    assert images.labels.tolist() == [1, 2]
    model.evaluation = dict(names=[f"n{i}" for i in range(classes)])  # teacher.json comes first
    assert model.class_names()[2] == ["n2"]
    assert dit(None).class_names() is not None


@pytest.mark.parametrize("id2label", [{"0": "tench"}, {"0": 3}, "tench"])
def test_damaged_names_of_a_pipeline(id2label, dit, tmp_path):
    model = dit(id2label)
    with pytest.raises(UserError, match="model_index.json: id2label: expected a text for each"):
        load_images(str(write(tmp_path / "set", "0")), model, quiet)
