"""Writes the tables of README.md and of pages in docs/ from the records in benchmarks/results/.

    python docs/make_results.py            # after a benchmark has written new records
    python docs/make_results.py --check    # fail where a table is not what the records give

A table is between `<!-- results:NAME -->` and `<!-- /results -->`; the text around it is written by hand. Figures are
means over seeds ± standard deviation, differences have the 95 % interval of a paired bootstrap over users.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev

import torch
from safetensors.torch import load_file


ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT), str(ROOT / "benchmarks" / "quality")]

from audit import table as audit_lines  # noqa: E402

from benchmarks.quality.office import KEPT, difference, exposed_file, gains  # noqa: E402
from gflowtrl.pipeline.comparison import spread  # noqa: E402
from gflowtrl.pipeline.exposed import paired_difference  # noqa: E402
from gflowtrl.pipeline.run_report import aligned, interval_text  # noqa: E402


PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("results", "exposure", "paper"))]
MARKED = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)


@cache
def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Row:
    """A method of the records RUNS-seed42.json and so on, one per seed."""

    title: str
    runs: str
    method: str = "gflownet"
    seed: str = "??"  # a pattern; all seeds

    def files(self) -> list[Path]:
        found = sorted(KEPT.glob(f"{self.runs}-seed{self.seed}.json"))
        if not found:
            raise FileNotFoundError(f"{KEPT} has no records {self.runs}-seed??.json, which the table needs.")
        return found

    def values(self, metric: str) -> list[float]:
        """One per seed."""
        return [read(file)["methods"][self.method]["metrics"][metric] for file in self.files()]

    def gains(self) -> list[dict]:
        """Recall@10 and NDCG@10 of every user, one per seed."""
        return [gains(load_file(file.with_suffix(".safetensors"))[self.method]) for file in self.files()]

    def exposed(self, name: str) -> list[float]:
        """The mean of a metric of exposed items, one per seed."""
        return [read(file)["exposed"]["methods"][self.method]["metrics"][name] for file in self.files()]

    def of_users(self, name: str) -> torch.Tensor:
        """The metric of exposed items of every user, averaged over the seeds; NaN where it is not defined."""
        found = [load_file(exposed_file(file))[f"{self.method}/{name}"] for file in self.files()]
        return torch.stack(found).mean(0)


Column = Callable[[Row], str]


def averaged(values: list[float], digits: int) -> str:
    """Mean, and standard deviation where the seeds differ."""
    return spread(values if len(set(values)) > 1 else values[:1], digits)


def metric(name: str, digits: int = 4) -> Column:
    return lambda row: averaged(row.values(name), digits)


def minus(words: str, runs: str | None = None, method: str = "control") -> dict[str, Column]:
    """Differences to another method, by default the control of the same runs. That method's own cells are empty."""

    def column(name: str) -> Column:
        def cell(row: Row) -> str:
            other = Row(row.title, runs or row.runs, method, row.seed)
            if len(row.files()) != len(other.files()):
                raise ValueError(f"{row.runs} and {other.runs} are of different seeds; run the missing ones.")
            return "" if row == other else difference(row.gains(), other.gains(), name)

        return cache(cell)

    return {f"{title} minus {words}": column(title.lower()) for title in ("Recall@10", "NDCG@10")}


def exposed(name: str) -> Column:
    return lambda row: averaged(row.exposed(name), 3)


def exposed_minus_control(name: str) -> Column:
    """Difference of a GFlowNet to the control of the same runs, over users."""

    def cell(row: Row) -> str:
        if row.method != "gflownet":
            return ""
        return interval_text(paired_difference(row.of_users(name), replace(row, method="control").of_users(name)))

    return cell


def ratio(name: str) -> Column:
    """The value over that of the control of the same run, seed by seed."""

    def cell(row: Row) -> str:
        pairs = zip(row.values(name), replace(row, method="control").values(name), strict=True)
        return "" if row.method == "control" else " / ".join(f"{ours / theirs:.2f}" for ours, theirs in pairs)

    return cell


def kept_prefix(row: Row) -> str:
    """Share of test users whose target's first two tokens are still in the beam."""
    files = [file.with_name(f"{file.stem}-prefixes.json") for file in row.files()]
    found = [read(file)["methods"] for file in files if file.is_file()]
    return spread([methods[row.method]["survival@2"] for methods in found], 3)


