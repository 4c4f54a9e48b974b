"""Command-line flags that mean the same in every script."""

import argparse
import math
import os
import re
import sys

from common.errors import require
from common.teachers.kind import FROM_IMAGE, teacher_kind
from common.teachers.sizes import sizes_of
from training.folder import NOT_KEPT, default_folder, flags_of, read_starts


class Help(argparse.RawDescriptionHelpFormatter):
    """--help in 100 columns, with the default of each flag, that of the chosen teacher's preset."""

    def __init__(self, prog):
        super().__init__(prog, width=100, max_help_position=28)

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(action.type, "TEXT")

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default == argparse.SUPPRESS:
            return action.help
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        without = re.sub(r" \[[^\]]*\]$", "", action.help)  # [what holds without a default]
        return f"{without} [{default}]"


def head_and_usage(doc):
    """A script's docstring -> its first paragraph and its paragraph "Usage:", "" if it has none."""
    paragraphs = doc.strip().split("\n\n")
    usage = [text for text in paragraphs if text.startswith("Usage:")]
    return paragraphs[0], "".join(usage[:1])


class Several(argparse.Action):
    """A flag that may be given several times: the list of its values, which replaces the default.

    argparse's own "append" adds to the default, which a resumed run has from its start."""

    class Given(list):
        pass

    def __call__(self, parser, namespace, value, option_string=None):
        earlier = getattr(namespace, self.dest, None)
        earlier = earlier if isinstance(earlier, self.Given) else []
        setattr(namespace, self.dest, self.Given([*earlier, value]))


