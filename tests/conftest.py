"""Environment variables that must be set before torch and transformers are imported."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Threads slow tiny tensors down, and one thread keeps the order of summation fixed.
os.environ.setdefault("OMP_NUM_THREADS", "1")
