"""What `bench static` reads from machine code and predicts, on code and launches small enough to count by hand."""

import itertools

import pytest
import torch

from bench import command
from bench.static import attention, chips, cuda, launches, model, occupancy, pipes, rows, sass, table, waits
from gradroute.kernels.attention.schedule import balance
from gradroute.kernels.configs import CONFIGS
from gradroute.kernels.launch import INTERPRETED

DKDV = "attention_dkdv_kernel"
CLOCKS_OF_A_TILE = 4235  # of dK and dV on sm_90, as read from machine code: bench/results/static/before.md
HOPPER = chips.ARCHITECTURES[90]

CODE = """
.text.first_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R26.64] ;
.L_x_0:
        /*0020*/              @!P1 LDG.E.U16 R18, desc[UR4][R28.64+0x6] ;
        /*0030*/             @!UPT UIADD3 URZ, URZ, URZ, URZ ;
        /*0040*/                   FFMA R8, R4, R18, R8 ;
        /*0050*/                   IADD3 R26, P0, R26, 0x10, RZ ;
        /*0060*/               @P2 BRA `(.L_x_0) ;
        /*0070*/                   STG.E.64 desc[UR4][R30.64], R8 ;
        /*0080*/                   EXIT ;
.L_x_1:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*00a0*/              @!P0 BRA `(.L_x_1) ;
        /*00b0*/                   BRA `(.L_x_0) ;
.text.second_kernel:
        /*0000*/                   EXIT ;
"""
LOOP = [sass.Instruction(0, "LDG.E.128 R4, desc[UR4][R26.64]"), sass.Instruction(16, "FADD R8, R8, R4")]


def read(*texts):
    """Instructions one after the other."""
    return [sass.Instruction(16 * place, text) for place, text in enumerate(texts)]


def test_kernels_are_read_with_their_loops_and_without_what_never_runs():
    first, second = sass.parse(CODE)
    assert (first.name, second.name) == ("first_kernel", "second_kernel")
    assert (len(first.instructions), len(second.instructions)) == (12, 1)
    # The wait behind the kernel's end leads back into it and is no loop; its own repetition is one.
    assert first.loops == [(2, 6), (9, 10)]
    assert [one.opcode for one in first.body((2, 6))] == ["LDG", "FFMA", "IADD3", "BRA"]
    assert str(first.instructions[2]) == "/*0020*/ @!P1 LDG.E.U16 R18, desc[UR4][R28.64+0x6]"
    assert first.instructions[5].registers == [["R26"], ["P0"], ["R26"], [], []]


def test_accesses_are_counted_by_their_bits():
    first, _ = sass.parse(CODE)
    assert sass.widths(first.body(None), sass.GLOBAL_LOADS) == {128: 1, 16: 1}
    assert sass.widths(first.body(None), sass.GLOBAL_STORES) == {64: 1}
    assert [sass.width(f"LDG.E.{part}") for part in ("ENL2.256", "U8", "SYS")] == [256, 8, 32]


def test_text_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="expected what `nvdisasm -c` prints"):
        sass.parse("nvdisasm fatal")


def test_products_take_the_tensor_cores_and_shared_memory_by_their_shapes():
    both_shared = read("HGMMA.64x64x16.F32.BF16 R152, gdesc[UR20], R152")
    from_registers = read("HGMMA.64x64x16.F32.BF16 R24, R152, gdesc[UR20], R24")
    # 2 × 64 × 64 × 16 FLOP for each of two groups of four warps, 4096 a clock.
    assert pipes.clocks(both_shared, 8, HOPPER).tensor == 64
    assert pipes.clocks(both_shared, 8, HOPPER).shared == 2 * 2 * 16 * (64 + 64) / 128
    assert pipes.clocks(from_registers, 8, HOPPER).shared == 2 * 2 * 16 * 64 / 128
    mma = read("HMMA.16816.F32.BF16 R52, R32.reuse, R16, RZ")
    assert pipes.clocks(mma, 8, chips.ARCHITECTURES[80]).tensor == 8 * 2 * 16 * 8 * 16 / 2048
    assert pipes.clocks(read("UTCHMMA gdesc[UR24], gdesc[UR26], tmem[UR56]"), 4, HOPPER).tensor is None
    assert pipes.products(both_shared + mma) == {"wgmma": 1, "mma": 1}


