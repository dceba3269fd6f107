"""Pages and plots made of the files of benchmark runs, and the comparison of two of them."""

import copy
import json
import math
import sys

import matplotlib.figure
import pytest

from bench import compare, headlines, plots, report
from bench.results import RELATIVE, Figure, Row, Run, machine_name, unit

CPU = {
    "gradroute": "0.1.0",
    "torch": "2.13.0+cpu",
    "triton": "3.7.1",
    "liger_kernel": None,
    "model": "AMD EPYC",
    "threads": 2,
    "instruction_set": "avx512",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "clean": True,
}
GPU = CPU | {"torch": "2.13.0+cu130", "gpu": "NVIDIA H200", "driver": "580.1", "cudnn": 91002, "clean": False}
README = """# A readme

<!-- results: an older mark -->
outdated
<!-- /results -->
after
"""


def spread(p50):
    return Figure(p50, 0.98 * p50, 1.02 * p50)


def make_run(name, environment, ceilings):
    description = {
        "name": name,
        "command": f"python -m bench run {name}",
        "rounds": 21,
        "environment": environment,
        "ceilings": ceilings,
        "method": "in turns",
        "interrupted": False,
        "cases": {},
    }
    return Run(name, copy.deepcopy(description))


def add_case(run, name, suite, axes, times, **others):
    """A case whose variants take so many milliseconds, {mode: {variant: p50}}, and 100 MB more than the last."""
    variants = list(dict.fromkeys(variant for of_mode in times.values() for variant in of_mode))
    run.cases[name] = {
        "suite": suite,
        "kernel": f"routed_{suite}",
        "axes": axes,
        "x": "tokens",
        "base": variants[0],
        "rivals": variants[:1],
        "modes": list(times),
        "checked": "against fp64",
        "limits": [],
        "facts": {},
        "variants": {
            variant: {"is_rival": variant not in ("cpu", "triton", "routed")} for variant in variants
        },
    } | others
    for mode, of_mode in times.items():
        for place, (variant, p50) in enumerate(of_mode.items()):
            metrics = {"speed": spread(p50), "memory": Figure.single(100.0 * (1 + place))}
            for rival in run.cases[name]["rivals"]:
                metrics[RELATIVE + rival] = spread(p50 / of_mode[rival])
            add_rows(run, name, variant, mode, metrics)


def add_rows(run, case, variant, mode, metrics):
    described = run.cases[case]
    config = json.dumps({"suite": described["suite"], "case": case} | described["axes"])
    for metric, figure in metrics.items():
        where = (
            described["kernel"],
            variant,
            mode,
            metric,
            unit(metric),
            machine_name(run.description["environment"]),
        )
        x = described["x"]
        run.rows.append(
            Row(*where, x, x, float(described["axes"][x]), *figure, config, "2026-01-01 00:00:00", "")
        )


def limit(variant, most, rival, got, quantity="speed", mode="full", added=""):
    verdict = "not measured" if got is None else "reached" if got <= most else "MISSED"
    named = {
        "variant": variant,
        "rival": rival,
        "most": most,
        "quantity": quantity,
        "mode": mode,
        "added": added,
    }
    return named | {"got": got, "verdict": verdict}


def mlp_axes(tokens=8192, density=None):
    axes = {"tokens": tokens, "d_model": 256, "dtype": "float32", "tables": "block"}
    return axes if density is None else axes | {"tables": "interval", "density": density}


@pytest.fixture
def cpu_run():
    """Two headline cases, and sweeps of three numbers of tokens and of three densities."""
    run = make_run("cpu", CPU, {"copy": 20.0, "gemm": {"float32": 0.25}})
    limits = [
        limit("cpu", 0.95, "unmasked", 0.84),
        limit("cpu", 1.5, "unmasked", 3.0, "memory"),
        limit("cpu", 0.5, "Liger", None, "saved"),
    ]
    times = {"full": {"unmasked": 100.0, "detach": 118.0, "cpu": 84.0}}
    add_case(run, "gated MLP, block", "gated_mlp", mlp_axes(), times, limits=limits)
    run.cases["gated MLP, block"]["variants"]["Liger"] = {
        "is_rival": True,
        "missing": "liger_kernel is not installed",
    }
    rates = {"useful rate": spread(0.2), "dense-equivalent rate": spread(0.3)}
    add_rows(run, "gated MLP, block", "cpu", "full", rates)
    times = {"forward": {"unmasked": 30.0, "cpu": 31.0}, "full": {"unmasked": 0.09, "cpu": 0.0405}}
    limits = [limit("cpu", 1.1, "unmasked", 31 / 30, mode="forward")]
    axes = mlp_axes() | {"tables": "quarters"}
    add_case(run, "gated MLP, quarters", "gated_mlp", axes, times, limits=limits, facts={"share": 0.25})
    for tokens in (1024, 4096):
        times = {"full": {"unmasked": tokens / 80, "cpu": tokens / 90}}
        add_case(run, f"tokens {tokens}", "gated_mlp", mlp_axes(tokens), times)
    for density in (0.25, 0.5, 1.0):
        times = {"full": {"unmasked": 100.0, "cpu": 40 + 60 * density}}
        add_case(run, f"density {density}", "gated_mlp", mlp_axes(8192, density), times, x="density")
    return run


