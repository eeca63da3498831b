"""The studies of audit.py: for each row a recipe, options and stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from office import ROOT

from gflowtrl.losses import LossSpec, register_loss, trajectory_balance


OWN = ROOT / "benchmarks" / "quality" / "recipes"
PAPER = ROOT / "recipes" / "gflowgr_paper.yaml"
METHOD = ("sft", "gflownet")  # stages
ALL = ("teacher", "sft", "control", "gflownet")


def register_losses() -> None:
    """Register the loss of an ablation: pi is the model's softmax over all tokens, as in plain decoding."""
    register_loss("vocabulary_balance", LossSpec(trajectory_balance, any_label_space=True))


@dataclass(frozen=True)
class Row:
    """A row of a study: a recipe with options. Stages that rows share have their results in the study's first row."""

    title: str
    recipe: Path
    options: Sequence[str] = field(default=())
    stages: Sequence[str] = field(default=METHOD)


STANDARD = (
    "--rewards=[{type: ground_truth, weight: 10}, {type: collaborative, normalization: standard}, "
    "{type: token_similarity}]"
)
HARD = "--sampler={ground_truth: 1, hard: [{type: curriculum, pool: teacher, pool_size: 50}, 2]}"


def lambdas(value: float) -> list[str]:
    return ["--gflownet.loss_weights", "1.0", str(value)]


def beta(value: float) -> list[str]:
    return ["--gflownet.reward_beta", str(value)]


EXP = [STANDARD, "--gflownet.reward_transform", "exp"]
EXP_4 = [STANDARD.replace("standard}", "standard, weight: 4}"), *EXP[1:], *beta(0.5)]  # deviations count four times
#: The readings of the paper's method that were tried on the validation split of Office.
READING = {
    "published": Row("R as published, lambda 1", PAPER, (), ALL),
    "lambda01": Row("R as published, lambda .1", PAPER, lambdas(0.1)),
    "power2": Row("R^2, lambda .1", PAPER, [*lambdas(0.1), *beta(2)]),
    "power3": Row("R^3, lambda .1", PAPER, [*lambdas(0.1), *beta(3)]),
    "power5": Row("R^5, lambda .1", PAPER, [*lambdas(0.1), *beta(5)]),
    "exp05": Row("exp(.5 R), scores standardized, lambda .1", PAPER, [*EXP, *lambdas(0.1), *beta(0.5)]),
    "exp1": Row("exp(R), scores standardized, lambda .1", PAPER, [*EXP, *lambdas(0.1), *beta(1)]),
    "exp05_hard": Row(
        "exp(.5 R), scores standardized, the teacher's best 50, lambda .1",
        PAPER,
        [*EXP, HARD, *lambdas(0.1), *beta(0.5)],
    ),
    "exp1_hard": Row(
        "exp(R), scores standardized, the teacher's best 50, lambda .1", PAPER, [*EXP, HARD, *lambdas(0.1), *beta(1)]
    ),
    "exp05_hard_1": Row(
        "exp(.5 R), scores standardized, the teacher's best 50, lambda 1", PAPER, [*EXP, HARD, *lambdas(1), *beta(0.5)]
    ),
    "exp4": Row("exp(.5 R), scores standardized, times 4, lambda .1", PAPER, [*EXP_4, *lambdas(0.1)]),
    "exp4_1": Row("exp(.5 R), scores standardized, times 4, lambda 1", PAPER, [*EXP_4, *lambdas(1)]),
    "exp4_hard": Row(
        "exp(.5 R), scores standardized, times 4, the teacher's best 50, lambda .1",
        PAPER,
        [*EXP_4, HARD, *lambdas(0.1)],
    ),
    "exp4_hard_1": Row(
        "exp(.5 R), scores standardized, times 4, the teacher's best 50, lambda 1", PAPER, [*EXP_4, HARD, *lambdas(1)]
    ),
}
#: The chosen reading with the paper's two balance losses.
PAPER_CHOSEN = {
    "tb": replace(READING["exp4"], title="chosen reading, trajectory balance", stages=ALL),
    "db": Row(
        "chosen reading, detailed balance",
        PAPER,
        [*READING["exp4"].options, "--gflownet.loss_type", "[sft, detailed_balance]"],
    ),
}
OURS = ROOT / "recipes" / "gflowgr_ours.yaml"
BALANCES = {"tb": "trajectory_balance", "db": "detailed_balance", "subtb": "subtrajectory_balance"}


def ours(balance: str, sft: float, learning_rate: float = 1e-3, stages: Sequence[str] = METHOD) -> Row:
    """The second recipe with a balance loss and the weight of SFT next to it."""
    title = f"{balance.upper()}, {sft:g} x SFT + balance, learning rate {learning_rate:g}"
    options = ["--gflownet.loss_type", f"[sft, {BALANCES[balance]}]", "--gflownet.loss_weights", f"[{sft}, 1.0]"]
    return Row(title, OURS, [*options, "--gflownet.learning_rate", str(learning_rate)], stages)


