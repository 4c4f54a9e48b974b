"""Emoji images with captions: the training data of the `emoji` teachers (recipes/emoji_teacher.py).

They come from two packages of npm: emoji-datasource-google (Noto, Apache-2.0) and
emoji-datasource-twitter (Twemoji, CC BY 4.0). Archives are read in memory, nothing is unpacked.

Captions use two kinds of names. Unicode's were given when a character was added ("HEAVY BLACK
HEART"), the short names of the packages are what people type ("heart").
"""

import collections
import dataclasses
import hashlib
import io
import json
import re

import numpy as np
import torch
from PIL import Image

from common.errors import UserError
from recipes.npm import read_package

SIDE = 64  # pixels
STYLES = {"google": "noto", "twitter": "twemoji"}  # end of the package's name -> word in captions
STYLE_WEIGHT = {"noto": 1.0, "twemoji": 0.5}  # captions that name no style mostly show Noto
SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium light",
    "1F3FD": "medium",
    "1F3FE": "medium dark",
    "1F3FF": "dark",
}
TEMPLATES = ("{}", "{}", "{} emoji", "a picture of {}", "an emoji of {}")

# Phrases by first short name, where neither of the names is what people say.
SPOKEN = {
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
BUTTON = (
    r"(?:negative squared latin capital letter|circled latin capital letter"
    r"|squared|negative squared) (.+)"
)
HAIR = r"(man|woman|person) (red hair|curly hair|white hair|blond hair|beard)"
PERSON = r"\b(man|woman|person|men|women|people|boy|girl|adult|child) ?"
PRINTING = ("heavy", "black", "white", "ornament", "symbol", "sign")  # how a glyph was printed


@dataclasses.dataclass
class EmojiSet:
    images: torch.Tensor  # uint8 [n, 3, 64, 64]
    categories: list  # names
    category: torch.Tensor  # int64 [n]
    kinds: list  # names of the subcategories
    kind: torch.Tensor  # int64 [n]
    phrases: list  # [n] lists of phrases, the best first
    skin_tones: list  # [n] lists of words, of no, one or two people
    styles: list  # [n] words
    codes: list  # [n] Unicode numbers of the emoji, without skin tones
    held_out: torch.Tensor  # bool [n], not for training
    weight: torch.Tensor  # float [n] up to 1, how often an image is drawn in training

    def __len__(self):
        return len(self.images)


def load_emoji(source=None):
    """-> EmojiSet of both packages. source: see `read_package`. UserError."""
    rows = []
    for vendor, style in STYLES.items():
        rows += load_vendor(source, vendor, style)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    categories = sorted(set(columns["category"]))
    kinds = sorted(set(columns["kind"]))
    return EmojiSet(
        images=torch.stack(columns["image"]),
        categories=categories,
        category=torch.tensor([categories.index(name) for name in columns["category"]]),
        kinds=kinds,
        kind=torch.tensor([kinds.index(name) for name in columns["kind"]]),
        phrases=columns["phrases"],
        skin_tones=columns["skin_tones"],
        styles=columns["style"],
        codes=columns["code"],
        held_out=torch.tensor(columns["held_out"]),
        weight=torch.tensor(columns["weight"]),
    )


def load_vendor(source, vendor, style):
    """-> list of dicts, one an image of the package."""
    package = f"emoji-datasource-{vendor}"
    wanted = re.compile(rf"emoji\.json|img/{vendor}/64/[\w-]+\.png")
    files = read_package(source, package, wanted)
    rows = []
    try:
        table = [e for e in json.loads(files["emoji.json"]) if e["category"] != "Component"]
        names = {simplify(entry["name"]) for entry in table}
        for entry, weight in zip(table, entry_weights(table)):
            phrases = phrases_of(entry, names)
            for skin, image, share in variants(entry):
                path = f"img/{vendor}/64/{image}"
                if path not in files:  # some are missing in a set
                    continue
                skin_tones = [SKIN_TONES[code] for code in skin.split("-") if code]
                row = dict(
                    image=read_png(files[path], path),
                    category=entry["category"],
                    kind=entry["subcategory"],
                    phrases=phrases,
                    skin_tones=skin_tones,
                    style=style,
                    code=entry["unified"],
                    held_out=is_held_out(entry["unified"], skin_tones),
                    weight=STYLE_WEIGHT[style] * weight / share,
                )
                rows.append(row)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(
            f"{package}: expected emoji.json with name, short_names, category, subcategory and "
            f"image of each, found {type(e).__name__}: {e}"
        ) from None
    if not rows:
        raise UserError(f"{package}: expected images in img/{vendor}/64, found none")
    return rows


def variants(entry):
    """(skin code, name of the image, divisor of its weight) of an emoji and its skin tones.

    Skin codes are "", "1F3FB" for one person or "1F3FB-1F3FF" for two. All tones of one person
    together weigh half of the emoji without tone, and so do all pairs of tones.
    """
    tones = entry.get("skin_variations") or {}
    people = collections.Counter(code.count("-") for code in tones)
    found = [("", entry["image"], 1)]
    for code, variant in tones.items():
        found.append((code, variant["image"], 2 * people[code.count("-")]))
    return found


def read_png(data, where):
    """Bytes of a PNG file -> uint8 [3, 64, 64] on white. UserError."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if max(image.size) > 4 * SIDE:
                raise ValueError("too large")
            image = image.convert("RGBA")
    except Exception as e:  # pillow's readers raise many kinds for a damaged file
        raise UserError(
            f"{where}: expected a PNG of {SIDE} x {SIDE} pixels, found something else "
            f"({type(e).__name__})"
        ) from None
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    rgba = np.asarray(image, np.float32)
    color, alpha = rgba[..., :3], rgba[..., 3:]
    on_white = color * (alpha / 255) + 255 - alpha
    return torch.from_numpy(on_white.round().astype(np.uint8)).permute(2, 0, 1)


# ---- captions ------------------------------------------------------------------------------------


def simplify(text):
    """Lower case, only letters, digits and single spaces."""
    text = text.lower().replace("'", "").replace("’", "")
    return " ".join(re.sub(r"[^a-z0-9]+", " ", text).split())


def phrases_of(entry, names):
    """Phrases for an entry of emoji.json, the best first. names: simplified, of all entries."""
    name, shorts = simplify(entry["name"]), entry["short_names"]
    if shorts[0] in SPOKEN:
        return SPOKEN[shorts[0]]
    if flag := re.fullmatch(r"(.+) flag", name):
        if entry["category"] == "Flags" and entry["subcategory"] != "flag":
            return flag_phrases(flag[1])
    if button := re.fullmatch(BUTTON, name):
        return button_phrases(button[1])
    if hair := re.fullmatch(HAIR, name):
        return [f"{hair[1]} with {hair[2]}", simplify(shorts[0])]
    if bald := re.fullmatch(r"(man|woman|person) bald", name):
        return [f"bald {bald[1]}"]
    if clock := re.fullmatch(r"clock face (.+)", name):
        return [f"clock at {clock[1]}", "clock"]
    return general_phrases(name, shorts, names)


def flag_phrases(country):
    phrases = [f"flag of {country}", f"{country} flag"]
    if country.endswith("s") or "united" in country:
        phrases.append(f"flag of the {country}")
    return phrases


def button_phrases(label):
    label = re.sub(r"^(cjk unified ideograph|katakana)", "japanese", label)
    phrases = [f"{label} button"]
    if len(label) == 1:
        phrases.append(f"letter {label} button")
    return phrases


def general_phrases(name, shorts, names):
    """Unicode's name without words about printing, then short names that add something."""
    words = name.split()
    if len(words) > 1:
        short_words = simplify(shorts[0]).split()
        words = [w for w in words if w not in PRINTING or w in short_words]
    phrases = [" ".join(words) or name]
    for short in shorts:
        short = short.replace("_", " ").replace("-", " ")
        short = re.sub(r"^male\b", "man", short)
        short = simplify(re.sub(r"^female\b", "woman", short))
        if len(short) < 3 or re.search(r"\d$", short):  # "dog2" is the second with this name
            continue
        # another emoji's name is ambiguous, such as "dog" of DOG FACE
        if short not in phrases and short not in names:
            phrases.append(short)
    return phrases


def entry_weights(table):
    """Weight in training of every entry of emoji.json.

    Entries that differ in man, woman, boy, girl and the like only, weigh as much as one. Flags,
    of which there are many, weigh half.
    """
    groups = []
    for i, entry in enumerate(table):
        if entry["category"] == "People & Body":
            name = simplify(entry["name"])
            groups.append(re.sub(PERSON, "", name) or name)
        else:
            groups.append(i)
    sizes = collections.Counter(groups)
    weights = []
    for entry, group in zip(table, groups):
        weight = 0.5 if entry["category"] == "Flags" else 1.0
        weights.append(weight / sizes[group])
    return weights


def is_held_out(code, skin_tones):
    """Whether this skin tone of this emoji is left out of training: one pair in 25, the same in
    both styles, so that the composition is new.
    """
    if len(skin_tones) != 1:
        return False
    return hashlib.sha256(f"{code} {skin_tones[0]}".encode()).digest()[0] % 25 == 0


def make_caption(data, i, u):
    """Caption of image i of an EmojiSet.

    u: three uniform numbers, which choose the phrase (the first one half of the time), the template
    and the form of the skin tone, and whether the style is named.
    """
    phrases = data.phrases[i]
    phrase = phrases[0] if u[0] < 0.5 else phrases[int((u[0] - 0.5) * 2 * len(phrases))]
    if data.skin_tones[i]:
        different = dict.fromkeys(data.skin_tones[i])
        skin = f"{' and '.join(different)} skin"
        phrase = f"{phrase} with {skin}" if u[1] < 0.5 else f"{phrase}, {skin}"
    text = TEMPLATES[int(u[1] * 2 % 1 * len(TEMPLATES))].format(phrase)
    return text if u[2] < 0.5 else f"{text}, {data.styles[i]} style"
