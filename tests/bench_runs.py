"""Made-up runs of the benchmark, for the tests of its pages and plots."""

import copy
import json

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
