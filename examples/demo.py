"""Trains a small Llama of transformers with routed gradients on real text, ablates what was routed, and reports.

Licence texts (the forget set) may only train the last block of MLP units, while Python's documentation and library
sources train everything else: SGTM, arXiv 2512.05648, but with the label of each token instead of one per step. Zeroing
the block then takes the licences away and leaves the rest. A control, trained on the same data without routing, is
ablated the same way. Both are then ordinary models again: they are saved, loaded and evaluated. Results are printed
and saved as JSON and PNG; the exit code is 1 when localisation failed.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType

INTERRUPTED = "\ndemo: interrupted; nothing is saved before the end"


def main() -> int:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    print("demo: loading PyTorch, transformers and gradroute", flush=True)
    try:
        earlier = signal.signal(signal.SIGINT, stop)
        from unlearning.stages import demonstrate  # only now, because it takes seconds to import

        signal.signal(signal.SIGINT, earlier)
        return demonstrate(arguments.steps, arguments.seed, arguments.device, arguments.out)
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130


def stop(number: int, frame: FrameType | None) -> None:
    """Ends the process while it imports, for some imports swallow a KeyboardInterrupt."""
    print(INTERRUPTED, file=sys.stderr, flush=True)
    os._exit(130)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("demo-results"), help="folder of demo.json and demo.png"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=positive, default=500, help="training steps of each of both models")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes a CUDA GPU when there is one",
    )
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text) if text.lstrip("-").isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
