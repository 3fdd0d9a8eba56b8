"""What only a GPU can tell: `cargo xtask gpu` builds what this needs, and runs it where there is a GPU.

Usage: checks.py PROGRAMS [--images DIR] [--part NAME ...]. PROGRAMS holds `percheron` and `percheron-worker`; DIR
holds train.tar and validation.tar in WebDataset's layout. Python with PyTorch and CUDA gives the libraries.
It prints one JSON object a line: what was measured.
"""
import argparse
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

import torch

HERE = pathlib.Path(__file__).resolve().parent
MODEL, BATCH = "reg800m_perceiver_t128", 128
SMALL = ["--set", "max_steps=40", "--set", "precision=bf16", "--set", "evaluate_every_epochs=0",
         "--set", "model.name=reg400m_perceiver_t32"]
SHARED = "cuda:0,cuda:0"


def environment(programs):
    """The libraries of the wheels that PyTorch came with."""
    site = pathlib.Path(torch.__path__[0])
    folders = [site / "lib", *sorted(site.parent.glob("nvidia/*/lib"))]
    path = [str(folder) for folder in folders] + [os.environ.get("LD_LIBRARY_PATH", "")]
    return dict(os.environ, LD_LIBRARY_PATH=":".join(path), PATH=f"{programs}:{os.environ['PATH']}")


def say(**figures):
    print(json.dumps(figures), flush=True)


