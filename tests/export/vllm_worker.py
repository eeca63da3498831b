"""Run vLLM on an exported folder: JSON `{"histories", "count", "beams"}` from a file, lists and draws to another.

It runs in the environment of vLLM, without gflowtrl: `python vllm_worker.py FOLDER INPUT OUTPUT`.
"""

import json
import sys


def main() -> None:
    folder, source, target = sys.argv[1:]
    sys.path.insert(0, folder)
    from gflowtrl_vllm import load, recommend, sample

    with open(source) as file:
        asked = json.load(file)
    llm, catalog = load(folder, max_model_len=64, max_num_seqs=64, enforce_eager=True, kv_cache_memory_bytes=1 << 26)
    answer = {"draws": sample(llm, catalog, asked["histories"], asked["count"], seed=1)}
    if asked["beams"]:
        answer["lists"] = recommend(llm, catalog, asked["histories"], k=20, num_beams=asked["beams"])
    with open(target, "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()
