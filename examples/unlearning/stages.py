"""The demo from texts to results: two models, routed and not, are trained, ablated, reloaded and compared."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from .corpus import ROUTE_NAMES, Batch, encode, load_corpus, mixture, pack, train_tokenizer
from .cost import measure
from .model import Shape
from .report import MODELS, print_report, save_json, save_plot, verdict
from .training import FINE_TUNE_STEPS, ROWS, choose_device, run_stages

LENGTH = 256
FORGET_FRACTION = 0.4
HELD_OUT_ROWS = 40


def demonstrate(steps: int, seed: int, device_name: str, out: Path) -> int:
    """Runs the demo, prints and saves its results; returns the exit code."""
    device = choose_device(device_name)
    start = time.perf_counter()
    results = run(steps, seed, device)
    results["seconds"] = time.perf_counter() - start
    print_report(results)
    save_json(results, out / "demo.json")
    save_plot(results, out / "demo.png")
    print(f"{results['seconds']:.0f} s on {device}")
    return 0 if results["verdict"]["localised"] else 1


def run(steps: int, seed: int, device: torch.device) -> dict[str, Any]:
    shape = Shape()
    train, retain, held_out = batches(shape, steps, seed)
    losses = {name: run_stages(name, shape, train, retain, held_out, seed, device) for name in MODELS}
    return {
        "seed": seed,
        "steps": steps,
        "device": str(device),
        "shape": dataclasses.asdict(shape),
        "losses": losses,
        "cost": measure(shape, train.rows(0, ROWS), device),
        "verdict": verdict(losses),
    }


def batches(shape: Shape, steps: int, seed: int) -> tuple[Batch, Batch, list[Batch]]:
    """The mixed batches to train on, those of retain text to fine-tune on, and the held-out rows of each set."""
    print("reading the texts", flush=True)
    corpus = load_corpus(seed)
    print("training their tokenizer", flush=True)
    tokenizer = train_tokenizer(corpus, shape.vocabulary)
    documents = [encode(tokenizer, texts) for texts in corpus.train]
    held_out = [
        pack(((route, ids) for ids in encode(tokenizer, texts)), HELD_OUT_ROWS, LENGTH)
        for route, texts in enumerate(corpus.held_out)
    ]
    train = pack(mixture(documents, FORGET_FRACTION, seed), steps * ROWS, LENGTH)
    retain = pack(mixture(documents, 0.0, seed + 1), FINE_TUNE_STEPS * ROWS, LENGTH)
    for route, name in enumerate(ROUTE_NAMES):
        tokens, kept = sum(map(len, documents[route])), held_out[route].input_ids.numel()
        print(f"{name}: {len(documents[route])} documents of {tokens} tokens, {kept} held out", flush=True)
    return train, retain, held_out
