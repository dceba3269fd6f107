"""Plots of the files of benchmark runs."""

import sys

import pytest

pytest.importorskip("matplotlib")

import matplotlib.figure
from bench_runs import CPU, add_case, limit, make_run, mlp_axes

from bench import plots


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
