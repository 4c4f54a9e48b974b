"""How a pipeline of plain diffusers makes the samples of a student: its scheduler and its call.

No method is known here. The student's own sampler runs once with a stub in place of its network,
which records the times of the steps (`trace`). Configurations of diffusers' schedulers that could
have these times are tried on the same stub, and the first one that gives the same samples is taken
(`find_plain`). So what is written beside a student has been compared with its own sampler.
"""

import math

import torch

from common.routed import ByLevel

TOLERANCE = 1e-5  # of samples, relative
ROUNDED = 5.1e-4  # difference of times that were rounded to thousandths
DIFFUSERS_PREDICTION = dict(eps="epsilon", v="v_prediction", x0="sample")


class NotPlain(Exception):
    """A student that plain diffusers cannot sample; its text says why."""


class Trace:
    """What a sampler did with a network. t_max: the last time of the network's schedule.

    steps: a dict for each pass: t, the network's own time; expert, its number; x, the network's
    input [2, *shape]; extra, what is added to its time embedding [2, width], or None.
    z: the unit noise that it began with, sample: what it made, stochastic: it drew further noise.
    """

    def __init__(self, t_max):
        self.t_max = t_max
        self.steps = []
        self.z = None
        self.sample = None
        self.stochastic = False

    @property
    def times(self):
        return [step["t"] for step in self.steps]

    def stub(self, x, t):
        """Stands in for the network: its output for input x at time t, 0-d or [B]."""
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        if t.ndim:
            t = t.view(-1, *[1] * (x.ndim - 1))
        return (x + 2 * t / self.t_max).cos()


