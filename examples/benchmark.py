"""Times slcompile against dense training, side by side in one run: interleaved runs, medians and their ratios.

    python examples/benchmark.py
    python examples/benchmark.py --only train decode --dtype bfloat16 --device cuda --hidden 2048 --intermediate 5461

``train`` and ``decode`` are ``slcompile.bench`` on a LLaMA and on the linear layers of a block; ``slcompile bench``
does the same with a model of yours. ``first`` is the LLaMA's first training step with empty caches, in a process of its
own. Needs ``pip install "slcompile[examples]"``. Some ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import copy
import functools
import multiprocessing
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from flags import option, whole
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import slcompile
from slcompile import torch_private
from slcompile.benchmark import interleaved
from slcompile.cli.bench import show as show_report
from slcompile.config import SAVES, SUPPORTS, VECTOR
from slcompile.measure import seconds_of
from slcompile.ops import compose, linear_factored, project, values_grad
from slcompile.ops.support import groups_per_row

PARTS = ("train", "decode", "matmul", "sparse", "first")
STARTS = ("dense", "factorized", "string")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

console = Console(highlight=False, width=120 if not sys.stdout.isatty() else None)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags, and refuses bad ones before any work is done."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of weights and activations")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--hidden", type=whole(1), default=512, help="width of the LLaMA that is trained")
    parser.add_argument("--intermediate", type=whole(1), default=1376, help="width of its MLP")
    parser.add_argument("--layers", type=whole(1), default=4, help="its layers")
    parser.add_argument("--vocab", type=whole(1), default=8000, help="its vocabulary")
    parser.add_argument("--batch", type=whole(1), default=8, help="sequences a step")
    parser.add_argument("--seq-len", type=whole(2), default=256, help="tokens a sequence")
    parser.add_argument("--rank", type=option("rank"), default=128, help="of its factors")
    parser.add_argument("--density", type=option("density"), default=0.03, help="share of non-zeros")
    parser.add_argument("--support", choices=SUPPORTS, default=SUPPORTS[0], help="of the non-zeros")
    parser.add_argument(
        "--vector", type=option("vector"), default=VECTOR, help="rows that share their columns; of --support vector"
    )
    parser.add_argument(
        "--save", choices=SAVES, default=SAVES[0], help="what the backward pass gets of factored matmuls"
    )
    parser.add_argument(
        "--lowering", choices=["auto", "composed", "factored"], default="auto", help="of the train step"
    )
    parser.add_argument("--runs", type=int, default=15, help="timed runs of each variant")
    args = parser.parse_args(argv)
    if args.runs < 3:
        parser.error(f"--runs must be at least 3, got {args.runs}")
    if args.hidden % 64:
        parser.error(f"--hidden must be a multiple of 64, the size of a head, got {args.hidden}")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device must be cpu here, got {args.device}")
    return args


def medians(variants: Mapping[str, Callable[[], object]], runs: int, device: str) -> dict[str, float]:
    """Median milliseconds of each variant."""
    return {name: 1e3 * statistics.median(each) for name, each in interleaved(variants, runs, device).items()}


def show(title: str, rows: Mapping[str, Mapping[str, float]], unit: str, base: str) -> None:
    """A table of medians and their ratios to the variant ``base``."""
    variants = list(next(iter(rows.values())))
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in variants:
        table.add_column(f"{name} ({unit})", justify="right")
    for name in variants:
        if name != base:
            table.add_column(f"{name} ÷ {base}", justify="right")
    for label, each in rows.items():
        numbers = [f"{each[name]:.4g}" for name in variants]
        ratios = [f"{each[name] / each[base]:.2f}" for name in variants if name != base]
        table.add_row(label, *numbers, *ratios)
    console.print(table)


def make_model(args: argparse.Namespace, dtype: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        vocab_size=args.vocab,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(args.device, DTYPES[dtype])


def config_of(args: argparse.Namespace, **fields: Any) -> slcompile.SLConfig:
    given = {"rank": args.rank, "density": args.density, "save": args.save}
    return slcompile.SLConfig(**{**support_of(args), **given, **fields})


def support_of(args: argparse.Namespace) -> dict[str, Any]:
    return {"support": args.support, **({"vector": args.vector} if args.support == "vector" else {})}


def train(args: argparse.Namespace) -> None:
    """A whole step: forward, backward and a fused AdamW; how long it takes, its memory and its compile time."""
    ids = torch.randint(args.vocab, (args.batch, args.seq_len), device=args.device)
    shape = f"{args.layers} layers of {args.hidden}/{args.intermediate}, batch {args.batch}x{args.seq_len}"
    lowerings = (args.lowering, "composed", "eager") if args.lowering == "auto" else (args.lowering, "eager")
    for dtype in args.dtype:
        console.print(f"Train step, {dtype} (LLaMA, {shape}, rank {args.rank}, density {args.density})")
        batch = {"input_ids": ids, "labels": ids}
        model = make_model(args, dtype)
        show_report(slcompile.bench(model, kwargs=batch, config=config_of(args), lowerings=lowerings, runs=args.runs))


def decode(args: argparse.Namespace) -> None:
    """One token through the linear layers of a block of the paper's 1B model: memory-bound."""
    config = slcompile.SLConfig(rank=512, density=0.03, **support_of(args))
    graphs = {"triton.cudagraphs": True} if args.device != "cpu" else {}
    for dtype in args.dtype:
        torch.manual_seed(0)
        shapes = [(2048, 2048)] * 4 + [(2048, 5461)] * 2 + [(5461, 2048)]
        dense = Stack([nn.Linear(*shape, bias=False) for shape in shapes]).to(args.device, DTYPES[dtype])
        x = torch.randn(1, 2048)
        console.print(f"Decode, {dtype} (1 token, q k v o gate up down of 2048/5461, rank 512, density 0.03)")
        lowerings = ("auto", "composed")
        show_report(
            slcompile.bench(
                dense, x, config=config, lowerings=lowerings, mode="inference", runs=3 * args.runs, inductor=graphs
            )
        )


