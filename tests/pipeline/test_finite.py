"""The SFT stage stops like the other trainers, and follows the same metric; the test refuses what is broken."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gflowtrl.finite import NonFiniteError
from gflowtrl.pipeline import run
from gflowtrl.pipeline import training as stages
from gflowtrl.pipeline.training import Seq2SeqSFTStage, SFTStage

from .micro import micro_recipe


T5 = {
    "model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "model"), [(SFTStage, {}), (Seq2SeqSFTStage, {"model": T5})], ids=["llama", "t5"])
def test_sft_stops_with_the_step_and_the_part(tmp_path, monkeypatch, kind, model):
    step = kind.training_step

    def break_at_two(self, trained, *args, **kwargs):
        if self.state.global_step == 1:
            with torch.no_grad():
                next(trained.parameters()).view(-1)[:] = float("nan")
        return step(self, trained, *args, **kwargs)

    monkeypatch.setattr(kind, "training_step", break_at_two)
    recipe = micro_recipe(tmp_path, stages=["sft"], **model)
    with pytest.raises(NonFiniteError, match="at step 2 the loss was not finite.*By now the model's weight '"):
        run(recipe, quiet=True)
    (stage,) = tmp_path.glob("sft-*")
    assert not (stage / "model").exists() and not list(stage.glob("checkpoints/checkpoint-*"))


def test_a_finished_stage_that_was_spoiled_is_not_measured(tmp_path):
    recipe = micro_recipe(tmp_path, stages=["sft"], sft={"num_train_epochs": 1, "per_device_train_batch_size": 8})
    monkey = pytest.MonkeyPatch()
    kept = stages.train

    def spoiled(trainer, run_data, folder, base):
        record = kept(trainer, run_data, folder, base)
        tensors = load_file(folder / "model" / "model.safetensors")
        next(iter(tensors.values())).view(-1)[0] = float("nan")
        save_file(tensors, folder / "model" / "model.safetensors", {"format": "pt"})
        return record

    monkey.setattr(stages, "train", spoiled)
    try:
        with pytest.raises(NonFiniteError, match=rf"The model {tmp_path}.*/model has NaN or infinity in its weight '"):
            run(recipe, quiet=True)
    finally:
        monkey.undo()


def test_metrics_of_every_stage_are_settled_before_the_teacher(tmp_path):
    recipe = micro_recipe(tmp_path)
    for stage in ("sft", "control", "gflownet"):
        args = recipe.training_arguments(stage, tmp_path)
        assert (args.metric_for_best_model, args.greater_is_better) == ("eval_ndcg@5", True)
        assert args.logging_nan_inf_filter is False
        settings = {stage: {**getattr(recipe, stage), "metric_for_best_model": "eval_recall@7"}}
        with pytest.raises(
            ValueError, match="'eval_recall@7', which evaluate.. does not report; choose from eval_rec"
        ):
            micro_recipe(tmp_path, **settings)
    plateau = micro_recipe(tmp_path, sft={"lr_scheduler_type": "reduce_lr_on_plateau"})
    assert plateau.training_arguments("sft", tmp_path).lr_scheduler_kwargs["mode"] == "max"
    assert json.dumps(plateau.as_dict())
