"""A training step of a RegNetY Dynamic Perceiver in eager PyTorch: what `percheron bench step` is compared with.

Written from the paper (arXiv:2306.11248) and the state dict of the official code. It prints the same JSON.
"""
import argparse
import json
import resource
import time

import torch
from torch import nn
from torch.nn import functional as F

WIDTHS = {"reg400m": ([48, 104, 208, 440], [1, 3, 6, 6], 8), "reg800m": ([64, 144, 320, 784], [1, 3, 8, 2], 16)}


def conv_norm(inputs, outputs, kernel=1, stride=1, groups=1):
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.normal_(convolution.weight, 0, (2 / (kernel * kernel * outputs)) ** 0.5)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride, group_width):
        super().__init__()
        self.proj = conv_norm(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else None
        self.a = conv_norm(inputs, outputs)
        self.b = conv_norm(outputs, outputs, 3, stride, outputs // group_width)
        hidden = round(inputs * 0.25)
        self.fc1, self.fc2 = nn.Conv2d(outputs, hidden, 1), nn.Conv2d(hidden, outputs, 1)
        self.c = conv_norm(outputs, outputs)

    def forward(self, x):
        y = F.relu(self.b(F.relu(self.a(x), inplace=True)), inplace=True)
        gate = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(y, 1)), inplace=True)).sigmoid()
        y = self.c(y * gate)
        return F.relu((x if self.proj is None else self.proj(x)) + y, inplace=True)


class Attention(nn.Module):
    def __init__(self, query, source, inner, heads=1, positions=None):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for width in (query, source, source))
        self.o = nn.Linear(inner, query)
        self.position = nn.Parameter(torch.zeros(1, positions, inner)) if positions else None

    def forward(self, asking, source):
        q, k, v = self.q(asking), self.k(source), self.v(source)
        if self.position is not None:
            k = k + self.position
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


def mlp(width, widening):
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, width * widening), nn.GELU(), nn.Linear(width * widening, width))


class Cross(nn.Module):
    def __init__(self, query, source, inner, positions=None):
        super().__init__()
        self.q_norm, self.kv_norm = nn.LayerNorm(query), nn.LayerNorm(source)
        self.attention, self.mlp = Attention(query, source, inner, positions=positions), mlp(query, 1)

    def forward(self, asking, source):
        asking = asking + self.attention(self.q_norm(asking), self.kv_norm(source))
        return asking + self.mlp(asking)


class SelfLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, width, width, heads)
        self.mlp = mlp(width, 4)

    def forward(self, z):
        normed = self.norm(z)
        z = z + self.attention(normed, normed)
        return z + self.mlp(z)


