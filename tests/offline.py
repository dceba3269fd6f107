"""Compiles, without a GPU, every Triton launch that the ops' samples make, as the runtime would compile it.

`python tests/offline.py ARCHITECTURE [--sampled | --candidates]` prints one JSON line a kernel: its name, dtype and
configuration, registers, spills (bytes), shared memory (bytes), and whether Triton's runtime would have specialised it
the same way.
Sampled: of every kernel, dtype and configuration the first specialisation, and a third of the others. Candidates: those
of kernels/candidates.py in the place of what is shipped, and the first specialisation alone. It must run without
TRITON_INTERPRET, whose functions cannot be compiled.
"""

import contextlib
import io
import itertools
import json
import re
import sys
from unittest import mock

import cases
import torch
import triton
import triton.language as tl
from toolkit import test_optim_fused
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

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

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


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
BINARY = {"sites": ("score_edges", "value_edges"), "tables": "blocks"}
EVERYTHING = {"strength": "token", "padding": 7}
MANY_ROUTES = {"tables": "blocks", "num_routes": 40, "documents": 3, "causal": False, "window": 50}
GATHERED = EVERYTHING | {"gathered": True}
CALLS = (PLAIN, MASKED, BINARY, EVERYTHING, MANY_ROUTES, GATHERED)
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


def attention_sample(head_dim, dtype, gathered=False, **options):
    """One call; `gathered`: with edges of too many different values for levels of bits."""
    sizes = testing.Sizes(heads=4, kv_heads=2, head_dim=head_dim)
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


def compile_arguments(launch):
    """The signature, constants and attributes with which the runtime would specialise this launch.

    Constants and attributes by path: the index of an argument, then those of an element in its tuples.
    """
    signature, constants, attributes = {}, {}, {}
    values = launch.arguments | {k: v for k, v in launch.config.items() if k not in OPTIONS}
    for index, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        else:
            signature[parameter.name] = specialised(value, (index,), constants, attributes)
    return signature, constants, attributes


def specialised(value, path, constants, attributes):
    """The type of an argument, or of an element in a tuple, in a signature; adds to constants and attributes."""
    if isinstance(value, tuple):
        types = [specialised(own, (*path, i), constants, attributes) for i, own in enumerate(value)]
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    if value is None or isinstance(value, tl.constexpr) or (type(value) is int and value == 1):
        constants[path] = value
        return "constexpr"
    address = value.data_ptr() if isinstance(value, torch.Tensor) else value
    if isinstance(address, int) and address % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return type_of(value)


def type_of(value):
    """The type of a number or a tensor in a signature."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


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


def compile_and_read(source, architecture, options):
    """The binary, and registers and spilled bytes per thread: what the assembler says as Triton calls it."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    said = said.getvalue()
    stores, loads = (int(re.search(rf"(\d+) bytes spill {kind}", said)[1]) for kind in ("stores", "loads"))
    return binary, int(re.search(r"Used (\d+) registers", said)[1]), stores + loads


def compiled(architecture, how):
    """One report per distinct kernel, or for a sample of them: how is "", "--sampled" or "--candidates"."""
    done, kinds = set(), set()
    for launch in recorded_candidates(architecture) if how == "--candidates" else recorded(architecture):
        signature, constants, attributes = compile_arguments(launch)
        options = {name: launch.config[name] for name in OPTIONS if name in launch.config}
        key = repr((launch.kernel.__name__, signature, constants, attributes, options))
        if key in done:
            continue
        done.add(key)
        dtype = next(kind for kind in flat(signature.values()) if kind.startswith("*"))
        kind = (launch.kernel.__name__, dtype, repr(launch.config), launch.arguments.get("BLOCK_D"))
        if kind in kinds and (how == "--candidates" or (how == "--sampled" and len(done) % 3)):
            continue
        kinds.add(kind)
        source = ASTSource(launch.kernel, signature, constants, attributes)
        binary, registers, spilled = compile_and_read(
            source, architecture, options | {"enable_fp_fusion": True}
        )
        yield {
            "kernel": launch.kernel.__name__,
            "constants": {
                name: constants[(index,)]
                for index, name in enumerate(launch.kernel.arg_names)
                if name.isupper()
            },
            "dtype": dtype,
            "options": options,
            "registers": registers,
            "spilled": spilled,
            "shared": binary.metadata.shared,
            "as_the_runtime": (signature, constants, attributes) == runtime_arguments(launch, architecture),
        }


if __name__ == "__main__":
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # nothing is said of what comes from the cache
    for report in compiled(int(sys.argv[1]), "".join(sys.argv[2:])):
        print(json.dumps(report), flush=True)