@pytest.fixture
def gpu_run():
    """A suite that is bound by bytes, and a model's step, which has a limit on what is added."""
    run = make_run("cuda", GPU, {"copy": 4000.0, "gemm": {"bfloat16": 700.0}})
    times = {"backward": {"unmasked": 0.5, "copy": 0.25, "triton": 0.26}}
    limits = [limit("triton", 1.1, "copy", 1.04, mode="backward")]
    axes = {"tokens": 16384, "dtype": "bfloat16"}
    add_case(run, "norm", "norm", axes, times, limits=limits, rivals=["unmasked", "copy"])
    for variant, rate in {"unmasked": 1900.0, "copy": 3800.0, "triton": 3650.0}.items():
        add_rows(run, "norm", variant, "backward", {"bandwidth": spread(rate)})
    run.cases["norm"]["variants"] |= {
        "Flex": {"is_rival": True, "wrong": "dx: error 3 | 1"},
        "cuda": {"is_rival": False, "error": "RuntimeError: no such device"},
    }
    times = {"step": {"unrouted": 1000.0, "detach": 1400.0, "routed": 1250.0}}
    limits = [limit("routed", 0.5, "detach", 0.625, mode="step", added="unrouted")]
    add_case(
        run, "Llama", "model", axes | {"tokens": 2048}, times, limits=limits, rivals=["unrouted", "detach"]
    )
    run.description["interrupted"] = True
    return run


@pytest.fixture
def root(tmp_path, cpu_run, gpu_run):
    """A checkout with results of two machines, and of one that is nobody else's."""
    results = tmp_path / "bench" / "results"
    cpu_run.save(results / "two-cores")
    cpu_run.save(results / "local")
    gpu_run.save(results / "h200")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    return tmp_path


@pytest.fixture
def two_headlines(monkeypatch):
    """The cases of the README's table are those of these runs."""
    monkeypatch.setattr(headlines, "CASES", ("Llama", "gated MLP, block", "of another machine"))


def tables(text):
    return [line for line in text.splitlines() if line.startswith("|")]


