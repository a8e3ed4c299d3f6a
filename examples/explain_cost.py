"""What ``slcompile.explain`` takes, against tracing the same model: ``python examples/explain_cost.py``.

Tracing is what any compile of a training step does before it generates code: Dynamo with its guards, AOTAutograd's
joint graph of forward and backward with Inductor's decompositions, and the partition into two graphs. It is measured on
the dense model and on the factorized one, whose graph is larger; all in turn, in CPU seconds, on a LLaMA whose weights
take no memory. ``--model 7b`` explains LLaMA 7B once.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import resource
import statistics
import time
from collections.abc import Callable

import torch
from flags import whole
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from transformers import LlamaConfig, LlamaForCausalLM

import slcompile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=whole(1), default=28, help="28 layers are a captured graph of about 2,000 nodes"
    )
    parser.add_argument("--rounds", type=whole(1), default=5)
    parser.add_argument("--model", choices=["7b"], help="explain it once: clock and memory")
    args = parser.parse_args()
    if args.model:
        explain_7b()
        return
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=args.layers, use_cache=False, **sizes)).train()
        ids = torch.zeros(1, 128, dtype=torch.long)

    def explain() -> int:
        return len(slcompile.explain(model, kwargs={"input_ids": ids}).graphs[0].before)

    factorized = slcompile.factorize_(copy.deepcopy(model))
    kinds = {"dense": lambda: trace(model, ids), "factorized": lambda: trace(factorized, ids), "explain": explain}
    nodes = 0
    for kind in kinds.values():  # once before: imports and caches
        nodes = kind() or nodes
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(args.rounds):
        for name, kind in kinds.items():
            seconds[name].append(measured(kind))
    print(f"{nodes} captured nodes, CPU seconds, median of {args.rounds}")
    for name, each in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(each, seconds["explain"], strict=True))
        print(f"  {name:<12}{statistics.median(each):8.2f}   explain takes {ratio:.2f} times as long")


def explain_7b() -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32, use_cache=False, **sizes)).train()
        ids = torch.zeros(1, 256, dtype=torch.long)
    begin = time.perf_counter()
    found = slcompile.explain(model, kwargs={"input_ids": ids}, config=slcompile.SLConfig(rank=1024, density=0.05))
    print(f"{time.perf_counter() - begin:.1f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB RSS")
    print(found)


def measured(function: Callable[[], object]) -> float:
    """CPU seconds of this process, which other processes disturb less than the clock."""
    gc.collect()
    begin = time.process_time()
    function()
    return time.process_time() - begin


def trace(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """What a compile of the training step does before it generates code."""
    torch._dynamo.reset()

    class Traced(Exception):  # ends the first call where the compiled graph would run
        pass

    def stop(*_):
        raise Traced

    def nothing(graph, inputs):
        return make_boxed_func(stop)

    backend = aot_autograd(
        fw_compiler=nothing,
        bw_compiler=nothing,
        partition_fn=functools.partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )
    with contextlib.suppress(Traced):
        torch.compile(model, backend=backend)(input_ids=ids)


if __name__ == "__main__":
    main()
