"""Make accelerate shard a job of two CPU processes. Import it before transformers and accelerate; for tests only.

Without an accelerator, accelerate sets MULTI_CPU, for which it never applies FSDP.
"""

import os


os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")

from accelerate.state import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402


_prepare_backend = PartialState._prepare_backend


def _as_if_on_gpus(self, cpu=False, sagemaker_dp=False, backend=None):
    if "LOCAL_RANK" in os.environ and not cpu:
        return "gloo", DistributedType.MULTI_GPU
    return _prepare_backend(self, cpu, sagemaker_dp, backend)


PartialState._prepare_backend = _as_if_on_gpus