class TestReport:
    def test_both_files_are_written_and_then_agree(self, root, capsys):
        assert report.main(check=True, root=root) == 1
        said = capsys.readouterr().err
        assert "README.md differs" in said
        assert "bench/results/README.md differs" in said
        assert report.main(check=False, root=root) == 0
        assert report.main(check=True, root=root) == 0
        readme = (root / "README.md").read_text(encoding="utf-8")
        assert readme.startswith(f"# A readme\n\n{report.START}")
        assert readme.endswith(f"\n{report.END}after\n")
        assert "outdated" not in readme
        page = (root / "bench/results/README.md").read_text(encoding="utf-8").splitlines()
        assert page[0].startswith("# ")
        assert page[2].startswith("Generated by `python -m bench report`")

    @pytest.mark.parametrize(("before", "after", "files"), [
        ("100.0,98.0,102.0", "101.0,98.0,102.0", ["bench/results/README.md"]),
        ("0.84,0.8231999999999999,0.8568", "0.74,0.7,0.8", ["README.md", "bench/results/README.md"]),
    ])  # fmt: skip
    def test_a_figure_that_changed_is_found(self, root, two_headlines, capsys, before, after, files):
        report.main(check=False, root=root)
        file = root / "bench/results/two-cores/cpu.csv"
        text = file.read_text(encoding="utf-8")
        assert before in text
        file.write_text(text.replace(before, after), encoding="utf-8")
        assert report.main(check=True, root=root) == 1
        said = capsys.readouterr().err.splitlines()
        assert [line.split()[0] for line in said] == files

    def test_a_readme_without_marks_is_refused(self):
        with pytest.raises(ValueError, match="got no part between"):
            report.with_part("# A readme\n", "results")

    def test_the_readme_has_the_headlines_of_every_machine(self, root, two_headlines):
        part = report.readme_part(root / "bench" / "results")
        assert "local" not in part
        assert part.splitlines()[3:-2] == [
            "NVIDIA H200, torch 2.13.0+cu130, commit 0123456 (**dirty**), **interrupted**:",
            "",
            "| time relative to | PyTorch without routing | the detach idiom |",
            "| --- | --- | --- |",
            "| Llama | 1.25 | 0.89 |",
            "",
            "1 of 2 targets are reached. Missed: Llama, speed 0.62 × detach (target 0.5).",
            "",
            "AMD EPYC, 2 threads, avx512, torch 2.13.0+cpu, commit 0123456:",
            "",
            "| time relative to | PyTorch without routing | the detach idiom |",
            "| --- | --- | --- |",
            "| gated MLP, block | 0.84 | – |",
            "",
            "2 of 4 targets are reached. Missed: gated MLP, block, memory 3.00 × unmasked (target 1.5). "
            "1 not measured.",
        ]

    def test_headlines_name_other_bases(self, cpu_run, two_headlines):
        times = {"step": {"AdamW": 10.0, "routed": 8.0}}
        limits = [limit("routed", 1.0, "AdamW", 0.8, mode="step")]
        add_case(cpu_run, "Llama", "optim", mlp_axes(), times, limits=limits)
        assert "| Llama (`routed` beside `AdamW`) | 0.80 | – |" in headlines.part([cpu_run])
        missed = (
            limit("routed", 15.0, "unrouted", 16.67, "added"),
            limit("own", 2.0, "", 2.5, "seconds"),
        )
        assert [headlines.missed("a case", one) for one in missed] == [
            "a case +16.7 µs (target 15)",
            "a case 2.5 s (target 2)",
        ]

    def test_a_machine_without_headlines_has_no_table(self, cpu_run):
        assert headlines.part([cpu_run]) == ""

    def test_limits(self, cpu_run, gpu_run):
        assert report.limits_table(cpu_run).splitlines() == [
            "| target | | limit | measured | |",
            "| --- | --- | --- | --- | --- |",
            "| gated MLP, block | `cpu` time | ≤ 0.95 × `unmasked` | 0.840 | reached |",
            "| | `cpu` peak memory | ≤ 1.5 × `unmasked` | 3.000 | **MISSED** |",
            "| | `cpu` saved for backward | ≤ 0.5 × `Liger` | – | not measured |",
            "| gated MLP, quarters | `cpu` time, forward | ≤ 1.1 × `unmasked` | 1.033 | reached |",
        ]
        assert report.limits_table(gpu_run).splitlines()[2:] == [
            "| norm | `triton` time, backward | ≤ 1.1 × `copy` | 1.040 | reached |",
            "| Llama | `routed` time, step | ≤ 0.5 × `detach`, both beyond `unrouted` | 0.625 | **MISSED** |",
        ]

    def test_relative_times_of_headline_cases(self, cpu_run, gpu_run):
        caption, table = report.relative_tables(cpu_run, "gated_mlp")
        assert caption == "gated_mlp, gated MLP; time relative to `unmasked`:\n"
        assert table.splitlines() == [
            "| | unmasked | detach | **cpu** | Liger |",
            "| --- | --- | --- | --- | --- |",
            "| block | 1.00 | 1.18 | **0.84** | missing |".replace("**", ""),
            "| quarters | 1.00 | – | 0.45 | – |",
        ]
        caption, table = report.relative_tables(gpu_run, "norm")
        assert caption == "norm; time relative to `unmasked`:\n"
        assert table.splitlines()[0] == "| | unmasked | copy | **triton** | Flex | **cuda** |"
        assert table.splitlines()[2] == "| norm, backward | 1.00 | 0.50 | 0.52 | wrong | does not run |"

    def test_many_variants_are_rows(self, cpu_run, monkeypatch):
        monkeypatch.setattr(report, "MOST_COLUMNS", 3)
        _, table = report.relative_tables(cpu_run, "gated_mlp")
        assert table.splitlines() == [
            "| | block | quarters |",
            "| --- | --- | --- |",
            "| unmasked | 1.00 | 1.00 |",
            "| detach | 1.18 | – |",
            "| **cpu** | 0.84 | 0.45 |",
            "| Liger | missing | – |",
        ]
        monkeypatch.setattr(report, "MOST_COLUMNS", 1)
        _, first, second = report.relative_tables(cpu_run, "gated_mlp")
        assert len(first.splitlines()) == 6
        assert second.splitlines()[2:] == ["| unmasked | 1.00 |", "| **cpu** | 0.45 |"]

    def test_bases_are_named_where_they_differ(self, cpu_run):
        cpu_run.cases["gated MLP, quarters"] |= {"base": "cpu"}
        caption, table = report.relative_tables(cpu_run, "gated_mlp")
        assert caption.endswith("time relative to the base in brackets:\n")
        assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
            "| block (unmasked)",
            "| quarters (cpu)",
        ]

    def test_a_case_on_the_page(self, cpu_run):
        assert report.case_table(cpu_run, "gated MLP, block").splitlines() == [
            "| pass | variant | time | × unmasked | useful | dense-equivalent | peak memory |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            "| full | unmasked | 100 ms (98.0–102) | 1.00 | – | – | 100 MB |",
            "| full | detach | 118 ms (116–120) | 1.18 | – | – | 200 MB |",
            "| full | **cpu** | 84.0 ms (82.3–85.7) | 0.84 | 0.200 TFLOP/s (80%) | 0.300 TFLOP/s (120%) | 300 MB |",
            "| – | Liger | missing | – | – | – | – |",
        ]
        assert report.case_table(cpu_run, "gated MLP, quarters").splitlines()[2:] == [
            "| forward | unmasked | 30.0 ms (29.4–30.6) | 1.00 | 100 MB |",
            "| forward | **cpu** | 31.0 ms (30.4–31.6) | 1.03 | 200 MB |",
            "| full | unmasked | 90.0 µs (88.2–91.8) | 1.00 | 100 MB |",
            "| full | **cpu** | 40.5 µs (39.7–41.3) | 0.45 | 200 MB |",
        ]

    def test_a_case_that_is_bound_by_bytes(self, gpu_run):
        lines = report.case_table(gpu_run, "norm").splitlines()
        assert lines[0] == "| pass | variant | time | × unmasked | × copy | bandwidth | peak memory |"
        assert (
            lines[4]
            == "| backward | **triton** | 260 µs (255–265) | 0.52 | 1.04 | 3650 GB/s (91%) | 300 MB |"
        )
        assert lines[5:] == [
            "| – | Flex | wrong | – | – | – | – |",
            "| – | **cuda** | does not run | – | – | – | – |",
        ]

    def test_what_was_not_timed(self, cpu_run, gpu_run):
        assert tables(report.untimed_table(gpu_run))[2:] == [
            r"| Flex | wrong | dx: error 3 \| 1 | norm |",
            "| **cuda** | does not run | RuntimeError: no such device | norm |",
        ]
        for case in cpu_run.cases.values():
            case["variants"]["Liger"] = {"is_rival": True, "missing": "liger_kernel is not installed"}
        assert tables(report.untimed_table(cpu_run))[2:] == [
            "| Liger | missing | liger_kernel is not installed | all |"
        ]

    def test_the_page_has_all_cases_the_environment_and_the_plots(self, root, cpu_run):
        results = root / "bench" / "results"
        plots.main([results / "two-cores"], None)
        page = report.page(results)
        for line in (
            "## two-cores",
            "### Run cpu: AMD EPYC, 2 threads, avx512",
            "| commit | 0123456789abcdef0123456789abcdef01234567, clean |",
            "| bandwidth of a copy | 20.0 GB/s |",
            "| matmul, float32 | 0.250 TFLOP/s |",
            "Method: in turns",
            "#### Targets",
            "#### Relative times of the cases with targets",
            "#### Suite gated_mlp",
            "![cpu-gated_mlp-relative](two-cores/cpu-gated_mlp-relative.png)",
            "It was interrupted: cases are missing.",
            "**gated MLP, quarters**: `routed_gated_mlp`; tokens 8192, d model 256, dtype float32, tables quarters; "
            "share 0.25",
        ):
            assert line in page.splitlines()
        assert all(f"**{name}**: " in page for name in cpu_run.cases)
        assert "h200/" not in page
        assert page.count("Checked: against fp64") == 3

    def test_the_demo(self, root):
        losses = {"before ablation": {"retain": 4.1, "forget": 4.8}}
        demo = {
            "seed": 0,
            "steps": 500,
            "losses": {"routed": losses | {"before, routes unknown": {"retain": 4.6}}, "control": losses},
            "cost": {
                "unrouted": {"times_unrouted": 1.0, "saved_bytes": 200},
                "routed": {"times_unrouted": 1.1, "saved_bytes": 154},
            },
        }
        folder = root / "bench" / "results" / "laptop"
        folder.mkdir()
        (folder / "demo.json").write_text(json.dumps(demo), encoding="utf-8")
        expected = [
            "`make demo` on laptop (seed 0, 500 steps), held-out loss, nats a token:",
            "",
            "| | routed, retain | routed, forget | control, retain | control, forget |",
            "| --- | --- | --- | --- | --- |",
            "| before ablation | 4.10 | 4.80 | 4.10 | 4.80 |",
            "",
            "| forward and backward of one mixed batch | time | saved for backward |",
            "| --- | --- | --- |",
            "| unrouted | 1.00 × | 1.00 × |",
            "| routed | 1.10 × | 0.77 × |",
            "",
        ]
        text = report.page(folder.parent)
        start = text.index("`make demo`")
        assert text[start:].splitlines()[: len(expected)] == expected
        assert "demo" not in report.readme_part(folder.parent)

    @pytest.mark.parametrize(("value", "text"), [
        (0.0, "0"), (-2.0, "-2.00"), (0.001234, "0.00123"), (12.345, "12.3"), (12345.6, "12346"), (math.inf, "inf")
    ])  # fmt: skip
    def test_three_digits(self, value, text):
        assert report.significant(value) == text

    def test_units(self):
        assert [report.milliseconds(value) for value in (0.25, 12.0, 12000.0)] == [
            "250 µs",
            "12.0 ms",
            "12.0 s",
        ]
        assert [report.megabytes(value) for value in (0.5, 1500.0)] == ["0.500 MB", "1.50 GB"]
        assert [report.ratio(value) for value in (0.0572, 1.234)] == ["0.057", "1.23"]


