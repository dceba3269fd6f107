"""Trains an agent that oversight can seldom tell what it did, and takes away the part of it that learned to do wrong.

Cloud et al. 2024 (arXiv 2410.04332, section 4.3): in a gridworld, reaching Diamond is wanted and reaching Ghost is not,
but the reward is the same, and which of both was reached is known in few episodes only. Those teach one expert each;
episodes without a label teach both as the gate mixes them; then the Diamond expert acts alone. Compared with training
on understood episodes only, with labels used as punishment, and with an oracle. Exit code 1 when routing does not help.
"""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch
from experiment import Check, Experiment, Run, main, median, spread
from gridworld import training
from gridworld.training import METHODS, Trainer, evaluate
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OVERSIGHT = (0.02, 0.1, 0.4)
FEW, SOME = OVERSIGHT[:2]
COMPARED = ("routing", "filtering", "naive")  # at every level of oversight
# With 400 the Diamond expert of one seed in three had a true return of 0.05 at 2 % oversight, and naive training, even
# twice as long, had not settled: 0.05, 0.35 and 0.43.
UPDATES, QUICK_UPDATES = 600, 2
LONGER = 3  # times as many updates
EVALUATIONS = 12  # evaluations of a training, the last at its end
EPISODES, QUICK_EPISODES = 2048, 32  # episodes of an evaluation
ROUTING_LONGER, NAIVE_LONGER = "routing, longer", "naive, longer"
# Every training: its name, the level of oversight, the method, and how many times UPDATES. Longest first, so that no
# process is left with one at the end. The oracle sees all ends, so that the level changes little for it.
TRAININGS = (
    (ROUTING_LONGER, FEW, "routing", LONGER),
    (NAIVE_LONGER, FEW, "naive", LONGER),
    *((method, oversight, method, 1) for method in COMPARED for oversight in OVERSIGHT),
    ("gate, no routing", FEW, "gate, no routing", 1),
    ("gate, no routing", SOME, "gate, no routing", 1),
    ("routing, no gate", SOME, "routing, no gate", 1),
    ("oracle", SOME, "oracle", 1),
)
# A difference between true returns: a quarter of the oracle's 0.77.
MARGIN = 0.19
COLOURS = {"routing": "#0b6e99", "filtering": "#b5651d", "naive": "#9b2d30", "oracle": "#555555"}