def test_every_unit_takes_the_clocks_of_its_rate():
    body = read(
        "FFMA R1, R2, R3, R4",
        "IADD3 R1, R2, R3, RZ",
        "MUFU.EX2 R1, R2",
        "IMAD R1, R2, R3, R4",
        "BAR.SYNC 0x0",
    )
    clocks = pipes.clocks(body, 4, HOPPER)
    assert clocks.issue == 5
    assert clocks.fp32 == (1 + 2) * 128 / 128
    assert clocks.alu == 128 / 64
    assert clocks.mufu == 128 / 16
    assert pipes.shared_bytes(read("LDSM.16.M88.4 R8, [R2]")[0]) == 512
    assert pipes.shared_bytes(read("LDSM.16.MT88.2 R8, [R2]")[0]) == 256
    assert pipes.shared_bytes(read("STS.128 [R2], R8")[0]) == 512


@pytest.mark.parametrize(
    ("architecture", "warps", "registers", "shared", "blocks"),
    [
        # As NVIDIA's occupancy calculator has them.
        (90, 8, 255, 131584, 1),
        (90, 4, 32, 0, 16),
        (90, 4, 33, 0, 12),
        (90, 1, 16, 0, 32),
        (90, 4, 32, 100 * 1024, 2),
        (80, 4, 32, 80 * 1024, 2),
        (80, 4, 32, 100 * 1024, 1),
        (80, 4, 32, 164 * 1024, 0),
        (100, 16, 64, 0, 2),
        (90, 16, 128, 16384, 1),
    ],
)
def test_occupancy_is_that_of_the_calculator(architecture, warps, registers, shared, blocks):
    rates = chips.ARCHITECTURES[architecture]
    assert occupancy.blocks_per_multiprocessor(rates, warps, registers, shared) == blocks


def test_a_block_waits_for_its_load_and_has_it_in_flight():
    found = waits.waits(LOOP, 4, latency=500, repeats=True)
    # Each of the two instructions is issued in one clock, the second when the value is there.
    assert found.clocks == pytest.approx(502, abs=waits.ARITHMETIC)
    assert found.in_flight == 4 * 32 * 16
    independent = read(
        "LDG.E.128 R4, desc[UR4][R26.64]", "LDG.E.128 R8, desc[UR4][R28.64]", "FADD R1, R4, R8"
    )
    assert waits.waits(independent, 4, 500, repeats=False).clocks < 510
    assert waits.waits(independent, 4, 500, repeats=False).in_flight == 2 * 4 * 32 * 16


def test_asynchronous_copies_are_waited_for_by_group():
    body = read("LDGSTS.E.BYPASS.128 [R2], desc[UR4][R26.64]", "LDGDEPBAR", "DEPBAR.LE SB0, 0x1")
    found = waits.waits(body, 4, latency=500, repeats=True)
    assert found.in_flight == 2 * 4 * 32 * 16  # one group stays under way while the next one begins
    assert 240 < found.clocks < 260  # so each pass waits for half of the latency
    at_once = read("LDGSTS.E.BYPASS.128 [R2], desc[UR4][R26.64]", "LDGDEPBAR", "DEPBAR.LE SB0, 0x0")
    assert waits.waits(at_once, 4, latency=500, repeats=True).clocks > 500


def test_more_bytes_in_flight_are_a_larger_share_of_the_bandwidth():
    chip = chips.CHIPS["H200"]
    shares = [model.moved(LOOP, 4, blocks, True, 4 * 32 * 32, chip).share for blocks in (1, 4, 16)]
    assert shares == sorted(shares)
    assert shares[0] < 0.4
    assert shares[-1] > 0.9
    assert model.moved(LOOP, 4, 1, True, 4 * 32 * 32, chip).bound == "latency"


def test_products_and_the_rest_take_turns():
    body = read(*["HGMMA.64x64x16.F32.BF16 R152, gdesc[UR20], R152"] * 8, *["MUFU.EX2 R1, R2"] * 8)
    chip = chips.CHIPS["H200"]
    found = model.multiplied(body, 8, 1, 8 * 2 * 2 * 64 * 64 * 16, chip)
    assert found.took == pytest.approx(model.LOCK_STEP * (8 * 64 + 8 * 16))
    assert found.share == pytest.approx(8 * 64 / found.took)
    filled = model.multiplied(body, 8, 4, 8 * 2 * 2 * 64 * 64 * 16, chip)
    assert filled.took == 8 * 64  # other blocks fill the gaps
    assert filled.bound == "tensor cores"


def test_only_streamed_matrices_are_traffic():
    stored = read("LDG.E.128 R4, desc[UR4][R26.64]", "STG.E.128 desc[UR4][R30.64], R8")
    assert model.traffic(stored, 4, reads=3, writes=2, tile_bytes=0) == 4 * 32 * 16 * 5 / 2
    assert model.traffic(stored, 4, reads=2, writes=0, tile_bytes=100) == 200


