"""The private parts of torch's eager mode that we lean on: a new torch that moves one fails here first."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.optim import _apply_optimizer_in_backward

from slcompile import torch_private
from tests.testing import process_group


def test_without_wrappers(block):
    assert torch_private.without_wrappers(torch.compile(block)) is block
    assert torch_private.without_wrappers(checkpoint_wrapper(block)) is block
    assert torch_private.without_wrappers(torch.compile(checkpoint_wrapper(block))) is block
    assert torch_private.without_wrappers(block) is block


def test_compiling_is_no_exporting():
    class Asking(nn.Module):
        def forward(self, x):
            return x + 1 if torch_private.is_exporting() else x - 1

    model, x = Asking(), torch.zeros(3)
    assert not torch_private.is_exporting()
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), x - 1)
    for strict in (False, True):
        torch._dynamo.reset()
        assert torch.equal(torch.export.export(model, (x,), strict=strict).module()(x), x + 1)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), x - 1)


def test_allocations_are_those_of_the_profile_in_order():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        held = torch.empty(1000)
        del held
    assert [each for each in torch_private.allocations(profile) if abs(each) == 4000] == [4000, -4000]


def test_post_accumulate_hooks(block):
    assert torch_private.post_accumulate_hooks(block.mix) == []
    hooks = [lambda p: None, lambda p: None]
    handles = [block.mix.register_post_accumulate_grad_hook(each) for each in hooks]
    assert torch_private.post_accumulate_hooks(block.mix) == hooks
    handles[0].remove()
    assert torch_private.post_accumulate_hooks(block.mix) == hooks[1:]


def test_what_torch_steps_in_the_backward_pass(block):
    _apply_optimizer_in_backward(torch.optim.SGD, [block.mix], {"lr": 0.1})
    assert [torch_private.is_stepped_in_backward(each) for each in (block.mix, block.up.weight)] == [True, False]
    before = block.mix.detach().clone()
    block(torch.randn(4, 64)).sum().backward()
    assert not torch.equal(block.mix, before)


def test_a_step_without_its_hooks(block):
    class Fresh(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    bare = Fresh.step
    assert torch_private.step_without_hooks(Fresh) is bare
    Fresh(block.parameters(), lr=0.1)  # puts the hooks there
    assert Fresh.step is not bare
    assert torch_private.step_without_hooks(Fresh) is bare


def test_a_look_at_each_state_dict_before_it_is_loaded(block, monkeypatch):
    monkeypatch.setattr(nn.Module, "load_state_dict", nn.Module.load_state_dict)  # put back afterwards
    seen = []
    torch_private.before_load_state_dict(lambda *given: seen.append(given))
    state = block.state_dict()
    assert block.load_state_dict(state, strict=False).missing_keys == []
    assert seen == [(block, state, False, False)]


def test_transforms_and_forward_mode_are_noticed_in_eager_mode_and_by_dynamo():
    def run(x):
        factor = 2 if torch_private.is_transforming() else 3
        return (factor * x).sum()

    x = torch.ones(2)
    for function in (run, torch.compile(run, backend="eager", fullgraph=True)):
        assert function(x) == 6
        with torch.autograd.forward_ad.dual_level():
            assert function(x) == 4
    for transform in (torch.func.grad, torch.func.vmap):
        assert torch.equal(transform(run)(x), torch.tensor([2.0, 2.0]))
        assert torch.equal(torch.compile(lambda x, each=transform: each(run)(x), backend="eager")(x), 2 * x)


def test_eager_checkpoints_are_noticed():
    seen = []

    def function(x):
        seen.append(torch_private.in_eager_checkpoint())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    function(x)
    for reentrant in (False, True):
        torch.utils.checkpoint.checkpoint(function, x, use_reentrant=reentrant).sum()
    with torch.autograd.graph.save_on_cpu():
        function(x)
    assert seen == [False, True, False, False]


def test_ddp_leaves_gradients_in_its_buckets_and_calls_back_before_it_ends(tmp_path):
    calls: list[bool] = []
    with process_group(tmp_path):
        layer = nn.Linear(4, 4)
        wrapped = nn.parallel.DistributedDataParallel(layer)

        def hook(state, bucket):
            def callback() -> None:
                calls.append(torch_private.in_backward())
                for parameter in bucket.parameters():
                    parameter.grad = None

            torch_private.after_backward(callback)
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        assert torch_private.bucket_hooks(wrapped) == []
        wrapped.register_comm_hook(None, hook)
        assert torch_private.bucket_hooks(wrapped) == [hook]
        wrapped(torch.ones(2, 4)).sum().backward()
        assert calls == [True]
        assert all(each.grad is not None for each in layer.parameters())  # copied after that
        layer.zero_grad()
        torch_private.leave_gradients_in_buckets(wrapped)
        wrapped(torch.ones(2, 4)).sum().backward()
        assert calls == [True, True]
        assert all(each.grad is None for each in layer.parameters())


def test_watching_sees_the_ops_of_both_passes_and_not_its_own():
    seen = []

    def see(name, args, result):
        seen.append(name)
        torch.mm(torch.ones(1, 1), torch.ones(1, 1))

    weight, x = torch.randn(4, 3), torch.randn(2, 5, 3, requires_grad=True)
    with torch_private.Watching(see):
        y = nn.functional.linear(x, weight, torch.zeros(4))
        forward = list(seen)
        torch.autograd.grad(y.sum(), x)
    torch.mm(weight, weight.t())
    assert forward.count("addmm") == 1
    assert seen.count("mm") == 1  # the input's gradient


def test_memory_is_told_apart_also_when_it_was_freed():
    tensor = torch.randn(1000)
    memory = torch_private.memory_of(tensor)
    assert memory == torch_private.memory_of(tensor[3:].view(-1, 1)) == torch_private.memory_of(tensor.detach())
    assert len({memory, torch_private.memory_of(tensor.t())}) == 1
    assert not memory.expired()
    del tensor
    assert memory.expired()  # it was not kept
    others = [torch.randn(1000) for _ in range(50)]
    assert not any(torch_private.memory_of(each) == memory for each in others)
