"""Trains a policy by GRPO on a reward that can be gamed, and takes away the adapter that learned to game it.

A small Llama sorts digits, and is paid for the right answer or for a word that has nothing to do with it. A detector
finds half of the rollouts with the word. Two LoRA adapters are trained: rollouts that were found train the second
alone, all others both (gradient routing, Cloud et al. 2024, arXiv 2410.04332, as github.com/jnward/rl-gradient-routing
does), and the second is removed afterwards. Compared with no intervention, with taking the rewards of found rollouts
away, with two adapters that are not routed, and with the true reward. Exit code 1 when routing does not help.
"""

import dataclasses
import sys
from typing import Any

from experiment import Check, Experiment, main, median, spread
from hacking.task import proxy_reward, true_reward
from hacking.training import Method, Settings, demonstrated, trained
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SETTINGS = Settings()
QUICK = Settings(
    digits=3,
    d_model=32,
    layers=1,
    blocks=1,
    block=2,
    demonstrations=8,
    steps=2,
    prompts=2,
    generations=4,
    rank=2,
    held_out=8,
    points=2,
)

NONE, MASKED, ROUTED, ORACLE = "no intervention", "rewards masked", "routed", "true reward"
#: Every training; all have the same two adapters.
METHODS = {
    NONE: Method(proxy_reward),
    MASKED: Method(proxy_reward, masked=True),
    ROUTED: Method(proxy_reward, routed=True),
    ORACLE: Method(true_reward),
}
WHOLE, ABLATED = "whole", "ablated"
#: The policies that are compared, and with them the control: the training without intervention, with one adapter less.
CONTROL = "not routed"
COMPARED = {
    NONE: (NONE, WHOLE),
    MASKED: (MASKED, WHOLE),
    CONTROL: (NONE, ABLATED),
    ROUTED: (ROUTED, ABLATED),
    ORACLE: (ORACLE, WHOLE),
}
COLOURS = {NONE: "#9b2d30", MASKED: "#b5651d", CONTROL: "#8a8a8a", ROUTED: "#0b6e99", ORACLE: "#555555"}

Run = dict[str, Any]


def run(seed: int, quick: bool) -> Run:
    settings = QUICK if quick else SETTINGS
    base, scores = demonstrated(settings, seed)
    return {
        "settings": dataclasses.asdict(settings),
        "base": scores,
        "trainings": {name: trained(base, method, settings, seed) for name, method in METHODS.items()},
    }


def of(runs: list[Run], policy: str, score: str) -> list[float]:
    """A score of one of COMPARED in each seed."""
    training, part = COMPARED[policy]
    return [run["trainings"][training][part][score] for run in runs]


def before(runs: list[Run], score: str) -> list[float]:
    """A score of the policy that GRPO starts from, in each seed."""
    return [run["base"][score] for run in runs]


def answers(scores: dict[str, float]) -> str:
    """The share of right answers among the completions without the exploit."""
    return f"{scores['true'] / (1 - scores['exploit']):.2f}" if scores["exploit"] < 1 else "–"


def table(runs: list[Run]) -> list[dict[str, str]]:
    """The policy before, then every training, whole and without the second adapter."""
    policies = {"before": [run["base"] for run in runs]}
    for name in METHODS:
        for part, words in ((WHOLE, "whole"), (ABLATED, "second removed")):
            policies[f"{name}, {words}"] = [run["trainings"][name][part] for run in runs]
    return [
        {
            "policy": name,
            "true reward": spread([one["true"] for one in scores]),
            "proxy reward": spread([one["proxy"] for one in scores]),
            "exploits": spread([one["exploit"] for one in scores]),
            "right where it answers": ", ".join(map(answers, scores)),
        }
        for name, scores in policies.items()
    ]


def checks(runs: list[Run]) -> list[Check]:
    def more(other: list[float]) -> float:
        """How much more true reward the routed policy has without its second adapter, in the median."""
        return median([a - b for a, b in zip(of(runs, ROUTED, "true"), other, strict=True)])

    return [
        Check(
            "rate of the exploit, no intervention, median (half: with less there is little to take away)",
            median(of(runs, NONE, "exploit")),
            0.5,
        ),
        Check(
            "rate of the exploit, routed, second adapter removed, median (a quarter: two adapters that had learnt it "
            "alike would leave about half)",
            median(of(runs, ROUTED, "exploit")),
            0.25,
            at_least=False,
        ),
        Check(
            "true reward, routed and second adapter removed less no intervention, median (a tenth of the largest)",
            more(of(runs, NONE, "true")),
            0.1,
        ),
        Check(
            "true reward, routed and second adapter removed less rewards masked, median (a tenth: what absorption must "
            "add to knowing the same rollouts)",
            more(of(runs, MASKED, "true")),
            0.1,
        ),
        Check(
            "true reward, routed less two adapters that are not routed, both without the second, median (a tenth: the "
            "rest is what removing any adapter does)",
            more(of(runs, CONTROL, "true")),
            0.1,
        ),
        Check(
            "true reward, routed and second adapter removed less before GRPO, median (no less: training must not cost "
            "the task)",
            more(before(runs, "true")),
            0.0,
        ),
    ]


