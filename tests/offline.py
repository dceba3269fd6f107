"""Compiles, without a GPU, every Triton launch that the ops' samples make, as the runtime would compile it.

`python tests/offline.py ARCHITECTURE [--sampled | --candidates]` prints one JSON line a kernel: its name, dtype and
configuration, registers, spills (bytes), shared memory (bytes), and whether Triton's runtime would have specialised it
the same way.
Sampled: of every kernel, dtype and configuration the first specialisation, and a third of the others. Candidates: those
of kernels/candidates.py in the place of what is shipped, and the first specialisation alone. It must run without
TRITON_INTERPRET, whose functions cannot be compiled.
"""

import itertools
import json
import sys
from unittest import mock

import cases
import torch
from toolkit import test_optim_fused
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from bench.static.compiling import assembled, options_of, resources, specialisation
from gradroute import AttentionSites, backends, testing
from gradroute.backends import triton as kernels
from gradroute.kernels.candidates import ALTERNATIVES, candidates
from gradroute.kernels.configs import CONFIGS

# Widths at which pointers and strides are divisible by 16, as in real models, and odd ones: two kernels come out.
SIZES = (testing.Sizes(d_model=256, d_ff=512, vocabulary=64), testing.Sizes(d_model=131, d_ff=261))
TOKENS = (64, 37)  # so are numbers of tokens
LAYOUTS = ("contiguous", "sliced", "transposed")
DTYPES = (torch.bfloat16, torch.float32)

# Rows that a norm keeps in registers at several numbers of warps, and longer ones.
NORM_WIDTHS = (1024, 4096, 8192, 16384)


def samples(op):
    """Calls of `op` in which every two values of the axes that change its kernels meet.

    Products of routed_linear need most registers where several come together, so every three meet there.
    """
    if op == "routed_attention":
        yield from attention_samples()
        return
    axes = {
        "dtype": (*DTYPES, torch.float16) if op == "routed_linear" else DTYPES,
        "strength": testing.STRENGTHS,
        "tables": ("dense", "sparse", "broadcast"),
        "sizes": SIZES,
        "tokens": TOKENS,
        "bias": (True, False),
        "variant": testing.variants(op),
        "gradient": LAYOUTS,
        "inputs": LAYOUTS,
    }
    for case in cases.covering(axes, strength=3 if op == "routed_linear" else 2):
        variant = case.pop("variant")
        yield testing.sample(op, **case, **variant)
    if op.endswith("_norm"):
        for width, dtype in itertools.product(NORM_WIDTHS, DTYPES):
            sizes = testing.Sizes(d_model=width)
            yield testing.sample(op, dtype=dtype, tokens=TOKENS[0], sizes=sizes, strength="token")


# For every configuration of attention's kernels (kernels/configs.py) the calls that need most registers.
PLAIN = {"sites": (), "causal": False, "window": 50}
MASKED = {"sites": ("heads", "forward_heads", "query", "key", "value"), "strength": "token", "padding": 7}
DOCUMENTS = {"sites": MASKED["sites"], "strength": "token", "documents": 3}
BINARY = {"sites": ("score_edges", "value_edges"), "tables": "blocks"}
EVERYTHING = {"strength": "token", "padding": 7}
MANY_ROUTES = {"tables": "blocks", "num_routes": 40, "documents": 3, "causal": False, "window": 50}
GATHERED = EVERYTHING | {"gathered": True}
SPLIT = EVERYTHING | {"heads": 8, "kv_heads": 1}  # dK and dV in parts
CAUSAL = {"sites": ()}
WINDOW = {"sites": MASKED["sites"], "strength": "token", "window": 50}
CALLS = (PLAIN, CAUSAL, MASKED, DOCUMENTS, WINDOW, BINARY, EVERYTHING, MANY_ROUTES, GATHERED, SPLIT)
PADDED = (MASKED, EVERYTHING)
HEAD_DIMS = {64: (16, 24, 48), 128: (80, 112), 256: ()}  # and smaller ones that its configurations serve


def attention_samples():
    """Those calls in every head dimension that has a configuration; a part of them in those that it serves."""
    for (head_dim, smaller), dtype in itertools.product(HEAD_DIMS.items(), DTYPES):
        for call in CALLS:
            yield attention_sample(head_dim, dtype, **call)
        for served, call in itertools.product(smaller, PADDED):
            yield attention_sample(served, dtype, **call)
    for call in PADDED:
        yield attention_sample(240, torch.bfloat16, **call)


