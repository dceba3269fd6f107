"""An installed gradroute, used once: a masked backward on every backend, compared with the detach idiom in fp64.

And `python -m gradroute check` once, in processes of its own, of one op on the CPU.
"""

import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import gradroute
from gradroute import MLPSites, Routes, routed_gated_mlp
from gradroute.tables import localize

D_MODEL, D_FF, TOKENS = 32, 96, 64
TABLE = localize(2, D_FF, {1: slice(80, 96)})  # tokens of route 1 train the last 16 hidden units only


def main():
    """Raises where a backend disagrees, or where loading gradroute started a second OpenMP runtime."""
    print(f"gradroute from {gradroute.__file__}")
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        check_backends(device)
    check_openmp()
    check_command()


def check_backends(device):
    """Compares every backend that can run on a device with the idiom."""
    torch.manual_seed(0)
    shapes = [(TOKENS, D_MODEL), (D_FF, D_MODEL), (D_FF, D_MODEL), (D_MODEL, D_FF), (TOKENS, D_MODEL)]
    *tensors, upstream = [torch.randn(shape, device=device) / shape[-1] ** 0.5 for shape in shapes]
    ids = torch.arange(TOKENS, device=device) % 2
    routed = partial(routed_gated_mlp, routes=Routes.of(ids, num_routes=2), sites=MLPSites(hidden=TABLE))
    wide = [tensor.double() for tensor in tensors]
    exact = gradients(partial(detach_idiom, m=TABLE.on(ids.device)[ids]), wide, upstream.double())
    for backend in gradroute.available_backends("routed_gated_mlp", device):
        found = gradients(partial(routed, backend=backend), tensors, upstream)
        # fp32 sums of at most 96 terms of size 1 or less
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5, check_dtype=False)
        print(f"ok: {backend} on {device}: a masked backward agrees with the detach idiom")


def gradients(function, tensors, upstream):
    """The gradients of the function's output, times the upstream gradient, with respect to the tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(function(*leaves), leaves, upstream)


def detach_idiom(x, w_gate, w_up, w_down, m):
    """The gated MLP whose hidden units' gradient is multiplied by m: m * h + (1 - m) * h.detach()."""
    h = F.silu(x @ w_gate.T) * (x @ w_up.T)
    return (m * h + (1 - m) * h.detach()) @ w_down.T


def check_openmp():
    """Checks that there is one OpenMP runtime: the threads of two would spin against each other."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        runtimes = set(re.findall(r"/\S*lib(?:gomp|omp|iomp5)[-.\w]*", maps.read_text()))
        assert len(runtimes) <= 1, f"several OpenMP runtimes are loaded: {runtimes}"
        print(f"ok: no second OpenMP runtime: {', '.join(runtimes) or 'none'}")


def check_command():
    """Runs `python -m gradroute check`, narrowed to one op, with a cache folder that is thrown away."""
    command = [sys.executable, "-m", "gradroute", "check", "--device", "cpu", "--op", "route_grad", "--quick"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, check=True, env={**os.environ, "GRADROUTE_CACHE": folder})
    print("ok: python -m gradroute check")


if __name__ == "__main__":
    main()
