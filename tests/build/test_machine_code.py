"""What the machine code of every kernel must have at its target shape: wide accesses, its products, room, no spills."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from test_offline import printed

from gradroute.kernels.configs import ARCHITECTURES

# The products that each architecture's tensor cores are driven by.
PRODUCTS = {80: "mma", 90: "wgmma", 100: "tcgen05"}
SERIALIZED = "C7512"  # the assembler's warning that products of warp groups wait for each other


class Expected(NamedTuple):
    """What a kernel's machine code must have.

    Attributes:
        narrowest: the fewest bits that a load or store of global memory may have.
        widest: the bits that loads and stores must have, both; 0: no matter.
        blocks: how many of it a multiprocessor must hold.
        repeated: how often the products of a tile are made.
    """

    narrowest: int = 8
    widest: int = 0
    blocks: int = 1
    repeated: float = 1.0


WIDE = Expected(narrowest=32, widest=128)
LISTED = Expected(narrowest=16, widest=128)

#: By kernel, by kernel and case where a case needs something else, or by these and an architecture.
EXPECTED: dict[str, Expected] = {
    "masked_product_kernel": WIDE,
    "activation_fwd_kernel": WIDE,
    "activation_bwd_kernel": WIDE,
    "glu_bwd_kernel": WIDE,
    "norm_bwd_kernel": WIDE._replace(blocks=2),
    "norm_bwd_chunked_kernel": WIDE._replace(blocks=2),
    "adamw_step_kernel": WIDE,
    "attention_fwd_kernel": WIDE,
    "attention_dq_kernel": WIDE,
    "attention_dkdv_kernel": WIDE,
    # Tiles are so small that several warps make the same products.
    "sm_80 attention_dkdv_kernel, attention, half of the heads": LISTED._replace(repeated=1.5),
    "sm_80 attention_dkdv_kernel, attention, documents": LISTED._replace(repeated=1.5),
    # Lists of tiles are of int16, read one by one.
    "attention_dq_kernel, attention, both edges": LISTED,
    "attention_dkdv_kernel, attention, both edges": LISTED,
    "attention_dkdv_kernel, attention, half of the heads": LISTED,
}

#: Loops whose tiles are too small for a group of warps, or that the compiler splits: head dimensions beyond 128.
ANY_PRODUCTS = "attention, D 256"


def expected_of(report):
    """What is expected of a report's kernel in its case."""
    case = f"{report['kernel']}, {report['case']}"
    names = (f"sm_{report['architecture']} {case}", case, report["kernel"])
    return next((EXPECTED[name] for name in names if name in EXPECTED), Expected())


def problems(report) -> Iterator[str]:
    """What a report's kernel lacks, and where."""
    expected = expected_of(report)
    if report["spilled"]:
        yield f"spills {report['spilled']} bytes of a thread at {report['registers']} registers"
    if SERIALIZED in report["said"]:
        yield f"products wait for each other: {report['said']}"
    if report["blocks"] < expected.blocks:
        fit = f"{report['blocks']} blocks fit on a multiprocessor at {report['registers']} registers"
        yield f"{fit}, not {expected.blocks}"
    for kind in ("loads", "stores"):
        yield from narrow(report[kind], kind, expected)
    yield from lacking_products(report)


def narrow(accesses, kind, expected) -> Iterator[str]:
    """Accesses below what is allowed, and the lack of those that are expected."""
    below = [text for bits, text in accesses if bits < expected.narrowest]
    if below:
        yield f"{len(below)} {kind} of less than {expected.narrowest} bits, first {below[0]}"
    if expected.widest and not any(bits >= expected.widest for bits, _ in accesses):
        yield f"no {kind} of {expected.widest} bits, but {accesses[0][1] if accesses else 'none at all'}"


def lacking_products(report) -> Iterator[str]:
    """Loops that do not drive the tensor cores as the architecture has them, or make another number of products."""
    if not report["tile"] or report["case"] == ANY_PRODUCTS:
        return
    kind = PRODUCTS[report["architecture"]]
    wanted = report["tile"] * expected_of(report).repeated
    if not report["loops"]:
        yield "no loop has products"
    for loop in report["loops"]:
        where = f"in the loop from {loop['at'][0]} to {loop['at'][1]}"
        if set(loop["kinds"]) != {kind}:
            yield f"products are {loop['kinds']}, not {kind}, {where}"
        elif loop["flop"] not in (None, wanted):
            yield f"{loop['kinds']} make {loop['flop']:.0f} FLOP of a tile, not {wanted:.0f}, {where}"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code_is_as_wide_and_roomy_as_expected(architecture, tmp_path):
    reports = printed("machine_code.py", str(architecture), cache=tmp_path)
    found = [
        f"sm_{architecture}, {report['kernel']} {report['configuration']}, {report['case']}: {problem}"
        for report in reports
        for problem in problems(report)
    ]
    assert not found, "\n".join(found)
    kernels = {report["kernel"] for report in reports}
    assert kernels >= {name.partition(",")[0].split()[-1] for name in EXPECTED}
    # The assembler was heard: it says of each kernel how many registers it uses.
    assert all("Used" in report["said"] for report in reports)


GOOD = {
    "case": "attention",
    "kernel": "attention_fwd_kernel",
    "architecture": 90,
    "configuration": {},
    "registers": 232,
    "spilled": 0,
    "blocks": 1,
    "said": "Used 232 registers",
    "loads": [[128, "/*0010*/ LDG.E.128 R4, desc[UR4][R26.64]"]],
    "stores": [[128, "/*0070*/ STG.E.128 desc[UR4][R30.64], R8"]],
    "loops": [{"kinds": {"wgmma": 12}, "flop": 4194304.0, "at": ["/*0020*/ HGMMA", "/*0060*/ BRA"]}],
    "tile": 4194304,
}
U16 = [16, "/*0020*/ @!P1 LDG.E.U16 R18, desc[UR4][R28.64+0x6]"]
LOOP = GOOD["loops"][0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"spilled": 8}, "spills 8 bytes of a thread at 232 registers"),
        ({"said": "ptxas info : (C7512) Potential Performance Loss"}, "products wait for each other"),
        ({"blocks": 0}, "0 blocks fit on a multiprocessor at 232 registers, not 1"),
        ({"loads": [*GOOD["loads"], U16]}, f"1 loads of less than 32 bits, first {U16[1]}"),
        ({"stores": [[64, "STG.E.64"]]}, "no stores of 128 bits, but STG.E.64"),
        ({"loops": []}, "no loop has products"),
        (
            {"loops": [LOOP | {"kinds": {"mma": 96}}]},
            "products are {'mma': 96}, not wgmma, in the loop from /*0020*/",
        ),
        (
            {"loops": [LOOP | {"flop": 1024.0}]},
            "make 1024 FLOP of a tile, not 4194304, in the loop from /*0020*/ HGMMA",
        ),
    ],
)
def test_a_kernel_that_loses_something_is_named_with_the_place(change, expected):
    assert list(problems(GOOD)) == []
    (found,) = problems(GOOD | change)
    assert expected in found


def test_every_expectation_is_of_a_case():
    from bench.static import launches

    cases = {f"{case.kernel}, {case.name}" for case in launches.cases()}
    known = cases | {name.partition(",")[0] for name in cases}
    assert known >= {name.partition(" ")[2] if name.startswith("sm_") else name for name in EXPECTED}
    assert ANY_PRODUCTS in launches.ATTENTION