class Parser(argparse.ArgumentParser):
    """argparse with the common flags, in the groups model, method, optimisation, run and
    dry run.

    A script says which optional parts it has, and gets only the flags that it can use:
    critic: a second trained network. lora_fake: that network may be trained as LoRA (default: as
    critic). images: losses that need images. few_steps: students of more than one step.
    lora: the student may be trained as LoRA or sharded. start: it may begin as another run's.
    small: student and critic may be smaller than the teacher.
    """

    def __init__(
        self,
        doc,
        critic=False,
        images=False,
        few_steps=True,
        lora=True,
        lora_fake=None,
        start=True,
        small=False,
    ):
        head, commands = head_and_usage(doc)
        super().__init__(
            description=head,
            epilog=commands,
            usage="python %(prog)s [--flag value ...]",
            formatter_class=Help,
            allow_abbrev=False,
            add_help=False,  # it stands in the group "run"
        )
        about = "Numbers such as (1) are those of the equations at the top of the script."
        self.model = self.add_argument_group("model")
        self.method = self.add_argument_group("method", about)
        self.optim = self.add_argument_group("optimisation")
        self.run = self.add_argument_group("run")
        self.dry = self.add_argument_group("dry run")
        # what common code reads although the script has no such flag
        self.set_defaults(nfe=1, data=None, lr_fake=None, lora=None, lora_fake=None)
        self.set_defaults(lora_alpha=None, lora_targets=None, shard=False, shard_size=None)
        self.set_defaults(small=None, small_fake=None)
        self.images = images

        add = self.model.add_argument
        add(
            "--teacher",
            metavar="NAME",
            default="mnist",
            help="mnist, toy, emoji, sdxl, ...; a hub name; a folder",
        )
        add_teacher_lora(add)
        if start:
            add(
                "--start",
                metavar="RUN",
                help="start from student and critic of this run [the teacher]",
            )
        add("--cfg", type=float, help="guidance scale w of the teacher in u + w (c - u); 1 is none")
        if few_steps:
            add("--nfe", type=int, help="network passes of the student per sample")
        add(
            "--prompts",
            metavar="FILE",
            help="one a line; a column of a table: FILE.csv:COLUMN [assets/prompts.txt]",
        )
        add_negative_prompt(add)
        add(
            "--cache-prompts",
            metavar="DIR",
            help="folder for embeddings of prompts and latents of images [out/prompts]",
        )
        add(
            "--size",
            type=parse_sizes,
            metavar="PX",
            help="N or HEIGHTxWIDTH; several with commas: one an iteration [the pipeline's]",
        )
        add("--frames", type=int, help="frames of a video [the pipeline's]")
        add("--embedded-guidance", type=float, help="FLUX.1-dev: value of its guidance input [3.5]")
        add(
            "--data",
            metavar="DIR",
            help="images: a subfolder per class, or captions [the teacher's]; edits"
            if images
            else "sources and prompts, of teachers that edit images",
        )
        if lora:
            add(
                "--lora",
                type=int,
                metavar="RANK",
                help="train LoRA adapters of this rank; 0: the whole weights",
            )
            if critic if lora_fake is None else lora_fake:
                add("--lora-fake", type=int, metavar="RANK", help="the same for the critic")
            add(
                "--lora-alpha",
                type=float,
                help="adapters are multiplied by alpha / rank [the rank]",
            )
            add(
                "--lora-targets",
                nargs="+",
                metavar="NAME",
                help="layers with adapters, by the ends of their names [attention, feed-forward]",
            )
        if small:
            add(
                "--small",
                nargs="+",
                metavar="KEY=VALUE",
                help="a student smaller than the teacher: changes to its config.json",
            )
            add("--small-fake", nargs="+", metavar="KEY=VALUE", help="the same for the critic")

        add = self.optim.add_argument
        add("--iters", type=int, help="iterations of the loop")
        add("--batch", type=int, help="samples per iteration, over all processes")
        add(
            "--accumulate",
            type=int,
            default=1,
            metavar="N",
            help="split a batch into N passes, which saves memory",
        )
        add("--lr", type=float, help="learning rate of the student")
        if critic:
            add("--lr-fake", type=float, help="learning rate of the critic or heads")
        add("--warmup", type=int, default=0, help="iterations of linear warm-up")
        add(
            "--cooldown",
            type=float,
            default=0.0,
            help="share of the run, at its end, in which rates fall",
        )
        add("--clip", type=float, default=10.0, help="maximum gradient norm")
        add("--betas", type=float, nargs=2, default=(0.9, 0.999), help="AdamW, all networks")
        add("--weight-decay", type=float, default=0.01, help="AdamW, all networks")
        add("--ema", type=float, help="half-life of the student's average in images; 0: off")
        add("--ema-cpu", action="store_true", help="keep the average in CPU memory")
        add("--grad-checkpoint", action="store_true", help="recompute activations in backward")

        add = self.run.add_argument
        add("--out", metavar="DIR", help="folder of the run [out/<script>-<teacher>]")
        add("--seed", type=int, default=0, help="seed of all random numbers")
        add("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N")
        add(
            "--dtype",
            default="auto",
            choices=["auto", "fp32", "bf16"],
            help="dtype of passes; auto: bf16 on CUDA",
        )
        add("--deterministic", action="store_true", help="CUDA: the same bits in every run")
        if lora:
            add("--shard", action="store_true", help="spread weights over the GPUs (FSDP2)")
            add("--shard-size", type=int, help="processes that share one copy of the weights [all]")
        add("--compile", action="store_true", help="torch.compile the networks")
        add("--log-every", type=int, default=10, help="iterations between lines of log.jsonl")
        add(
            "--sample-every",
            type=int,
            help="iterations between pictures; 0: at the end [a tenth of --iters, 10 to 500]",
        )
        add(
            "--eval-every",
            type=int,
            default=0,
            help="iterations between evaluations with 1000 samples; 0: none",
        )
        add("--eval-n", type=int, default=5000, help="samples of the last evaluation; 0: none")
        add(
            "--save-every",
            type=int,
            help="iterations between checkpoints [a tenth of --iters, 100 to 500]",
        )
        add("--resume", action="store_true", help="continue from the newest checkpoint of --out")
        add("--overwrite", action="store_true", help="discard the run that is in --out")
        add("--smoke", action="store_true", help="three iterations, to see that all parts run")
        add("-h", "--help", action="help", help="print this, with the defaults of --teacher")

        add = self.dry.add_argument
        add(
            "--dry-run",
            action="store_true",
            help="measure memory and work at full size, without a GPU or weights",
        )
        add("--device-memory", type=float, metavar="GB", help="find the largest --batch that fits")
        add("--processes", type=int, help="processes (GPUs) that share the batch [1]")
        add("--tflops", type=float, help="TFLOP/s that a GPU reaches, to estimate the time")

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")

    def parse(self, presets, argv=None, out=None):
        """Flags, with the preset of the teacher's kind as defaults, or, with --resume, the flags of
        the run.

        presets: kind of teacher (common/teachers/kind.py) -> dict of flags, and `source`, where the
        numbers are from. "default" is for all other kinds.
        out: function of the flags, the default of --out; None: see default_folder.
        args.preset, preset_from, preset_source: what was taken and why, for the print at the start.
        """
        argv = sys.argv[1:] if argv is None else argv
        without_help = [a for a in argv if a not in ("-h", "--help")]
        given = self.given(without_help)
        typed = set(given)
        preset = self.use_preset(presets, given)
        if given.get("resume"):
            known = self.parse_known_args(without_help)[0]
            folder = known.out or (out or default_out)(known)
            kept = self.flags_of_run(folder)
            if given.get("nfe", kept.get("nfe")) != kept.get("nfe"):
                kept |= dict.fromkeys(kept.keys() & STEPS)
            given = kept | given
            preset = self.use_preset(presets, given)  # for flags that are newer than the run
            self.set_defaults(**kept | dict(out=str(folder)))
            self.add_opposites()
        args = self.parse_args(argv)
        args.preset, args.preset_from, args.preset_source = preset
        args.cfg_given = "cfg" in given
        args.from_image = self.kind in FROM_IMAGE
        require(
            self.images or args.from_image or not args.data,
            f"--data {args.data}: expected a teacher that takes an image "
            f"({', '.join(FROM_IMAGE)}), found {args.teacher}; this script uses no other images",
        )
        if args.smoke:
            shorten(args)
        if "warmup" not in typed and args.warmup >= args.iters:  # that of a longer run
            args.warmup = args.iters // 10
        if args.sample_every is None:
            args.sample_every = tenth(args.iters, 10)
        if args.save_every is None:
            args.save_every = tenth(args.iters, 100)
        if not (args.lora or args.lora_fake):
            for name in ("lora_alpha", "lora_targets"):  # those of a preset's adapters
                if name not in given:
                    setattr(args, name, None)
        check_flags(args)
        args.lora = lora_spec(args, "--lora", args.lora)
        args.lora_fake = lora_spec(args, "--lora-fake", args.lora_fake)
        args.small = small_spec(args, "--small", args.small)
        args.small_fake = small_spec(args, "--small-fake", args.small_fake)
        return args

    def use_preset(self, presets, given):
        """Takes the preset of the teacher as defaults -> its name, what says so, its source."""
        kind, found = teacher_kind(given.get("teacher", self.get_default("teacher")))
        self.kind = kind
        borrowed = kind not in presets and FROM_IMAGE.get(kind) in presets
        name = FROM_IMAGE[kind] if borrowed else kind
        preset = dict(presets.get(name, presets["default"]))
        source = preset.pop("source", "")
        if borrowed:
            source = f"nobody's: {name}'s"
        if kind not in presets:
            found += f"; {self.prog} has none for {kind}"
        kind = name
        if given.get("nfe", preset.get("nfe")) != preset.get("nfe"):
            for name in STEPS:
                preset.pop(name, None)
        self.set_defaults(**preset)
        return kind if kind in presets else "default", found, source

    def given(self, argv):
        """Flags on the command line, {name: value}, without any defaults."""
        unset = object()
        names = {action.dest for action in self._actions}
        blank = argparse.Namespace(**dict.fromkeys(names, unset))
        found = vars(self.parse_known_args(argv, blank)[0])
        return {name: found[name] for name in names if found[name] is not unset}

    # ---- --resume

    def flags_of_run(self, folder):
        """Flags of the newest start of the run in a folder, {} if none is noted there. UserError
        for values that the flags cannot have: the file may be damaged or somebody else's."""
        starts = read_starts(folder)
        if not starts:
            return {}
        found = flags_of(starts[-1], absolute=False)
        kept = {}
        for action in self._actions:
            name = action.dest
            if name in NOT_KEPT or name not in found:
                continue
            value = found[name]
            if isinstance(value, dict):  # --lora, --small: see lora_spec, small_spec
                value = value.get("rank", value.get("changes"))
            ok = value is None or is_value_of(action, value)
            require(
                ok,
                f"{folder}/run.jsonl: {flag_name(name)}: expected its value, found {value!r:.80}",
            )
            kept[name] = value
        return kept

    def add_opposites(self):
        """--no-NAME for each switch, since a resumed run has the switches of its start."""
        for action in list(self._actions):
            if isinstance(action, argparse._StoreTrueAction) and action.dest not in NOT_KEPT:
                self.add_argument(
                    f"--no-{action.option_strings[0][2:]}",
                    dest=action.dest,
                    action="store_false",
                    default=action.default,
                    help=argparse.SUPPRESS,
                )


