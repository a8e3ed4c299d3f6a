"""What torchrun starts for ``test_killed.py``: the distributed example, one process of which is killed or hangs.

``killed.py POINT FOLDER ...`` runs the example with what follows as its arguments, in double precision and eager mode,
and writes the losses of each process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from slcompile.convert import transaction

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import pretrain_distributed as example

STEP = 5
"""In which something happens; or in the first checkpoint at its end or later."""


def kill(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def after(owner: Any, name: str, then: Callable[[], None], calls: int = 1) -> None:
    """Lets a function do something after so many of its calls."""
    function, left = getattr(owner, name), [calls]

    def called(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            then()
        return result

    setattr(owner, name, called)


def in_backward(then: Callable[[], None]) -> None:
    """Lets something happen when a layer's gradients of ``STEP`` were reduced, and other layers' were not."""
    sharded = example.sharded

    def hooked(*args: Any, **kwargs: Any) -> torch.nn.Module:
        model, passes = sharded(*args, **kwargs), []

        def reduced(_: torch.Tensor) -> None:
            passes.append(None)
            if len(passes) == STEP:
                then()

        model.layers[-1].up.weight_sl.B.register_post_accumulate_grad_hook(reduced)
        return model

    example.sharded = hooked


def hang() -> None:
    if dist.get_rank() == 1:
        time.sleep(45)


POINTS: dict[str, Callable[[], None]] = {
    "never": lambda: None,
    "conversion": lambda: after(transaction, "put_in_place", lambda: kill(1), calls=3),  # of 8 weights
    "step": lambda: in_backward(lambda: kill(1)),
    "save": lambda: after(FileSystemWriter, "write_data", lambda: kill(1), calls=2),  # the second checkpoint's
    "move": lambda: after(example.dcp, "save", lambda: kill(0), calls=2),  # whole, and not in its place
    "remove": lambda: after(Path, "rename", lambda: kill(0), calls=4),  # each save renames two: DCP's file, and ours
    "hang": lambda: in_backward(hang),
    "hang at the start": lambda: after(transaction, "put_in_place", hang, calls=3),
}


def main() -> None:
    _, point, folder, *arguments = sys.argv
    sys.argv[1:] = [*arguments, "--out", folder]
    torch.set_default_dtype(torch.float64)
    torch.compiler.set_stance("force_eager")  # what is compiled is not what this is about
    POINTS[point]()
    losses = example.main()
    Path(folder, f"losses{os.environ['RANK']}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
