"""Every op of the table has all its pieces; what is missing is named. CONTRIBUTING.md lists them for a new op."""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import cases
import pytest

import gradroute
from gradroute import backends, reference, testing
from gradroute.backends import composed, native
from gradroute.backends import triton as kernels
from gradroute.kernels import configs
from gradroute.primitives.protocol import HeadPrimitives, Primitives

ROOT = Path(__file__).parents[2]

# Where an op's stem stands for a backend; the reference has its own file for all.
STEM_FILES = {
    "torch": "gradroute/{}.py",
    "triton": "kernels/{}.py",
    "cpu": "csrc/{}.cpp",
    "cuda": "csrc/{}.cu",
}


def missing_pieces(op):
    """The pieces that an op of the table lacks, in words."""
    return [
        *missing_meaning(op),
        *missing_public_names(op),
        *missing_samples(op),
        *missing_files(op),
        *missing_primitives(op),
    ]


def missing_meaning(op):
    if not inspect.isfunction(getattr(reference, op, None)):
        yield f"gradroute.reference has no {op}, the meaning of the op"


def missing_public_names(op):
    function = getattr(gradroute, op, None)
    if function is None or op not in gradroute.__all__:
        yield f"gradroute does not export {op}, the public function"
        return
    if "backend" not in inspect.signature(function).parameters:
        yield f"gradroute.{op} takes no backend"
    if not function.__doc__ or "Raises:" not in function.__doc__ or "Returns:" not in function.__doc__:
        yield f"gradroute.{op} has no docstring with its Returns and Raises"
    sites = "routes: Routes | None, sites: " in str(inspect.signature(function)).replace("'", "")
    if not sites and op != "route_grad":
        yield f"gradroute.{op} does not take routes, then sites"


def missing_samples(op):
    known = testing.OPS.get(op)
    if known is None:
        yield f"gradroute.testing.OPS has no {op}, the generator of its samples"
        return
    if known.sites_name is None:
        return
    sites = getattr(gradroute, known.sites_name, None)
    if sites is None:
        yield f"gradroute does not export {known.sites_name}, the sites of {op}"
        return
    # The updates of attention concern projections: sites of layers, refused by the function.
    fields = {field.name for field in dataclasses.fields(sites)}
    if op == "routed_attention":
        fields = {name for name in fields if not name.startswith("update")}
    for name in sorted(fields ^ set(testing.site_names(op))):
        yield f"gradroute.testing and gradroute.{known.sites_name} disagree on the site {name} of {op}"


def stem_of(op):
    """The file name that all of an op's files share: that of its public function."""
    return getattr(gradroute, op).__module__.rpartition(".")[2]


def missing_files(op):
    if getattr(gradroute, op, None) is None:
        return
    for backend in backends.OPS[op]:
        if backend not in STEM_FILES:
            continue
        name = STEM_FILES[backend].format(stem_of(op))
        file = ROOT / name
        if not file.exists() and not file.with_suffix("").is_dir():  # a large op has a folder instead
            yield f"{name} is missing: {op} is in the table for {backend}"


def declared(protocol):
    """The signatures of a Protocol's functions, by name."""
    return {
        name: list(inspect.signature(function).parameters.values())[1:]  # without self
        for name, function in vars(protocol).items()
        if inspect.isfunction(function) and not name.startswith("_")
    }


PRIMITIVES = declared(Primitives)
HEAD_PRIMITIVES = declared(HeadPrimitives)
MODULES = {name: backends.primitives(name) for name in backends.BACKENDS if name != "reference"}
DISTINCT_MODULES = list(dict.fromkeys(MODULES.values()))
COMPOSED = {name: getattr(composed, name, None) for name in PRIMITIVES}  # before a test removes one


class MissingPrimitive(Exception):
    """An op asked for a primitive that backend `torch` lacks."""


class Recorder:
    """Backend `torch`, which notes what is asked of it: also what is not called, but passed as a value."""

    def __init__(self):
        self.names = set()

    def __getattr__(self, name):
        if name not in COMPOSED:
            raise AttributeError(f"gradroute.primitives.protocol.Primitives has no {name}")
        self.names.add(name)
        if COMPOSED[name] is None:
            raise MissingPrimitive(name)
        return COMPOSED[name]