class Stack(nn.Module):
    """The linear layers of a LLaMA block, without what lies between."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = layers

    def forward(self, x: Tensor) -> Tensor:
        x = self.o(self.q(x) * self.k(x) + self.v(x))
        return self.down(self.gate(x) * self.up(x))


def matmul(args: argparse.Namespace) -> None:
    """One product with a weight of the trained model, forward only, by lowering and number of tokens."""
    rows = {}
    for dtype in args.dtype:
        for rows_, columns in ((args.hidden, args.hidden), (args.intermediate, args.hidden)):
            linear = nn.Linear(columns, rows_, bias=False, device=args.device, dtype=DTYPES[dtype])
            factorized = slcompile.factorize_(nn.Sequential(linear), config_of(args))
            dense = copy.deepcopy(factorized)
            slcompile.merge_(dense)
            for tokens in (1, 16, 256, 2048, 8192):
                x = torch.randn(tokens, columns, device=args.device, dtype=DTYPES[dtype])
                runs = products_of(args.device)(dense, factorized, x)
                check(runs, dtype)
                label = f"{dtype} {rows_}x{columns}, {tokens} tokens"
                rows[label] = medians(runs, args.runs, args.device)
                torch._dynamo.reset()
    how = "eager" if args.device == "cpu" else "compiled"
    show(f"One matmul, forward, {how} (rank {args.rank}, density {args.density})", rows, "ms", "dense")


Runs = Mapping[str, Callable[[], Tensor]]


def products_of(device: str) -> Callable[[nn.Module, nn.Module, Tensor], Runs]:
    """What is timed on a device. On CPUs the ops are what compiled code calls; on GPUs it launches kernels instead."""
    return eager_products if device == "cpu" else compiled_products


def eager_products(dense: nn.Module, factorized: nn.Module, x: Tensor) -> Runs:
    """The ops that compiled code calls on CPUs."""
    (weight,) = (each for each in factorized.modules() if isinstance(each, slcompile.SLWeight))
    B, A, values, support = (each.detach() for each in weight.operands().values())
    matrix, scale = dense[0].weight.detach(), weight.scale
    return {
        "dense": lambda: x @ matrix.t(),
        "composed": lambda: x @ compose(B, A, values, support, *weight.op_args()).t(),
        "factored": lambda: linear_factored(
            x, project(x, [A], [scale]), [B], [values], [support], [None], False, weight.vector
        )[0],
    }


def compiled_products(dense: nn.Module, factorized: nn.Module, x: Tensor) -> Runs:
    """Compiled code; more tokens than the kernels are for are composed, whatever was asked for."""

    def without_gradients(run: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: run(x))

    lowered = {
        name: torch.compile(factorized, backend="sltrain", options={"lowering": name}, dynamic=False)
        for name in ("composed", "factored")
    }
    runs = {"dense": torch.compile(dense, dynamic=False), **lowered}
    return {name: without_gradients(run) for name, run in runs.items()}


def sparse(args: argparse.Namespace) -> None:
    """What S takes of a step, in the three products with one weight: where rows share their columns, and where not."""
    rows = {}
    tokens, rows_, columns = args.batch * args.seq_len, args.intermediate, args.hidden
    for dtype in args.dtype:
        groups = groups_per_row(columns, args.density)
        x, g, values, hidden, B, A = (
            torch.randn(shape, device=args.device).to(DTYPES[dtype])
            for shape in ((tokens, columns), (tokens, rows_), (rows_, groups), (tokens, 1), (rows_, 1), (1, columns))
        )
        seed = torch.tensor([1], device=args.device)

        def step(vector: int, x=x, g=g, values=values, hidden=hidden, B=B, A=A, seed=seed) -> None:
            linear_factored(x, [hidden], [B], [values], [seed], [None], False, vector)
            linear_factored(g, [hidden], [A], [values], [seed], [None], True, vector)
            values_grad(g, x, values, seed, vector)

        runs = {f"vector {each}": functools.partial(step, each) for each in (args.vector, 64)}
        rows[dtype] = medians({"stratified": functools.partial(step, 1), **runs}, args.runs, args.device)
    show(f"S in a step: S x, S^T g, gradient of values ({rows_}x{columns}, {tokens} tokens)", rows, "ms", "stratified")


def first(args: argparse.Namespace) -> None:
    """The first step: of the dense model, of one that is factorized before, and of one that the string converts."""
    rows = {}
    for dtype in args.dtype:
        rows[dtype] = {}
        for start in STARTS:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                rows[dtype][start] = process.submit(first_step, args, dtype, start).result()
    show("First training step, empty caches, one run each in a process of its own", rows, "s", "dense")


def first_step(args: argparse.Namespace, dtype: str, start: str) -> float:
    """Seconds of the first step, and by how many the second is longer than a third: the string traces twice."""
    torch.compile(nn.Linear(8, 8))(torch.ones(4, 8)).sum().backward()  # loads the compiler
    model, config = make_model(args, dtype), config_of(args)
    if start == "factorized":
        slcompile.factorize_(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    backend = {"dense": {"backend": "inductor"}, "factorized": {"backend": "sltrain"}}
    compiled = torch.compile(model, **backend.get(start, {"backend": "sltrain", "options": config.to_options()}))
    ids = torch.randint(args.vocab, (args.batch, args.seq_len), device=args.device)

    def step() -> None:
        compiled(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch_private.fresh_cache():
        first, second, third = (seconds_of(step, torch.device(args.device)) for _ in range(3))
    return first + max(0.0, second - third)


def check(runs: Runs, dtype: str) -> None:
    """A variant that computes something else is not timed."""
    results = {name: run() for name, run in runs.items()}
    limit = 8 * torch.finfo(DTYPES[dtype]).eps * float(results["dense"].float().norm())
    for name, result in results.items():
        if not float((result.float() - results["dense"].float()).norm()) <= limit:
            raise RuntimeError(f"{name} does not compute the product")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.cuda.get_device_name() if args.device != "cpu" else f"{platform.machine()} CPU"
    threads = f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""
    console.print(f"{device}{threads}, torch {torch.__version__}, slcompile {slcompile.__version__}\n")
    parts = {"train": train, "decode": decode, "matmul": matmul, "sparse": sparse, "first": first}
    for name in args.only:
        parts[name](args)
        console.print()


if __name__ == "__main__":
    main()
