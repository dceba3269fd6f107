"""`python -m bench`: it says at once that it is there, because what it imports takes seconds."""

import sys


def main() -> int:
    print("python -m bench: loading PyTorch and gradroute", file=sys.stderr, flush=True)
    try:
        from .command import main as run

        return run()
    except KeyboardInterrupt:
        print("\npython -m bench: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