#: The choice of the second recipe, on the validation split of Office.
OUR_READING = {
    "tb_1": ours("tb", 1, stages=ALL),
    "db_1": ours("db", 1),
    "subtb_1": ours("subtb", 1),
    "tb_10": ours("tb", 0.1),
    "db_10": ours("db", 0.1),
    "subtb_10": ours("subtb", 0.1),
    "db_10_slow": ours("db", 0.1, 5e-4),
    "db_10_fast": ours("db", 0.1, 2e-3),
}
TITLES = {
    "cross_entropy": "cross entropy over the vocabulary",
    "msl": "MSL, temperature .7",
    "bear": "BEAR",
    "apao_pointwise": "APAO, pointwise",
    "apao_pairwise": "APAO, pairwise, beta .3",
    "dpo": "DPO",
    "sdpo": "S-DPO",
    "ipa": "IPA",
    "grpo": "GRPO as in ReRe",
    "grpo_trl": "GRPO as in TRL",
    "dapo": "DAPO",
    "dr_grpo": "Dr. GRPO",
    "gbpo": "GBPO",
    "vstar": "V-STAR without its decoder",
    "flowrl": "FlowRL",
    "gflowgr": "GFlowGR as published",
    "gflowgr_detailed_balance": "GFlowGR as published, detailed balance",
    "vargrad": "VarGrad",
    "vargrad_linex": "VarGrad, linex",
    "exact_flow": "exact flows",
    "letter": "cross entropy on LETTER's ids",
}
#: Every method from one SFT checkpoint, for the same number of steps.
METHODS_OF_OFFICE = {
    name: Row(title, OWN / "audit" / f"{name}.yaml", (), ALL if name == "cross_entropy" else METHOD)
    for name, title in TITLES.items()
} | {
    "apao_gentle": Row(
        "APAO, pairwise, beta .1", OWN / "audit" / "apao_pairwise.yaml", ["--gflownet.loss_weights", "1.0", "0.1"]
    ),
    "vargrad_excluded": Row(
        "VarGrad, no reward for items of the history",
        OWN / "audit" / "vargrad.yaml",
        ["--gflownet.exclude_history", "auto"],
    ),
    "gflowgr_known": Row(
        "GFlowGR as published, known Z", OWN / "audit" / "gflowgr.yaml", ["--gflownet.flows", "known"]
    ),
    "gflowgr_vocabulary": Row(
        "GFlowGR as published, balance over the vocabulary",
        OWN / "audit" / "gflowgr.yaml",
        ["--gflownet.loss_type", "[sft, vocabulary_balance]", "--gflownet.label_space", "vocabulary"],
    ),
}


def changed(names: Sequence[str], options: Sequence[str], without: str = "") -> dict[str, Row]:
    """Some methods of the first study with further options, and without a stage."""
    return {
        name: replace(
            METHODS_OF_OFFICE[name],
            options=[*METHODS_OF_OFFICE[name].options, *options],
            stages=[stage for stage in METHODS_OF_OFFICE[name].stages if stage != without],
        )
        for name in names
    }


#: Five of the best, without an SFT checkpoint: six epochs from random weights.
UNTRAINED = ["cross_entropy", "bear", "apao_pointwise", "vargrad", "exact_flow"]
FROM_RANDOM_WEIGHTS = ["--start", "untrained", "--gflownet.num_train_epochs", "6"]
ON_BEAUTY = ["cross_entropy", "msl", "apao_gentle", "sdpo", "grpo", "gflowgr", "vargrad", "exact_flow"]
ON_YAHOO = ["cross_entropy", "msl", "apao_gentle", "sdpo", "grpo", "gflowgr"]
OF_YAHOO = [  # data, model and schedule of recipes/gflowgr_yahoo.yaml
    *("--data.semantic_ids", "{quantizer: kmeans, collaborative: 1.0}"),
    *("--model.hidden_size", "64", "--model.intermediate_size", "256"),
    *("--model.num_hidden_layers", "2", "--model.num_attention_heads", "2"),
    *("--sft.num_train_epochs", "8", "--sft.eval_delay", "5", "--gflownet.num_train_epochs", "1"),
]
STUDIES: dict[str, dict[str, Row]] = {
    "reading": READING,
    "paper": PAPER_CHOSEN,
    "ours": OUR_READING,
    "office": METHODS_OF_OFFICE,
    "untrained": changed(UNTRAINED, FROM_RANDOM_WEIGHTS, without="sft"),
    "beauty": changed(ON_BEAUTY, ["--gflownet.num_train_epochs", "1"]),
    "yahoo": changed(ON_YAHOO, OF_YAHOO),
}