class Checks:
    def __init__(self, programs, images):
        self.env, self.images = environment(programs), images
        self.worker = str(pathlib.Path(programs) / "percheron-worker")
        self.room = pathlib.Path(tempfile.mkdtemp(prefix="percheron-gpu-"))

    def call(self, command, seconds=150):
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=seconds)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip().splitlines()[-1:]}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    def step(self):
        """Steps of one micro-batch: ours and PyTorch's, three rounds, side by side."""
        ours = [self.worker, "bench-step", "--model", MODEL, "--batch", BATCH, "--device", "cuda", "--precision",
                "bf16", "--steps", 30, "--json"]
        theirs = [sys.executable, HERE.parent / "bench" / "step_torch.py", "--model", MODEL, "--batch", BATCH,
                  "--device", "cuda", "--precision", "bf16", "--steps", 30]
        ways = {"percheron_graph": ours + ["--graph"], "percheron_eager": ours, "torch_eager": theirs,
                "torch_eager_channels_last": theirs + ["--channels-last"]}
        rounds = {name: [] for name in ways}
        for _ in range(3):
            for name, command in ways.items():
                rounds[name].append(self.call(list(map(str, command))))
        walls = {name: statistics.median(r["wall_s"] for r in found) for name, found in rounds.items()}
        digests = {r["params_sha256"] for name in ("percheron_graph", "percheron_eager") for r in rounds[name]}
        eager = min(walls["torch_eager"], walls["torch_eager_channels_last"])
        say(check="step", ms={name: round(wall * 1e3, 2) for name, wall in walls.items()},
            images_per_s={name: round(BATCH / wall) for name, wall in walls.items()},
            against_eager=round(eager / walls["percheron_graph"], 3),
            device_peak_mb=rounds["percheron_graph"][0]["device_peak_mb"],
            torch_peak_mb=rounds["torch_eager"][0]["device_peak_mb"], one_digest_over_6_runs=len(digests) == 1)

    def compiled(self):
        """PyTorch's compiler on the same step."""
        theirs = [sys.executable, HERE.parent / "bench" / "step_torch.py", "--model", MODEL, "--batch", BATCH,
                  "--device", "cuda", "--precision", "bf16", "--steps", 30, "--channels-last", "--compile"]
        found = self.call(list(map(str, theirs)), 280)
        ours = self.call([self.worker, "bench-step", "--model", MODEL, "--batch", str(BATCH), "--device", "cuda",
                          "--precision", "bf16", "--steps", "30", "--json", "--graph"])
        say(check="compiled", torch_compile_ms=round(found["wall_s"] * 1e3, 2),
            percheron_graph_ms=round(ours["wall_s"] * 1e3, 2), against_compile=round(found["wall_s"] / ours["wall_s"], 3))

    def up(self, name, *options, seconds=150):
        run_dir = self.room / name
        return self.call(["percheron", "up", "--run-dir", str(run_dir), "--json", *map(str, options)], seconds)

    def hashes(self):
        """One run many ways, several workers on one card among them: one final state."""
        digits = ["--recipe", "digits", *SMALL]
        ways = {
            "alone": ["--workers", 1, "--device", "cuda:0"],
            "alone_again": ["--workers", 1, "--device", "cuda:0"],
            "alone_a_third_time": ["--workers", 1, "--device", "cuda:0"],
            "two_by_host": ["--workers", 2, "--device", SHARED, "--transport", "mesh"],
            "two_by_nccl": ["--workers", 2, "--device", SHARED],
            "three_by_nccl_one_killed": ["--workers", 3, "--device", SHARED, "--chaos", "kill@12"],
            "three_by_nccl_one_stopped": ["--workers", 3, "--device", SHARED, "--chaos", "stop@12"],
        }
        found = {name: self.up(name, *digits, *options) for name, options in ways.items()}
        digests = {result["state_sha256"] for result in found.values()}
        say(check="hashes", one_digest=len(digests) == 1, digests=sorted(digests), runs=list(ways),
            recovery_ms={name: result["recovery_ms"] for name, result in found.items() if result["recovery_ms"]},
            abort_ms={name: result["abort_ms"] for name, result in found.items() if result["abort_ms"]})

    def busy(self):
        """Training from shards: how busy the card is, and what the exact sum costs."""
        shards = self.room / "shards"
        options = ["--recipe", self.recipe(shards), "--workers", 1, "--device", "cuda:0"]
        figures = {}
        for round_ in range(2):
            for reduction in ("exact", "fast"):
                with Utilization() as card:
                    result = self.up(f"busy-{reduction}-{round_}", *options, "--set", f"reduction={reduction}", seconds=200)
                figures.setdefault(reduction, []).append((result["step_ms_median"], card.median(), result["phase_ms_median"]))
        best = {name: min(runs, key=lambda run: run[0]) for name, runs in figures.items()}
        say(check="busy", step_ms={name: run[0] for name, run in best.items()},
            images_per_s=round(4 * BATCH / best["exact"][0] * 1e3), utilization={name: run[1] for name, run in best.items()},
            phase_ms=best["exact"][2], exact_over_fast=round(best["exact"][0] / best["fast"][0], 4))

    def recipe(self, shards):
        """The published network and augmentation on the images at hand, which are packed first."""
        for split in ("train", "validation"):
            tar = str(self.images / f"{split}.tar")
            subprocess.run(["percheron", "shards", "pack", tar, "--out", str(shards), "--split", split], env=self.env,
                           check=True, capture_output=True, timeout=120)
        text = f"""
name = "busy"
seed = 1
epochs = 12
max_steps = 40
virtual_ranks = 4
batch_size = {BATCH}
precision = "bf16"
evaluate_every_epochs = 0
[data]
location = "{shards}"
validation = "validation"
[augment]
aa = "rand-m9-mstd0.5-inc1"
reprob = 0.25
mixup = 0.8
cutmix = 1.0
[model]
name = "{MODEL}"
classes = 10
input_size = 224
[schedule]
warmup_epochs = 1
"""
        path = self.room / "busy.toml"
        path.write_text(text)
        return path

    def metrics(self):
        """What the coordinator tells Prometheus of the card while it trains."""
        address = "127.0.0.1:9109"
        run = subprocess.Popen(
            ["percheron", "up", "--json", "--run-dir", str(self.room / "metrics"), "--recipe", "digits", *SMALL,
             "--workers", "1", "--device", "cuda:0"],
            env=dict(self.env, PERCHERON_HTTP=address), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found = {}
        while run.poll() is None:
            try:
                with urllib.request.urlopen(f"http://{address}/metrics", timeout=2) as answer:
                    lines = answer.read().decode().splitlines()
                found.update(line.rsplit(" ", 1) for line in lines if line.startswith("percheron_gpu_"))
            except OSError:
                pass  # It has not begun to listen, or has just ended.
            time.sleep(0.5)
        if run.returncode != 0 or not found:
            raise RuntimeError(f"status {run.returncode}, {len(found)} figures of the card")
        say(check="metrics", found=found)

    def memory(self):
        """A step that cannot fit."""
        done = subprocess.run([self.worker, "bench-step", "--model", MODEL, "--batch", "4096", "--size", "384",
                               "--device", "cuda", "--steps", "1"], env=self.env, capture_output=True, text=True, timeout=120)
        say(check="memory", status=done.returncode, last_line=done.stderr.strip().splitlines()[-1][:400])


class Utilization:
    """Samples what share of the time a kernel was running, as the driver counts it."""

    def __enter__(self):
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.samples = [int(line) for line in self.process.communicate()[0].split() if line.isdigit()]

    def median(self):
        """Of the samples while training ran: the longest stretch without an idle one."""
        marks = "".join("x" if sample > 20 else "." for sample in self.samples)
        longest = max(re.finditer("x+", marks), key=lambda stretch: len(stretch.group()), default=None)
        inside = self.samples[longest.start() + 1:longest.end() - 1] if longest else []
        return statistics.median(inside) if inside else 0


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("programs")
    options.add_argument("--images", type=pathlib.Path)
    options.add_argument("--part", action="append", choices=("step", "compiled", "hashes", "busy", "memory", "metrics"))
    o = options.parse_args()
    checks = Checks(pathlib.Path(o.programs).resolve(), o.images)
    say(card=torch.cuda.get_device_name(), torch=torch.__version__, cores=os.cpu_count())
    failed = False
    for part in o.part or ("step", "hashes", "busy", "memory", "metrics", "compiled"):
        if part == "busy" and o.images is None:
            say(check="busy", skipped="no --images")
            continue
        begun = time.monotonic()
        try:
            getattr(checks, part)()
        except (RuntimeError, subprocess.SubprocessError, KeyError, ValueError) as error:
            failed = True
            say(check=part, failed=str(error)[-600:])
        say(part=part, seconds=round(time.monotonic() - begun))
    shutil.rmtree(checks.room)
    sys.exit(failed)


main()
