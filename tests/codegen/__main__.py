"""Writes docs/codegen.md: what Inductor generates for an H100, what its kernels take, and estimated times.

    python -m tests.codegen

Needs Triton, no GPU; some minutes on one core.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from slcompile.ops.support import groups_per_row
from tests.codegen import estimate
from tests.codegen.estimate import H100, SIZES, Size
from tests.codegen.generate import Generated, generate
from tests.codegen.launches import Call, compiled_kernels, large_writes, launches
from tests.codegen.models import Layer

PAGE = Path(__file__).parents[2] / "docs" / "codegen.md"
TOKENS = (4096, 16384, 65536)
FEW = 16
MANY = TOKENS[1]
SUPPORTS = {"stratified": {"support": "stratified"}} | {
    f"vector {vector}": {"support": "vector", "vector": vector} for vector in (16, 64, 128)
}
"""Names and options of supports."""
FEW_OR_COMPOSED = [
    (lowering, support, tokens)
    for support in ("stratified", "vector 16")
    for lowering, tokens in (("composed", MANY), ("factored", FEW))
]
FACTORED, CHOSEN = (
    [(lowering, support, MANY) for support in SUPPORTS if support != "stratified"] for lowering in ("factored", "auto")
)
"""Lowering, support and tokens."""


@functools.cache
def generated(size: Size, tokens: int, lowering: str, dtype: str, support: str) -> list[Generated]:
    """The modules of a layer's training step; ``lowering`` may be ``"dense"``, ``dtype`` ``"autocast"``."""
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    with torch.device("meta"):
        model = Layer(size.hidden, size.inner, autocast=dtype == "autocast").to(kind)
    options: dict[str, Any] = {"rank": size.rank, "density": size.density, "lowering": lowering} | SUPPORTS[support]
    args = [((tokens, size.hidden), kind)]
    if lowering == "dense":
        return generate(model, args, {}, backend="inductor")
    return generate(model, args, options)


def calls_of(modules: list[Generated]) -> list[Call]:
    return [call for each in modules for call in launches(each)]


def trained(size: Size, dense: bool) -> int:
    """Parameters of a layer's linear layers."""
    shapes = [(size.hidden, size.hidden)] * 4 + [(size.inner, size.hidden)] * 2 + [(size.hidden, size.inner)]
    if dense:
        return sum(rows * columns for rows, columns in shapes)
    return sum(size.rank * (n + k) + n * groups_per_row(k, size.density) for n, k in shapes)


def ratio(size: Size, tokens: int, lowering: str = "composed", support: str = "stratified") -> float:
    """Estimated seconds of a step over those of a dense one."""
    ours, dense = (
        estimate.step(size, tokens, calls_of(generated(size, tokens, *each)), trained(size, each[0] == "dense"))
        for each in ((lowering, "bfloat16", support), ("dense", "bfloat16", "stratified"))
    )
    return ours / dense


def layer_rows() -> Iterator[str]:
    """What a layer's forward and backward call."""
    cases = [("dense", "", MANY), *FEW_OR_COMPOSED, *FACTORED, *CHOSEN]
    for name, size in SIZES.items():
        for dtype in ("bfloat16", "autocast"):
            written = 0
            for lowering, support, tokens in cases:
                if support.startswith("vector") and dtype == "autocast":
                    continue
                calls = calls_of(generated(size, tokens, lowering, dtype, support or "stratified"))
                ours = sum(each.ours for each in calls)
                products = sum(each.name.startswith("extern") for each in calls)
                large = large_writes(calls, tokens * size.hidden)
                written = large if lowering == "dense" else written
                copies = "" if tokens == FEW else str(large - written)
                times = [1e6 * sum(map(each, calls)) for each in (estimate.seconds, estimate.roofline)]
                rest = len(calls) - ours - products
                counts = f"{products} | {ours} | {rest} | {copies}"
                estimated = f"{times[0]:.0f} | {times[1]:.0f}"
                yield f"| {name} | {lowering} | {support} | {dtype} | {tokens} | {counts} | {estimated} |"


