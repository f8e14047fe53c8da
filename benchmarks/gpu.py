"""Speed and memory on a GPU against the plain way and the CPU: `python benchmarks/gpu.py --out book/measured`.

Writes gpu.csv, a row for each measurement: what, variant, seconds (the median of its rounds), peak memory in MB, and
how many images a second or what share of the card's peak that is; and gpu.json with the card, versions and date.
Alternatives alternate round by round in one run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from schedulefree import AdamWScheduleFree
from torch.utils.flop_counter import FlopCounterMode

from residual import Encoder, load_encoder, trace
from residual.alignment import Bases, ResiDual
from residual.dimension import two_nn
from residual.pursuit import somp_in_basis, textspan_from_moments
from residual.spectrum import Moments, pca_from_moments
from residual.training import BATCH, _Task
from residual.units import residual_units

ENCODERS = {"ViT-B/16": "OpenCLIP-B", "ViT-L/14": "OpenCLIP-L"}
BATCHES = {"OpenCLIP-B": 256, "OpenCLIP-L": 128}
PRECISIONS = ("float32", "bfloat16", "float16")
K, D, TEXTS = 66, 768, 3498  # coordinates of a head, output, dictionary
LAYERS, HEADS = 24, 16  # of ViT-L
rows: list[dict] = []


def measure(what: str, variants: dict[str, Callable], rounds: int, device: str, **facts: object) -> dict[str, float]:
    """Medians of the seconds of each variant, which alternate; and peak memory above what was there before."""
    seconds, peak = {name: [] for name in variants}, {}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
                peak[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
            if turn or rounds == 1:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
        if rounds == 1:
            break
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name in variants:
        rows.append(
            {"what": what, "variant": name, "device": device, "seconds": medians[name], "mb": peak.get(name)} | facts
        )
        print(rows[-1], flush=True)
    return medians


def ceiling(device: str) -> float:
    """Operations a second of a large bf16 matrix product."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = measure("bf16 matrix product, 8192 x 8192 x 8192", {"torch": lambda: a @ b}, 10, device)
    return 2 * 8192**3 / seconds["torch"]


def tracing(device: str, peak: float) -> None:
    for label, name in ENCODERS.items():
        with torch.device(device):
            encoder = load_encoder(name, pretrained=False, device=device)
        for precision in PRECISIONS:
            traced_against_plain(encoder, label, precision, BATCHES[name], peak)


def traced_against_plain(encoder: Encoder, label: str, precision: str, batch: int, peak: float) -> None:
    pixels = torch.randint(256, (batch, 3, 224, 224), dtype=torch.uint8).to(encoder.device)
    with FlopCounterMode(display=False) as counter:
        encoder.encode_image(pixels[:4])
    flops = counter.get_total_flops() / 4 * batch

    def plain() -> None:
        encoder.encode_image(pixels)

    def traced() -> None:
        trace(encoder, pixels)

    facts = {"encoder": label, "precision": precision, "images": batch}
    with torch.autocast(encoder.device.type, getattr(torch, precision), enabled=precision != "float32"):
        medians = measure("tracing", {"plain forward": plain, "traced": traced}, 6, encoder.device.type, **facts)
    for row in rows[-len(medians) :]:
        row |= {"images_per_second": batch / row["seconds"], "share_of_peak": flops / row["seconds"] / peak}


def compiling(device: str) -> None:
    name = "OpenCLIP-B"
    with torch.device(device):
        encoder, other = (load_encoder(name, pretrained=False, device=device) for _ in range(2))
    for block in other.tower.blocks:
        block.mlp.compile()
    pixels = torch.randn(BATCHES[name], 3, 224, 224, device=device)

    def traced(encoder: Encoder) -> None:
        with torch.autocast(device, torch.bfloat16):
            trace(encoder, pixels)

    variants = {"eager": lambda: traced(encoder), "compiled MLPs": lambda: traced(other)}
    measure("tracing, compiled", variants, 8, device, encoder="ViT-B/16", precision="bfloat16", images=len(pixels))


def decoding() -> None:
    """Seconds in which one process decodes and resizes a JPEG of ImageNet's usual size."""
    import io

    from PIL import Image

    encoder = load_encoder("OpenCLIP-B", pretrained=False)
    noise = torch.randint(256, (1, 3, 47, 63), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).float()
    picture = torch.nn.functional.interpolate(noise, (375, 500), mode="bicubic").clamp(0, 255).byte()[0]
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=90)
    decode = lambda: [encoder.preprocess(Image.open(io.BytesIO(buffer.getvalue()))) for _ in range(20)]  # noqa: E731
    seconds = measure("decoding and preprocessing, one process, 20 images of 500 x 375", {"pillow": decode}, 5, "cpu")
    rows[-1]["images_per_second"] = 20 / seconds["pillow"]