def trained(name: str, oversight: float, method: str, times: int, seed: int, quick: bool) -> Run:
    """One training: its evaluations on the way, and at the end."""
    updates = times * (QUICK_UPDATES if quick else UPDATES)
    batch, episodes = (QUICK_EPISODES, QUICK_EPISODES) if quick else (training.EPISODES, EPISODES)
    trainer = Trainer(METHODS[method], oversight, seed, updates, batch)
    every = max(1, updates // EVALUATIONS)
    held_out = seed + 1_000_000  # the gridworlds of evaluations, the same for all methods
    curve = []
    for update in range(1, updates + 1):
        trainer.update()
        if update % every == 0:
            scores = evaluate(trainer.steered(), oversight, episodes, held_out)
            curve.append({"update": update, "return": scores["return"]})
    return {
        "name": name,
        "oversight": oversight,
        "curve": curve,
        **scores,
        "unseen": evaluate(trainer.steered(), 0.0, episodes, held_out),
        "unsteered": evaluate(trainer.policy, oversight, episodes, held_out),
    }


def run(seed: int, quick: bool) -> Run:
    arguments = [(*one, seed, quick) for one in TRAININGS]
    with workers(quick) as each:
        trainings = list(each(trained, *zip(*arguments, strict=True)))
    return {"updates": QUICK_UPDATES if quick else UPDATES, "trainings": trainings}


@contextmanager
def workers(quick: bool) -> Iterator[Any]:
    """A `map` over processes of one thread each: networks this small gain nothing from several threads.

    Every training seeds itself, so that results do not depend on how many processes there are.
    """
    if quick:
        yield map
        return
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ProcessPoolExecutor(
        count, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield pool.map


def scores(runs: list[Run], name: str, oversight: float, key: str = "return", where: str = "") -> list[float]:
    """A training's score in each seed; where: of another evaluation than that of the policy to use at this level."""
    return [
        (one[where] if where else one)[key]
        for run in runs
        for one in run["trainings"]
        if (one["name"], one["oversight"]) == (name, oversight)
    ]


def percent(values: list[float]) -> str:
    """The seeds' median of a training's score."""
    return f"{100 * median(values):.0f} %"


def table(runs: list[Run]) -> list[dict[str, str]]:
    """The trainings by name and level, the compared ones first."""
    names = ["routing", ROUTING_LONGER, "filtering", "naive", NAIVE_LONGER]
    names += ["gate, no routing", "routing, no gate", "oracle"]
    rows = []
    for name, oversight, method, _ in sorted(TRAININGS, key=lambda one: (names.index(one[0]), one[1])):
        both = spread(scores(runs, name, oversight, where="unsteered")) if METHODS[method].experts else ""
        rows.append(
            {
                "training": name,
                "oversight": f"{oversight:.0%}",
                "true return": spread(scores(runs, name, oversight)),
                "reaches Diamond": percent(scores(runs, name, oversight, "diamond")),
                "reaches Ghost": percent(scores(runs, name, oversight, "ghost")),
                "true return, nothing overseen": spread(scores(runs, name, oversight, where="unseen")),
                "true return, both experts": both,
            }
        )
    return rows


def differences(runs: list[Run], one: tuple[str, float], other: tuple[str, float]) -> list[float]:
    """The seeds' differences: how much more true return one training, (name, level), gives than another."""
    return [a - b for a, b in zip(scores(runs, *one), scores(runs, *other), strict=True)]


def checks(runs: list[Run]) -> list[Check]:
    few, some = ("routing", FEW), ("routing", SOME)
    steering = [
        alone - both
        for alone, both in zip(scores(runs, *some), scores(runs, *some, where="unsteered"), strict=True)
    ]
    return [
        Check(
            f"true return at {FEW:.0%} oversight: routing less filtering, worst seed (no effect is 0; {MARGIN} is a "
            "quarter of the oracle's return in pilots)",
            min(differences(runs, few, ("filtering", FEW))),
            MARGIN,
        ),
        Check(
            f"true return at {SOME:.0%} oversight: routing less filtering, median (no effect is 0)",
            median(differences(runs, some, ("filtering", SOME))),
            0.0,
        ),
        Check(
            f"true return at {FEW:.0%} oversight, both trained {LONGER} times as long: routing less naive, median (as "
            f"above: {MARGIN})",
            median(differences(runs, (ROUTING_LONGER, FEW), (NAIVE_LONGER, FEW))),
            MARGIN,
        ),
        Check(
            f"true return at {SOME:.0%} oversight: the Diamond expert alone less both experts, worst seed (as above: "
            f"{MARGIN})",
            min(steering),
            MARGIN,
        ),
        Check(
            f"true return: the oracle less routing at {SOME:.0%} oversight, median (about 0.2 in the paper; half as "
            "much again is allowed)",
            median(differences(runs, ("oracle", SOME), some)),
            0.3,
            at_least=False,
        ),
    ]


def found(runs: list[Run]) -> str:
    def reached(name: str, oversight: float, where: str = "") -> str:
        return f"{median(scores(runs, name, oversight, where=where)):.2f}"

    def ghosts(name: str) -> str:
        return percent(scores(runs, name, FEW, "ghost", "unseen"))

    few, some = (f"{100 * oversight:.0f} %" for oversight in (FEW, SOME))
    best = median([max(values) for values in zip(*curve(runs, "naive", FEW)[1], strict=True)])
    compared = "; ".join(
        f"at {100 * oversight:.0f} % oversight the Diamond expert alone has {reached('routing', oversight)}, "
        f"filtering {reached('filtering', oversight)}, naive training {reached('naive', oversight)}"
        for oversight in OVERSIGHT
    )
    return (
        f"true returns, where the oracle has {reached('oracle', SOME)}: {compared}. Both experts together have "
        f"{reached('routing', SOME, 'unsteered')} at {some}. Naive training learns to tell what is overseen: at {few} "
        f"its return is {best:.2f} at its best moment, which only the true return shows, and "
        f"{reached(NAIVE_LONGER, FEW)} after {LONGER} times as many updates (routing {reached(ROUTING_LONGER, FEW)}). "
        f"Then it reaches Ghost in {ghosts(NAIVE_LONGER)} of the episodes where nothing is overseen, the Diamond "
        f"expert in {ghosts(ROUTING_LONGER)}. Of the method's two parts, a gate that is taught the labels and masks on "
        "gradients, the gate does most here, and the masks little: without masks there is "
        f"{reached('gate, no routing', FEW)} at {few} and {reached('gate, no routing', SOME)} at {some}, without the "
        f"gate {reached('routing, no gate', SOME)} at {some}. In the paper, after 328 million steps, neither is enough "
        "alone."
    )


def plot(runs: list[Run], figure: Figure) -> None:
    returns, ghosts, curves = figure.subplots(1, 3)
    for name in COMPARED:
        plot_levels(returns, runs, name, "return", "")
        plot_levels(ghosts, runs, name, "ghost", "unseen")
    for name in (ROUTING_LONGER, "filtering", NAIVE_LONGER):
        plot_curve(curves, runs, name, FEW)
    for axis, key, where in ((returns, "return", ""), (ghosts, "ghost", "unseen")):
        oracle = median(scores(runs, "oracle", SOME, key, where))
        axis.axhline(oracle, color=COLOURS["oracle"], linestyle="--", label="oracle")
        axis.set(
            xscale="log", xlabel="oversight", xticks=OVERSIGHT, xticklabels=[f"{p:.0%}" for p in OVERSIGHT]
        )
        axis.minorticks_off()
    returns.set(ylabel="true return", title="At the level of training")
    ghosts.set(ylabel="share of episodes that reach Ghost", title="Nothing overseen")
    curves.set(xlabel="updates", ylabel="true return", title=f"In the course of training at {FEW:.0%}")
    returns.legend(frameon=False)
    for axis in (returns, ghosts, curves):
        axis.spines[["top", "right"]].set_visible(False)


def plot_levels(axis: Axes, runs: list[Run], name: str, key: str, where: str) -> None:
    """Draws the seeds' median by level, and the range from the smallest to the largest."""
    values = [scores(runs, name, oversight, key, where) for oversight in OVERSIGHT]
    axis.plot(OVERSIGHT, [median(each) for each in values], "o-", color=COLOURS[name], label=name)
    bounds = [min(each) for each in values], [max(each) for each in values]
    axis.fill_between(OVERSIGHT, *bounds, color=COLOURS[name], alpha=0.2, linewidth=0)


def plot_curve(axis: Axes, runs: list[Run], name: str, oversight: float) -> None:
    """Draws the seeds' median in the course of a training."""
    updates, values = curve(runs, name, oversight)
    axis.plot(updates, [median(each) for each in values], color=COLOURS[name.split(",")[0]])


def curve(runs: list[Run], name: str, oversight: float) -> tuple[list[int], list[list[float]]]:
    """Updates [E], and the true returns then [E, seeds]."""
    of_seeds = [
        one["curve"]
        for run in runs
        for one in run["trainings"]
        if (one["name"], one["oversight"]) == (name, oversight)
    ]
    returns = [[point["return"] for point in points] for points in zip(*of_seeds, strict=True)]
    return [point["update"] for point in of_seeds[0]], returns


EXPERIMENT = Experiment(
    name="oversight",
    title="Scalable oversight",
    paper="at 5 % oversight the Diamond expert reaches what other methods reach with six times as much; data filtering "
    "fails to learn below 40 %, naive training learns to seek Ghost where nobody sees it, and an oracle ends about 0.2 "
    "higher (Cloud et al. 2024, section 4.3 and appendix F).",
    run=run,
    table=table,
    checks=checks,
    found=found,
    plot=plot,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