@functools.cache
def primitives_of(op):
    """The primitives that an op asks of its backend: in runs with every mask, and with all inputs but one frozen."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends._PRIMITIVES, "torch", recorder)
        for variant in testing.variants(op):
            call = cases.make(op, tables="dense", strength="token", **variant)
            others = [
                [other for other in call.differentiable if other != name] for name in call.differentiable
            ]
            for frozen in ((), *others):
                with contextlib.suppress(MissingPrimitive):  # which is noted, so that it is named
                    call.run("torch", frozen=frozen)
    return sorted(recorder.names)


def missing_primitives(op):
    if getattr(gradroute, op, None) is None or op not in testing.OPS:
        return
    for name in primitives_of(op):
        for backend in backends.OPS[op]:
            if backend in MODULES and not callable(getattr(MODULES[backend], name, None)):
                yield f"{MODULES[backend].__name__} has no {name}, a primitive of {op} on {backend}"


def signature_difference(name, module, protocol=PRIMITIVES):
    """How a backend's primitive differs from the Protocol's in what it takes; it may take more, with defaults.

    mypy compares the types.
    """
    function = getattr(module, name, None)
    if function is None:
        return f"{module.__name__} has no {name}"
    own = list(inspect.signature(function).parameters.values())
    taken, declared = ([(p.name, p.kind, p.default) for p in of] for of in (own, protocol[name]))
    extra = taken[len(declared) :]
    if taken[: len(declared)] == declared and not any(
        default is inspect.Parameter.empty for *_, default in extra
    ):
        return None
    own_names, names = ([name for name, *_ in parameters] for parameters in (taken, declared))
    return f"{name} takes {own_names} in {module.__name__}, {names} in the Protocol"


def kernel_entries():
    """The names of all @triton.jit functions that launchers launch."""
    modules = [
        importlib.import_module(info.name)
        for info in pkgutil.walk_packages(gradroute.kernels.__path__, "gradroute.kernels.")
    ]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def configuration_errors():
    """Errors in the table of launch configurations; a name may end with a dtype, as in x.float32."""
    configured = {name.partition(".")[0] for name in configs.CONFIGS}
    for name in sorted(kernel_entries() - configured):
        yield f"gradroute.kernels.configs.CONFIGS has no {name}"
    for name in sorted(configured - kernel_entries()):
        yield f"gradroute.kernels.configs.CONFIGS has {name}, and no kernel has that name"
    for name, shipped in configs.CONFIGS.items():
        if configs.ARCHITECTURES[0] not in shipped:
            yield f"gradroute.kernels.configs.CONFIGS[{name!r}] has no entry for {configs.ARCHITECTURES[0]}"
        for architecture in sorted(set(shipped) - set(configs.ARCHITECTURES)):
            yield f"gradroute.kernels.configs.CONFIGS[{name!r}] has an unknown architecture {architecture}"


@pytest.mark.parametrize("op", backends.OPS)
def test_every_op_is_complete(op):
    missing = "\n".join(missing_pieces(op))
    assert not missing, missing


def test_every_backend_has_its_place():
    """A backend that one of these leaves out would be passed over in silence."""
    assert set(backends._FASTEST_FIRST) == set(backends.BACKENDS)
    assert set(STEM_FILES) == set(MODULES)


def test_every_row_of_the_table_names_backends_and_ends_with_the_meaning():
    for op, row in backends.OPS.items():
        assert set(row) <= set(backends.BACKENDS), op
        assert row[-1] == "reference", op


@pytest.mark.parametrize("module", DISTINCT_MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
@pytest.mark.parametrize("name", PRIMITIVES)
def test_every_primitive_has_the_signature_of_the_protocol(name, module):
    assert signature_difference(name, module) is None


@pytest.mark.parametrize("module", [composed, native], ids=["torch", "native"])
@pytest.mark.parametrize("name", HEAD_PRIMITIVES)
def test_every_primitive_of_heads_has_the_signature_of_the_protocol(name, module):
    assert signature_difference(name, module, HEAD_PRIMITIVES) is None


@pytest.mark.parametrize("protocol", [Primitives, HeadPrimitives])
def test_the_protocol_says_what_every_primitive_computes(protocol):
    for name in declared(protocol):
        assert getattr(protocol, name).__doc__, name


KERNELS = re.findall(
    r"^KERNEL\((\w+), ", (ROOT / "csrc/kernels.inc").read_text(encoding="utf-8"), re.MULTILINE
)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_native_kernel_is_defined(kernel):
    """Each is defined once for the CPU and once for CUDA, in files of the same stem, and listed in kernels.inc."""
    stems = {}
    for kind in ("cpp", "cu"):
        found = [
            file.stem
            for file in (ROOT / "csrc").glob(f"*.{kind}")
            if re.search(rf"^void {kernel}\(", file.read_text(encoding="utf-8"), re.MULTILINE)
        ]
        assert len(found) == 1, f"{kernel} is defined in {found} of csrc/*.{kind}"
        stems[kind] = found
    assert stems["cpp"] == stems["cu"]


@pytest.mark.skipif(native.module is None, reason=str(native.load_error))
def test_every_native_kernel_is_in_every_implementation():
    built = [name for name in dir(native.module) if name.startswith(("cpu_", "cuda"))]
    assert {f"cpu_{name}" for name in native.module.INSTRUCTION_SETS} <= set(built)
    for name in built:
        absent = sorted(set(KERNELS) - set(dir(getattr(native.module, name))))
        assert not absent, f"{name} has no {', '.join(absent)}: `make venv` compiles csrc/ again"


def test_every_primitive_is_one_of_an_op_or_of_the_optimizer():
    assert {name for op in backends.OPS for name in primitives_of(op)} | {
        "adamw_step",
        "touched_blocks",
    } == set(PRIMITIVES)


def test_every_kernel_has_a_configuration():
    assert len(kernel_entries()) >= len(PRIMITIVES)
    assert list(configuration_errors()) == []


def test_every_op_of_the_samples_is_in_the_table():
    assert set(testing.OPS) == set(backends.OPS)


def test_files_of_an_op_share_its_stem():
    """The middles of the MLPs live with them, the norms together."""
    assert stem_of("routed_activation") == stem_of("routed_mlp") == "mlp"
    assert stem_of("routed_glu") == stem_of("routed_gated_mlp") == "gated_mlp"
    assert stem_of("routed_rms_norm") == stem_of("routed_layer_norm") == "norm"
    assert stem_of("route_grad") == "route_grad"


# The tests above fail when a piece is removed, and say which.


def added(errors, before):
    """The errors that were not there before: while an op is being written, others are."""
    return [error for error in errors if error not in before]


REMOVALS = {
    "gradroute.routed_linear": "gradroute does not export routed_linear, the public function",
    "gradroute.LinearSites": "gradroute does not export LinearSites, the sites of routed_linear",
    "gradroute.reference.routed_linear": "gradroute.reference has no routed_linear, the meaning of the op",
    "gradroute.backends.composed.weight_grad": (
        "gradroute.backends.composed has no weight_grad, a primitive of routed_linear on torch"
    ),
    "gradroute.backends.triton.weight_grad": (
        "gradroute.backends.triton has no weight_grad, a primitive of routed_linear on triton"
    ),
}


@pytest.mark.parametrize("piece", REMOVALS)
def test_a_removed_piece_is_named(piece, monkeypatch):
    before = missing_pieces("routed_linear")
    module, _, name = piece.rpartition(".")
    monkeypatch.delattr(sys.modules[module], name)
    assert REMOVALS[piece] in added(missing_pieces("routed_linear"), before)


def test_a_removed_sample_is_named(monkeypatch):
    before = missing_pieces("routed_linear")
    monkeypatch.delitem(testing.OPS, "routed_linear")
    assert added(missing_pieces("routed_linear"), before) == [
        "gradroute.testing.OPS has no routed_linear, the generator of its samples"
    ]


def test_a_site_that_no_sample_has_is_named(monkeypatch):
    before = missing_pieces("routed_linear")
    known = testing.OPS["routed_linear"]

    def fewer(*arguments):
        return {name: width for name, width in known.site_features(*arguments).items() if name != "input"}

    monkeypatch.setitem(testing.OPS, "routed_linear", known._replace(site_features=fewer))
    assert added(missing_pieces("routed_linear"), before) == [
        "gradroute.testing and gradroute.LinearSites disagree on the site input of routed_linear"
    ]


def test_a_removed_file_is_named(monkeypatch):
    before = missing_pieces("routed_rms_norm")
    monkeypatch.setitem(STEM_FILES, "triton", "kernels/of/{}.py")
    assert added(missing_pieces("routed_rms_norm"), before) == [
        "kernels/of/norm.py is missing: routed_rms_norm is in the table for triton"
    ]


def test_a_removed_configuration_is_named(monkeypatch):
    before = list(configuration_errors())
    for name in [name for name in configs.CONFIGS if name.partition(".")[0] == "bias_grad_kernel"]:
        monkeypatch.delitem(configs.CONFIGS, name)
    assert added(list(configuration_errors()), before) == [
        "gradroute.kernels.configs.CONFIGS has no bias_grad_kernel"
    ]


def test_a_configuration_without_a_kernel_is_named(monkeypatch):
    before = list(configuration_errors())
    monkeypatch.setitem(configs.CONFIGS, "conv_bwd_kernel", {80: {"num_warps": 4}})
    assert added(list(configuration_errors()), before) == [
        "gradroute.kernels.configs.CONFIGS has conv_bwd_kernel, and no kernel has that name"
    ]


def test_an_op_without_any_piece_is_named(monkeypatch):
    monkeypatch.setitem(backends.OPS, "routed_conv", ("triton", "torch", "reference"))
    assert missing_pieces("routed_conv") == [
        "gradroute.reference has no routed_conv, the meaning of the op",
        "gradroute does not export routed_conv, the public function",
        "gradroute.testing.OPS has no routed_conv, the generator of its samples",
    ]


def test_another_signature_is_named(monkeypatch):
    monkeypatch.setattr(kernels, "bias_grad", lambda g, table, routes: None)
    assert signature_difference("bias_grad", kernels) == (
        "bias_grad takes ['g', 'table', 'routes'] in gradroute.backends.triton, "
        "['g', 'routes', 'table'] in the Protocol"
    )


def test_a_primitive_of_the_protocol_that_a_backend_lacks_is_named(monkeypatch):
    monkeypatch.delattr(native, "norm_backward")
    assert signature_difference("norm_backward", native) == "gradroute.backends.native has no norm_backward"


def test_a_primitive_that_only_the_protocol_has_is_named(monkeypatch):
    before = missing_pieces("routed_linear")
    monkeypatch.setitem(COMPOSED, "bias_grad", None)
    monkeypatch.delattr(composed, "bias_grad")
    primitives_of.cache_clear()
    missing = missing_pieces("routed_linear")
    primitives_of.cache_clear()
    assert added(missing, before) == [
        "gradroute.backends.composed has no bias_grad, a primitive of routed_linear on torch"
    ]


def test_a_primitive_that_is_passed_as_a_value_is_found():
    recorder = Recorder()
    passed = recorder.masked_product
    assert callable(passed)
    assert recorder.names == {"masked_product"}


@pytest.mark.parametrize("op", backends.OPS)
def test_samples_are_reproducible_and_have_what_was_asked_for(op):
    first, second, other = (cases.make(op, strength="token", seed=seed) for seed in (0, 0, 1))
    for name in first.differentiable:
        assert first.tensors[name].equal(second.tensors[name])
        assert not first.tensors[name].equal(other.tensors[name])
    assert first.routes.ids.unique().tolist() == [0, 1, 2, 3]
    assert set(first.tables) == set(testing.site_names(op))
    unused = cases.make(op, tables="unused", gradient="zero_stride", inputs="transposed")
    assert unused.routes.counts[-1] == 0
    assert set(unused.upstream.stride()) == {0}
