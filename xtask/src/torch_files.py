"""Reads what `percheron export` wrote, as a user of torch would, and writes it again with torch.save.

Usage: torch_files.py CHECKPOINT.pth AVERAGED.safetensors OUT.pth. Prints the number of tensors.
"""

import argparse
import collections
import sys

import safetensors.torch
import torch

checkpoint, averaged, out = sys.argv[1:]
held = torch.load(checkpoint, weights_only=True)
model = collections.OrderedDict(held["model"])
average = safetensors.torch.load_file(averaged)
assert set(average) == set(held["model_ema"]) == set(model)
assert all(torch.equal(average[name], value) for name, value in held["model_ema"].items())

# The reference's groups: no decay for what has one dimension or is a bias.
learned = [
    (name, torch.nn.Parameter(value.clone()))
    for name, value in model.items()
    if not name.rsplit(".", 1)[-1].startswith(("running_", "num_batches_tracked"))
]
groups = [[], []]
for name, value in learned:
    groups[value.dim() == 1 or name.endswith(".bias")].append(value)
optimizer = torch.optim.AdamW([{"params": values} for values in groups])
optimizer.load_state_dict(held["optimizer"])
resumed = optimizer.state_dict()
for number, moments in held["optimizer"]["state"].items():
    for moment in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(resumed["state"][number][moment], moments[moment]), number

model._metadata = collections.OrderedDict({"": {"version": 1}})  # As Module.state_dict() has it.
args = argparse.Namespace(**held["args"], clip_grad=None)
parts = {"model": model, "model_ema": average, "optimizer": resumed, "scaler": {}, "args": args}
torch.save(parts, out)
print(len(model))