def seconds_per_epoch(row: Row) -> str:
    costs = read(KEPT.parent / "speed" / "methods.json")["rows"]
    found = {f"office-{cost['method']}": cost["seconds_an_epoch"] for cost in costs}
    return f"{found[row.runs]:.0f}" if row.method == "gflownet" else ""


def baselines(runs: str) -> list[Row]:
    titles = {"SASRec, the teacher": "teacher", "SFT": "sft", "SFT continued for the same steps (control)": "control"}
    return [Row(title, runs, method) for title, method in titles.items()]


def markdown(columns: Iterable[str], lines: list[list[str]]) -> str:
    """A table whose figures have no zero before the point, as in papers."""
    return aligned([["", *columns], *([re.sub(r"(?<![\d.,])0\.", ".", cell) for cell in line] for line in lines)])


def table(rows: list[Row], columns: dict[str, Column]) -> str:
    return markdown(columns, [[row.title, *(column(row) for column in columns.values())] for row in rows])


MAIN, BEAUTY = "office-gflowgr_office_llama", "beauty-gflowgr_beauty_llama"
COSTS = {"kept": kept_prefix, "seconds per epoch": seconds_per_epoch}
ACCURACY = {"Recall@10": metric("recall@10"), "NDCG@10": metric("ndcg@10"), "coverage@10": metric("coverage@10", 3)}
ITEMS = {
    "Recall@10": metric("item_recall@10"),
    "NDCG@10": metric("item_ndcg@10"),
    "Recall@10, seen removed": metric("unseen_item_recall@10"),
    "NDCG@10, seen removed": metric("unseen_item_ndcg@10"),
    "coverage@10": metric("coverage@10", 3),
}
MINUS_CONTROL = minus("control")
MINUS_TEACHERS = minus("its teacher", method="teacher") | minus(
    "distillation", "office-distillation_office_llama", "gflownet"
)
MINUS_CROSS_ENTROPY = minus("cross entropy", "office-cross_entropy", "gflownet")
PAPER = Row("GFlowNet, the paper's configuration (`gflowgr_paper`)", "office-gflowgr_paper")
VARGRAD = Row("GFlowNet, VarGrad, .7 target + .3 teacher", f"{MAIN}_vargrad")
DISTILLATION = Row("exact flows, teacher alone (distillation)", "office-distillation_office_llama")
EXACT = Row("exact flows, .3 target + .7 teacher", MAIN)
ENSEMBLE = Row("exact flows towards three SASRec averaged, four epochs", f"{MAIN}_ensemble")
OFFICE = [
    *baselines(MAIN),
    PAPER,
    Row("the same with detailed balance", "office-paper_detailed_balance"),
    VARGRAD,
    Row("the same with contrastive balance", "office-contrastive"),
    DISTILLATION,
    EXACT,
    Row("the same, teacher at temperature .7, popularity correction .5", f"{MAIN}_broad"),
    Row("the same, teacher at temperature .7, popularity correction 1", f"{MAIN}_broader"),
    Row("three SASRec averaged, the teacher of the last row", f"{MAIN}_ensemble", "teacher"),
    Row("SFT continued for four epochs (control of the last row)", f"{MAIN}_ensemble", "control"),
    ENSEMBLE,
]
SHORT = [*baselines(MAIN), PAPER, DISTILLATION, EXACT, ENSEMBLE]
OBJECTIVES = [
    Row("SFT, the checkpoint", "office-cross_entropy", "sft"),
    Row("cross entropy over the vocabulary", "office-cross_entropy"),
    Row("cross entropy over the tree (MSL, temperature 1)", "office-cross_entropy", "control"),
    Row("APAO, pointwise", "office-apao_pointwise"),
    Row("APAO, pairwise, 32 negatives", "office-apao_pairwise"),
    Row("S-DPO", "office-sdpo"),
    Row("GRPO in ReRe's form, 16 beams", "office-grpo"),
    Row("the paper's configuration (`gflowgr_paper`)", "office-gflowgr_paper"),
    Row("exact flows", MAIN),
    Row("exact flows + APAO's pairwise loss", "office-exact_prefix"),
]
BREADTH = [
    *baselines("breadth-0"),
    Row(".3 target + .7 teacher", "breadth-0"),
    Row(".8 target + .2 teacher", "breadth-1"),
    Row("teacher at temperature .7", "breadth-2"),
    Row("teacher at temperature 1.5", "breadth-3"),
    Row("popularity correction .5", "breadth-4"),
    Row("popularity correction 1", "breadth-5"),
    Row("half of the teacher's share to EASE", "breadth-6"),
    Row(".6 target + .4 teacher, popularity correction .5", "breadth-7"),
    Row("temperature .7, popularity correction .5", "breadth-8"),
]
STRONG = "office-gflowgr_office_strong"
STRONG_ROWS = [
    Row("its teacher, a mixture", STRONG, "teacher"),
    Row("cross entropy, the same rows and steps (control)", STRONG, "control"),
    Row("exact flows (`gflowgr_office_strong`)", STRONG),
    Row("exact flows, three altered copies of each history, twice the steps", "strength-augmented", seed="4[234]"),
    Row("exact flows, with rewards for items of the history as well", "strength-no_exclusion"),
    Row("one SASRec", "strength-one_sasrec", "teacher"),
    Row("exact flows with one SASRec as the only teacher", "strength-one_sasrec"),
]
#: The record of the strongest recipe on each larger catalog, and those of variants.
LARGER = {
    "beauty": (
        "beauty-gflowgr_beauty_strong",
        [
            Row(
                "exact flows, an altered copy of each history, 1.5 times the steps",
                "beauty-beauty_augmented",
                seed="42",
            )
        ],
    ),
    "sports": (
        "sports-gflowgr_sports_strong",
        [
            Row("one SASRec", "strength-sports_one_sasrec", "teacher", "42"),
            Row("exact flows with one SASRec as the only teacher, 7 epochs", "strength-sports_one_sasrec", seed="42"),
        ],
    ),
}
VARIANTS = [
    Row("`gflowgr_office_strong`", STRONG, seed="42"),
    Row("with the ids of the data folder", "strength-published_ids", seed="42"),
    Row("width 192", "strength-wide", seed="42"),
    Row("three altered copies of each history, twice the steps", "strength-augmented", seed="42"),
    Row("without the trajectory to an item of the history", "strength-no_history_trajectory", seed="42"),
    Row("without it, and with rewards for items of the history", "strength-no_exclusion", seed="42"),
    Row("without it, dropout .1 (GPT-NeoX), 30 epochs", "strength-dropout", seed="42"),
    Row("without it, one cross-fitted SASRec, 12 epochs", "strength-folds", seed="42"),
]
T5 = [
    Row("cross entropy (control)", "strength-t5", "control"),
    Row("exact flows", "strength-t5"),
]
KNOWN_TRUTH = {
    "unseen liked": metric("unseen_liked_mass", 3),
    "over control, per seed": ratio("unseen_liked_mass"),
    "TV to truth": metric("total_variation", 3),
    "TV over control, per seed": ratio("total_variation"),
    "Recall@10 of the log": metric("recall@10", 3),
}
TRUTH = {
    **{f"{title}@5": exposed(f"{title.lower()}@5") for title in ("NDCG", "Recall")},
    "AUC": exposed("auc"),
    "NDCG@5, corrected": exposed("corrected_ndcg@5"),
    "AUC, corrected": exposed("corrected_auc"),
    "Recall@10 of the log": metric("item_recall@10", 3),
    "NDCG@5 minus control": exposed_minus_control("ndcg@5"),
    "AUC minus control": exposed_minus_control("auc"),
}
#: Title, way in seconds.json, number of seeds.
WAYS = [
    ("SASRec, the teacher", "teacher", 1),
    ("SFT, 12 epochs", "sft", 1),
    ("SFT, then two epochs of exact flows by separate rows", "separate", 1),
    ("six epochs of exact flows by whole rows, from random weights", "whole", 1),
    ("the same, three seeds", "whole", 3),
    ("cross entropy by whole rows, the same six epochs", "visits", 1),
    ("cross entropy by whole rows, the same seconds (14 epochs)", "seconds", 1),
]