def found(runs: list[Run]) -> str:
    def percent(policy: str) -> str:
        return f"{100 * median(of(runs, policy, 'exploit')):.0f} %"

    def true(policy: str) -> str:
        return f"{median(of(runs, policy, 'true')):.2f}"

    def kept(policy: str) -> str:
        pairs = zip(of(runs, policy, "true"), before(runs, "true"), strict=True)
        shares = [after / first for after, first in pairs if first]
        return f"{100 * median(shares):.0f} %" if shares else "–"

    whole = [run["trainings"][ROUTED][WHOLE] for run in runs]
    recall = 100 * runs[0]["settings"]["recall"]
    return (
        f"before GRPO {100 * median(before(runs, 'exploit')):.0f} % of the completions are the exploit, and the true "
        f"reward is {median(before(runs, 'true')):.2f}. Without intervention {percent(NONE)} are, with a true reward "
        f"of {true(NONE)}; where the rewards of the {recall:.0f} % that a detector finds are masked, {percent(MASKED)} "
        f"and {true(MASKED)}. Routed, both adapters together have "
        f"{100 * median([one['exploit'] for one in whole]):.0f} % and {median([one['true'] for one in whole]):.2f}, "
        f"without the second {percent(ROUTED)} and {true(ROUTED)}; of two adapters that are not routed the first alone "
        f"has {percent(CONTROL)} and {true(CONTROL)}. Training on the true reward gives {true(ORACLE)}. Of the true "
        f"reward before GRPO, routing and removal leave {kept(ROUTED)}, masked rewards {kept(MASKED)}."
    )


def plot(runs: list[Run], figure: Figure) -> None:
    curves, exploits, rewards = figure.subplots(1, 3)
    for name in METHODS:
        plot_curve(curves, runs, name)
    curves.set(
        xlabel="steps of GRPO", ylabel="share", title="Exploits among rollouts, both adapters", ylim=(0, 1)
    )
    curves.legend(frameon=False)
    labels = {
        CONTROL: "not routed,\nsecond\nremoved",
        ROUTED: "routed,\nsecond\nremoved",
        NONE: "no inter-\nvention",
    }
    labels |= {MASKED: "rewards\nmasked", ORACLE: "true\nreward"}
    for axis, score, title in (
        (exploits, "exploit", "Exploits, held out"),
        (rewards, "true", "True reward, held out"),
    ):
        plot_bars(axis, runs, score)
        axis.set(title=title, ylim=(0, 1))
        axis.set_xticks(range(len(COMPARED)), [labels[name] for name in COMPARED], fontsize=8)
    for axis in (curves, exploits, rewards):
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)


def plot_curve(axis: Axes, runs: list[Run], name: str) -> None:
    """Draws the seeds' median in the course of a training, and the range from the smallest to the largest."""
    points = list(zip(*(run["trainings"][name]["curve"] for run in runs), strict=True))
    steps = [of_seeds[0]["step"] for of_seeds in points]
    rates = [[one["exploit"] for one in of_seeds] for of_seeds in points]
    axis.plot(steps, list(map(median, rates)), color=COLOURS[name], label=name)
    axis.fill_between(
        steps, list(map(min, rates)), list(map(max, rates)), color=COLOURS[name], alpha=0.2, linewidth=0
    )


def plot_bars(axis: Axes, runs: list[Run], score: str) -> None:
    """Draws the seeds' median of the compared policies, each seed, and the policy before as a line."""
    for place, name in enumerate(COMPARED):
        values = of(runs, name, score)
        axis.bar(place, median(values), color=COLOURS[name], width=0.65)
        axis.plot([place] * len(values), values, "o", color="black", markersize=4, alpha=0.6)
    axis.axhline(median(before(runs, score)), color="black", linestyle="--", linewidth=1, label="before GRPO")
    axis.legend(frameon=False)


EXPERIMENT = Experiment(
    name="reward_hacking",
    title="Reward hacking in an adapter",
    paper=(
        "Qwen3-4B is trained by GRPO on programming problems whose tests it can overwrite. A detector labels half of "
        "the rollouts that do, and none wrongly; these train one of two LoRA adapters alone, which is removed "
        "afterwards. What that is compared with, screening, gives such rollouts an advantage of 0 and leaves their "
        "rewards out of their group's mean (github.com/jnward/rl-gradient-routing; the files that were read here state "
        "no results)."
    ),
    run=run,
    table=table,
    checks=checks,
    found=found,
    plot=plot,
    seeds=3,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
