"""Metrics of ranking, breadth, fairness and calibration."""

from .breadth import breadth_metrics, popularity_groups
from .exposed import debiased_estimates, exposed_metrics, inverse_propensities, mean_over_users
from .prefixes import prefix_metrics
from .ranking import group_means, item_ranking_metrics, leaf_ranking_metrics, primary_cutoff
from .ranking_report import RankingReport, summarize, summarize_items
from .reliability import binned_by_target, reliability_curve
from .statistics import jensen_shannon, mean_and_error, paired_bootstrap, total_variation


__all__ = [
    "RankingReport",
    "binned_by_target",
    "breadth_metrics",
    "debiased_estimates",
    "exposed_metrics",
    "group_means",
    "inverse_propensities",
    "item_ranking_metrics",
    "jensen_shannon",
    "leaf_ranking_metrics",
    "mean_and_error",
    "mean_over_users",
    "paired_bootstrap",
    "popularity_groups",
    "prefix_metrics",
    "primary_cutoff",
    "reliability_curve",
    "summarize",
    "summarize_items",
    "total_variation",
]
