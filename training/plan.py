"""What a run is going to do: lines that are printed before the first step and kept in run.jsonl."""

import re

import torch

from common.files import ROOT
from common.model import Model
from common.teachers.load import default_prompts

LONGEST = 8  # steps that are listed one by one
SOURCES = {  # of the numbers of a preset
    "P": "paper",
    "C": "official code",
    "A": "an author's answer:",
    "T": "others' code:",
    "D": "DMD2's",
    "F": "MeanFlow in FastGen",
    "O": "measured here",
}


def describe_steps(schedule, times):
    """The student's steps. schedule: that of the times. times: float [n], falling, all above 0."""
    times = torch.as_tensor(times)
    ratios = schedule.sigma(times) / schedule.alpha(times)
    return f"{len(times)} at t = {listed(times)}, sigma / alpha = {listed(ratios)}"


def listed(numbers):
    texts = [f"{x:.4g}" for x in numbers.tolist()]
    if len(texts) > LONGEST:
        texts = [*texts[:3], "...", texts[-1]]
    return " ".join(texts)


def describe_run(run, images, networks, facts):
    """-> {name: text}, a line each. images: of the losses, or None. networks: {name: module}.

    facts: guidance and steps, where a script says them better, and more lines by name.
    """
    args = run.args
    guidance = facts.pop("guidance", None) or describe_guidance(args, networks)
    steps = facts.pop("steps", None)
    plan = {
        "preset": f"{args.preset} ({args.preset_from}); source: {spelled_out(args.preset_source)}",
        "teacher lora": ", ".join(lora.argument() for lora in run.loras),
        "guidance, steps": "; ".join(text for text in (guidance, steps) if text),
        "negative prompt": args.negative_prompt and f"{args.negative_prompt!r:.70}",
        "rates": describe_rates(args, networks),
        "batch": describe_batch(run),
        "data": describe_data(args, images, networks),
        "sizes": describe_sizes(networks.get("teacher")),
        "networks": describe_networks(networks),
        "smaller": describe_smaller(networks),
        **facts,
    }
    return {name.replace("_", " "): str(text) for name, text in plan.items() if text}


def spelled_out(source):
    """The source of a preset's numbers, as scripts write it, in words: [P, C] -> paper, official
    code."""

    def words(match):
        return ", ".join(SOURCES.get(letter, letter) for letter in match[1].split(", "))

    text = re.sub(r"\[([A-Z](?:, [A-Z])*)\]", words, source)
    return text.replace("nobody's", "not published")


def describe_guidance(args, networks):
    if args.cfg is None:
        return None
    text = f"w = {args.cfg:g}"
    embedded = embedded_guidance(networks.get("teacher"))
    return text if embedded is None else f"{text}, {embedded:g} as an input of the network"


def embedded_guidance(teacher):
    """Scale that the teacher's network is given (FLUX.1-dev); None for all other teachers."""
    net = getattr(teacher, "net", None)
    has_input = getattr(getattr(net, "config", None), "guidance_embeds", False)
    return teacher.guidance if has_input else None


def describe_rates(args, networks):
    text = f"student {args.lr:g}"
    if args.lr_fake is not None:
        second = [name for name, net in networks.items() if name != "student" and is_trained(net)]
        text += f", {second[0] if second else 'critic'} {args.lr_fake:g}"
    if getattr(args, "ratio", None):
        text += f", ratio {args.ratio}"
    if args.warmup:
        text += f", warm-up {args.warmup}"
    if args.cooldown:
        text += f", cooldown {args.cooldown:g}"
    return text


def describe_batch(run):
    args = run.args
    parts = f" x {args.accumulate} parts" if args.accumulate > 1 else ""
    average = f"average over {args.ema:g} images" if args.ema else "no average"
    return (
        f"{args.batch} = {run.world} process(es) x {run.batch} samples{parts}; "
        f"{args.iters} iterations; {average}"
    )


def describe_data(args, images, networks):
    """Images of the losses and prompts: how many, and where from."""
    found = []
    if images is not None:
        found.append(f"{len(images)} images of {args.data or 'the teacher'}")
    teacher = networks.get("teacher")
    if getattr(teacher, "takes_prompts", False):
        file = args.prompts or default_prompts(teacher.folder)
        if teacher.takes_image:
            file = f"{args.data}, each with an image"
        found.append(f"{len(teacher.prompts)} prompts in {short_path(file)}")
    return "; ".join(found)


def describe_sizes(teacher):
    sizes = getattr(teacher, "sizes", None)
    return f"one of {sizes}, by chance for each iteration" if sizes else None


def short_path(path):
    """Without the folder of this repository."""
    return str(path).removeprefix(f"{ROOT}/")


def is_trained(net):
    return any(p.requires_grad for p in net.parameters())


def describe_networks(networks):
    trained, frozen = [], []
    for name, net in networks.items():
        count = sum(p.numel() for p in net.parameters()) / 1e6
        base = sum(base_weights(net).values()) / 1e6
        text = f"{name} {count:.2f}M"
        if base:
            text += f" (on {base:.2f}M of the teacher's, frozen)"
        (trained if is_trained(net) else frozen).append(text)
    text = f"trained: {', '.join(trained)}"
    return f"{text}; frozen: {', '.join(frozen)}" if frozen else text


def describe_smaller(networks):
    """Of networks that are smaller than the teacher: how much of them starts as it."""
    found = []
    for name, net in networks.items():
        for model in net.modules():
            if isinstance(model, Model) and model.copied_share is not None:
                share = f"{100 * model.copied_share:.3g} %"
                found.append(f"{share} of the {name}'s parameters start as the teacher's")
                break
    return "; ".join(found)


def base_weights(net):
    """Of networks with adapters: sizes of the teacher's weights that they run on, by identity."""
    base = {}
    for model in net.modules():
        if isinstance(model, Model):
            base |= {id(p): p.numel() for p in model.base}
    return base


def is_unguided_by_mistake(args, teacher):
    """Is this a teacher of prompts at w = 1, which its pipeline never is, and nobody asked for?"""
    takes_prompts = getattr(teacher, "takes_prompts", False)
    guided = args.cfg != 1 or embedded_guidance(teacher) is not None
    return takes_prompts and not guided and not args.cfg_given
