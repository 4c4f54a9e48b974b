"""A folder with a subfolder of images per class -> labels, matched by the subfolders' names.

The order of the folders says nothing: '10' sorts before '2', and a subset starts in the middle of
the teacher's classes. What cannot be matched is refused.
"""

import re
import unicodedata
from collections import Counter

import torch

from common.errors import UserError, did_you_mean
from common.files import ROOT
from data.image_folder import existing_folder, image_files, is_image, is_junk, trusted_root

SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
SYNSET = re.compile(r"n\d{8}(?!\d)")  # of WordNet: n01440764, also at the start of a longer name
SHOWN = 8  # names in a message


def class_folders(folder, teacher=None, say=print, notes=None):
    """-> image files, their labels int64 [N], the names of the folders in the order of the labels.

    teacher: gives `classes` and `class_names()`. A folder has the label of the class with its name
    (capitals, _ and - do not matter), the place of its synset n01440764 among the 1,000 of
    ImageNet, or the number that is its name. Names that the teacher cannot know are numbered in
    sorted order, if there are as many as classes. None: a new teacher, whose classes they become.
    A folder without subfolders is one class, label 0. say: prints the labels. notes: Counter.
    """
    folder = existing_folder(folder)
    notes = Counter() if notes is None else notes
    files_of, beside = group_files(folder, notes)
    if beside and not files_of:
        return one_class(folder, beside, teacher)
    if beside:
        notes["left out beside the class folders"] += len(beside)

    names = list(files_of)
    labels = new_labels(folder, names) if teacher is None else known_labels(folder, names, teacher)
    names.sort(key=labels.get)
    if names:
        of_how_many = f" ({len(names)} of {teacher.classes} classes)" if teacher else ""
        say(f"{folder}: labels{of_how_many}: {show_mapping(names, labels)}")
    files = [path for name in names for path in files_of[name]]
    rows = [labels[name] for name in names for _ in files_of[name]]
    return files, torch.tensor(rows, dtype=torch.int64), names


def group_files(folder, notes):
    """-> {name of a subfolder: its images}, images that are in no subfolder."""
    root = trusted_root(folder)
    files_of, beside = {}, []
    for path in sorted(folder.iterdir()):
        if is_junk(path.name):
            continue
        if not path.is_dir():
            beside += [path] if is_image(path, notes, root) else []
            continue
        files = image_files(path, notes, root)
        if files:
            files_of[path.name] = files
            notes["class folders that are links"] += path.is_symlink()
        else:
            notes["folders without images"] += 1
    return files_of, beside


def one_class(folder, files, teacher):
    if teacher is not None and teacher.classes > 1:
        raise UserError(
            f"--data {folder}: expected a subfolder for each of the {teacher.classes} classes of "
            f"this teacher, found {len(files)} images and no subfolder with images"
        )
    return files, torch.zeros(len(files), dtype=torch.int64), [folder.name]


def show_mapping(names, labels):
    shown = [f"{name} -> {labels[name]}" for name in names]
    if len(shown) > SHOWN + 1:
        shown[SHOWN:-1] = ["..."]
    return ", ".join(shown)


# ---- labels --------------------------------------------------------------------------------------


def new_labels(folder, names):
    """{name: label} for a teacher to be: places in the sorted list, by value if all are numbers."""
    check_splits(folder, names)
    if all(is_number(name) for name in names):
        names = sorted(names, key=int)
        check_distinct(folder, {name: int(name) for name in names})
    return {name: label for label, name in enumerate(names)}


