"""Network passes, counted where they happen: by hooks on the networks."""

import torch

from common.model import Model


class PassCounter:
    """Counts passes of networks, in samples: one forward pass of one sample is 1.

    A backward pass costs as much again for the gradients of the weights, and as much again for the
    gradients of the activations, so a pass counts 3 if the network is trained, 2 if a gradient only
    flows through it, 1 without gradient. A pass that ends early, at a feature layer, counts whole.
    """

    def __init__(self, modules):
        """modules: {name: module}, every Model in them is counted under that name."""
        self.samples = dict.fromkeys(modules, 0)
        self.left_out = []  # names of modules without a Model: heads, the branch of nct.py
        self.paused = False
        self.handles = []
        hooked = set()
        for name, module in modules.items():
            models = [m for m in module.modules() if isinstance(m, Model)]
            if not models:
                self.left_out.append(name)
            for model in models:
                # the toy's exact teacher has a formula instead of a network
                net = model if getattr(model, "exact", False) else model.net
                if id(net) not in hooked:
                    hooked.add(id(net))
                    self.handles.append(self.hook(net, name))

    def hook(self, net, name):
        def count(module, args, kwargs):
            if self.paused:
                return
            tensors = [v for v in (*args, *kwargs.values()) if torch.is_tensor(v)]
            self.samples[name] += len(tensors[0]) * pass_cost(module, tensors)

        return net.register_forward_pre_hook(count, with_kwargs=True)

    def remove(self):
        for handle in self.handles:
            handle.remove()


def pass_cost(net, inputs):
    if not torch.is_grad_enabled():
        return 1
    if any(p.requires_grad for p in net.parameters()):
        return 3
    if any(x.requires_grad for x in inputs):
        return 2
    return 1
