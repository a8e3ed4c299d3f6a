"""Non-zeros that move: which, to where, what starts again, what stays, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slcompile
from slcompile.optim import SupportMoves
from slcompile.optim.support_moves import best_moves
from slcompile.torch_private import Watching, memory_of
from slcompile.weight.sl_weight import SLWeight
from tests.conftest import CountingBackend
from tests.testing import some_of

CONFIG: dict[str, Any] = {"rank": 4, "density": 0.0625, "support": "largest", "init": "spectral", "seed": 0}


def factorized(model: nn.Module, **options: Any) -> nn.Module:
    return slcompile.factorize_(model, slcompile.SLConfig(**{**CONFIG, **options}))


def weights(model: nn.Module) -> dict[str, SLWeight]:
    return {name: each for name, each in model.named_modules() if isinstance(each, SLWeight)}


def trained(model: nn.Module, steps: int = 3) -> torch.optim.Optimizer:
    """An optimizer with moments, after some steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(torch.randn(16, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.slow
class TestATeacherWhoseSparsePartIsElsewhere:
    """A student that was fitted to a low-rank part plus one sparse one, and learns the same plus another."""

    STEPS = 160

    def sparse(self) -> Tensor:
        columns = torch.randint(16, (32, 4)) + torch.arange(4) * 16
        return torch.zeros(32, 64).scatter(1, columns, torch.randn(32, 4))

    def run(
        self, seed: int, fraction: float | None, steps: range | None = None, state: Any = None
    ) -> tuple[float, Any]:
        torch.manual_seed(seed)
        low_rank = torch.randn(32, 4) @ torch.randn(4, 64) / 8
        teacher, start = low_rank + self.sparse(), low_rank + self.sparse()
        model = nn.Sequential(nn.Linear(64, 32, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(start)
        factorized(model, min_dim=16)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
        moves = SupportMoves(model, optimizer, every=20, fraction=fraction or 1, until=120)
        parts = (model, optimizer, moves)
        if state is not None:
            for part, saved in zip(parts, state, strict=True):
                part.load_state_dict(saved)
        loss = torch.tensor(0.0)
        for step in steps or range(self.STEPS):
            x = torch.randn(128, 64, generator=torch.Generator().manual_seed(step))

            def error(x: Tensor = x) -> Tensor:
                return (model(x) - x @ teacher.t()).square().mean()

            loss = error()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if fraction is not None:
                moves.step(error)
        return loss.item(), [copy.deepcopy(part.state_dict()) for part in parts]

    @pytest.mark.parametrize("seed", some_of(range(3), [0]))
    def test_it_is_found(self, seed):
        fixed, moving = self.run(seed, None)[0], self.run(seed, 0.4)[0]
        assert moving < 0.2 * fixed

    def test_training_goes_on_from_a_checkpoint_to_the_bit(self):
        _, whole = self.run(0, 0.4, range(70))
        _, half = self.run(0, 0.4, range(35))
        assert 0 < half[2]["moved"] < whole[2]["moved"]
        _, again = self.run(0, 0.4, range(35, 70), half)
        assert all(torch.equal(each, again[0][name]) for name, each in whole[0].items())
        assert whole[2] == again[2]
        for position, held in whole[1]["state"].items():
            assert all(torch.equal(each, again[1]["state"][position][key]) for key, each in held.items())


class Tied(nn.Module):
    """A weight that is read twice, once of them turned; one in a checkpoint; one that the loss does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.inner, self.unread = (nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.twice(x)) @ self.twice.weight
        return checkpoint(lambda each: torch.tanh(self.inner(each)), hidden, use_reentrant=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_moves_are_those_of_the_dense_gradient_by_looking_at_each_entry(dtype):
    model, x = factorized(Tied()), torch.randn(24, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = {name: each.offsets.clone() for name, each in weights(model).items()}

    dense = {name: each().detach().requires_grad_() for name, each in weights(model).items()}
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        twice, inner = dense["twice.weight_sl"], dense["inner.weight_sl"]
        torch.tanh(F.linear(torch.tanh(F.linear(x, twice)) @ twice, inner)).square().mean().backward()
    wanted = {}
    for name, weight in weights(model).items():
        if dense[name].grad is None:
            continue
        sizes, values = dense[name].grad.abs(), weight.values.detach().abs().view(64, 4)
        merits = []
        for row in range(64):
            for group in range(4):
                own, inside = int(weight.offsets[4 * row + group]), sizes[row, 16 * group : 16 * group + 16].tolist()
                best = max((each for each in range(16) if each != own), key=inside.__getitem__)
                if inside[best] > inside[own]:
                    merits.append((inside[best] / float(values[row, group]), 4 * row + group, best))
        wanted[name] = {(place, best) for _, place, best in sorted(merits)[-round(0.2 * 256) :]}

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model(x).square().mean()

    moved = SupportMoves(model, optimizer, every=1, fraction=0.2).step(loss)
    assert moved == sum(map(len, wanted.values())) == 2 * 51
    for name, weight in weights(model).items():
        places = (weight.offsets != before[name]).nonzero().flatten().tolist()
        found = {(place, int(weight.offsets[place])) for place in places}
        if dtype == torch.float32:
            assert found == wanted.get(name, set()), name
        else:  # gradients in 8 bits are equal or in another order where they are near
            assert len(found & wanted.get(name, set())) >= 0.9 * len(found), name
        weight.check_support()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_composed_weights_nor_their_gradients_are_kept(dtype):
    model = factorized(nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4))))
    x, made, alive = torch.randn(8, 64), [], []

    def see(name: str, args: Any, result: Any) -> None:
        if name in ("compose", "_to_copy") and result.shape == (64, 64):
            made.append(memory_of(result))
        if name == "compose_backward":
            made.append(memory_of(args[0]))
            alive.append(sum(not each.expired() for each in made))

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False):
            result = model(x).square().mean()
        alive.append(sum(not each.expired() for each in made))
        return result

    before = [each.grad for each in model.parameters()]
    with Watching(see):
        assert SupportMoves(model, torch.optim.SGD(model.parameters()), every=1).step(loss)
    assert len(made) >= 8
    assert alive[0] == 0
    assert max(alive) <= 3  # a weight and the gradient of one, and a cast
    assert [each.grad for each in model.parameters()] == before == [None] * len(before)


def test_a_stack_of_matrices_and_groups_of_many_columns(block_class):
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 600, 48))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.up.mT)

    model, x = Experts(), torch.randn(3, 5, 48)
    slcompile.factorize_(model, slcompile.SLConfig(**CONFIG), example_args=(x,))
    weight, gradient = model.up_sl, torch.randn(3, 600, 48)
    move = best_moves(weight, gradient, 0.5)
    assert len(move.which) == len(weight.values) // 2
    index = weight.index.clone()
    weight.move(move.which, move.offsets)
    assert bool((weight.index[1:] > weight.index[:-1]).all())
    sizes = gradient.flatten().abs()
    assert bool((sizes[weight.index[move.which].long()] > sizes[index[move.which].long()]).all())

    wide = factorized(nn.Sequential(nn.Linear(600, 32, bias=False)), density=1 / 600)[0].weight_sl
    assert wide.offsets.dtype == torch.uint16
    move = best_moves(wide, torch.randn(32, 600), 1.0)
    wide.move(move.which, move.offsets)
    wide.check_support()
    assert int(wide.index[move.which].max()) > 256


def test_what_moved_starts_again_and_all_else_stays(block):
    factorized(block)
    optimizer = trained(block)
    block(torch.randn(16, 64)).square().mean().backward()  # gradients that a step would use
    states = copy.deepcopy(optimizer.state_dict()["state"])
    before = {name: each.detach().clone() for name, each in [*block.named_parameters(), *block.named_buffers()]}
    grads = {name: each.grad.clone() for name, each in block.named_parameters() if each.grad is not None}
    moves = SupportMoves(block, optimizer, every=1, fraction=0.1)
    assert moves.step(lambda: block(torch.randn(16, 64)).square().mean()) == moves.moved > 0

    names = [name for name, _ in block.named_parameters()]
    after = optimizer.state_dict()["state"]
    count = 0
    for position, name in enumerate(names):
        parameter = block.get_parameter(name)
        kept = torch.ones_like(parameter, dtype=torch.bool)
        if name.endswith("values"):
            offsets = name.removesuffix("values") + "offsets"
            kept = block.get_buffer(offsets) == before[offsets]
            assert 0 < int((~kept).sum()) == round(0.1 * kept.numel())
            count += int((~kept).sum())
        pairs = [(parameter, before[name])]
        if name in grads:
            pairs.append((parameter.grad, grads[name]))
        pairs += [(after[position][key], states[position][key]) for key in ("exp_avg", "exp_avg_sq")]
        for now, then in pairs:
            assert torch.equal(now[kept], then[kept]), name
            assert not now[~kept].any(), name
            assert bool(then[~kept].any()) == bool((~kept).any())
        assert after[position]["step"] == states[position]["step"]
    assert count == moves.moved


@pytest.mark.slow
@pytest.mark.usefixtures("aten_kernels")
@pytest.mark.parametrize("lowering", some_of(["composed", "factored"], ["factored"]))
def test_compiled_graphs_stay_and_are_as_exact_as_eager(assert_eager, block, batch, lowering):
    backend = CountingBackend()
    factorized(block)
    compiled = torch.compile(block, backend=backend, options={"lowering": lowering})
    assert_eager(compiled, block, [batch[0]])
    with torch.no_grad():
        compiled(batch[0])
    calls = backend.calls
    moves = SupportMoves(compiled, torch.optim.SGD(block.parameters(), lr=0.1), every=1, fraction=0.5)
    before = block(batch[0])
    for _ in range(2):
        assert moves.step(lambda: compiled(batch[0]).square().mean()) > 300
        assert_eager(compiled, block, [batch[0]])
        with torch.no_grad():
            torch.testing.assert_close(compiled(batch[0]), block(batch[0]))
    assert not torch.allclose(block(batch[0]), before, rtol=1e-2)
    assert backend.calls == calls


def test_states_and_merging_go_with_what_moved(block, block_class, tmp_path):
    factorized(block)
    moves = SupportMoves(block, trained(block), every=1, fraction=0.5)
    assert moves.step(lambda: block(torch.randn(16, 64)).square().mean())
    other, x = factorized(block_class()), torch.randn(4, 64)
    other.load_state_dict(block.state_dict())
    for twin in (other, copy.deepcopy(block)):
        assert torch.equal(twin(x), block(x))
    torch.testing.assert_close(slcompile.merge_(other)(x), block(x))


@pytest.mark.slow
@pytest.mark.usefixtures("aten_kernels")
def test_it_may_be_made_before_the_first_step_converts_and_moves_when_it_is_time(block):
    compiled = torch.compile(block, backend="sltrain", options=CONFIG)
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-3)
    moves = SupportMoves(compiled, optimizer, every=3, fraction=0.2, until=9)
    counts = []
    for _ in range(12):
        x = torch.randn(16, 64)

        def loss(x: Tensor = x) -> Tensor:
            return compiled(x).square().mean()

        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(moves.step(loss))
    at = {step + 1: count for step, count in enumerate(counts) if count}
    assert list(at) == [3, 6]  # at the 9th step the fraction is zero
    assert 0 < at[6] < at[3]
    assert moves.state_dict() == {"steps": 12, "moved": sum(counts)}


def broken(block: nn.Module) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is said of each thing that is refused, and what does it."""
    loss = lambda: block(torch.randn(8, 64)).square().mean()  # noqa: E731
    values = weights(block)["up.weight_sl"].values
    plain = torch.optim.SGD(block.parameters(), lr=0.1)
    for name, value in (("every", 0), ("until", 100), ("every", 1.5), ("fraction", 0), ("fraction", 1.1)):
        yield f"{name} must be", lambda name=name, value=value: SupportMoves(block, plain, **{name: value})
    yield "optimizer must be a torch.optim.Optimizer, got str", lambda: SupportMoves(block, "adam")
    for state in ({}, {"steps": 3}, None, plain.state_dict()):
        said = "state must be what SupportMoves.state_dict returned, got"
        yield said, lambda state=state: SupportMoves(block, plain).load_state_dict(state)
    counts = {"steps": -1, "moved": 0}
    yield r"state\['steps'\] must be an int >= 0", lambda: SupportMoves(block, plain).load_state_dict(counts)
    others = torch.optim.SGD([each for each in block.parameters() if each is not values], lr=0.1)
    yield r"optimizer does not hold up\.weight_sl\.values", lambda: SupportMoves(block, others)
    wanted = [
        ("closure must return a scalar loss that has a gradient", lambda: block(torch.randn(8, 64))),
        ("closure must return a scalar loss that has a gradient", lambda: None),
        ("closure must compute a loss of the model", lambda: block.head.weight.square().sum()),
    ]
    for said, closure in wanted:
        yield said, lambda closure=closure: SupportMoves(block, plain, every=1).step(closure)
    stepped = torch.optim.Rprop(block.parameters())
    loss().backward()
    stepped.step()
    block.zero_grad()
    yield r"Rprop holds prev of .*values as Tensor", lambda: SupportMoves(block, stepped, every=1).step(loss)
    wrapper = nn.DataParallel(block)
    yield "model is inside DataParallel", lambda: (SupportMoves(block, plain, every=1).step(loss), wrapper)


def test_what_cannot_be_is_refused_before_anything_changes(block):
    factorized(block)
    trained(block)
    for said, attempt in broken(block):
        before = {name: each.clone() for name, each in block.state_dict().items()}
        with pytest.raises(ValueError, match=said):
            attempt()
        assert all(torch.equal(each, before[name]) for name, each in block.state_dict().items())


@pytest.mark.parametrize("options", [{"support": "vector"}, {"support": "stratified"}, {"support": "uniform"}, "cp"])
def test_other_supports_and_structures_do_not_move(block, options):
    options = {"structure": "cp"} if options == "cp" else {**options, "density": 0.0625}
    slcompile.factorize_(block, slcompile.SLConfig(rank=4, seed=0, **options))
    optimizer, held = torch.optim.SGD(block.parameters(), lr=0.1), next(iter(options.items()))
    with pytest.raises(ValueError, match=f"no weight whose non-zeros can move: up.weight_sl has {held[0]}='{held[1]}'"):
        SupportMoves(block, optimizer)


def test_what_a_reentrant_checkpoint_hides_does_not_move():
    model, x = factorized(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))), torch.randn(8, 64, requires_grad=True)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    moves = SupportMoves(model, torch.optim.SGD(model.parameters(), lr=0.1), every=1)
    with pytest.raises(ValueError, match="a loss of the model, got one whose gradient reaches no weight of it"):
        moves.step(lambda: checkpoint(model, x, use_reentrant=True).square().mean())
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_a_model_that_is_dense_is_refused_when_it_is_time(block):
    moves = SupportMoves(block, torch.optim.SGD(block.parameters(), lr=0.1), every=2)
    assert moves.step(lambda: pytest.fail("it was not time")) == 0
    with pytest.raises(ValueError, match="model has no factorized weight"):
        moves.step(lambda: pytest.fail("it went on"))


def test_eight_bit_states_are_refused_and_plain_ones_of_small_weights_are_not():
    optim = pytest.importorskip("torchao.optim", exc_type=ImportError)
    model = factorized(nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 64)))
    optimizer = optim.AdamW8bit(model.parameters(), lr=1e-3)
    large, small = (each.weight_sl.values for each in model)
    for each in (large, small):
        each.grad = torch.randn_like(each)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles an update for each shape
        optimizer.step()
    optimizer.zero_grad()
    before = model[0].weight_sl.offsets.clone()
    moves = SupportMoves(model, optimizer, every=1)
    with pytest.raises(ValueError, match=r"holds exp_avg of 0\.weight_sl\.values as OptimState8bit .* 32-bit states"):
        moves.step(lambda: model(torch.randn(8, 512)).square().mean())
    assert torch.equal(model[0].weight_sl.offsets, before)
    large.requires_grad_(False)  # what is not trained does not move
    assert moves.step(lambda: model(torch.randn(8, 512)).square().mean()) > 0
    assert torch.equal(model[0].weight_sl.offsets, before)