def test_balance_of_launches_that_are_scheduled_by_hand():
    assert balance([1, 1, 1, 1], 2) == 1
    assert balance([4, 1, 1, 1, 1], 2) == 1
    # The last one starts when both places are free at 2, and ends at 6; the mean is 4.
    assert balance([1, 1, 1, 1, 4], 2) == pytest.approx(4 / 6)
    assert balance([3], 4) == 0.25


def case_of(kernel, name="attention", **shape):
    """A case of attention in a small shape."""
    found = next(case for case in launches.cases() if case.kernel == kernel and case.name == name)
    return found._replace(shape=launches.Shape(**shape))


def test_programs_of_attention_have_the_tiles_that_they_see():
    config = {"BLOCK_Q": 16, "BLOCK_K": 8}
    shape = {"batch": 1, "heads": 2, "kv_heads": 1, "length": 32, "head_dim": 16}
    forward = attention.programs(case_of("attention_fwd_kernel", **shape), config)
    assert forward == [(2, 2)] * 2 + [(0, 2)] * 2
    keys = attention.programs(case_of("attention_dkdv_kernel", **shape), config)
    assert keys == [(0, 4), (0, 4), (0, 2), (0, 2)]  # of both heads
    split = attention.programs(case_of("attention_dkdv_kernel", **shape), config, parts=2)
    assert split == [(0, 2)] * 4 + [(0, 1)] * 4
    half = case_of("attention_dq_kernel", "attention, half of the heads", **shape)
    assert sorted(attention.programs(half, config)) == [(0, 0), (0, 0), (0, 2), (2, 2)]
    assert attention.visible(half, config).pairs == 32 * 33 // 2


def test_programs_leave_out_tiles_without_edges_and_of_other_documents():
    config = {"BLOCK_Q": 64, "BLOCK_K": 64}
    shape = {"batch": 2, "heads": 1, "kv_heads": 1, "length": 1024, "head_dim": 16}
    edges = case_of("attention_dq_kernel", "attention, both edges", **shape)
    plain = case_of("attention_dq_kernel", **shape)
    seen = attention.visible(edges, config)
    tiles = attention.programs(edges, config)
    assert sum(whole for whole, _ in tiles) == int(seen.all.sum()) > 0
    assert sum(partial for _, partial in tiles) == int((seen.some & ~seen.all).sum()) > 0
    assert attention.visible(edges, config).pairs < attention.visible(plain, config).pairs
    documents = case_of("attention_fwd_kernel", "attention, documents", **shape)
    ends = launches.document_ends(documents.shape, 8).tolist()
    assert attention.visible(documents, config).pairs == 2 * sum(
        (stop - start) * (stop - start + 1) // 2 for start, stop in itertools.pairwise(ends)
    )


def test_every_triton_kernel_has_a_case_and_is_launched_by_it():
    cases = launches.cases()
    assert {case.kernel for case in cases} == {entry.partition(".")[0] for entry in CONFIGS}
    names = [(case.name, case.kernel) for case in cases]
    assert len(set(names)) == len(names)


