"""Settings that must stand before torch and transformers are imported."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny tensors: threads cost more than they bring, and sums keep one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
