"""Configuration files of diffusers pipelines: read with the defaults of their classes, and checked.

A teacher class evaluates the network as its pipeline does. Where a value would make the pipeline
compute something else, the run ends before anything is loaded, with a line that names the value:
`Pipeline.expected` lists what is supported. docs/teachers.md has a table of all keys.
"""

import inspect
import math
from types import SimpleNamespace

from common import schedules
from common.errors import UserError
from common.files import read_json

# Values of the scheduler's keys. A key that the class of the scheduler does not have is ignored, as
# by diffusers.
VP_SCHEDULER = dict(
    beta_schedule=["linear", "scaled_linear"],
    trained_betas=[None],
    prediction_type=["epsilon", "v_prediction", "sample"],
    use_flow_sigmas=[False],
    timestep_type=["discrete"],
    thresholding=[False],
    clip_sample=[False],
    variance_type=[None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"],
)
FLOW_SCHEDULER = dict(
    num_train_timesteps=[1000],
    prediction_type=["flow_prediction"],
    use_flow_sigmas=[True],
    invert_sigmas=[False],
    thresholding=[False],
)


# ---- reading -------------------------------------------------------------------------------------


def full_config(kind, folder):
    """Configuration of the diffusers class `kind` in a folder, see `with_defaults`."""
    return with_defaults(kind, read_json(folder / "config.json", "--teacher"))


def with_defaults(kind, config):
    """A configuration of the diffusers class `kind`, with its fields as attributes. config: dict.

    Fields that it, perhaps of an older version, does not have get the defaults of the class.
    """
    parameters = inspect.signature(kind.__init__).parameters
    defaults = {k: p.default for k, p in parameters.items() if p.default is not p.empty}
    return SimpleNamespace(**defaults | config)


def release(version):
    """Of diffusers: "0.8.1.dev0" -> (0, 8)"""
    return tuple(int(part) for part in version.split(".")[:2])


def read_scheduler(folder, index):
    """Configuration of a pipeline's scheduler: a dict with the keys of its class and no others.

    diffusers makes the scheduler, of the class in model_index.json, and fills in its defaults.
    Further entries: `_class_name`, and `last_alpha_cumprod` where it has a table of noise levels:
    alpha^2 at the last step, which schedulers with a zero terminal SNR set to 0 or to 2^-24.
    """
    import diffusers

    kind = getattr(diffusers, index["scheduler"][1])
    scheduler = kind.from_pretrained(folder / "scheduler")
    keys = inspect.signature(kind.__init__).parameters
    config = {key: value for key, value in scheduler.config.items() if key in keys}
    config["_class_name"] = kind.__name__
    if hasattr(scheduler, "alphas_cumprod"):
        config["last_alpha_cumprod"] = float(scheduler.alphas_cumprod[-1])
    return config


# ---- checking ------------------------------------------------------------------------------------


def check_configurations(name, cls, scheduler, net, vae):
    """UserError that names the first value that the teacher class does not support.

    scheduler: dict of read_scheduler. net, vae: of full_config.
    """
    check_scheduler_class(name, scheduler, cls.expected["scheduler"])
    check_values(name, "scheduler/scheduler_config.json", scheduler, cls.expected["scheduler"])
    check_values(name, f"{cls.part}/config.json", vars(net), cls.expected.get("network", {}))
    if scheduler.get("rescale_betas_zero_snr") and scheduler["prediction_type"] == "epsilon":
        raise UserError(
            f"--teacher {name}: scheduler/scheduler_config.json: rescale_betas_zero_snr: expected "
            "false with prediction_type epsilon, found true; the noise in pure noise says nothing "
            "about the image"
        )
    if getattr(net, "quantization_config", None):
        raise UserError(
            f"--teacher {name}: {cls.part}/config.json: quantization_config: expected weights in "
            "fp32, bf16 or fp16, found quantised ones, which cannot be trained"
        )
    check_channels(name, cls, net, vae)


def check_scheduler_class(name, scheduler, expected):
    """A scheduler of a flow has a time shift, one of DDPM's noise levels has betas."""
    if "invert_sigmas" in expected:
        fits = is_flow_matching(scheduler) or "flow_shift" in scheduler
        examples = (
            "FlowMatchEulerDiscreteScheduler, or DPMSolverMultistepScheduler with flow sigmas"
        )
    else:
        fits = "beta_schedule" in scheduler and "last_alpha_cumprod" in scheduler
        examples = "DDIMScheduler, EulerDiscreteScheduler or another with beta_schedule"
    if not fits:
        raise UserError(
            f"--teacher {name}: scheduler: expected {examples}, found {scheduler['_class_name']}"
        )


def is_flow_matching(scheduler):
    return scheduler["_class_name"].startswith("FlowMatch") and "shift" in scheduler


def check_values(name, path, config, expected):
    """config: dict. expected: {key: values that it may have}; absent keys are not checked."""
    for key, allowed in expected.items():
        value = config.get(key, allowed[0])
        if (list(value) if isinstance(value, tuple) else value) not in allowed:
            words = " or ".join("null" if v is None else str(v).lower() for v in allowed)
            raise UserError(
                f"--teacher {name}: {path}: {key}: expected {words}, found {str(value)[:80]!r}"
            )


def check_channels(name, cls, net, vae):
    """The network's input and output are the VAE's latents, the VAE's are RGB images."""
    names = ("in_channels", "out_channels", "input_channels")
    rgb = dict.fromkeys(names, [cls.pixel_channels(vae)])
    check_values(name, "vae/config.json", vars(vae), rgb)

    path = f"--teacher {name}: {cls.part}/config.json"
    latents = cls.latent_channels(vae)
    expected = cls.input_channels(latents)
    if net.in_channels != expected:
        raise UserError(
            f"{path}: in_channels: expected {expected} for the {latents} channels of the VAE, "
            f"found {net.in_channels}; networks that take an image as a further input are not "
            "supported"
        )
    allowed = cls.output_channels(net)
    if getattr(net, "out_channels", allowed[0]) not in allowed:
        words = " or ".join("null" if v is None else str(v) for v in allowed)
        raise UserError(f"{path}: out_channels: expected {words}, found {net.out_channels}")


# ---- schedules -----------------------------------------------------------------------------------


def vp_schedule(scheduler):
    """Schedule of DDPM's noise levels. scheduler: dict of read_scheduler."""
    last = scheduler["last_alpha_cumprod"] if scheduler.get("rescale_betas_zero_snr") else None
    return schedules.VP(
        scheduler["num_train_timesteps"],
        scheduler["beta_start"],
        scheduler["beta_end"],
        scheduler["beta_schedule"],
        last_alpha2=None if last is None else max(last, schedules.VP.PURE_NOISE),
    )


def flow_schedule(scheduler, tokens=None, mu=None):
    """Flow schedule with the pipeline's time shift. scheduler: dict of read_scheduler.

    Dynamic shifting, for a number of image tokens: the shift is exp(mu), mu linear in the number.
    tokens: None for pipelines that have no dynamic shifting. mu: of pipelines that compute it in
    another way.
    """
    if not (scheduler.get("use_dynamic_shifting") and (tokens or mu)):
        return schedules.Flow(
            float(scheduler["shift" if is_flow_matching(scheduler) else "flow_shift"])
        )
    if mu is None:
        # Schedulers without these keys get the values that pipelines of diffusers assume.
        low_tokens = scheduler.get("base_image_seq_len", 256)
        high_tokens = scheduler.get("max_image_seq_len", 4096)
        low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        mu = low + (high - low) * (tokens - low_tokens) / (high_tokens - low_tokens)
    if scheduler.get("time_shift_type") == "linear":
        return schedules.Flow(mu)
    return schedules.Flow(math.exp(mu))
