"""Exponential moving average of a model's weights, with a half-life in images."""

from concurrent.futures import ThreadPoolExecutor

import torch


class EMA:
    """Average of a model's weights, fp32.

    halflife: in images, 0 for no average (`.model` is then the model itself). It is shortened to
    5 % of the images seen so far, so that the average forgets its start (EDM's ramp-up).
    on_cpu: the average stays in CPU memory (--ema-cpu). A background thread blends the weights in
    while the next iteration runs, and `.model` is a copy that is made at each use.
    """

    def __init__(self, model, halflife, on_cpu=False):
        self.halflife = halflife
        self.images = 0
        self.live = model
        self.averaged = model
        self.on_cpu = bool(halflife and on_cpu)
        if self.on_cpu:
            self.weights = [copy_to_cpu(p) for p in model.parameters()]
            pinned = torch.cuda.is_available()
            self.fetched = [torch.empty_like(w, pin_memory=pinned) for w in self.weights]
            self.thread = ThreadPoolExecutor(1)
            self.blending = None
        elif halflife:
            self.averaged = model.copy().requires_grad_(False)

    @property
    def model(self):
        """The averaged model, frozen."""
        if not self.on_cpu:
            return self.averaged
        self.wait()
        model = self.live.copy().requires_grad_(False)
        for p, w in zip(model.parameters(), self.weights, strict=True):
            p.copy_(w)
        return model

    @torch.no_grad()
    def update(self, images):
        """Call after a student update only: in other iterations the average would advance towards
        a student that did not move. images: of this update (run.images_stepped); 0: no change."""
        self.images += images
        if not self.halflife or not images:
            return
        halflife = max(min(self.halflife, 0.05 * self.images), 1e-8)
        beta = 0.5 ** (images / halflife)
        if self.on_cpu:
            self.blend_in_background(1 - beta)
        else:
            averaged = list(self.averaged.parameters())
            live = [p.float() for p in self.live.parameters()]
            torch._foreach_lerp_(averaged, live, 1 - beta)

    def blend_in_background(self, share):
        self.wait()
        for to, p in zip(self.fetched, self.live.parameters(), strict=True):
            to.copy_(p, non_blocking=True)
        copied = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            copied = torch.cuda.current_stream().record_event()

        def blend():
            if copied is not None:
                copied.synchronize()
            torch._foreach_lerp_(self.weights, self.fetched, share)

        self.blending = self.thread.submit(blend)

    def wait(self):
        """Until the background thread is done; raises what went wrong there."""
        if self.blending is not None:
            self.blending.result()
        self.blending = None

    def state_dict(self):
        if not self.halflife:
            return dict(images=self.images, model={})
        if not self.on_cpu:
            return dict(images=self.images, model=self.averaged.state_dict())
        self.wait()
        names = [name for name, _ in self.live.named_parameters()]
        state = self.live.state_dict() | dict(zip(names, self.weights))
        return dict(images=self.images, model=state)

    def load_state_dict(self, state):
        images = state["images"]
        if not isinstance(images, (int, float)) or not images >= 0:
            raise ValueError(f"average: expected a number of images, found {str(images)[:80]}")
        if self.halflife and not state["model"]:
            raise ValueError("the checkpoint has no average, its run had --ema 0")
        self.images = images
        if self.on_cpu:
            self.wait()
            for (name, _), w in zip(self.live.named_parameters(), self.weights, strict=True):
                w.copy_(state["model"][name])
        elif self.halflife:
            self.averaged.load_state_dict(state["model"])


def copy_to_cpu(p):
    return p.detach().to("cpu", torch.float32, copy=True)
