from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slcompile
import slcompile.convert.transaction
from tests.testing import CONFIG, OPTIONS

pytestmark = pytest.mark.usefixtures("aten_kernels")


def compiled_step(block, batch):
    """A compiled model and one call of it: the call converts."""
    compiled = torch.compile(block, backend="sltrain", options=OPTIONS)
    loss = F.cross_entropy(compiled(batch[0]), batch[1])
    return compiled, loss


def held(optimizer: torch.optim.Optimizer) -> list[int]:
    return [id(p) for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, lr=1e-2),
        lambda p: torch.optim.LBFGS(p, lr=1e-2, max_iter=2),
    ],
    ids=["adamw", "adamw-fused", "adamw-foreach", "sgd-momentum", "rmsprop", "lbfgs"],
)
def test_an_optimizer_made_before_equals_one_made_after(block_class, batch, make):
    """Same seeds, same steps: mended at conversion, or made of the factors, the weights come out bit-equal."""
    states = []
    for before in (True, False):
        torch.manual_seed(0)
        model = block_class()
        optimizer = make(model.parameters()) if before else None
        slcompile.factorize_(model, CONFIG)
        optimizer = optimizer or make(model.parameters())
        assert held(optimizer) == [id(p) for p in model.parameters()]

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_param_groups_and_names_are_edited_in_place(block):
    decay = [(n, p) for n, p in block.named_parameters() if p.dim() > 1]
    rest = [(n, p) for n, p in block.named_parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1, "lr": 1e-3}, {"params": rest, "weight_decay": 0.0}], lr=1e-2
    )
    groups, lists = list(optimizer.param_groups), [group["params"] for group in optimizer.param_groups]
    slcompile.factorize_(block, CONFIG)
    assert all(a is b for a, b in zip(groups, optimizer.param_groups, strict=True))
    assert all(a is group["params"] for a, group in zip(lists, optimizer.param_groups, strict=True))
    names = {id(p): n for n, p in block.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]
    expected = [f"{w}_sl.{part}" for w in ("up.weight", "down.weight") for part in ("B", "A", "values")]
    assert optimizer.param_groups[0]["param_names"] == ["mix", *expected, "head.weight"]
    assert (optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[0]["lr"]) == (0.1, 1e-3)


@pytest.mark.slow
def test_schedulers_made_before_go_on(block, batch):
    optimizer = torch.optim.AdamW(block.parameters(), lr=1.0)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=10)
    compiled, loss = compiled_step(block, batch)
    rates = []
    for _ in range(4):
        loss.backward()
        optimizer.step()
        one_cycle.step()
        optimizer.zero_grad()
        rates.append(optimizer.param_groups[0]["lr"])
        loss = F.cross_entropy(compiled(batch[0]), batch[1])
    assert len(set(rates)) == 4
    assert block.up.weight_sl.B.count_nonzero() > 0  # it started at zero


def test_grad_scaler_unscales_the_factors(block, batch):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(block.parameters(), lr=1.0)
    compiled, loss = compiled_step(block, batch)
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    scaler.scale(loss).backward()
    scaled = {name: p.grad.clone() for name, p in block.named_parameters()}
    scaler.step(optimizer)
    scaler.update()
    for name, p in block.named_parameters():
        torch.testing.assert_close(before[name] - p.detach(), scaled[name] / 1024, rtol=1e-5, atol=1e-6, msg=name)
    del compiled  # alive until here: it holds the graph whose backward pass was run


@pytest.mark.slow
def test_accumulation_and_clipping_reach_the_factors(block, batch):
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    compiled, loss = compiled_step(block, batch)
    (loss / 2).backward()
    once = block.up.weight_sl.values.grad.clone()
    (F.cross_entropy(compiled(batch[0]), batch[1]) / 2).backward()
    torch.testing.assert_close(block.up.weight_sl.values.grad, 2 * once, rtol=1e-5, atol=1e-7)
    norm = nn.utils.clip_grad_norm_(block.parameters(), 1e-3)
    assert norm > 1e-3
    total = torch.stack([p.grad.norm() for p in block.parameters()]).norm()
    torch.testing.assert_close(total, torch.tensor(1e-3), rtol=1e-3, atol=0)
    optimizer.step()


def stepped(block, batch):
    optimizer = torch.optim.AdamW(block.parameters())
    F.cross_entropy(block(batch[0]), batch[1]).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def keeping(collect):
    def prepare(block, batch):
        optimizer = torch.optim.SGD(block.parameters())
        optimizer.own = collect(list(block.parameters()))
        return optimizer

    return prepare


def overwritten(value):
    def prepare(block, batch):
        with torch.no_grad():
            block.up.weight[3, 5] = value

    return prepare


