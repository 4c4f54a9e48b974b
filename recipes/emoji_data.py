"""Emoji images with captions, from the npm packages emoji-datasource-google (Noto, Apache-2.0) and emoji-datasource-twitter (Twemoji, CC BY 4.0): needed only
to train the `emoji` teachers again (common/pretrain_emoji.py). Archives are read into memory, nothing is unpacked.

Unicode's names say what was meant in 1993 ("HEAVY BLACK HEART"), the packages' short names what people type ("heart"): captions use both.
"""

import collections
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from common.errors import UserError

SETS = {"google": "noto", "twitter": "twemoji"}  # package -> the word for its style in captions


OFTEN = dict(
    noto=1.0, twemoji=0.5
)  # how often a style is seen: a prompt that names none is then mostly Noto


SIDE, LARGEST = 64, 2**23  # pixels of an image; bytes of a file that is read


SKIN = {
    "1F3FB": "light",
    "1F3FC": "medium light",
    "1F3FD": "medium",
    "1F3FE": "medium dark",
    "1F3FF": "dark",
}


TEMPLATES = ("{}", "{}", "{} emoji", "a picture of {}", "an emoji of {}")


SAID = {  # by the first short name, where neither name is what people say
    "heart": ["red heart", "heart"],
    "star": ["star", "yellow star"],
    "+1": ["thumbs up"],
    "-1": ["thumbs down"],
    "x": ["cross mark", "red cross"],
    "100": ["hundred points"],
    "o": ["large red ring"],
    "white_check_mark": ["check mark", "green check mark"],
    "v": ["victory hand", "peace sign"],
    "blue_car": ["recreational vehicle", "blue car"],
    "relaxed": ["smiling face"],
    "smiley": ["smiling face with open mouth", "smiley"],
    "phone": ["telephone", "red telephone"],
    "8ball": ["billiards", "eight ball"],
    "flags": ["carp streamer"],
    "dart": ["direct hit", "dart"],
    "shit": ["pile of poo"],
    "hankey": ["pile of poo"],
    "sunny": ["sun", "sun with rays"],
    "zap": ["high voltage", "lightning bolt"],
    "soccer": ["soccer ball", "football ball"],
    "question": ["red question mark", "question mark"],
    "exclamation": ["red exclamation mark", "exclamation mark"],
    "coffee": ["hot beverage", "cup of coffee", "coffee"],
    "hearts": ["heart suit"],
    "spades": ["spade suit"],
    "clubs": ["club suit"],
    "diamonds": ["diamond suit"],
}


def package(source, name):
    """source: None (npm fetches it), a folder with the .tgz, or one with the unpacked package -> dict of path below package/ -> bytes: emoji.json and the PNGs."""
    if source is None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                subprocess.run(["npm", "pack", name], cwd=folder, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as e:
                raise UserError(
                    f"npm pack {name}: expected the package, found: {' '.join(str(e).split())[:200]}; give --source a folder that has it"
                ) from None
            return package(folder, name)
    wanted = lambda path: (
        path == "emoji.json" or re.fullmatch(rf"img/{name.split('-')[-1]}/64/[\w-]+\.png", path)
    )
    archives, folder = sorted(Path(source).glob(f"{name}-*.tgz")), Path(source) / name
    if archives:
        try:
            with tarfile.open(archives[-1], "r:gz") as tar:
                members = [m for m in tar if wanted(m.name.removeprefix("package/"))]
                for m in members:
                    if not m.isfile() or m.size > LARGEST:
                        raise UserError(
                            f"--source {archives[-1]}: {m.name}: expected a file of at most {LARGEST} bytes, found {'more' if m.isfile() else 'no plain file'}"
                        )
                return {m.name.removeprefix("package/"): tar.extractfile(m).read() for m in members}
        except (tarfile.TarError, OSError, EOFError) as e:
            raise UserError(
                f"--source {archives[-1]}: expected a .tgz of npm, found something else ({type(e).__name__})"
            ) from None
    if folder.is_dir():
        paths = [
            p
            for p in folder.glob("**/*")
            if wanted(p.relative_to(folder).as_posix()) and p.is_file() and not p.is_symlink()
        ]
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}
    raise UserError(
        f"--source {source}: expected {name}-VERSION.tgz or a folder {name}, found neither"
    )


