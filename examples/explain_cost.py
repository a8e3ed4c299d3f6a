"""What ``slcompile.explain`` takes, against tracing the same model: ``python examples/explain_cost.py --layers 24``.

Tracing is what any compile of a training step begins with: Dynamo, and AOTAutograd's joint graph of forward and
backward, with Inductor's decompositions; of the dense model, and of the factorized one, whose graph is larger. All are
measured in turn, on a LLaMA whose weights take no memory.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from transformers import LlamaConfig, LlamaForCausalLM

import slcompile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28, help="28 layers are a captured graph of about 2,000 nodes")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
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


def measured(function: Callable[[], object]) -> float:
    """CPU seconds of this process, which other processes disturb less than the clock."""
    gc.collect()
    begin = time.process_time()
    function()
    return time.process_time() - begin


def trace(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """What a compile of the training step does before it generates code."""
    torch._dynamo.reset()

    def nothing(graph, inputs):
        return make_boxed_func(graph.forward)

    class Traced(Exception):  # ends the compile where the forward and the backward graph are there
        pass

    def partition(joint, inputs, **kwargs):
        min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **kwargs)
        raise Traced

    backend = aot_autograd(
        fw_compiler=nothing, bw_compiler=nothing, partition_fn=partition, decompositions=select_decomp_table()
    )
    try:
        torch.compile(model, backend=backend)(input_ids=ids)
    except Exception as error:
        if not isinstance(getattr(error, "inner_exception", error), Traced):
            raise


if __name__ == "__main__":
    main()