def seconds() -> str:
    """What ways to train reach, and the processor seconds that they take."""
    records = read(KEPT / "seconds.json")["rows"]
    teacher = next(record["seconds"] for record in records if record["way"] == "teacher")
    lines = []
    for title, way, seeds in WAYS:
        found = [record for record in records if record["way"] == way][:seeds]
        spent = [record["seconds"] for record in found]
        cell = f"{fmean(spent):,.0f}" + (f" ± {stdev(spent):.0f}" if seeds > 1 else "")
        if way in ("separate", "whole"):  # which need a teacher
            cell += f" + {fmean(record.get('teacher', teacher) for record in found):.0f}"
        shown = {"test_recall@10": 4, "test_ndcg@10": 4, "test_coverage@10": 3}
        cells = [spread([record[name] for record in found], digits) for name, digits in shown.items()]
        lines.append([title, str(seeds), cell, *cells])
    return markdown(["seeds", "seconds", *ACCURACY], lines)


def strong_on(record: str, variants: list[Row]) -> str:
    """The strongest recipe of a larger catalog and its variants, one seed."""
    rows = [
        Row("its teacher, a mixture", record, "teacher", "42"),
        Row("cross entropy (control)", record, "control", "42"),
        Row("exact flows", record, seed="42"),
        *variants,
    ]
    return table(rows, ITEMS | minus("control", record))