def known_labels(folder, names, teacher):
    """{name: label} for a teacher's classes; UserError if one has no label, or two the same."""
    classes = max(teacher.classes, 1)
    known = teacher.class_names()
    if known and len(known) != classes:
        raise UserError(
            f"--data {folder}: expected, in the teacher's own files, names for its {classes} "
            f"classes, found {len(known)}"
        )
    exact = index_names(known)
    simple = index_names([map(simplify, synonyms) for synonyms in known])
    synsets = index_synsets() if classes == 1000 else {}
    has_numbers = any(is_number(name) for synonyms in known for name in synonyms)

    labels, problems = {}, {}
    for name in names:
        found = exact.get(name) or simple.get(simplify(name)) or []
        synset = SYNSET.match(name)
        if len(found) == 1:
            labels[name] = found[0]
        elif synset and synset[0] in synsets:
            labels[name] = synsets[synset[0]]
        elif is_number(name) and int(name) < classes and not has_numbers:
            labels[name] = int(name)
        else:
            problems[name] = found

    if problems:
        check_splits(folder, names)
        if len(names) > classes:
            raise UserError(
                f"--data {folder}: expected at most {classes} class subfolders for this teacher, "
                f"found {len(names)}: {', '.join(names[:SHOWN])}"
            )
        # A teacher that knows no names: nothing to compare, but a complete set has one order
        is_complete = len(names) == classes and not known and not synsets
        if not is_complete or labels or any(map(is_number, names)):
            raise unmatched(folder, problems, labels, known, classes)
        labels = {name: label for label, name in enumerate(names)}
    check_distinct(folder, labels)
    return labels


def unmatched(folder, problems, labels, known, classes):
    """UserError that shows what was not matched, what would be, and what was.

    problems: {name: labels of the classes that have this name, fewer or more than one}.
    """
    fitting = [f"numbered from 0 to {classes - 1}"]
    if classes == 1000:
        fitting.append("named by ImageNet's synsets (n01440764)")
    if known:
        first = ", ".join(synonyms[0] for synonyms in known[:SHOWN])
        dots = ", ..." if classes > SHOWN else ""
        fitting.insert(0, f"named like the teacher's classes ({first}{dots})")
    known_names = {simplify(name) for synonyms in known for name in synonyms}
    found = []
    for name, owners in list(problems.items())[:SHOWN]:
        hint = f" (the name of classes {owners}: use the number)"
        if not owners:
            hint = "" if is_number(name) else did_you_mean(simplify(name), known_names)
        found.append(repr(name) + hint)
    if len(problems) > SHOWN:
        found.append("...")
    matched = show_mapping(sorted(labels, key=labels.get), labels) or "none"
    return UserError(
        f"--data {folder}: expected subfolders {', or '.join(fitting)}; found "
        f"{len(problems)} of {len(problems) + len(labels)} that are neither: {'; '.join(found)}; "
        f"matched: {matched}"
    )


def check_splits(folder, names):
    if names and all(name.lower() in SPLITS for name in names):
        raise UserError(
            f"--data {folder}: expected a folder of class folders, found the parts of a download "
            f"({', '.join(names)}); choose one: --data {folder / names[0]}"
        )


def check_distinct(folder, labels):
    """labels: {name: anything}. UserError if two names have the same."""
    first = {}
    for name, label in labels.items():
        other = first.setdefault(label, name)
        if other != name:
            raise UserError(
                f"--data {folder}: expected one subfolder per class, found {other!r} and {name!r} "
                "for the same"
            )


# ---- names ---------------------------------------------------------------------------------------


def is_number(name):
    return name.isascii() and name.isdigit()


def simplify(name):
    """A name without capitals, punctuation and leading zeros; accents in one form (macOS has two).

    'Great_White-Shark' -> 'great white shark', '007' -> '7'.
    """
    if is_number(name):
        return str(int(name))
    text = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"[\W_]+", " ", text).strip() or text


def index_names(names):
    """{name: labels of the classes that have it}. names: of each class, in the order of labels."""
    index = {}
    for label, own in enumerate(names):
        for name in set(own):
            index.setdefault(name, []).append(label)
    return index


def index_synsets():
    """{synset: label} of ImageNet's 1,000 classes: the label is the place in the sorted list."""
    synsets = (ROOT / "assets" / "imagenet_synsets.txt").read_text().split()
    return {synset: label for label, synset in enumerate(synsets)}


def read_synonyms(id2label, classes, where):
    """Synonyms of each class from DiT's id2label, {"0": "tench, Tinca tinca", ...}; {} -> []."""
    try:
        names = [id2label[str(label)] for label in range(classes if id2label else 0)]
        # the whole text too: class folders may be called so
        return [[name, *(part.strip() for part in name.split(","))] for name in names]
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{where}: id2label: expected a text for each class from 0 to {classes - 1}"
        ) from None