@pytest.fixture
def untouched(monkeypatch):
    """Memory that nothing writes to, as in the command: poisoning would take gigabytes."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@pytest.mark.parametrize("name", ["RMS norm", "RoutedAdamW, blocks of columns", "attention, MQA"])
def test_a_launch_is_recorded_at_its_target_shape(name, untouched):
    case = next(case for case in launches.cases() if case.name == name)
    launch = launches.recorded(case, 90)
    assert launch.kernel.__name__ == case.kernel
    sizes = {value for value in launch.arguments.values() if isinstance(value, int)}
    expected = {"RMS norm": 16384, "RoutedAdamW, blocks of columns": 14336, "attention, MQA": 32}
    assert expected[name] in sizes


def test_a_case_that_launches_another_kernel_is_refused(untouched):
    case = next(case for case in launches.cases() if case.name == "RMS norm")
    with pytest.raises(LookupError, match="got launches of norm_bwd_kernel, expected optim_kernel"):
        launches.recorded(case._replace(kernel="optim_kernel"), 90)


def test_the_peak_of_each_gpu_is_what_nvidia_states():
    stated = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}
    for name, peak in stated.items():
        assert chips.CHIPS[name].peak == pytest.approx(peak, rel=0.01)
        assert chips.CHIPS[name].source


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--architecture", "70"], "architecture: got 70, expected any of 80, 90, 100"),
        (["--name", "a b"], "name: got 'a b', expected letters, digits and underscores"),
        (["--kernel", "nothing"], "kernel: got 'nothing', which is in no name of a case or a kernel"),
        (["--out", "README.md"], "out: got README.md, which is a file, expected a folder"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_compiled(arguments, expected, capsys, monkeypatch):
    monkeypatch.setattr("bench.static.command.INTERPRETED", False)
    assert command.main(["static", *arguments]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.skipif(not INTERPRETED, reason="only Triton's interpreter is refused")
def test_functions_of_the_interpreter_are_refused(capsys):
    assert command.main(["static"]) == 2
    assert "TRITON_INTERPRET: it is set" in capsys.readouterr().err


def test_the_page_marks_predictions_and_has_every_row():
    row = {
        "case": "attention",
        "kernel": "attention_fwd_kernel",
        "registers": 232,
        "spilled": 0,
        "shared": 131072,
        "warps": 8,
        "blocks": 1,
        "loads": {128: 56},
        "stores": {128: 8, 32: 1},
        "products": {"wgmma": 12},
        "clocks": {
            "tensor": None,
            "shared": 1024.0,
            "issue": 806.0,
            "alu": 404.0,
            "mufu": 544.0,
            "fp32": 376.0,
        },
        "bound": "tensor cores, in turn",
        "share": 0.47,
        "in_flight": 32768,
        "ceiling": "tensor",
        "balance": 0.968,
        "milliseconds": 1.51,
        "tflops": 364.0,
    }
    report = {
        "name": "made_up",
        "command": "python -m bench static --name made_up",
        "environment": {"triton": "3.7.1"},
        "chips": {"90": chips.CHIPS["H200"]._asdict() | {"peak": chips.CHIPS["H200"].peak}},
        "calibration": [],
        "kernels": {"90": [row]},
        "cuda": {"missing": "there is no nvcc"},
    }
    page = table.page(report)
    assert (
        "| attention | `attention_fwd_kernel` | 232 | 0 | 128.0 | 1 × 8 | 56 × 128 | 8 × 128, 1 × 32 | 12 wgmma | – |"
        in page
    )
    assert "| 32 | tensor cores, in turn | 47% | tensor | 0.968 | 1.51 ms | 364 |" in page
    assert "Missing: there is no nvcc." in page
    assert all(table.PREDICTED in line for line in page.splitlines() if line.startswith("# "))


def test_cuda_kernels_are_read_with_what_the_assembler_said_of_them():
    said = (
        "ptxas info    : Compiling entry function 'first_kernel' for 'sm_90a'\n"
        "    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 45 registers, used 1 barriers, 1024 bytes smem\n"
        "ptxas info    : Compiling entry function 'second_kernel' for 'sm_90a'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 8 registers, used 0 barriers\n"
    )
    first, second = cuda._rows("a.cu", said, {kernel.name: kernel for kernel in sass.parse(CODE)})
    assert first == {
        "source": "a.cu",
        "kernel": "first_kernel",
        "registers": 45,
        "spilled": 12,
        "shared": 1024,
        "loads": {128: 1, 16: 1},
        "stores": {64: 1},
    }
    assert (second["registers"], second["spilled"], second["loads"]) == (8, 0, {})


def test_cuda_kernels_without_a_compiler_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(cuda, "nvcc", lambda: None)
    assert command.main(["static", "--cuda"]) == 2
    assert "cuda: there is no nvcc on PATH or in CUDA_HOME" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["attention", "attention, B 1", "attention, half of the heads", "attention, MQA"]
)
def test_target_shapes_keep_the_multiprocessors_busy(name, untouched):
    """dK and dV: the mean of the multiprocessors' times is at least 0.97 of the longest."""
    case = next(case for case in launches.cases() if (case.name, case.kernel) == (name, DKDV))
    launch = launches.recorded(case, 90)
    tiles = attention.programs(case, launch.config, launch.arguments["parts"])
    work = [rows.AROUND_THE_LOOP + CLOCKS_OF_A_TILE * (whole + partial) for whole, partial in tiles]
    assert balance(work, chips.CHIPS["H200"].multiprocessors) >= 0.97


def test_runs_of_ids_are_those_that_their_lengths_say():
    ids = launches.ids_in_runs((2, 4096))
    assert ids.shape == (2, 4096)
    changes = torch.nonzero(ids[0].diff()).flatten()
    assert int(changes.diff().min()) >= launches.RUN_LENGTHS[0]