def average() -> str:
    """Pairs of policies of different seeds, and the averages of their probabilities."""
    names = ("item_recall@10", "item_ndcg@10", "unseen_item_recall@10", "unseen_item_ndcg@10", "coverage@10")
    lines, averages = [], []
    for first, second in ((42, 43), (44, 45), (46, 47)):
        found = read(KEPT / f"average_office-{first}-{second}.json")["results"]
        titles = {"model 1": f"seed {first}, altered copies", "model 2": f"seed {second}, altered copies"}
        for name, title in {**titles, "models 1-2": "their average"}.items():
            minus_mean = found[name].get("minus_mean", {})
            shown = [interval_text(minus_mean[metric]) if minus_mean else "" for metric in names[:2]]
            lines.append([title, *(f"{found[name]['metrics'][metric]:.4f}" for metric in names), *shown])
        averages.append(found["models 1-2"]["metrics"])
    lines.append(["mean of the averages", *(spread([one[name] for one in averages], 4) for name in names), "", ""])
    columns = [*ITEMS, "Recall@10 minus the mean of the two", "NDCG@10 minus the mean of the two"]
    return markdown(columns, lines)


def on_exposed(prefix: str) -> str:
    """The methods on items shown at random."""
    recipe, flows = f"{prefix}-gflowgr_yahoo", "GFlowNet, exact flows"
    rows = [
        Row("popularity", f"{prefix}-most_popular", "teacher"),
        Row("EASE", f"{prefix}-ease", "teacher"),
        Row("SASRec, the teacher", recipe, "teacher"),
        Row("SFT", recipe, "sft"),
        Row("SFT continued for the same steps (control)", recipe, "control"),
        Row(f"{flows}, no correction", f"{prefix}-plain"),
        Row(f"{flows}, corrected by interactions", f"{prefix}-popularity"),
        Row(f"{flows}, corrected by impressions (`gflowgr_yahoo`)", recipe),
        Row("the same, a tenth of the reward uniform", f"{prefix}-uniform"),
        Row(f"{flows}, inverse propensity of the target", f"{prefix}-propensity"),
        *(
            [
                Row("three SASRec, averaged", f"{prefix}-three_sasrec", "teacher"),
                Row(f"{flows}, corrected by impressions, three SASRec", f"{prefix}-three_sasrec"),
            ]
            if prefix == "yahoo"
            else []
        ),
        Row("GFlowNet, VarGrad, corrected by impressions", f"{prefix}-vargrad"),
    ]
    return table(rows, TRUTH)