def attention_sample(head_dim, dtype, gathered=False, heads=4, kv_heads=2, **options):
    """One call; `gathered`: with edges of too many different values for levels of bits."""
    sizes = testing.Sizes(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    call = testing.sample("routed_attention", dtype=dtype, tokens=(1, 256), sizes=sizes, **options)
    if not gathered:
        return call
    generator = torch.Generator().manual_seed(0)
    edges = {name: torch.randn(4, 4, generator=generator) for name in ("score_edges", "value_edges")}
    return call.with_sites(AttentionSites(**call.tables | edges))


def take_steps():
    """Steps of RoutedAdamW in which every two of a shape, a dtype, a kind of blocks and amsgrad or not meet."""
    axes = {
        "shape": [*((size.d_model, size.d_ff) for size in SIZES), (1, 256), (256, 1)],
        "dtype": DTYPES,
        "blocks": test_optim_fused.BLOCKS,
        "amsgrad": (False, True),
    }
    for case in cases.covering(axes):
        test_optim_fused.Step(**case).take(kernels.adamw_step)
        step = test_optim_fused.Step(**case)
        two = [[] if tensor is None else [tensor, tensor.clone()] for tensor in step.copies()]
        kernels.adamw_step(*two, step.factors.float().repeat(1, 2), [step.kind] * 2, step.options)


def recorded(architecture):
    """The launches of every op's samples on backend triton, forward and backward, and of steps; nothing runs."""
    with kernels.record(architecture) as launches:
        for op, row in backends.OPS.items():
            for call in samples(op) if "triton" in row else ():
                call.run("triton")
        take_steps()
    return launches


def recorded_candidates(architecture):
    """The launches with configurations of kernels/candidates.py: those of every entry that stand first, then second."""
    lists = {entry: candidates(entry, architecture)[1:] for entry in ALTERNATIVES[architecture]}
    for chosen in itertools.zip_longest(*lists.values()):
        tried = {entry: {architecture: config} for entry, config in zip(lists, chosen, strict=True) if config}
        with mock.patch.dict(CONFIGS, tried):
            launches = recorded(architecture)
        given = [config for entry in tried.values() for config in entry.values()]
        yield from (launch for launch in launches if any(launch.config is config for config in given))


def flat(types):
    """The types of arguments and of the elements in their tuples."""
    for kind in types:
        if isinstance(kind, tuple):
            yield from flat(kind)
        else:
            yield kind


def runtime_arguments(launch, architecture):
    """The same from Triton's own binder, which `kernel[grid](...)` goes through: internals, so only compared with."""
    target, kernel = make_backend(GPUTarget("cuda", architecture, 32)), launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, target)
    bound, specialization, options = bind(**launch.arguments, **launch.config)
    _, signature, constants, attributes = kernel._pack_args(
        target, launch.config, bound, specialization, options
    )
    return signature, constants, {index: attribute for index, attribute in attributes.items() if attribute}


def compiled(architecture, how):
    """One report per distinct kernel, or for a sample of them: how is "", "--sampled" or "--candidates"."""
    done, kinds = set(), set()
    for launch in recorded_candidates(architecture) if how == "--candidates" else recorded(architecture):
        special, options = specialisation(launch), options_of(launch)
        key = repr((launch.kernel.__name__, special, options))
        if key in done:
            continue
        done.add(key)
        dtype = next(kind for kind in flat(special.signature.values()) if kind.startswith("*"))
        kind = (launch.kernel.__name__, dtype, repr(launch.config), launch.arguments.get("BLOCK_D"))
        if kind in kinds and (how == "--candidates" or (how == "--sampled" and len(done) % 3)):
            continue
        kinds.add(kind)
        source = ASTSource(launch.kernel, *special)
        binary, said = assembled(source, architecture, {"enable_fp_fusion": True} | options)
        registers, spilled = resources(said)
        yield {
            "kernel": launch.kernel.__name__,
            "constants": {
                name: special.constants[(index,)]
                for index, name in enumerate(launch.kernel.arg_names)
                if name.isupper()
            },
            "dtype": dtype,
            "options": options,
            "registers": registers,
            "spilled": spilled,
            "shared": binary.metadata.shared,
            "as_the_runtime": special == runtime_arguments(launch, architecture),
        }


if __name__ == "__main__":
    for report in compiled(int(sys.argv[1]), "".join(sys.argv[2:])):
        print(json.dumps(report), flush=True)