def on_white(png, where):
    """PNG file -> uint8 [3, 64, 64], transparent parts white."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            if max(image.size) > 4 * SIDE:
                raise ValueError("too large")
            image = (
                image.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                if image.size != (SIDE, SIDE)
                else image.convert("RGBA")
            )
    except Exception as e:  # pillow's readers raise many kinds for a damaged file
        raise UserError(
            f"{where}: expected a PNG of {SIDE} x {SIDE} pixels, found something else ({type(e).__name__})"
        ) from None
    a = np.asarray(image, np.float32)
    white = a[..., :3] * (a[..., 3:] / 255) + 255 - a[..., 3:]
    return torch.from_numpy(white.round().astype(np.uint8)).permute(2, 0, 1)


def plain(text):
    """Letters, digits and single spaces, lower case."""
    return " ".join(
        re.sub(r"[^a-z0-9]+", " ", text.lower().replace("'", "").replace("’", "")).split()
    )


def nouns(entry, taken):
    """Phrases for an entry of emoji.json, the best first. taken: plain names of all entries; a short name that is another's name ("dog" of DOG FACE) is left out."""
    name, shorts = plain(entry["name"]), entry["short_names"]
    if shorts[0] in SAID:
        return SAID[shorts[0]]
    if (
        entry["category"] == "Flags"
        and (m := re.fullmatch(r"(.+) flag", name))
        and entry["subcategory"] != "flag"
    ):
        return [f"flag of {m[1]}", f"{m[1]} flag"] + (
            [f"flag of the {m[1]}"] if m[1].endswith("s") or "united" in m[1] else []
        )
    if m := re.fullmatch(
        r"(?:negative squared latin capital letter|circled latin capital letter|squared|negative squared) (.+)",
        name,
    ):
        m = re.sub(r"^(cjk unified ideograph|katakana)", "japanese", m[1])
        return [f"{m} button"] + ([f"letter {m} button"] if len(m) == 1 else [])
    if m := re.fullmatch(
        r"(man|woman|person) (red hair|curly hair|white hair|blond hair|beard)", name
    ):
        return [f"{m[1]} with {m[2]}", *map(plain, shorts[:1])]
    if m := re.fullmatch(r"(man|woman|person) bald", name):
        return [f"bald {m[1]}"]
    if m := re.fullmatch(r"clock face (.+)", name):
        return [f"clock at {m[1]}", "clock"]
    words, short = name.split(), plain(shorts[0])
    words = [
        w
        for i, w in enumerate(words)
        if not (
            w in ("heavy", "black", "white", "ornament", "symbol", "sign")
            and w not in short.split()
            and len(words) > 1
        )
    ]
    found = [" ".join(words) or name]
    for s in shorts:
        s = plain(
            re.sub(
                r"^female\b",
                "woman",
                re.sub(r"^male\b", "man", s.replace("_", "-").replace("-", " ")),
            )
        )
        s = s if not re.search(r"\d$", s) else found[0]  # "dog2" is a number among short names
        if len(s) > 2 and s not in found and s not in taken:
            found.append(s)
    return found


def rarity(table):
    """Weight in training of every entry of emoji.json: those that differ in man, woman, boy or girl only weigh as one; flags, many and seldom asked for, half."""
    key = lambda e: (
        e["category"],
        re.sub(
            r"\b(man|woman|person|men|women|people|boy|girl|adult|child) ?", "", plain(e["name"])
        )
        or plain(e["name"]),
    )
    keys = [key(e) if e["category"] == "People & Body" else i for i, e in enumerate(table)]
    count = collections.Counter(keys)
    return [(0.5 if e["category"] == "Flags" else 1.0) / count[k] for e, k in zip(table, keys)]


def held_out(base, skin):
    """Is this skin tone of this person kept from training? One pair of 25, the same in both styles, so that the composition has never been seen."""
    return len(skin) == 1 and hashlib.sha256(f"{base} {skin[0]}".encode()).digest()[0] % 25 == 0


def load(source=None):
    """Both sets -> SimpleNamespace: images uint8 [n, 3, 64, 64]; label int64 [n] (category) and kind int64 [n] (subcategory), names and kinds; nouns: list of lists
    of phrases; skin: list of lists of words; style: list of words; held bool [n]; base: list of Unicode numbers; weight float [n]: how often an image is seen,
    at most 1: all tones of an emoji together weigh half of the emoji (`rarity`, OFTEN)."""
    rows, images = [], []
    for name, style in SETS.items():
        files = package(source, f"emoji-datasource-{name}")
        try:
            table = json.loads(files["emoji.json"])
            table = [e for e in table if e["category"] != "Component"]
            taken = {plain(e["name"]) for e in table}
            for e, often in zip(table, rarity(table)):
                phrases, tones = nouns(e, taken), e.get("skin_variations") or {}
                for skin, variant in [("", e), *tones.items()]:
                    if (path := f"img/{name}/64/{variant['image']}") not in files:
                        continue  # a set lacks some
                    skins = [SKIN[s] for s in skin.split("-") if s]
                    same = 2 * sum(s.count("-") == skin.count("-") for s in tones) if skin else 1
                    rows.append(
                        (
                            e["category"],
                            e["subcategory"],
                            phrases,
                            skins,
                            style,
                            held_out(e["unified"], skins),
                            OFTEN[style] * often / same,
                            e["unified"],
                        )
                    )
                    images.append(on_white(files[path], path))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(
                f"emoji-datasource-{name}: expected emoji.json with name, short_names, category, subcategory and image of each, found {type(e).__name__}: {e}"
            ) from None
        if not images:
            raise UserError(
                f"emoji-datasource-{name}: expected images in img/{name}/64, found none"
            )
    category, kind, phrases, skin, style, held, weight, base = map(list, zip(*rows))
    names, kinds = sorted(set(category)), sorted(set(kind))
    return SimpleNamespace(
        images=torch.stack(images),
        label=torch.tensor([names.index(c) for c in category]),
        kind=torch.tensor([kinds.index(k) for k in kind]),
        names=names,
        kinds=kinds,
        nouns=phrases,
        skin=skin,
        style=style,
        held=torch.tensor(held),
        weight=torch.tensor(weight),
        base=base,
    )


def caption(data, i, u):
    """Caption of image i; u: three uniform numbers that choose the phrase (the first half of the time), the template, and whether the style is said."""
    phrases = data.nouns[i]
    phrase = phrases[0 if u[0] < 0.5 else int((u[0] - 0.5) * 2 * len(phrases))]
    if data.skin[i]:
        skin = f"{' and '.join(dict.fromkeys(data.skin[i]))} skin"
        phrase = f"{phrase} with {skin}" if u[1] < 0.5 else f"{phrase}, {skin}"
    text = TEMPLATES[int(u[1] * 2 % 1 * len(TEMPLATES))].format(phrase)
    return text if u[2] < 0.5 else f"{text}, {data.style[i]} style"