def new_items(prefix: str) -> str:
    """The users whose target is an item that occurs in no history and no other target, and the others."""
    files = {path.name.split("-")[2]: path for path in sorted(KEPT.glob(f"{prefix}-*-seed42.json"))}
    records = {name: read(file) for name, file in files.items()}
    rows = [
        ("nearest texts", "text", "teacher"),
        ("SASRec", "sasrec", "teacher"),
        ("content SASRec (.8) and texts (.2)", "content", "teacher"),
        ("content SASRec (.5) and texts (.5)", "half_text", "teacher"),
        ("cross entropy", "content" if "content" in records else "half_text", "control"),
        ("exact flows, teacher SASRec", "sasrec", "gflownet"),
        ("exact flows, teacher content SASRec (.8) and texts (.2)", "content", "gflownet"),
        ("exact flows, teacher content SASRec (.5) and texts (.5)", "half_text", "gflownet"),
    ]
    found = [
        (title, records[name]["new_items"]["methods"][method])
        for title, name, method in rows
        if name in records and method in records[name]["new_items"]["methods"]
    ]
    if "added" in records:
        found.append(("exact flows, .8 and .2, items added after training", records["added"]["groups"]))
    names, groups = {"Recall@10": "item_recall@10", "NDCG@10": "item_ndcg@10"}, ("new", "others")
    lines = [
        [title, *("{:.4f} ± {:.4f}".format(*of[group][name]) for group in groups for name in names.values())]
        for title, of in found
    ]
    return markdown([f"{title}, {group}" for group in groups for title in names], lines)


def audit(study: str, seeds: list[int], columns: list[str], order: str) -> str:
    """Methods of a study of benchmarks/quality/audit.py, the best one first."""
    lines = audit_lines(study, seeds, order)
    return markdown(columns, [[line["method"], *(line[column] for column in columns)] for line in lines])


VALIDATION = "validation NDCG@10"
DIFFERENCES = ["Recall@10 minus control", "NDCG@10 minus control"]
READING = [VALIDATION, "Recall@10", "NDCG@10", "coverage@10", *DIFFERENCES]
SEEN_REMOVED = [f"{name}, seen removed" for name in ("Recall@10", "NDCG@10")]
AUDIT = [VALIDATION, "Recall@10", "NDCG@10", *SEEN_REMOVED, "coverage@10", "kept", "minutes", "GiB", *DIFFERENCES]
TABLES: dict[str, Callable[[], str]] = {
    "office": lambda: table(SHORT, ACCURACY | dict([next(iter(MINUS_CONTROL.items()))])),
    "office_all": lambda: table(OFFICE, ACCURACY | MINUS_CONTROL),
    "teachers": lambda: table([DISTILLATION, EXACT, ENSEMBLE], MINUS_TEACHERS),
    "objectives": lambda: table(OBJECTIVES, ACCURACY | COSTS | MINUS_CROSS_ENTROPY),
    "beauty": lambda: table([*baselines(BEAUTY), Row(EXACT.title, BEAUTY)], ACCURACY | MINUS_CONTROL),
    "breadth": lambda: table(sorted(BREADTH, key=lambda row: -row.values("coverage@10")[0]), ACCURACY),
    "shop": lambda: table([*baselines("shop"), Row("GFlowNet, exact flows", "shop")], KNOWN_TRUTH),
    "seconds": seconds,
    "strong": lambda: table(STRONG_ROWS, ITEMS | minus("control", STRONG)),
    **{f"strong_{data}": partial(strong_on, *records) for data, records in LARGER.items()},
    **{f"exposed_{data}": partial(on_exposed, data) for data in ("yahoo", "coat")},
    **{f"new_items_{data}": partial(new_items, f"new_items-{data}") for data in ("office", "beauty")},
    "strong_average": average,
    "reading": lambda: audit("reading", [42], READING, VALIDATION),
    "paper": lambda: audit("paper", [42, 43, 44], READING, "NDCG@10"),
    "audit": lambda: audit("office", [42], AUDIT, "NDCG@10"),
    "strong_t5": lambda: table(T5, ITEMS | minus("control", "strength-t5")),
    "strong_variants": lambda: table(VARIANTS, ITEMS | minus("the recipe", STRONG, "gflownet")),
}


def filled(text: str) -> str:
    """A page with its tables made again."""
    return MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is out of date")
    check = parser.parse_args().check
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if check and new != text:
            sys.exit(f"{page.name} does not agree with benchmarks/results; run python docs/make_results.py.")
        if not check:
            page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
