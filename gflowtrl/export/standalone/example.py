"""Recommend items with vLLM, from the folder of this file.

echo '[17, 4, 2205]' | python example.py --k 10     # one history per line, oldest item first
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output gets the answers only

from gflowtrl_tree import Catalog, read_histories  # noqa: E402


def main() -> None:
    """Answer the histories on standard input, one JSON list per line, by lines of JSON."""
    parser = argparse.ArgumentParser(description="Recommend items for each line of standard input: [17, 4, 2205]")
    parser.add_argument("--k", type=int, default=10, help="length of the lists")
    parser.add_argument("--num_beams", type=int, help="beam width; by default max(20, k)")
    parser.add_argument("--sample", action="store_true", help="draw k semantic ids instead of a beam search")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON object with options of vllm.LLM")
    given = parser.parse_args()
    catalog = Catalog(Path(__file__).parent / "catalog")
    if given.k < 1 or (given.num_beams is not None and given.num_beams < given.k):
        parser.error("--k must be at least 1, and --num_beams at least as large")
    if not isinstance(given.options, dict):
        parser.error("--options must be a JSON object")
    if not given.sample and not catalog.equal_lengths:
        parser.error("vLLM's beam search needs semantic ids of one length, which these are not; use --sample")
    sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")  # Windows too, and a byte order mark
    histories = read_histories(sys.stdin, catalog)
    if not histories:
        return
    from gflowtrl_vllm import load, recommend, sample  # after all checks, because vLLM takes long

    beams = given.num_beams or max(20, given.k)
    llm, catalog = load(Path(__file__).parent, **{"max_logprobs": max(64, 2 * beams)} | given.options)
    if given.sample:
        lists = [
            [(item, value) for items, value in draws for item in items]
            for draws in sample(llm, catalog, histories, given.k)
        ]
    else:
        lists = recommend(llm, catalog, histories, given.k, given.num_beams)
    for found in lists:
        print(json.dumps([{"item": item, "probability": math.exp(value)} for item, value in found]))


if __name__ == "__main__":
    main()