class Net(nn.Module):
    def __init__(self, backbone, tokens, classes):
        super().__init__()
        widths, depths, group_width = WIDTHS[backbone]
        self.widths = [32, *widths]
        self.stem = conv_norm(3, 32, 3, 2)
        stages = []
        for before, width, depth in zip(self.widths, widths, depths):
            sizes = [(before, 2)] + [(width, 1)] * (depth - 1)
            stages.append(nn.Sequential(*(Block(inputs, width, stride, group_width) for inputs, stride in sizes)))
        self.stages = nn.ModuleList(stages)
        c = self.widths
        self.latent = nn.Parameter(torch.randn(tokens, c[0]) * 0.02)
        self.dwc = nn.ModuleList(nn.Conv2d(w, w, 7, 1, 3, groups=w) for w in c[:4])
        self.read = nn.ModuleList(Cross(w, w, w, 49) for w in c[:4])
        self.write = nn.ModuleList([*(Cross(w, w, w // 8) for w in c[1:4]), Cross(c[4], c[3], c[4] // 8)])
        layers = zip(c[:4], (3, 3, 9, 6), (1, 2, 4, 8))
        self.attend = nn.ModuleList(
            nn.Sequential(*(SelfLayer(width, heads) for _ in range(count))) for width, count, heads in layers)
        self.mixer = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(n), nn.Linear(n, n // 2)) for n in (tokens, tokens // 2, tokens // 4))
        self.expander = nn.ModuleList(nn.Sequential(nn.LayerNorm(a), nn.Linear(a, b)) for a, b in zip(c[:3], c[1:4]))
        transfer = lambda: nn.Sequential(nn.Linear(classes, c[3]), nn.BatchNorm1d(c[3]), nn.ReLU())
        self.isc3, self.isc4 = transfer(), transfer()
        self.early3, self.att, self.cnn = (nn.Linear(n, classes) for n in (c[2], 2 * c[3], c[4]))
        self.merge = nn.Sequential(nn.BatchNorm1d(c[4] + 2 * c[3]), nn.Linear(c[4] + 2 * c[3], classes))

    def put(self, write, x, z):
        size = x.shape
        return write(x.flatten(2).transpose(1, 2), z).transpose(1, 2).reshape(size)

    def forward(self, images):
        x = F.relu(self.stem(images), inplace=True)
        z = self.latent.expand(len(images), -1, -1)
        for stage in range(4):
            if stage > 0:
                z = self.mixer[stage - 1](z.transpose(1, 2)).transpose(1, 2)
                z = self.expander[stage - 1](z)
                x = self.put(self.write[stage - 1], x, z)
            grid = F.adaptive_avg_pool2d(self.dwc[stage](x) + x, 7)
            z = self.attend[stage](self.read[stage](z, grid.flatten(2).transpose(1, 2)))
            if stage == 2:
                early3 = self.early3(z.mean(1))
            if stage < 3:
                x = self.stages[stage](x)
        code = z.mean(1)
        att = self.att(torch.cat([code, self.isc3(early3)], 1))
        x = self.stages[3](x)
        cnn = self.cnn(x.mean((2, 3)))
        pooled = self.put(self.write[3], x, z).mean((2, 3))
        return early3, att, cnn, self.merge(torch.cat([pooled, code, self.isc4(att)], 1))


def loss_of(exits, labels):
    targets = F.one_hot(labels, exits[0].shape[1]).float() * 0.9 + 0.1 / exits[0].shape[1]
    factors = (0.5, 0.5, 1.0, 1.0)
    loss = sum(f * (-targets * F.log_softmax(y, -1)).sum(-1).mean() for f, y in zip(factors, exits))
    teacher = exits[3].detach().softmax(-1)
    taught = (F.kl_div(F.log_softmax(y, -1), teacher, reduction="batchmean") for y in exits[:3])
    return loss + 0.5 * sum(taught)


def main():
    options = argparse.ArgumentParser()
    for name, default in (("batch", 32), ("size", 224), ("classes", 1000), ("threads", 1), ("steps", 5)):
        options.add_argument("--" + name, type=int, default=default)
    options.add_argument("--model", required=True)
    options.add_argument("--channels-last", action="store_true")
    options.add_argument("--device", default="cpu")
    options.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    options.add_argument("--compile", action="store_true")
    options.add_argument("--json", action="store_true")
    o = options.parse_args()
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    device = torch.device(o.device)
    on_card = device.type == "cuda"
    finish = torch.cuda.synchronize if on_card else lambda: None
    backbone, tokens = o.model.split("_perceiver_t")
    net = Net(backbone, int(tokens), o.classes)
    images = torch.linspace(-2, 2, o.batch * 3 * o.size * o.size).sin().view(o.batch, 3, o.size, o.size)
    if o.channels_last:
        net, images = (it.to(memory_format=torch.channels_last) for it in (net, images))
    labels = torch.arange(o.batch) % o.classes
    net, images, labels = net.to(device), images.to(device), labels.to(device)
    module = net
    if o.compile:
        net = torch.compile(net)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=o.precision == "bf16")
    decayed = [p for p in module.parameters() if p.dim() > 1]
    rest = [p for p in module.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, **({"fused": True} if on_card else {"foreach": True}))
    averaged = [v.detach().clone() for v in module.state_dict().values()]
    parts = []
    for _ in range(o.steps + (10 if on_card else 1)):
        finish()
        wall, marks = time.perf_counter(), [time.process_time()]
        with autocast:
            exits = net(images)
        loss = loss_of([y.float() for y in exits], labels)
        marks.append(time.process_time())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        marks.append(time.process_time())
        optimizer.step()
        marks.append(time.process_time())
        with torch.no_grad():
            values = list(module.state_dict().values())
            if on_card:
                floats = [i for i, average in enumerate(averaged) if average.is_floating_point()]
                torch._foreach_lerp_([averaged[i] for i in floats], [values[i] for i in floats], 1 - 0.9999)
            else:
                for average, value in zip(averaged, values):
                    if average.is_floating_point():
                        average.mul_(0.9999).add_(value, alpha=1 - 0.9999)
                    else:
                        average.copy_(value)
        finish()
        marks.append(time.process_time())
        parts.append([b - a for a, b in zip(marks, marks[1:])] + [marks[-1] - marks[0], time.perf_counter() - wall])
    names = ("forward_cpu_s", "backward_cpu_s", "optimizer_cpu_s", "ema_cpu_s", "total_cpu_s", "wall_s")
    medians = {name: sorted(column)[len(column) // 2] for name, column in zip(names, zip(*parts[10 if on_card else 1:]))}
    medians["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    if on_card:
        medians["device_peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    medians["parameters"] = sum(p.numel() for p in module.parameters())
    print(json.dumps(medians))


main()
