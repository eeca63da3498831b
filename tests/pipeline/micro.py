"""A recipe so small that the whole pipeline takes seconds."""

from gflowtrl.pipeline import Recipe


def micro_settings(output_dir, **changes) -> dict:
    settings = {
        "output_dir": str(output_dir),
        "name": "micro",
        "seed": 7,
        "data": {
            "max_history_items": 6,
            "shop": {
                "n_users": 40,
                "n_items": 30,
                "departments": 3,
                "shelves": 3,
                "interests": 3,
                "min_users_shown": 15,
            },
        },
        "model": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
        },
        "teacher": {"type": "ease", "regularization": 5.0},
        "sft": {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 5e-3},
        "control": {"learning_rate": 2e-3},
        "gflownet": {
            "loss_type": ["exact_flow"],
            "num_generations": 3,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 32,
            "learning_rate": 2e-3,
        },
        "rewards": [{"type": "ground_truth", "weight": 0.3}, {"type": "collaborative", "weight": 0.7}],
        "sampler": "reward",
        "evaluation": {"num_beams": 5, "ks": [3, 5], "batch_size": 32, "bootstrap_samples": 200},
    }
    return settings | changes


def micro_recipe(output_dir, **changes) -> Recipe:
    return Recipe(**micro_settings(output_dir, **changes))
