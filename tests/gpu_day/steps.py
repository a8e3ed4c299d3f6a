"""Train steps and decoding at the paper's widths, a few layers, with the peak memory beside the estimator's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import slcompile
from tests.codegen.estimate import Size
from tests.codegen.models import Layer

HEAD = 128
"""Width of an attention head."""

VOCABULARY = 2048
"""Small, so that the step is that of the layers."""

LENGTH = 2048
"""Tokens of a sequence."""


def llama(size: Size, layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Returns a LLaMA of these widths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=layers,
        num_attention_heads=max(1, size.hidden // HEAD),
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device, dtype)


def config_of(size: Size, support: str, **fields: Any) -> slcompile.SLConfig:
    """Returns the options of these weights."""
    return slcompile.SLConfig(rank=size.rank, density=size.density, support=support, seed=0, **fields)


def train(
    device: torch.device,
    size: Size,
    layers: int,
    tokens: int,
    dtype: torch.dtype,
    runs: int,
    inductor: dict[str, Any],
) -> list[dict[str, Any]]:
    """Measures a train step: dense, composed, factored, and with the vector support by the cost model's choice.

    Returns:
        A row for each: seconds, the share of the dense step that was measured in the same call, compile time, bytes at
        the peak and what ``estimate_memory`` said of it.
    """
    length = min(tokens, LENGTH)
    ids = torch.randint(VOCABULARY, (tokens // length, length), device=device)
    batch = {"input_ids": ids, "labels": ids}
    rows = []
    for support, fields, lowerings in (
        ("stratified", {}, ("composed", "factored")),
        ("vector", {}, ("auto",)),
        ("vector 64", {"vector": 64}, ("auto", "factored")),
    ):
        model = llama(size, layers, device, dtype)
        config = config_of(size, support.split()[0], **fields)
        report = slcompile.bench(model, kwargs=batch, config=config, lowerings=lowerings, runs=runs, inductor=inductor)
        estimates: dict[str, int] = {}
        for lowering in lowerings:
            asked = config_of(size, support.split()[0], lowering=lowering, **fields)
            estimate = slcompile.estimate_memory(model, kwargs=batch, config=asked, device=_kind(device))
            estimates |= {"dense": estimate.dense.peak, f"sltrain {lowering}": estimate.peak}
        dense = report.variants["dense"].seconds
        for name, each in report.variants.items():
            rows.append(
                {
                    "variant": name,
                    "support": "" if name == "dense" else support,
                    "seconds": each.seconds,
                    "of_dense": each.seconds / dense,
                    "tokens_per_second": each.tokens_per_second,
                    "compile_seconds": each.compile_seconds,
                    "peak": each.peak,
                    "estimated_peak": estimates[name],
                }
            )
        _free(device)
    return rows


def decode(
    device: torch.device,
    size: Size,
    layers: int,
    tokens: Sequence[int],
    dtype: torch.dtype,
    runs: int,
    inductor: dict[str, Any],
) -> list[dict[str, Any]]:
    """Measures the linear layers of a decoding step, under CUDA graphs on a GPU."""
    graphs = {**inductor, **({"triton.cudagraphs": True} if device.type == "cuda" else {})}
    rows = []
    for count in tokens:
        for support in ("stratified", "vector"):
            torch.manual_seed(0)
            model = nn.Sequential(*(Layer(size.hidden, size.inner) for _ in range(layers))).to(device, dtype)
            x = torch.randn(count, size.hidden)
            report = slcompile.bench(
                model,
                x,
                config=config_of(size, support),
                lowerings=("factored", "composed"),
                mode="inference",
                runs=runs,
                inductor=graphs,
            )
            dense = report.variants["dense"].seconds
            for name, each in report.variants.items():
                described = {"variant": name, "support": "" if name == "dense" else support, "tokens": count}
                rows.append({**described, "seconds": each.seconds, "of_dense": each.seconds / dense})
            _free(device)
    return rows


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "cuda"


def _free(device: torch.device) -> None:
    """Forgets what was compiled, whose constants and graphs hold memory."""
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
