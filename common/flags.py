"""Command-line flags that mean the same in every script."""

import argparse
import os
import re
import sys
from pathlib import Path

from common.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the flags that mean the same in every script, in the groups model / method / optimisation / run."""

    def __init__(self, doc):
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.model, self.method = (
            self.add_argument_group("model"),
            self.add_argument_group("method"),
        )
        self.optim, self.run = (
            self.add_argument_group("optimisation"),
            self.add_argument_group("run"),
        )
        self.model.add_argument(
            "--teacher",
            default="mnist",
            help="toy, toy-cond, mnist; sdxl, sd15, sana, sd3, ... (common/models.py, HUB); a name on the hub; a folder",
        )
        self.model.add_argument(
            "--prompts",
            help="text-to-image: file of prompts, one per line; default assets/prompts.txt",
        )
        self.model.add_argument(
            "--cache-prompts",
            help="folder for their embeddings and for latents of --data, computed once; default out/prompts",
        )
        self.model.add_argument(
            "--size",
            type=parse_size,
            help="pixels along a side, or HEIGHTxWIDTH, if other than what the teacher was built for (pipelines)",
        )
        self.model.add_argument(
            "--frames",
            type=int,
            help="frames of a video, if other than what the teacher's pipeline makes by default (text to video)",
        )
        self.model.add_argument(
            "--cfg",
            type=float,
            help="guidance scale w of the teacher, u + w (c - u); 1 is the plain conditional",
        )
        self.model.add_argument(
            "--embedded-guidance",
            type=float,
            help="guidance scale that FLUX.1-dev, distilled from guidance, is told as an input (3.5); --cfg is on top of it",
        )
        self.model.add_argument("--nfe", type=int, help="network passes of the student per sample")
        self.model.add_argument(
            "--lora",
            type=int,
            metavar="RANK",
            help="train adapters of this rank instead of the student's weights, which stay the teacher's",
        )
        self.model.add_argument(
            "--lora-fake",
            type=int,
            metavar="RANK",
            help="the same for the second network, where there is one",
        )
        self.model.add_argument(
            "--lora-alpha",
            type=float,
            help="the adapters' update is alpha / rank B A; default: the rank",
        )
        self.model.add_argument(
            "--lora-targets",
            nargs="+",
            metavar="NAME",
            help="ends of the names of layers that get adapters; default: attention and feed-forward",
        )
        self.model.add_argument(
            "--data",
            help="images for losses that need them: a folder with one subfolder per class (text-to-image: with captions, .txt or "
            "metadata.jsonl); default: the teacher's own",
        )
        self.optim.add_argument("--iters", type=int, help="iterations of the loop")
        self.optim.add_argument(
            "--batch", type=int, help="global batch: samples per iteration over all processes"
        )
        self.optim.add_argument(
            "--accumulate",
            type=int,
            default=1,
            metavar="N",
            help="sum the gradients of an iteration over N parts of its batch: less memory, the same step (README says where not quite)",
        )
        self.optim.add_argument("--lr", type=float, help="learning rate of the student")
        self.optim.add_argument(
            "--lr-fake", type=float, help="learning rate of the second network, where there is one"
        )
        self.optim.add_argument(
            "--warmup", type=int, default=0, help="iterations of linear warm-up"
        )
        self.optim.add_argument(
            "--cooldown",
            type=float,
            default=0.0,
            help="share of the run, at its end, over which learning rates fall to 0",
        )
        self.optim.add_argument("--clip", type=float, default=10.0, help="gradient norm")
        self.optim.add_argument(
            "--betas", type=float, nargs=2, default=(0.9, 0.999), help="of AdamW, all networks"
        )
        self.optim.add_argument(
            "--weight-decay", type=float, default=0.01, help="of AdamW, all networks"
        )
        self.optim.add_argument(
            "--ema",
            type=float,
            help="half-life of the student's weight average, in images of student updates; 0 is off",
        )
        self.optim.add_argument(
            "--ema-cpu",
            action="store_true",
            help="keep the weight average in the host's memory, updated beside the training",
        )
        self.optim.add_argument(
            "--grad-checkpoint",
            action="store_true",
            help="recompute activations in backward: less memory, about a third more time",
        )
        self.run.add_argument("--out", help="folder of the run; default out/<method>-<teacher>")
        self.run.add_argument(
            "--seed",
            type=int,
            default=0,
            help="of all random numbers; noise and labels depend on (seed, iteration, sample), not on the processes",
        )
        self.run.add_argument("--device", default="auto", help="auto, cpu or cuda")
        self.run.add_argument(
            "--dtype",
            default="auto",
            choices=["auto", "fp32", "bf16"],
            help="of the network passes; weights stay fp32. auto: bf16 on CUDA",
        )
        self.run.add_argument(
            "--deterministic",
            action="store_true",
            help="CUDA: the same bits in every run on the same machine, at some cost in time; CPUs do it anyway",
        )
        self.run.add_argument(
            "--shard",
            action="store_true",
            help="spread weights, gradients and optimiser over the processes (torch's fully_shard) instead of DDP",
        )
        self.run.add_argument("--compile", action="store_true", help="torch.compile the networks")
        self.run.add_argument(
            "--log-every", type=int, default=10, help="iterations between lines of log.jsonl"
        )
        self.run.add_argument(
            "--sample-every",
            type=int,
            default=500,
            help="iterations between sample grids; 0: only at the end",
        )
        self.run.add_argument(
            "--eval-every",
            type=int,
            default=0,
            help="iterations between evaluations of 1,000 samples; 0: only at the end",
        )
        self.run.add_argument(
            "--eval-n", type=int, default=5000, help="samples of the evaluation at the end; 0: none"
        )
        self.run.add_argument(
            "--save-every",
            type=int,
            default=500,
            help="iterations between checkpoints; 0: only at the end",
        )
        self.run.add_argument(
            "--resume", action="store_true", help="continue from the newest checkpoint of --out"
        )
        self.run.add_argument(
            "--overwrite", action="store_true", help="discard a run that is already in --out"
        )
        self.run.add_argument(
            "--smoke",
            action="store_true",
            help="three iterations of everything, then a small evaluation",
        )

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")

    def parse(self, presets, argv=None):
        """Two passes: --teacher picks a preset, which becomes the defaults. Every default can still be overridden."""
        teacher = (
            self.parse_known_args(argv)[0].teacher if "-h" not in (argv or sys.argv) else "mnist"
        )
        name = Path(
            teacher
        ).name  # a folder may be called like a preset; emoji-flow is trained as emoji is
        self.set_defaults(
            **next(
                presets[k]
                for k in (teacher, name, {"emoji-flow": "emoji"}.get(name), "default")
                if k in presets
            )
        )
        args = self.parse_args(argv)
        if args.smoke:
            args.iters, args.log_every, args.sample_every, args.save_every, args.eval_n = (
                3,
                1,
                3,
                3,
                min(args.eval_n, 64),
            )
        for name, given in vars(args).items():
            for value in given if isinstance(given, (list, tuple)) else [given]:
                if (
                    isinstance(value, float)
                    and value != value
                    or isinstance(value, int)
                    and abs(value) >= (2**63 if name == "seed" else 2**31)
                ):
                    raise UserError(
                        f"--{name.replace('_', '-')}: expected a number of ordinary size, found {value}"
                    )
        for name in ("iters", "batch", "accumulate", "nfe", "log_every"):
            if getattr(args, name) < 1:
                raise UserError(
                    f"--{name.replace('_', '-')}: expected at least 1, found {getattr(args, name)}"
                )
        for name in (
            "lr",
            "lr_fake",
            "ema",
            "cfg",
            "embedded_guidance",
            "warmup",
            "weight_decay",
            "sample_every",
            "eval_every",
            "eval_n",
            "save_every",
        ):
            if getattr(args, name) is not None and not 0 <= getattr(args, name) < float("inf"):
                raise UserError(
                    f"--{name.replace('_', '-')}: expected a number >= 0, found {getattr(args, name)}"
                )
        if (
            0 < args.eval_n < max(8, world := int(os.environ.get("WORLD_SIZE", 1)))
        ):  # k = 3 neighbours and a covariance need some
            raise UserError(
                f"--eval-n {args.eval_n}: expected 0 or at least {max(8, world)} samples"
            )
        for name, fine, expected in (
            ("cooldown", 0 <= args.cooldown <= 1, "a share from 0 to 1"),
            ("clip", args.clip > 0, "a number > 0"),
            ("betas", all(0 <= b < 1 for b in args.betas), "two numbers from 0 to below 1"),
        ):
            if not fine:
                raise UserError(f"--{name}: expected {expected}, found {getattr(args, name)}")
        for name, other in (
            ("compile", "neither has been tried with the other"),
            ("ema_cpu", "the average is spread over the processes already"),
            ("lora", "adapters need the teacher's whole weights"),
            ("lora_fake", "adapters need the teacher's whole weights"),
        ):
            if args.shard and vars(args).get(name):
                raise UserError(
                    f"--shard with --{name.replace('_', '-')}: {other}; use one of them"
                )
        if not (args.lora or args.lora_fake) and (args.lora_alpha is not None or args.lora_targets):
            raise UserError(
                "--lora-alpha and --lora-targets mean something only with --lora or --lora-fake"
            )
        if args.lora_alpha is not None and not 0 < args.lora_alpha < float("inf"):
            raise UserError(f"--lora-alpha: expected a number > 0, found {args.lora_alpha}")
        for name, flag in (
            ("lora", "--lora"),
            ("lora_fake", "--lora-fake"),
        ):  # what Model.copy asks for
            if (rank := getattr(args, name)) is not None:
                if rank < 1:
                    raise UserError(f"{flag}: expected a rank of at least 1, found {rank}")
                setattr(
                    args,
                    name,
                    dict(
                        rank=rank,
                        alpha=args.lora_alpha or rank,
                        targets=args.lora_targets,
                        seed=args.seed,
                        flag=flag,
                    ),
                )
        if args.resume and args.overwrite:
            raise UserError(
                "--resume and --overwrite contradict each other: the first keeps the run in --out, the second discards it"
            )
        return args


def parse_size(text):
    """A --size: 512, or HEIGHTxWIDTH -> [height, width]."""
    if not (m := re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)):
        raise argparse.ArgumentTypeError(f"expected pixels, as 512 or HEIGHTxWIDTH, found {text!r}")
    return [int(m[1]), int(m[2] or m[1])]