def shorten(args):
    """--smoke: flags of three iterations in which every kind of turn and step comes up.

    Iterations 0 and 2 have a student step, and 1 has none if --ratio allows that. At iteration 2
    the critic is no longer the teacher, where the student's gradient may be 0. Scripts shorten
    their own warm-ups and stages.
    """
    args.iters = 3
    args.log_every = 1
    args.sample_every = 2
    args.save_every = 3
    args.eval_n = min(args.eval_n, 64)
    args.warmup = min(args.warmup, 2)
    if "ratio" in args:
        args.ratio = min(args.ratio, 2)


def tenth(iters, least):
    """A tenth of the run's iterations, but not less than `least` and not more than 500."""
    return min(max(iters // 10, least), 500)


STEPS = {"steps", "step_indices"}  # belong to a number of steps: given with --nfe, or left out
AT_LEAST = dict.fromkeys(["iters", "batch", "accumulate", "nfe", "log_every", "shard_size"], 1)
AT_LEAST |= dict.fromkeys(["lr", "lr_fake", "ema", "cfg", "embedded_guidance", "warmup"], 0)
AT_LEAST |= dict.fromkeys(["weight_decay", "sample_every", "eval_every", "save_every", "eval_n"], 0)
NOT_WITH_SHARD = {
    "compile": "neither has been tried with the other",
    "ema_cpu": "the average is spread over the processes already",
    "lora": "adapters need the teacher's whole weights",
    "lora_fake": "adapters need the teacher's whole weights",
}


def check_flags(args):
    """UserError if a common flag is out of range, or if two of them contradict each other."""
    for name, value in vars(args).items():
        check_number(flag_name(name), value, largest=2**63 if name == "seed" else 2**31)
    for name, least in AT_LEAST.items():
        value = getattr(args, name)
        if value is not None:
            expected = f"at least {least}" if least else "a number >= 0"
            ok = least <= value < math.inf
            require(ok, f"{flag_name(name)}: expected {expected}, found {value}")
    # precision and recall need 3 neighbours, a covariance needs a few samples
    least = max(8, int(os.environ.get("WORLD_SIZE", 1)))
    ok = args.eval_n == 0 or args.eval_n >= least
    require(ok, f"--eval-n {args.eval_n}: expected 0 or at least {least} samples")
    ok = 0 <= args.cooldown <= 1
    require(ok, f"--cooldown: expected a share from 0 to 1, found {args.cooldown}")
    require(
        args.warmup < args.iters,
        f"--iters {args.iters}: expected more than --warmup {args.warmup}, or the rates never "
        f"reach --lr; add --warmup {args.iters // 10}",
    )
    require(args.clip > 0, f"--clip: expected a number > 0, found {args.clip}")
    ok = all(0 <= b < 1 for b in args.betas)
    require(ok, f"--betas: expected two numbers from 0 to below 1, found {args.betas}")
    for name, reason in NOT_WITH_SHARD.items():
        both = args.shard and getattr(args, name)
        require(not both, f"--shard with {flag_name(name)}: {reason}; use one of them")
    # a run that is resumed with --no-shard still has its --shard-size
    unused = args.shard_size is not None and not args.shard and not args.resume
    require(not unused, "--shard-size needs --shard")
    alpha = args.lora_alpha
    unused = not (args.lora or args.lora_fake) and (alpha is not None or args.lora_targets)
    require(not unused, "--lora-alpha and --lora-targets need --lora or --lora-fake")
    ok = alpha is None or 0 < alpha < math.inf
    require(ok, f"--lora-alpha: expected a number > 0, found {alpha}")
    scales = {args.cfg}
    for name in ("cfg_range", "cfg_train"):
        scales |= set(getattr(args, name, None) or ())
    ok = args.negative_prompt is None or scales - {None, 1}
    require(ok, f"--negative-prompt: expected --cfg other than 1, {NOT_GUIDED}")
    for lora, small in (("lora", "small"), ("lora_fake", "small_fake")):
        both = getattr(args, lora) and getattr(args, small)
        require(
            not both,
            f"{flag_name(small)} with {flag_name(lora)}: adapters need the teacher's own network; "
            f"use one of them ({flag_name(lora)} 0: none, also where a preset has them)",
        )
    both = args.resume and args.overwrite
    require(not both, "--resume keeps the run in --out, --overwrite discards it: use one of them")
    check_dry_run(args)


def check_dry_run(args):
    """UserError if flags of --dry-run are out of range or contradict others."""
    for name in ("device_memory", "processes", "tflops"):
        value = getattr(args, name)
        flag = flag_name(name)
        require(args.dry_run or value is None, f"{flag} needs --dry-run")
        require(value is None or value > 0, f"{flag}: expected a number > 0, found {value}")
    if not args.dry_run:
        return
    for name in ("resume", "compile"):
        both = getattr(args, name)
        require(not both, f"--dry-run with --{name}: expected a new run without it; leave it out")
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    require(not several, "--dry-run: expected one process; --processes N stands for N of them")


def check_number(name, value, largest):
    """UserError for nan and for integers that no tensor holds, also within lists."""
    if isinstance(value, (list, tuple)):
        for v in value:
            check_number(name, v, largest)
    nan = isinstance(value, float) and math.isnan(value)
    huge = isinstance(value, int) and abs(value) >= largest
    require(not nan and not huge, f"{name}: expected a number of ordinary size, found {value}")


def is_value_of(action, value):
    """Whether a value from a JSON file is one that the flag of an argparse action has."""
    if isinstance(action, argparse._StoreTrueAction):
        return isinstance(value, bool)
    if action.type is parse_sizes:
        return bool(sizes_of(value))
    kinds = {None: str, int: int, float: (int, float)}[action.type]
    several = action.nargs is not None or isinstance(action, Several)
    if several != isinstance(value, list):
        return False
    values = value if several else [value]
    ok = all(isinstance(v, kinds) and not isinstance(v, bool) for v in values)
    return ok and (action.choices is None or value in action.choices)


def lora_spec(args, name, rank):
    """What Model.copy takes to make adapters, as a dict; None without --lora."""
    if not rank:  # 0: whole weights, where a preset has adapters
        return None
    require(rank >= 1, f"{name}: expected a rank of at least 1, found {rank}")
    alpha = args.lora_alpha or rank
    return dict(rank=rank, alpha=alpha, targets=args.lora_targets, seed=args.seed, flag=name)


def small_spec(args, name, changes):
    """What Model.copy takes to make a network of another size, as a dict; None without --small."""
    return dict(changes=list(changes), seed=args.seed, flag=name) if changes else None


def add_teacher_lora(add):
    """--teacher-lora. add: of a parser or a group of it."""
    add(
        "--teacher-lora",
        action=Several,
        metavar="FILE",
        help="LoRA that becomes part of the teacher, FILE or FILE:SCALE; repeatable",
    )


NOT_GUIDED = "where the teacher is not guided and no null condition is used"


def add_negative_prompt(add):
    """--negative-prompt. add: of a parser or a group of it."""
    add(
        "--negative-prompt",
        metavar="TEXT",
        help="text-to-image: of u in u + w (c - u) [the pipeline's null prompt]",
    )


def default_out(args):
    return default_folder(sys.argv[0], args.teacher)


def flag_name(name):
    """A flag as it stands on the command line."""
    return f"--{name.replace('_', '-')}"


def parse_size(text):
    """A --size: 512 or HEIGHTxWIDTH -> [height, width]."""
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected pixels, as 512 or HEIGHTxWIDTH, found {text!r}")
    height, width = match[1], match[2] or match[1]
    return [int(height), int(width)]


def parse_sizes(text):
    """--size of a training: as parse_size, or several of them with commas -> list of them."""
    sizes = [parse_size(part) for part in text.split(",")]
    return sizes[0] if len(sizes) == 1 else sizes
