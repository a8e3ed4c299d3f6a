"""What a compact ONNX file costs beside one with merged weights: bytes, seconds to load, milliseconds of a run.

Both files hold the same small LLaMA and are measured in one process, in turn, in onnxruntime on the CPU:

    python examples/onnx_figures.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from flags import whole
from transformers import LlamaConfig, LlamaForCausalLM

import slcompile

HEADS = 8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=whole(64), default=512, help="make the model so wide (default: 512)")
    parser.add_argument("--layers", type=whole(1), default=4, help="give it so many layers (default: 4)")
    parser.add_argument("--tokens", type=whole(1), default=64, help="run it on so many tokens (default: 64)")
    parser.add_argument("--repeats", type=whole(1), default=9, help="take the median of so many runs (default: 9)")
    args = parser.parse_args()
    if args.hidden % HEADS:
        parser.error(f"--hidden must be a multiple of {HEADS}, the heads, got {args.hidden}")
    return args


def load(file: Path) -> tuple[float, onnxruntime.InferenceSession]:
    """Seconds to load a file, and its session."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: at 2 it reports each constant that it does not fold
    begin = time.perf_counter()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return time.perf_counter() - begin, session


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=HEADS,
        vocab_size=4096,
    )
    model = slcompile.factorize_(LlamaForCausalLM(config))
    inputs = {"input_ids": torch.arange(args.tokens)[None] % 4096, "use_cache": False}
    feeds = {"input_ids": inputs["input_ids"].numpy()}
    with tempfile.TemporaryDirectory() as directory:
        files = {name: Path(directory, name, "model.onnx") for name in ("merged", "compact")}
        for name, file in files.items():
            file.parent.mkdir()
            slcompile.export_onnx(model, (), file, kwargs=inputs, compact=name == "compact")
        loaded = {name: load(file) for name, file in files.items()}
        seconds: dict[str, list[float]] = {name: [] for name in files}
        for _ in range(args.repeats + 1):
            for name, (_, session) in loaded.items():
                begin = time.perf_counter()
                session.run(None, feeds)
                seconds[name].append(time.perf_counter() - begin)
        print(f"{'':8}{'MB':>10}{'load (s)':>10}{'run (ms)':>10}")
        for name, file in files.items():
            size = sum(each.stat().st_size for each in file.parent.iterdir())
            run = statistics.median(seconds[name][1:])  # the first run allocates
            print(f"{name:8}{size / 1e6:>10.1f}{loaded[name][0]:>10.2f}{run * 1e3:>10.2f}")


if __name__ == "__main__":
    main()