def with_gradient(block, batch):
    F.cross_entropy(block(batch[0]), batch[1]).backward()


REFUSED = {  # what is done to a model, which may return an optimizer; what is said of it
    "state": (stepped, "AdamW already has state for the dense weight"),
    "muon": (lambda block, batch: torch.optim.Muon([block.up.weight, block.down.weight]), "Muon orthogonalises"),
    "copy": (keeping(list), "SGD cannot be mended: it keeps dense weights in its attribute 'own'"),
    "groups": (keeping(lambda params: [{"params": params}]), "it keeps dense weights in its attribute 'own'"),
    "masters": (
        keeping(lambda params: {p: p.double() for p in params}),
        "it keeps dense weights in its attribute 'own'",
    ),
    "hook": (lambda block, batch: hooked(block.up.weight.register_hook), "up.weight carries a gradient hook"),
    "accumulate-hook": (
        lambda block, batch: hooked(block.up.weight.register_post_accumulate_grad_hook),
        "up.weight carries a post-accumulate-grad hook",
    ),
    "gradient": (with_gradient, "has a gradient that conversion would lose"),
    "nan": (overwritten(float("nan")), "up.weight contains NaN or Inf"),
    "inf": (overwritten(float("inf")), "up.weight contains NaN or Inf"),
}


def hooked(register) -> None:
    register(lambda tensor: None)


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [True, False], ids=["factorize_", "compiled"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_converted_is_refused_and_the_model_left_as_it_was(block, batch, kind, explicit):
    prepare, message = REFUSED[kind]
    optimizer = prepare(block, batch)
    before = {name: (id(p), p.detach().clone()) for name, p in block.named_parameters()}
    classes = [type(module) for module in block.modules()]
    groups = held(optimizer) if optimizer is not None else None
    compiled = torch.compile(block, backend="sltrain", options=OPTIONS)
    convert = functools.partial(slcompile.factorize_, block, CONFIG, example_args=batch[:1])
    with pytest.raises(ValueError, match=message):
        convert() if explicit else compiled(batch[0])
    assert [type(module) for module in block.modules()] == classes
    for name, parameter in block.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter.nan_to_num(), before[name][1].nan_to_num())
    assert not any(key.endswith("_sl") for module in block.modules() for key in module._modules)
    assert groups is None or held(optimizer) == groups


def test_an_optimizer_of_stale_parameters_refuses_to_step(block):
    stale = list(block.parameters())
    slcompile.factorize_(block, CONFIG)
    optimizer = torch.optim.SGD(stale, lr=0.1)
    with pytest.raises(RuntimeError, match=r"up\.weight was converted to factors"):
        optimizer.step()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    optimizer.step()
    slcompile.merge_(block)
    with pytest.raises(RuntimeError, match="merged into a dense weight"):
        optimizer.step()


@pytest.mark.slow
def test_a_compiled_optimizer_step_still_traces(block, batch):
    slcompile.factorize_(block, CONFIG)
    optimizer = torch.optim.AdamW(block.parameters(), lr=torch.tensor(1e-2))
    F.cross_entropy(block(batch[0]), batch[1]).backward()
    before = block.up.weight_sl.values.detach().clone()
    torch.compile(optimizer.step, backend="eager")()
    assert not torch.equal(before, block.up.weight_sl.values)


def test_a_failure_to_mend_leaves_every_optimizer_as_it_was(block, monkeypatch):
    first, second = (torch.optim.SGD(block.named_parameters(), lr=0.1) for _ in range(2))
    before = held(first), held(second)
    monkeypatch.setattr(slcompile.convert.transaction, "require_mendable", lambda *args: None)
    second.param_groups[0]["param_names"].pop()
    with pytest.raises(ValueError, match="zip"):
        slcompile.factorize_(block, CONFIG)
    assert (held(first), held(second)) == before
    assert type(block.up) is nn.Linear
    monkeypatch.undo()
    with pytest.raises(ValueError, match="not as many param_names as params"):
        slcompile.factorize_(block, CONFIG)


def test_a_matrix_only_optimizer_of_a_converted_model_refuses_values(block, batch):
    slcompile.factorize_(block, CONFIG)
    F.cross_entropy(block(batch[0]), batch[1]).backward()
    matrices = [p for p in block.parameters() if p.dim() == 2]
    with pytest.raises(RuntimeError, match="Muon orthogonalises matrices"):
        torch.optim.Muon(matrices).step()
    torch.optim.Muon([block.up.weight_sl.B, block.up.weight_sl.A]).step()


@pytest.mark.slow
def test_a_closure_that_converts(block, batch):
    compiled = torch.compile(block, backend="sltrain", options=OPTIONS)
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2, fused=True)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(compiled(batch[0]), batch[1])
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert block.up.weight_sl.B in optimizer.state
