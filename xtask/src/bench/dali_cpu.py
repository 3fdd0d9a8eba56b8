"""Prepares training images with NVIDIA DALI on the CPU, one pass over a folder for each line on standard input.

Usage: dali_cpu.py DIR crop. Answers each line with the CPU seconds of the pass, all threads of the process
counted. The files are in memory before the first pass. The filter is cubic and antialiased, as everybody
else's here.
"""

import pathlib
import sys
import time

import numpy as np
from nvidia.dali import fn, pipeline_def, types

SIZE = 224


def main(folder: str, recipe: str) -> None:
    if recipe != "crop":
        sys.exit("only the recipe crop has a counterpart in DALI's CPU pipeline")
    paths = sorted(p for p in pathlib.Path(folder).iterdir() if p.suffix in (".jpg", ".JPEG"))
    files = [np.frombuffer(path.read_bytes(), dtype=np.uint8) for path in paths]

    @pipeline_def(
        batch_size=len(files),
        num_threads=1,
        device_id=None,
        exec_pipelined=False,
        exec_async=False,
        seed=1,
    )
    def prepare():
        encoded = fn.external_source(source=lambda: files, batch=True, no_copy=True)
        images = fn.decoders.image_random_crop(
            encoded,
            device="cpu",
            output_type=types.RGB,
            random_area=[0.08, 1.0],
            random_aspect_ratio=[0.75, 4 / 3],
            num_attempts=10,
        )
        images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout="CHW",
            mirror=fn.random.coin_flip(probability=0.5),
            mean=[0.485 * 255, 0.456 * 255, 0.406 * 255],
            std=[0.229 * 255, 0.224 * 255, 0.225 * 255],
        )

    pipeline = prepare()
    pipeline.build()
    print(len(files), flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        pipeline.run()
        print(time.process_time() - start, flush=True)


main(*sys.argv[1:])