def dimensions(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (20_000, 80_000):
        x = (torch.randn(n, K, generator=generator) * torch.linspace(3, 0.1, K)).to(device)
        variants = {"ours": lambda x=x: two_nn(x)}
        if device == "cuda" or n == 20_000:  # 80,000 rows need 26 GB twice
            variants["torch.cdist"] = lambda x=x: torch.cdist(x, x).topk(3, largest=False)
        measure(f"TwoNN of a head, n = {n:,}", variants, 3 if device == "cuda" else 1, device, images=n)
    if device == "cuda":
        layer = {"ours": lambda: [two_nn(x) for _ in range(HEADS)]}
        measure("TwoNN of a layer of 16 heads, n = 80,000", layer, 1, device, images=80_000)


def pursuits(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    words = torch.nn.functional.normalize(torch.randn(TEXTS, D, generator=generator), dim=1).to(device)
    n = 5_000
    coordinates = (torch.randn(n, HEADS, K, generator=generator) * torch.linspace(3, 0.1, K)).to(device)
    frames = torch.randn(HEADS, K, D, generator=generator).to(device)
    moments = Moments.of(coordinates)
    rounds = 5 if device == "cuda" else 1
    measure("PCA of a layer of 16 heads", {"ours": lambda: pca_from_moments(moments, frames)}, rounds, device, images=n)
    textspan = {"ours": lambda: textspan_from_moments(moments, words, 5, frames)}
    measure("TextSpan of a layer of 16 heads, 5 of 3,498 texts", textspan, rounds, device, images=n)
    basis, factor = torch.linalg.qr(frames[0].double().mT)
    samples = (coordinates[:, 0] - coordinates[:, 0].mean(0)).double() @ factor.mT

    def somp():
        for _ in range(HEADS):
            somp_in_basis(samples, basis, words.double(), 5, "l1")

    measure("SOMP of a layer of 16 heads, 5 of 3,498 texts, n = 5,000", {"ours": somp}, rounds, device, images=n)


def residual_epoch(device: str) -> None:
    """An epoch of RD at the size of ViT-L on 10,000 images; on a GPU, also a batch with the encoder in the loop."""
    n, d = 10_000, D
    units = tuple(residual_units(LAYERS, HEADS)[1:])
    sizes = torch.tensor([64 if unit.kind == "head" else d for unit in units])
    k = int(sizes.sum())
    index = torch.arange(len(units)).repeat_interleave(sizes)
    bases = Bases("RD", units, torch.randn(k, d) / d**0.5, index, torch.zeros(len(units), d), torch.ones(k))
    module = ResiDual(bases).to(device)
    optimizer = AdamWScheduleFree(module.parameters(), lr=1e-2)
    optimizer.train()
    inputs = torch.empty(n, bases.width, dtype=torch.float16, device=device).normal_()
    classes = torch.nn.functional.normalize(torch.randn(100, d, device=device), dim=1)
    task = _Task(inputs, torch.arange(n) % 100, classes, 100.0, torch.device(device))

    def step(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def epoch():
        with torch.enable_grad():
            for loss in task.epoch(module, torch.Generator().manual_seed(0)):
                step(loss)

    label = f"an epoch of RD, {k:,} components, {n:,} images"
    seconds = measure(label, {"ours": epoch}, 3 if device == "cuda" else 1, device, images=n)["ours"]
    rows[-1]["images_per_second"] = n / seconds
    if device == "cuda":
        with torch.device(device):
            encoder = load_encoder("OpenCLIP-L", pretrained=False, device=device)
        pixels = torch.randn(BATCH, 3, 224, 224, device=device)

        def in_the_loop():
            trace(encoder, pixels)
            with torch.enable_grad():
                step(task.loss(module(inputs[:BATCH]), torch.arange(BATCH)))

        seconds = measure("a batch of RD with the encoder in the loop", {"naive": in_the_loop}, 5, device, images=BATCH)
        rows[-1]["images_per_second"] = BATCH / seconds["naive"]


def write(path: Path) -> None:
    """Four digits of each second, whole megabytes and images."""
    digits = {"seconds": "{:.4g}", "mb": "{:.0f}", "images": "{:.0f}", "images_per_second": "{:.0f}"}
    digits |= {"share_of_peak": "{:.3f}"}
    table = pd.DataFrame(rows)
    for name, form in digits.items():
        if name in table:
            table[name] = table[name].map(form.format, na_action="ignore")
    table.to_csv(path, index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true", help="the estimators on this machine's CPU as well")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    peak = ceiling("cuda")
    parts = [lambda: tracing("cuda", peak), lambda: dimensions("cuda"), lambda: pursuits("cuda")]
    parts += [lambda: residual_epoch("cuda"), decoding]
    if args.cpu:
        parts += [lambda: pursuits("cpu"), lambda: residual_epoch("cpu"), lambda: dimensions("cpu")]
    for part in [*parts, lambda: compiling("cuda")]:
        part()
        write(args.out / "gpu.csv")
    facts = {"card": torch.cuda.get_device_name(0), "torch": torch.__version__, "date": str(datetime.date.today())}
    facts |= {"transformers": version("transformers"), "open_clip": version("open_clip_torch")}
    facts |= {"bf16_tflops": round(peak / 1e12), "command": "python benchmarks/gpu.py --out FOLDER --cpu"}
    (args.out / "gpu.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
