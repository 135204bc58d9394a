"""PyTorch reference of StarNet, DemoNet and the 2-D DemoNet, for the tests only.

Written from the paper (arXiv 2403.19967) and from the facts of the published code: its state-dict
keys, its layer defaults and its initialisation. Inputs are NCHW, or [N, 2] for the 2-D network.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn.functional import gelu, relu, relu6

OPS = {"star": torch.mul, "sum": torch.add}

# name: base width, blocks per stage, expansion (paper, tables 5 and 13)
STARNETS = {
    "starnet_s1": (24, (2, 2, 8, 3), 4),
    "starnet_s2": (32, (1, 2, 6, 2), 4),
    "starnet_s3": (32, (2, 2, 8, 4), 4),
    "starnet_s4": (32, (3, 3, 12, 5), 4),
    "starnet_s050": (16, (1, 1, 3, 1), 3),
    "starnet_s100": (20, (1, 2, 4, 1), 4),
    "starnet_s150": (24, (1, 2, 4, 2), 3),
}


def conv(inputs, outputs, kernel=1, stride=1, groups=1, bn=True):
    """Biased, size-keeping convolution with an optional BatchNorm behind it."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups)
    children = OrderedDict(conv=layer)
    if bn:
        children["bn"] = nn.BatchNorm2d(outputs)
    return nn.Sequential(children)


def drop_samples(x, rate, training):
    """Stochastic depth: drop whole samples, scale the rest by 1 / (1 - rate)."""
    if rate == 0 or not training:
        return x
    return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(1 - rate) / (1 - rate)


class StarBlock(nn.Module):
    """Star block (paper, section 4.1 and figure 3)."""

    def __init__(self, width, expansion, op, rate):
        super().__init__()
        self.op, self.rate = op, rate
        hidden = expansion * width
        self.dwconv = conv(width, width, 7, groups=width)
        self.f1 = conv(width, hidden, bn=False)
        self.f2 = conv(width, hidden, bn=False)
        self.g = conv(hidden, width)
        self.dwconv2 = conv(width, width, 7, groups=width, bn=False)

    def forward(self, x):
        y = self.dwconv(x)
        y = OPS[self.op](relu6(self.f1(y)), self.f2(y))
        return x + drop_samples(self.dwconv2(self.g(y)), self.rate, self.training)


class StarNet(nn.Module):
    """StarNet (paper, section 4.1); only the head leaves PyTorch's default initialisation."""

    def __init__(self, base, depths, expansion, ops, num_classes, rate):
        super().__init__()
        rates = iter(torch.linspace(0, rate, sum(depths)).tolist())
        self.stem = nn.Sequential(conv(3, 32, 3, 2), nn.ReLU6())
        self.stages = nn.Sequential()
        inputs = 32
        for i, (depth, op) in enumerate(zip(depths, ops, strict=True)):
            width = base * 2**i
            blocks = [StarBlock(width, expansion, op, next(rates)) for _ in range(depth)]
            self.stages.append(nn.Sequential(conv(inputs, width, 3, 2), *blocks))
            inputs = width
        self.norm = nn.BatchNorm2d(inputs)
        self.head = nn.Linear(inputs, num_classes)
        trunc_normal(self.head)

    def forward(self, x):
        return self.head(self.norm(self.stages(self.stem(x))).mean((2, 3)))


class DemoBlock(nn.Module):
    """Isotropic block on NHWC tokens (paper, section 3.3; supplement A.1, algorithm 1)."""

    def __init__(self, width, op):
        super().__init__()
        self.op = op
        self.norm = nn.LayerNorm(width)
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.f = nn.Linear(width, 6 * width)
        self.g = nn.Linear(3 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x):
        y = self.dwconv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        a, b = self.f(y).chunk(2, -1)
        return x + self.gamma * self.g(OPS[self.op](gelu(a), b))


class PointBlock(nn.Module):
    """Block of the 2-D network: ReLU, no convolution, no layer scale (supplement, algorithm 2)."""

    def __init__(self, width, op):
        super().__init__()
        self.op = op
        self.norm = nn.LayerNorm(width)
        self.f = nn.Linear(width, 6 * width)
        self.g = nn.Linear(3 * width, width)

    def forward(self, x):
        a, b = self.f(self.norm(x)).chunk(2, -1)
        return x + self.g(OPS[self.op](relu(a), b))


class DemoNet(nn.Module):
    """Stem, blocks, mean over the tokens if there are any, LayerNorm and head (supplement A.1)."""

    def __init__(self, stem, blocks, width, num_classes):
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        self.apply(trunc_normal)

    def forward(self, x):
        x = self.blocks(self.stem(x).movedim(1, -1))
        return self.head(self.norm(x.mean((1, 2)) if x.ndim == 4 else x))


def trunc_normal(module):
    """Truncated normal weights, standard deviation 0.02, and zero biases."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def starnet(name, num_classes=1000, op="star", stage_ops=None, drop_path=0.0):
    """StarNet by name; `stage_ops` gives each of the four stages its own operation."""
    return StarNet(*STARNETS[name], stage_ops or (op,) * 4, num_classes, drop_path)


def demonet(depth, width, num_classes=1000, op="star"):
    """DemoNet for images, one token per 16 x 16 patch."""
    blocks = [DemoBlock(width, op) for _ in range(depth)]
    return DemoNet(nn.Conv2d(3, width, 16, 16), blocks, width, num_classes)


def demonet_2d(ops=("star",) * 4, num_classes=2):
    """2-D DemoNet of width 100, one block per entry of `ops`."""
    return DemoNet(nn.Linear(2, 100), [PointBlock(100, op) for op in ops], 100, num_classes)


# stem, down-samplers and g: small before a norm, so that its epsilon counts; f1 and f2: both kinks
# of ReLU6 are reached; dwconv2: small, so that the products of a deep stage do not run away
GAINS = {"stem": 0.1, "0": 0.1, "g": 0.3, "f1": 2.0, "f2": 2.0, "dwconv2": 0.3}


def gain(name):
    """Output size of a randomized layer per unit of input."""
    return GAINS.get(name.removesuffix(".conv").rpartition(".")[2], 1.0)


def redraw(name, module):
    """Draw every parameter that `module` itself holds."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        module.weight.normal_(0, gain(name) / module.weight[0].numel() ** 0.5)
        module.bias.normal_(0, gain(name) / 2)
    elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
        module.weight.uniform_(0.5, 1.5)
        module.bias.normal_(0, 0.3)
    elif isinstance(module, DemoBlock):
        module.gamma.normal_(0.1, 0.03)


def settle(model, norms):
    """Set the running statistics to those of a random batch, then perturb them."""
    training = model.training
    model.eval()
    for norm in norms:
        norm.train().momentum = 1.0
    model(torch.randn(2, 3, 224, 224))
    model.train(training)
    for norm in norms:
        norm.momentum = 0.1
        norm.running_mean += 0.3 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.6, 1.6)


@torch.no_grad()
def randomize(model, seed):
    """Make every parameter and statistic matter, with activations of ordinary size; in place."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            redraw(name, module)
        if norms:
            settle(model, norms)
    return model
