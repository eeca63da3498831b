"""Shared code of the speed benchmarks: interleaved rounds, peak memory, models, catalogs, reports.

On a shared machine, ratios are more reliable than times: both sides run alternately in one process on the same model
and batch, and the median of the rounds is reported.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from gflowtrl import ItemCatalog
from gflowtrl.data import build_tokenizer
from gflowtrl.pipeline import load_recipe
from gflowtrl.pipeline.run_data import RunData, prepare


ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks.quality.total_variation import environment  # noqa: E402


LEVELS = "abcdefgh"


def random_catalog(num_items: int = 5000, depth: int = 3, codes: int = 256, seed: int = 0):
    """Return `(catalog, tokenizer)` of random distinct ids with `codes` tokens per level."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, codes, (num_items + num_items // 5, depth), generator=generator)
    paths = torch.unique(drawn, dim=0)
    paths = paths[torch.randperm(len(paths), generator=generator)[:num_items]].tolist()
    ids = {item: tuple(f"<{LEVELS[d]}_{c}>" for d, c in enumerate(path)) for item, path in enumerate(paths)}
    every = {-1 - code: tuple(f"<{LEVELS[d]}_{code}>" for d in range(depth)) for code in range(codes)}
    tokenizer = build_tokenizer(ids | every)  # all codes, so that the vocabulary does not depend on the draw
    return ItemCatalog.from_semantic_ids(ids, tokenizer), tokenizer


def random_prompts(batch: int, length: int, vocab_size: int, device: torch.device, ragged: bool = False):
    """Return a left-padded batch of random tokens; `ragged` draws lengths uniformly from length / 4 to `length`."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(tokens)
    if ragged:
        lengths = torch.randint(length // 4, length + 1, (batch, 1), generator=generator)
        mask = (torch.arange(length) >= length - lengths).long()
    return {"input_ids": (tokens * mask).to(device), "attention_mask": mask.to(device)}


def office(data_dir: str) -> RunData:
    """Return the rows, catalog and tokenizer of the Office recipe."""
    return prepare(load_recipe(ROOT / "recipes" / "gflowgr_office_llama.yaml", ["--data_dir", data_dir]))


#: Width, layers and heads: 0.2, 1.2, 6.5 and 113 million parameters with a vocabulary of about 1,000 tokens.
SIZES = {"0.2M": (64, 2, 4), "1.2M": (128, 4, 4), "6.5M": (256, 6, 8), "113M": (768, 12, 12)}


def llama(vocab_size: int, size: str = "1.2M") -> LlamaForCausalLM:
    """Return a Llama with random weights and tied embeddings."""
    width, layers, heads = SIZES[size]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=1024,
            initializer_range=0.1,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
    )


def t5(vocab_size: int, size: str = "1.2M") -> T5ForConditionalGeneration:
    """Return a gated T5 with random weights; "1.2M" is that of recipes/gflowgr_office_t5.yaml (1.9 M parameters)."""
    width, layers, heads = SIZES[size]
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocab_size,
            d_model=width,
            d_kv=width // heads,
            d_ff=4 * width,
            num_layers=layers * 3 // 4,
            num_decoder_layers=layers * 3 // 4,
            num_heads=heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        )  # fmt: skip
    )
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter)
    return model


BACKBONES: dict[str, Callable[..., PreTrainedModel]] = {"llama": llama, "t5": t5}


# ---------------------------------------------------------------------------------------------------------- measuring
def interleaved(
    sides: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, progress: str = ""
) -> dict[str, dict[str, float]]:
    """Return the seconds (median of the rounds) and the peak memory of each side; sides alternate after a warm-up.

    The memory is the peak of the warm-up minus the memory in use at its start: on CUDA the memory that torch
    allocates, otherwise the resident memory of the process (Linux only, NaN elsewhere).
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, float] = {}
    for number in tqdm(range(rounds + 1), desc=progress, disable=not sys.stderr.isatty(), leave=False):
        for name, side in sides.items():
            before = reset_peak(device) if number == 0 else 0.0
            start = time.perf_counter()
            side()
            synchronize(device)
            if number == 0:
                peaks[name] = peak(device) - before
            else:
                times[name].append(time.perf_counter() - start)
    return {
        name: {"seconds": statistics.median(times[name]), "peak_memory": peaks[name], "rounds": rounds}
        for name in sides
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> float:
    """Reset the peak and return the bytes in use. On a CPU, freed memory is returned to the system first."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # returns memory of freed tensors to the system
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the resident memory
    except OSError:
        return float("nan")
    return _status("VmRSS")


def peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def peak_of(process: int) -> float:
    """Return the peak resident bytes of another process, without its children; NaN where they are not known."""
    return _status("VmHWM", process)


def in_own_process(*words: str) -> dict[str, Any]:
    """Start this script again with more words, and return the row that it prints last, as JSON."""
    command = [sys.executable, *sys.argv, *words]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(answer.splitlines()[-1])


def _status(field: str, process: int | str = "self") -> float:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), float("nan"))


# ---------------------------------------------------------------------------------------------------------- reporting
def arguments(description: str | None, rounds: int = 7) -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds after a warm-up; the median is reported")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser


def markdown(rows: list[dict[str, Any]], columns: Mapping[str, str]) -> str:
    """Return the rows as a Markdown table; `columns` maps headings to format strings over the fields of a row."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(text.format(**row) for text in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


def report(rows: list[dict[str, Any]], columns: Mapping[str, str], given: argparse.Namespace, **more: Any) -> None:
    """Print the table and write the JSON file of `--out`, if given."""
    print(f"\n{markdown(rows, columns)}")
    if given.out is None:
        return
    command = shlex.join(["python", *sys.argv])
    machine = environment()
    if given.device.type == "cuda":
        machine["machine"]["gpu"] = torch.cuda.get_device_name(given.device)
    content = {"command": command, "date": date.today().isoformat(), **machine, **more, "rows": rows}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