@torch.no_grad()
def trace(student, sample, sampler, nfe):
    """Runs `sample` with the stub -> Trace. student: Pipeline, or ByLevel of some.

    sampler: further arguments of `sample`. torch's random numbers are as before afterwards.
    """
    experts = student.experts if isinstance(student, ByLevel) else [student]
    found = Trace(experts[0].schedule.t_max)

    def probe(number, expert):
        """The expert with the stub for its network; all else is shared."""
        model = expert.with_network(expert.net)
        model.extras = expert.extras
        model.dtype = torch.float32

        def predict(x, t, cond):
            extra = model.extra
            step = dict(t=float(t[0]), expert=number, x=x.clone(), extra=extra)
            found.steps.append(step)
            return found.stub(x, t)

        model.predict = predict
        return model

    probes = [probe(i, expert) for i, expert in enumerate(experts)]
    model = ByLevel(probes, student.table) if isinstance(student, ByLevel) else probes[0]
    device = experts[0].device

    def noise():
        found.stochastic = True
        return torch.randn(2, *student.shape).to(device)

    cond = student.encode([0, min(1, student.classes - 1)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found.z = torch.randn(2, *student.shape)
        found.sample = sample(model, found.z.to(device), cond, nfe, noise, **sampler).cpu()
    return found


# ---- the same with a scheduler of diffusers ------------------------------------------------------


def find_plain(student, found):
    """-> dict of `scheduler` (class and configuration) and `call` (arguments of the pipeline), or
    None if no scheduler of diffusers has these samples. student: Pipeline. found: its Trace.

    call has num_inference_steps where the scheduler's configuration holds the grid, otherwise the
    list of times. Its entry `noise`, where there is one, is a factor on the first noise. `nearly`,
    where there is one, is the relative difference of its samples from the sampler's own: the steps
    are rounded to thousandths, and the pipeline accepts no times.
    """
    candidates = candidates_of(student, found)
    exact = next(working(student, found, candidates), None)
    if exact is not None or student.takes_sigmas or not candidates:
        return exact
    scheduler, call = candidates[0]
    if "num_inference_steps" not in call:
        return None
    _, result = simulate(student, found, scheduler, call)
    times = scheduler.sigmas[: len(found.times)].tolist()
    if max(abs(a - b) for a, b in zip(times, found.times, strict=True)) > ROUNDED:
        return None
    difference = relative(result, found.sample)
    return dict(scheduler=configuration(scheduler), call=call, nearly=difference)


def find_plain_of_sizes(student, traces):
    """find_plain of a student with several sizes, one scheduler for all of them, and the call of
    each size; None if there is no such scheduler. traces: a Trace for each of student.sizes."""
    sizes = student.sizes
    sizes.use(0)
    if all(found.times == traces[0].times for found in traces):
        plain = find_plain(student, traces[0])
        return plain, [dict(plain["call"])] * len(traces) if plain else None
    for plain in working(student, traces[0], candidates_of(student, traces[0])):
        calls = []
        for i, found in enumerate(traces):
            sizes.use(i)
            others = working(student, found, candidates_of(student, found))
            calls += [p["call"] for p in others if p["scheduler"] == plain["scheduler"]][:1]
        sizes.use(0)
        if len(calls) == len(traces):
            return plain, calls
    return None, None


def candidates_of(student, found):
    """list of (scheduler, call) that may have a student's samples."""
    falling = found.times == sorted(set(found.times), reverse=True)
    if not falling:  # two steps at one end of the schedule, which schedulers take for one
        return []
    candidates = vp_candidates if student.schedule.unit_norm else flow_candidates
    return list(candidates(student, found))


def working(student, found, candidates):
    """Yields the dict of find_plain for each candidate that has the student's samples."""
    for with_factor in (False, True):
        for scheduler, call in candidates:
            if not student.takes_sigmas and "num_inference_steps" not in call:
                continue
            factor = 1.0
            if with_factor:
                first, _ = simulate(student, found, scheduler, call)
                factor = ratio(found.steps[0]["x"].cpu(), first)
            _, result = simulate(student, found, scheduler, call, factor)
            if relative(result, found.sample) < TOLERANCE:
                noise = dict(noise=round(factor, 7)) if with_factor else {}
                yield dict(scheduler=configuration(scheduler), call=call | noise)


def configuration(scheduler):
    """Contents of scheduler_config.json."""
    config = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    return dict(_class_name=type(scheduler).__name__, **config)


def ratio(a, b):
    """The number c with a = c b, in least squares."""
    return float((a.double() * b).sum() / b.double().square().sum())


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def simulate(student, found, scheduler, call, factor=1.0):
    """The loop of a diffusers pipeline with the stub -> its first input, its samples."""
    settings = {k: v for k, v in call.items() if k != "num_inference_steps"}
    n = call.get("num_inference_steps")
    if n and student.passes_sigmas:
        settings["sigmas"] = [1 - k / n for k in range(n)]
    elif n:
        settings["num_inference_steps"] = n
    if scheduler.config.get("use_dynamic_shifting"):
        settings["mu"] = shift_argument(scheduler, student.schedule.shift)
    scheduler.set_timesteps(**settings)
    unit = 1.0 if student.schedule.unit_norm else 1000.0  # of the scheduler's times
    x = factor * found.z * getattr(scheduler, "init_noise_sigma", 1.0)
    first = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.randn_like(found.z)  # what `trace` drew first
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t) if student.schedule.unit_norm else x
            first = scaled if first is None else first
            x = scheduler.step(found.stub(scaled, t / unit), t, x, return_dict=False)[0]
    return first, x


def shift_argument(scheduler, shift):
    """mu, with which a scheduler of dynamic shifting has this shift."""
    return shift if scheduler.config.get("time_shift_type") == "linear" else math.log(shift)


def vp_candidates(student, found):
    """Yields (scheduler, call) for a network on DDPM's noise levels.

    LCMScheduler denoises and adds fresh noise, EulerDiscreteScheduler follows the ODE. Both begin
    at the last entry of their table of noise levels, so the table is cut behind the first step.
    """
    from diffusers import EulerDiscreteScheduler, LCMScheduler

    n = len(found.steps)
    vp = student.schedule.config
    length = round(found.times[0]) + 1
    table = dict(
        num_train_timesteps=vp["T"],
        beta_start=vp["beta_start"],
        beta_end=vp["beta_end"],
        beta_schedule=vp["kind"],
        prediction_type=DIFFUSERS_PREDICTION[student.prediction],
        rescale_betas_zero_snr="last_alpha2" in vp,
    )
    cut = table
    if length < vp["T"]:
        betas = LCMScheduler(**table).betas[:length].tolist()
        cut = dict(table, num_train_timesteps=length, trained_betas=betas)
    lcm = LCMScheduler(**cut, original_inference_steps=length, set_alpha_to_one=False)
    euler = EulerDiscreteScheduler(**cut, timestep_spacing="trailing")
    if n == 1 or found.stochastic:
        yield lcm, dict(num_inference_steps=n)
    if n == 1 or not found.stochastic:
        yield euler, dict(num_inference_steps=n)
    if found.stochastic:
        yield lcm, dict(timesteps=[round(t) for t in found.times])
        return
    t = torch.tensor(found.times, dtype=torch.float64)
    sigmas = (student.schedule.sigma(t) / student.schedule.alpha(t)).tolist()
    whole = EulerDiscreteScheduler(**table, timestep_spacing="trailing")
    yield whole, dict(sigmas=[round(s, 7) for s in sigmas] + [0.0])


def flow_candidates(student, found):
    """Yields (scheduler, call) for a flow."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    options = dict(stochastic_sampling=found.stochastic and len(found.steps) > 1)
    n = len(found.steps)
    if student.sizes and student.sizes.dynamic and not student.shift_of_steps:
        scheduler = FlowMatchEulerDiscreteScheduler(**student.sizes.dynamic, **options)
        yield scheduler, dict(num_inference_steps=n)
    fitted = fit_shift(found.times, student.passes_sigmas)
    if fitted is not None:
        shift, terminal = fitted
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, shift_terminal=terminal, **options)
        yield scheduler, dict(num_inference_steps=n)
    sigmas = [round(t, 7) for t in found.times]
    yield FlowMatchEulerDiscreteScheduler(shift=1.0, **options), dict(sigmas=sigmas)


def fit_shift(times, passes_sigmas):
    """(shift, shift_terminal) with which FlowMatchEulerDiscreteScheduler has these falling times,
    at least where that is possible; None if there is no such pair.

    Its table is even, u_0 = 1 to u_{n-1}, then shifted, s u / (1 + (s - 1) u), then stretched, so
    that it ends at the terminal. The stretch keeps (1 - t_1) / (1 - t_{n-1}), which gives s. Where
    the pipeline passes no sigmas itself, u ends at the shift of 1 / 1000.
    """
    n = len(times)
    if n == 1:
        return 1.0, None  # the stretch of one time would be 0 / 0
    end = times[-1]
    if times[0] == end or not 0 < end < 1:
        return None
    shift = 1.0
    for _ in range(300):
        least = shift * 0.001 / (1 + (shift - 1) * 0.001)
        step = 1 / n if passes_sigmas else (1 - least) / (n - 1)
        last = 1 - (n - 1) * step
        if n == 2:
            break  # all shifts will do
        p = step / (1 - last)
        kept = (1 - times[1]) / (1 - end)
        divisor = kept * (1 - step) - p * last
        if divisor == 0:
            return None
        before, shift = shift, 1 + (p - kept) / divisor
        if not 0 < shift < math.inf:
            return None
        if abs(shift - before) < 1e-13 * shift:
            break
    return shift, end
