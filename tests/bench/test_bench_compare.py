"""The comparison of two benchmark runs."""

import copy

import pytest
from bench_runs import CPU, make_run

from bench import compare
from bench.results import Figure


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
