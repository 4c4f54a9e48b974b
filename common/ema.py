"""Exponential moving average of a model's weights, with a half-life in images."""

from concurrent.futures import ThreadPoolExecutor

import torch


class EMA:
    """Average of a model's weights, fp32. `halflife` is in images; it is shortened to 5 % of the images seen so far, so that the average forgets the
    start early on (EDM's ramp-up). halflife 0: `.model` is the model itself. host: the average stays in the host's memory (--ema-cpu); weights are fetched
    after each update and blended by a thread of its own while the next iteration runs, and `.model` is a copy made when it is asked for."""

    def __init__(self, model, halflife, host=False):
        self.halflife, self.images, self.live, self.blending = halflife, 0, model, None
        self.twin = model.copy().requires_grad_(False) if halflife and not host else model
        self.host = (
            [p.detach().to("cpu", torch.float32, copy=True) for p in model.parameters()]
            if halflife and host
            else []
        )
        self.fetched = [
            torch.empty_like(h, pin_memory=torch.cuda.is_available()) for h in self.host
        ]
        self.thread = ThreadPoolExecutor(1) if self.host else None

    def wait(self):
        if self.blending:
            self.blending.result()  # raises what went wrong there
        self.blending = None

    @property
    def model(self):
        if not self.host:
            return self.twin
        self.wait()
        twin = self.live.copy().requires_grad_(False)
        for p, h in zip(twin.parameters(), self.host, strict=True):
            p.copy_(h)
        return twin

    @torch.no_grad()
    def update(self, images):
        """To be called after a student update only: on other iterations the average would drift towards a student that did not move. images: of this update
        (Run.stepped); 0 changes nothing."""
        self.images += images
        if self.halflife and images:
            beta = 0.5 ** (images / max(min(self.halflife, 0.05 * self.images), 1e-8))
            if self.host:
                self.fetch(1 - beta)
            else:
                torch._foreach_lerp_(
                    list(self.twin.parameters()),
                    [p.float() for p in self.live.parameters()],
                    1 - beta,
                )

    def fetch(self, share):
        self.wait()
        for to, p in zip(self.fetched, self.live.parameters(), strict=True):
            to.copy_(p, non_blocking=True)
        done = (
            torch.cuda.current_stream().record_event()
            if torch.cuda.is_available() and torch.cuda.is_initialized()
            else None
        )

        def blend():
            if done:
                done.synchronize()
            torch._foreach_lerp_(self.host, self.fetched, share)

        self.blending = self.thread.submit(blend)

    def state_dict(self):
        self.wait()
        average = (
            dict(zip((name for name, _ in self.live.named_parameters()), self.host))
            if self.host
            else {}
        )
        return dict(
            images=self.images,
            model=(self.live.state_dict() | average if self.host else self.twin.state_dict())
            if self.halflife
            else {},
        )

    def load_state_dict(self, state):
        if not isinstance(state["images"], (int, float)) or not state["images"] >= 0:
            raise ValueError(
                f"average: expected a number of images, found {str(state['images'])[:80]}"
            )
        self.images = state["images"]
        if self.host:
            self.wait()
            for (name, _), h in zip(self.live.named_parameters(), self.host, strict=True):
                h.copy_(state["model"][name])
        elif self.halflife:
            self.twin.load_state_dict(state["model"])
