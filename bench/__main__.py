"""`python -m bench`: it says at once that it is there, because what it imports takes seconds."""

import os
import signal
import sys
from types import FrameType

NEEDED = ("tqdm", "matplotlib")  # the packages of the extra `bench`


def main() -> int:
    print("python -m bench: loading PyTorch and gradroute", file=sys.stderr, flush=True)
    try:
        earlier = signal.signal(signal.SIGINT, stop)
        from .command import main as run

        signal.signal(signal.SIGINT, earlier)
        return run()
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        print(
            f"python -m bench: got no package {error.name}; pip install '.[bench]' -c constraints.txt brings it",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\npython -m bench: interrupted", file=sys.stderr)
        return 130


def stop(number: int, frame: FrameType | None) -> None:
    """Ends the process while it imports: some imports swallow a KeyboardInterrupt, and nothing is there to save."""
    print("\npython -m bench: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
