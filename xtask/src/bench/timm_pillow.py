"""Prepares training images as timm does, one pass over a folder for each line on standard input.

Usage: timm_pillow.py DIR crop|full. Answers each line with the CPU seconds of the pass, all threads of
the process counted. The files are in memory before the first pass.
"""

import io
import pathlib
import sys
import time

import torch
from PIL import Image
from timm.data import create_transform

SIZE = 224


def main(folder: str, recipe: str) -> None:
    torch.set_num_threads(1)
    full = recipe == "full"
    transform = create_transform(
        SIZE,
        is_training=True,
        color_jitter=None,
        auto_augment="rand-m9-mstd0.5-inc1" if full else None,
        interpolation="bicubic",
        re_prob=0.25 if full else 0.0,
        re_mode="pixel",
        re_count=1,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    paths = sorted(p for p in pathlib.Path(folder).iterdir() if p.suffix in (".jpg", ".JPEG"))
    files = [path.read_bytes() for path in paths]
    print(len(files), flush=True)
    for line in sys.stdin:
        torch.manual_seed(int(line))
        start = time.process_time()
        for file in files:
            transform(Image.open(io.BytesIO(file)).convert("RGB"))
        print(time.process_time() - start, flush=True)


main(*sys.argv[1:])
