"""Train a generative recommender, fine-tune it with a GFlowNet, and compare the two.

    accelerate launch examples/gflowgr_amazon.py                       # the SYNTHETIC shop, a few minutes on a CPU
    accelerate launch examples/gflowgr_amazon.py \
        --config recipes/gflowgr_office_llama.yaml --data_dir DIR      # your data, in the format of docs/data.md

Each field of the recipe is an option (`--help` lists them): `--seed 43`, `--gflownet.learning_rate 1e-3`. After Ctrl-C
the same command resumes the run. The script is the same as the command `gflowtrl train`.
"""

import sys

from gflowtrl.cli import main


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
