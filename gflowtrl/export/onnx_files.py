"""`gflowtrl export --to onnx`: the model as an ONNX graph, the catalog, and a recommender in numpy that uses both."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gflowtrl.checks import one_line, shortened
from gflowtrl.compat import quiet_logger

from . import arrays
from .graph import INPUTS, BranchGraph
from .standalone import onnx_recommender


if TYPE_CHECKING:
    from gflowtrl.recommender import Recommender


MODEL_FILE = "model.onnx"
TOLERANCE = 1e-3  # of a log-probability; rounding explains about 1e-5


def write(recommender: Recommender, folder: Path) -> None:
    """Write the model, the catalog and `onnx_recommender.py` into an empty folder, and compare the result.

    Args:
        recommender: of a causal model; it is computed in float32.
        folder: gets the files.

    Raises:
        ValueError: the model is an encoder-decoder, torch cannot export it, or the exported recommender differs.
    """
    name = type(recommender.model).__name__
    if recommender.model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder, and the export to ONNX supports causal models only (Llama, Qwen3, ...). "
            f"Use --to csr with an engine of your own."
        )
    recommender.model.float().cpu()
    recommender.prompts([recommender.catalog.items[:1]])  # checks that the policy is exact, and moves the catalog
    (folder / arrays.CATALOG_FOLDER).mkdir()
    arrays.write(recommender, folder / arrays.CATALOG_FOLDER)
    _write_graph(recommender, folder / MODEL_FILE)
    shutil.copyfile(onnx_recommender.__file__, folder / "onnx_recommender.py")
    if (difference := largest_difference(recommender, folder)) > TOLERANCE:
        raise ValueError(
            f"The exported {name} and the recommender differ by {difference:.2g} in the log-probability of an item "
            f"(rounding explains {TOLERANCE:g}), so it is not exported. Use another version of torch or onnxscript."
        )


def _write_graph(recommender: Recommender, file: Path) -> None:
    graph = BranchGraph(recommender.model, recommender.catalog.tree.tokens, recommender.policy.temperature).eval()
    inputs = example_inputs(graph)
    dynamic, past = torch.export.Dim.DYNAMIC, inputs[-1]
    axes = [{0: dynamic, 1: dynamic}] * 3 + [dict.fromkeys(range(3), dynamic), {0: dynamic}]
    names = [f"{kind}_{layer}" for layer in range(len(past) // 2) for kind in ("key", "value")]
    with torch.no_grad(), quiet_logger("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                graph,
                inputs,
                dynamo=True,
                verbose=False,
                dynamic_shapes=(*axes, [{0: dynamic, 2: dynamic}] * len(past)),
                input_names=[*INPUTS, *(f"past_{name}" for name in names)],
                output_names=["logits", *(f"present_{name}" for name in names)],
            )
        except torch.onnx.OnnxExporterError as error:
            reason = one_line(str(error.__cause__ or error))
            raise ValueError(
                f"torch cannot export a {type(recommender.model).__name__} to ONNX ({shortened(reason, 300)}). Use a "
                f"newer version of torch and onnxscript, or --to vllm."
            ) from error
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    program.save(file, external_data=True)


@torch.no_grad()
def example_inputs(graph: BranchGraph) -> tuple[Any, ...]:
    """Return inputs of the graph for tracing: two prompts with five cached tokens, and three new ones each."""
    batch, cached, new = 2, 5, 3
    ids, positions = graph.tokens[:1].expand(batch, cached + new), torch.arange(cached + new).expand(batch, -1)
    visible = torch.ones(batch, cached + new, cached + new, dtype=torch.bool).tril()
    old, latest = slice(0, cached), slice(cached, None)
    _, *past = graph(ids[:, old], positions[:, old], positions[:, old], visible[:, old, old], torch.arange(cached), [])
    return ids[:, latest], positions[:, latest], positions, visible[:, latest], torch.arange(new), past


def largest_difference(recommender: Recommender, folder: Path) -> float:
    """Return the largest difference in the log-probability of a leaf between a recommender and its export.

    The sorted lists for the two prompts of `PromptEncoder.longest_histories` are compared, rank by rank, because
    leaves with equal probabilities may swap.
    """
    histories, width = recommender.encoder.longest_histories(), min(20, recommender.catalog.tree.num_leaves)
    _, expected = recommender.policy.beam_search(recommender.prompts(histories), width)
    _, found = onnx_recommender.OnnxRecommender(folder).beam_search(histories, width)
    return float((expected - torch.from_numpy(found)).abs().nan_to_num(torch.inf).max())