def kernel_rows() -> Iterator[str]:
    """What our kernels take as Inductor compiles them."""
    for name, size in SIZES.items():
        for lowering, support, tokens in [*FEW_OR_COMPOSED, *FACTORED]:
            found: dict[str, list[Any]] = {}
            others: list[Any] = []
            with tempfile.TemporaryDirectory() as folder:
                for index, each in enumerate(generated(size, tokens, lowering, "bfloat16", support)):
                    place = Path(folder, str(index))
                    place.mkdir()
                    for kernel, ours, usage, _ in compiled_kernels(each, place):
                        kind = kernel.rsplit("_kernel", 1)[0]
                        (found.setdefault(kind, []) if ours else others).append(usage)
            for kind, usages in [*found.items(), ("Inductor's own", others)]:
                registers, spilled, shared = (
                    max(getattr(each, field) for each in usages) for field in ("registers", "spilled", "shared")
                )
                matrix = "yes" if any(each.has_mma for each in usages) else "no"
                taken = f"{kind} | {registers} | {spilled} | {shared} | {matrix}"
                yield f"| {name} | {lowering} | {support} | {tokens} | {taken} |"


def step_rows() -> Iterator[str]:
    """Estimated steps over dense ones."""
    for name, size in SIZES.items():
        for lowering, support, _ in (("composed", "stratified", MANY), *CHOSEN):
            ratios = " | ".join(f"{ratio(size, tokens, lowering, support):.2f}" for tokens in TOKENS)
            yield f"| {name} | {lowering} | {support} | {ratios} |"


def main() -> None:
    """Writes the page."""
    logging.getLogger("slcompile").setLevel(logging.ERROR)
    steps, layers, kernels = ("\n".join(rows()) for rows in (step_rows, layer_rows, kernel_rows))
    numbers = " | ".join(f"{tokens // 1024}k" for tokens in TOKENS)
    PAGE.write_text(f"""# What is generated for a GPU

Inductor's code for an H100, generated on a machine without a GPU, with torch {torch.__version__} and
Triton {triton.__version__}:

```bash
python -m tests.codegen
```

**Every time on this page is estimated, none was measured.** Times follow from the shapes of what the generated code
calls, at the rates of `slcompile/cost/devices.py` (`sm_90`), by the rules in `tests/codegen/estimate.py`. Aligned
matrices may be off by 5 %, odd widths by 20 %. Registers, spills and shared memory are ptxas's own figures for sm_90.

## A training step ÷ dense (estimated)

bfloat16 parameters, fused AdamW, head and embedding dense; tokens of one microbatch. `auto` composes or factors each
product, as the cost model predicts it.

| | lowering | support | {numbers} |
|---|---|---|{"---|" * len(TOKENS)}
{steps}

The paper's 1B has the odd width 5461. A dense weight of that width is read with rows that begin anywhere; a composed
one is written with aligned rows, which is why it is estimated to be faster there. At even widths composing costs time.

Factored with the vector support, no weight is composed and no dense gradient made: products are those of the rank, and
S is multiplied on matrix units with columns that are gathered from a transposed copy of the input, which takes the
input's place where an activation function or a norm makes it: it alone is written (`read_transposed`). With 64 rows a
block that pays for nearly every product; with 16, four times as much is gathered, and for gradients it seldom does. Our
own products are taken to reach {H100.rates.own} of the vendor's rate, and gathers {H100.rates.gathers / 1e12:.0f} TB/s.

## A layer, forward and backward

Calls of the vendor's products, of our kernels, of Inductor's own; `copies` are matrices of all tokens that are written
and that the dense layer does not write. Times are estimated µs, and the least that the vendor's peak figures allow.

| | lowering | support | dtype | tokens | products | ours | Inductor's | copies | estimated µs | roofline µs |
|---|---|---|---|---|---|---|---|---|---|---|
{layers}

## Kernels

The most of any kernel of that name, as ptxas compiles what Inductor generates.

| | lowering | support | tokens | kernel | registers | spilled B | shared B | matrix instructions |
|---|---|---|---|---|---|---|---|---|
{kernels}
""")


if __name__ == "__main__":
    main()