@pytest.fixture
def later(cpu_run):
    """The same run once more: the machine is twice as slow, and one of our times grew by a further fifth."""
    run = copy.deepcopy(cpu_run)
    grown = ("gated MLP, block", "cpu")
    for place, row in enumerate(run.rows):
        factor = 1.2 if (row.case, row.kernel_provider) == grown else 1.0
        if row.metric_name == "speed":
            factor *= 2
        if row.metric_unit in ("ms", "x"):
            run.rows[place] = row._replace(
                y_value_50=factor * row.y_value_50,
                y_value_20=factor * row.y_value_20,
                y_value_80=factor * row.y_value_80,
            )
    return run


class TestCompare:
    def test_a_run_is_as_fast_as_itself(self, root, capsys):
        file = root / "bench/results/two-cores/cpu.json"
        assert compare.main(file, file.with_suffix(".csv"), 0.05) == 0
        said = capsys.readouterr().out
        assert compare.SLOWER not in said
        assert "WARNING" not in said
        assert "What else differs" not in said
        assert "Nothing of gradroute got slower beside its base by more than 5%." in said

    def test_what_counts_is_the_time_beside_the_base(self, tmp_path, cpu_run, later, capsys):
        cpu_run.save(tmp_path / "a")
        later.save(tmp_path / "b")
        assert compare.main(tmp_path / "a", tmp_path / "b", 0.05) == 1
        said = capsys.readouterr().out.splitlines()
        start = said.index("gated MLP, block")
        assert [" ".join(line.split()) for line in said[start + 1 : start + 4]] == [
            "full unmasked 100 ms 200 ms 2.000 – – – SLOWER by time",
            "full detach 118 ms 236 ms 2.000 1.180 1.180 1.000 same",
            "full cpu 84.0 ms 202 ms 2.400 0.840 1.008 1.200 SLOWER",
        ]
        assert said[-2:] == ["Slower beside its base by more than 5%:", "  gated MLP, block, full, cpu"]
        assert compare.main(tmp_path / "a", tmp_path / "b", 0.25) == 0
        assert compare.main(tmp_path / "b", tmp_path / "a", 0.05) == 0

    def test_a_slower_rival_is_no_failure(self, tmp_path, cpu_run, later):
        for run in (cpu_run, later):
            run.cases["gated MLP, block"]["variants"]["cpu"]["is_rival"] = True
        cpu_run.save(tmp_path / "a")
        later.save(tmp_path / "b")
        assert compare.main(tmp_path / "a", tmp_path / "b", 0.05) == 0

    @pytest.mark.parametrize(("before", "after", "said"), [
        (Figure(1.0, 0.99, 1.01), Figure(1.04, 1.03, 1.05), compare.SAME),
        (Figure(1.0, 0.99, 1.01), Figure(1.06, 1.05, 1.07), compare.SLOWER),
        (Figure(1.0, 0.9, 1.06), Figure(1.1, 1.05, 1.2), compare.SAME),
        (Figure(1.06, 1.05, 1.07), Figure(1.0, 0.99, 1.01), compare.FASTER),
        (Figure.single(1.04), Figure.single(1.0), compare.SAME),
    ])  # fmt: skip
    def test_verdicts(self, before, after, said):
        assert compare.verdict(before, after, 0.05) == said

    def test_other_machines_are_warned_of(self, cpu_run, gpu_run):
        said = compare.header(cpu_run, gpu_run)
        assert said[0] == "A: run cpu on AMD EPYC, 2 threads, avx512"
        assert said[1] == "B: run cuda on NVIDIA H200"
        assert said[2].startswith("WARNING: A and B are of different machines")
        table = [line.split() for line in said[said.index("What else differs:") + 1 :]]
        assert ["torch", "2.13.0+cpu", "2.13.0+cu130"] in table
        assert ["driver", "none", "580.1"] in table
        assert ["clean", "yes", "no"] in table
        assert not any(line[:1] == ["commit"] for line in table)
        assert "WARNING: B was interrupted." in said
        assert any(line.startswith("WARNING: B is of a checkout with changes") for line in said)

    def test_what_only_one_has_is_listed(self, cpu_run, later):
        del later.cases["density 0.5"]
        later.cases["gated MLP, block"]["variants"]["detach"]["error"] = "OutOfMemoryError"
        wanted = ("gated MLP, block", "detach")
        later.rows = [row for row in later.rows if (row.case, row.kernel_provider) != wanted]
        assert compare.unpaired(cpu_run, later) == [
            "",
            "only in A: gated MLP, block, full, detach; does not run: OutOfMemoryError",
            "only in A: density 0.5",
        ]
        assert compare.unpaired(later, cpu_run)[1:] == [
            "only in B: gated MLP, block, full, detach; does not run: OutOfMemoryError",
            "only in B: density 0.5",
        ]

    def test_runs_of_one_name_are_compared(self, tmp_path, cpu_run, gpu_run, capsys):
        cpu_run.save(tmp_path / "a")
        gpu_run.save(tmp_path / "a")
        cpu_run.save(tmp_path / "b")
        make_run("model", CPU, {}).save(tmp_path / "b")
        assert compare.main(tmp_path / "a", tmp_path / "b", 0.05) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[:2] == ["only in A: run cuda", "only in B: run model"]
        assert sum(line.startswith("A: run") for line in said) == 1

    def test_bad_arguments_are_named(self, tmp_path, cpu_run, gpu_run):
        cpu_run.save(tmp_path / "a")
        gpu_run.save(tmp_path / "b")
        make_run("model", CPU, {}).save(tmp_path / "b")
        with pytest.raises(ValueError, match=r"^B: .*nowhere: no such file or folder"):
            compare.main(tmp_path / "a", tmp_path / "nowhere", 0.05)
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"^A: .*empty: got no NAME\.csv"):
            compare.main(tmp_path / "empty", tmp_path / "a", 0.05)
        make_run("cpu, again", CPU, {}).save(tmp_path / "c")
        cpu_run.save(tmp_path / "c")
        with pytest.raises(ValueError, match="A has the runs cuda, model"):
            compare.main(tmp_path / "b", tmp_path / "c", 0.05)
        (tmp_path / "a" / "cpu.csv").unlink()
        with pytest.raises(ValueError, match=r"^A: .*cpu\.csv is missing"):
            compare.main(tmp_path / "a" / "cpu.json", tmp_path / "b", 0.05)
        (tmp_path / "a" / "cpu.csv").write_text("other,columns\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"^A: .*got columns"):
            compare.main(tmp_path / "a", tmp_path / "b", 0.05)


def labels(panel):
    return [label.get_text() for label in panel.get_yticklabels()]


class TestPlots:
    def test_files_stand_beside_the_results(self, root):
        results = root / "bench" / "results"
        written, empty = plots.main([results / "h200", results / "two-cores" / "cpu.json"], None)
        assert empty == []
        assert [str(file.relative_to(results)) for file in written] == [
            "h200/cuda-norm-relative.png",
            "h200/cuda-norm-ceiling.png",
            "h200/cuda-model-relative.png",
            "two-cores/cpu-gated_mlp-relative.png",
            "two-cores/cpu-gated_mlp-tokens.png",
            "two-cores/cpu-gated_mlp-density.png",
            "two-cores/cpu-gated_mlp-ceiling.png",
        ]
        assert all(5_000 < file.stat().st_size < 150_000 for file in written)

    def test_another_folder_has_one_for_each_machine(self, root, tmp_path, gpu_run):
        results = root / "bench" / "results"
        one, _ = plots.main([results / "h200"], tmp_path / "one")
        assert {file.parent for file in one} == {tmp_path / "one"}
        make_run("cpu", CPU, {}).save(results / "two-cores")
        several, empty = plots.main([results / "h200", results / "two-cores"], tmp_path / "several")
        assert {file.parent.name for file in several} == {"h200"}
        assert len(empty) == 1
        assert empty[0].startswith(f"{results / 'two-cores' / 'cpu.csv'}: nothing to plot: ")

    def test_no_results_are_refused(self, tmp_path):
        for path in (tmp_path, tmp_path / "cpu.csv"):
            with pytest.raises(ValueError, match="got no runs, expected NAME"):
                plots.main([path], None)

    def test_without_matplotlib_the_extra_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ValueError, match=r"pip install 'gradroute\[bench\]'"):
            plots.main([tmp_path], None)

    def test_over_tokens(self, cpu_run):
        picture = plots.over_tokens(cpu_run, "gated_mlp")
        assert isinstance(picture, matplotlib.figure.Figure)
        time, memory = picture.axes
        assert time.get_ylabel() == "time, ms"
        assert memory.get_ylabel() == "peak memory, MB"
        curves = {line.get_label(): line for line in time.get_lines()}
        assert list(curves) == ["unmasked", "cpu", "detach"]
        assert list(curves["cpu"].get_xdata()) == [1024, 4096, 8192]
        assert list(curves["cpu"].get_ydata()) == [1024 / 90, 4096 / 90, 84.0]
        assert list(curves["detach"].get_xdata()) == [8192]
        assert len(time.collections) == 3  # bands
        assert (time.get_xscale(), time.get_yscale()) == ("log", "log")
        assert [tick.get_text() for tick in time.get_xticklabels()] == ["1k", "4k", "8k"]
        assert [text.get_text() for text in picture.legends[0].get_texts()] == list(curves)

    def test_over_density(self, cpu_run):
        time, _ = plots.over_density(cpu_run, "gated_mlp").axes
        curves = {line.get_label(): list(line.get_ydata()) for line in time.get_lines()}
        assert curves == {"unmasked": [100.0] * 3, "cpu": [55.0, 70.0, 100.0]}
        assert time.get_yscale() == "linear"
        assert time.get_ylim()[0] == 0

    def test_cases_that_differ_otherwise_are_no_sweep(self, gpu_run, cpu_run):
        assert plots.over_tokens(gpu_run, "norm") is None
        assert plots.over_density(gpu_run, "norm") is None
        cpu_run.cases["tokens 1024"]["axes"]["d_model"] = 512
        (sweep,) = plots.sweeps(cpu_run, "gated_mlp", "tokens")
        assert list(sweep.cases) == [4096, 8192]
        assert sweep.title == "routed_gated_mlp, d_model 256, dtype float32, tables block"

    def test_sweeps_are_told_apart_by_their_axes(self, cpu_run, monkeypatch):
        for tokens in (1024, 2048):
            axes = mlp_axes(tokens) | {"d_model": 512}
            add_case(cpu_run, f"wide {tokens}", "gated_mlp", axes, {"full": {"unmasked": 1.0}})
        titles = [sweep.title for sweep in plots.sweeps(cpu_run, "gated_mlp", "tokens")]
        assert titles == ["routed_gated_mlp, d_model 256", "routed_gated_mlp, d_model 512"]
        assert len(plots.over_tokens(cpu_run, "gated_mlp").axes) == 4
        monkeypatch.setattr(plots, "MOST_SWEEPS", 1)
        picture = plots.over_tokens(cpu_run, "gated_mlp")
        assert len(picture.axes) == 2
        assert "1 more in the files" in picture.get_suptitle()

    def test_relative_bars(self, cpu_run):
        first, second = plots.relative(cpu_run, "gated_mlp").axes
        assert first.get_title(loc="left") == "gated MLP, block\n1 = unmasked"
        assert labels(first) == ["unmasked", "detach", "cpu"]
        assert labels(second) == ["unmasked", "cpu"]
        assert [bar.get_width() for bar in first.patches] == pytest.approx([1.0, 1.18, 0.84])
        ticks = [line for line in first.get_lines() if line.get_color() == plots.LIMIT_COLOR]
        assert [list(line.get_xdata()) for line in ticks] == [[0.95, 0.95]]
        assert [text.get_text() for text in first.texts] == ["1.00", "1.18", "0.84"]

    def test_a_limit_on_what_is_added(self, gpu_run):
        bars = plots.relative_bars(gpu_run, "Llama").bars
        assert bars["routed"].limits == pytest.approx([1 + 0.5 * 0.4])
        assert plots.is_over(bars["routed"])
        assert not bars["detach"].limits

    def test_shares_of_the_ceilings(self, cpu_run, gpu_run):
        (panel,) = plots.ceiling(cpu_run, "gated_mlp").axes
        assert labels(panel) == ["cpu"]
        assert [bar.get_width() for bar in panel.patches] == pytest.approx([1.2, 0.8])
        assert [text.get_text() for text in panel.texts] == ["80%, 120%"]
        said = plots.ceiling_text([plots.ceiling_bars(cpu_run, "gated MLP, block")])
        assert "Pale over 100%: work that masks leave out is counted" in said
        assert "Dark over 100%" not in said
        assert "Dark over 100%" in plots.ceiling_text([plots.Bars("", "", {"cpu": plots.Bar(1.1, "110%")})])
        (panel,) = plots.ceiling(gpu_run, "norm").axes
        assert panel.get_title(loc="left") == "norm, backward\n100% = copy, 4000 GB/s"
        assert [bar.get_width() for bar in panel.patches] == pytest.approx([0.475, 0.95, 0.9125])
        assert plots.ceiling(gpu_run, "model") is None

    def test_colours_are_those_of_the_variants(self, cpu_run, gpu_run):
        cpu, gpu = plots.looks(cpu_run, "gated_mlp"), plots.looks(gpu_run, "model")
        assert cpu["detach"].color == gpu["detach"].color
        assert cpu["unmasked"].line["linestyle"] == "--"
        assert cpu["cpu"].line["linestyle"] == "-"
        run = make_run("many", CPU, {})
        names = ["detach", "detach, compiled", "unmasked", "someone", "cpu", "triton"]
        add_case(run, "case", "mlp", mlp_axes(), {"full": dict.fromkeys(names, 1.0)})
        made = plots.looks(run, "mlp")
        assert list(made) == names
        assert len({made[name].color for name in names[:5]}) == 5
        assert len({(look.color, look.marker) for look in made.values()}) == len(names)

    def test_panels_that_are_left_over_are_not_there(self, cpu_run):
        for place in range(3):
            times = {"full": {"unmasked": 1.0, "cpu": 0.5}}
            limits = [limit("cpu", 0.6, "unmasked", 0.5)]
            add_case(cpu_run, f"more {place}", "gated_mlp", mlp_axes(99 + place), times, limits=limits)
        assert len(plots.relative(cpu_run, "gated_mlp").axes) == 5


def test_what_failed_and_what_is_missing_is_on_the_page(cpu_run, tmp_path):
    failed = {
        "suite": "mlp",
        "axes": {},
        "x": "tokens",
        "error": "RuntimeError: no",
        "base": "",
        "checked": "",
    }
    failed |= {"kernel": "routed_mlp"} | {name: [] for name in ("rivals", "modes", "limits")}
    cpu_run.cases["broken"] = failed | {"facts": {}, "variants": {}, "seconds": 1.0}
    cpu_run.description["missing"] = {"model": "transformers is not installed"}
    rows = report.untimed_table(cpu_run).splitlines()
    assert "| all | missing | transformers is not installed | model |" in rows
    assert "| all | failed | RuntimeError: no | broken |" in rows
    assert "broken" in "\n".join(report.run_page(cpu_run, tmp_path))
    assert "broken" not in report.limits_table(cpu_run)
