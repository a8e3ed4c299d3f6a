from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import slcompile
from slcompile import captured, passes
from tests.testing import CONFIG, process_group, randomize


class Conv1D(nn.Module):
    """GPT-2's: a weight stored [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 8)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def test_factorize_by_module_type_takes_linears(block, batch):
    assert slcompile.factorize_(block, CONFIG) is block
    assert set(slcompile.factors(block)) == {"up.weight", "down.weight"}
    assert type(block.up).__name__ == "SLLinear"
    assert isinstance(block.up, nn.Linear)
    F.cross_entropy(block(batch[0]), batch[1]).backward()
    assert all(p.grad is not None for p in block.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("again", [lambda model: model, copy.deepcopy], ids=["itself", "a copy"])
def test_what_its_config_says_of_compilation_holds_where_the_options_say_nothing_else(
    again, block, batch, aten_kernels, monkeypatch
):
    seen = []

    def watched(config, *args):
        seen.append(config)
        return passes.joint_passes(config, *args)

    monkeypatch.setattr(captured, "joint_passes", watched)
    plain = copy.deepcopy(block)
    config = slcompile.SLConfig(rank=8, lowering="composed", save="all", skip_passes=["group_projections"])
    model = again(slcompile.factorize_(block, config))
    torch.compile(model, backend="sltrain")(batch[0])
    torch.compile(model.up, backend="sltrain", options={"lowering": "factored"})(batch[0])
    with torch.no_grad():
        torch.compile(model.eval(), backend="sltrain")(batch[0])
    torch.compile(slcompile.factorize_(plain, CONFIG), backend="sltrain")(batch[0])
    whole, layer, inference, other = ((each.lowering, each.save, each.skip_passes) for each in seen)
    assert whole == inference == ("composed", "all", ("group_projections",))
    assert layer == ("factored", "all", ("group_projections",))
    assert other == ("auto", "auto", ())


def test_factorize_by_graph_takes_every_matmul_and_leaves_no_trace_of_the_run(block, batch):
    block.register_buffer("count", torch.zeros(()))
    state, buffers = torch.get_rng_state(), dict(block.named_buffers())
    slcompile.factorize_(block, slcompile.SLConfig(rank=8, seed=3), example_args=(batch[0],))
    assert set(slcompile.factors(block)) == {"up.weight", "down.weight", "mix"}
    assert block.count is buffers["count"]
    assert not torch.equal(torch.get_rng_state(), state)  # the factors were drawn, the model's run was not
    assert all(p.grad is None for p in block.parameters())


def test_a_conv1d_style_weight_starts_as_the_transposed_linear():
    model = nn.Sequential(Conv1D(256, 64))
    slcompile.factorize_(model, CONFIG, example_args=(torch.randn(4, 256),))
    weight = model[0].weight_sl
    assert weight.input_dim == 0
    assert weight.B.shape == (256, 8)
    assert weight.A.count_nonzero() == 0
    bound = 1 / 16  # 1 / sqrt(256), the input features
    assert 0.99 * bound < weight.B.abs().max() <= bound
    assert 0.95 * bound < weight.values.abs().max() <= bound


@pytest.mark.slow
@pytest.mark.parametrize("support", ["stratified", "vector", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_restores_a_plain_model_with_the_same_outputs(block, block_class, batch, support, dtype):
    block.to(dtype)
    keys, classes = list(block.state_dict()), [type(module) for module in block.modules()]
    attributes = [sorted(vars(module)) for module in block.modules()]
    slcompile.factorize_(
        block, slcompile.SLConfig(rank=8, density=0.05, support=support), example_args=(batch[0].to(dtype),)
    )
    randomize(block)
    want = block(batch[0].to(dtype))
    dense = block_class().to(dtype)
    dense.load_state_dict(slcompile.merged_state_dict(block), strict=True)
    assert slcompile.merge_(block) is block
    got = block(batch[0].to(dtype))
    if dtype is torch.float32:
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    else:  # composing rounds twice, merging once: half a unit in the last place (2**-9) for each of three weights
        assert (got - want).abs().max() <= 3 * 2**-8 * want.abs().max()
    assert torch.equal(dense(batch[0].to(dtype)), got)
    assert list(block.state_dict()) == keys
    assert [type(module) for module in block.modules()] == classes
    assert [sorted(vars(module)) for module in block.modules()] == attributes
    assert all(p.requires_grad for p in block.parameters())


def test_merged_state_dict_makes_one_tensor_at_a_time_and_saves_as_a_dict(block):
    slcompile.factorize_(block, CONFIG)
    merged = slcompile.merged_state_dict(block)
    assert merged["up.weight"] is not merged["up.weight"]
    buffer = io.BytesIO()
    torch.save(merged, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    assert set(loaded) == {"mix", "up.weight", "up.bias", "down.weight", "head.weight", "head.bias"}
    assert torch.equal(loaded["up.weight"], slcompile.merge_(block).up.weight)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent_and_equal(block, batch, clone):
    randomize(slcompile.factorize_(block, CONFIG))
    twin = clone(block)
    assert type(twin.up) is type(block.up)
    assert torch.equal(twin(batch[0]), block(batch[0]))
    with torch.no_grad():
        twin.up.weight_sl.values.zero_()
    assert not torch.equal(twin(batch[0]), block(batch[0]))
    slcompile.merge_(twin)
    assert type(twin.up) is nn.Linear
    assert type(block.up).__name__ == "SLLinear"


def test_a_class_of_a_converted_module_builds_dense_ones(block):
    slcompile.factorize_(block, CONFIG)
    made = type(block.up)(3, 4)
    assert type(made) is nn.Linear
    assert made.weight.shape == (4, 3)


def test_torch_export_keeps_the_factors_as_parameters(block, batch):
    slcompile.factorize_(block, CONFIG)
    program = torch.export.export(randomize(block), (batch[0],))
    assert "up.weight_sl.B" in program.state_dict
    torch.testing.assert_close(program.module()(batch[0]), block(batch[0]))


@pytest.mark.slow
@pytest.mark.parametrize("support", ["stratified", "vector", "uniform"])
def test_training_resumes_bit_equal_from_a_checkpoint(block_class, batch, support):
    config = slcompile.SLConfig(rank=8, density=0.05, support=support)

    def start(seed: int):
        torch.manual_seed(seed)
        model = slcompile.factorize_(block_class(), config)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def steps(model, optimizer, count):
        for _ in range(count):
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = start(0)
    steps(model, optimizer, 3)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    steps(model, optimizer, 3)
    resumed, again = start(1)  # other seeds: the supports must come from the checkpoint
    checkpoint = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    again.load_state_dict(checkpoint["optimizer"])
    steps(resumed, again, 3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert slcompile.factors(resumed)["up.weight"].seed == slcompile.factors(model)["up.weight"].seed


def test_a_state_dict_can_be_assigned(block, block_class, batch):
    slcompile.factorize_(block, CONFIG)
    twin = slcompile.factorize_(block_class(), CONFIG)
    twin.load_state_dict(randomize(block).state_dict(), assign=True)
    assert torch.equal(twin(batch[0]), block(batch[0]))
    twin(batch[0]).sum().backward()
    with pytest.raises(RuntimeError, match="Muon orthogonalises"):
        torch.optim.Muon([twin.up.weight_sl.values]).step()


def test_the_contract_of_a_converted_weight(block, monkeypatch):
    slcompile.factorize_(block, CONFIG)
    assert torch.equal(block.up.weight, block.up.weight_sl())
    for assign in (
        lambda: setattr(block.up, "weight", torch.zeros(96, 64)),
        lambda: setattr(block.up, "weight", nn.Parameter(torch.zeros(96, 64))),
        lambda: block.up.register_parameter("weight", nn.Parameter(torch.zeros(96, 64))),
    ):
        with pytest.raises(AttributeError, match=r"Linear\.weight is composed from weight_sl .* slcompile\.merge_"):
            assign()
    before = block.up.weight.detach().clone()
    bias = block.up.bias.detach().clone()
    block.up.reset_parameters()
    assert not torch.equal(block.up.weight, before)
    assert not torch.equal(block.up.bias, bias)
    assert torch.equal(block.up.weight != 0, before != 0)  # B is zero: the same support, other values
    with monkeypatch.context() as patch:
        patch.setattr(slcompile.SLWeight, "forward", lambda self: pytest.fail("composed to be discarded"))
        block.up.reset_parameters()
    block.up.weight_sl.requires_grad_(False)
    assert not block.up.weight.requires_grad
    slcompile.merge_(block)
    assert not block.up.weight.requires_grad
    assert block.down.weight.requires_grad


@pytest.mark.parametrize("support", ["stratified", "vector", "uniform"])
def test_the_seed_survives_averaging_and_meta_initialisation(block_class, support):
    config = slcompile.SLConfig(rank=8, density=0.05, support=support, seed=5)
    model = slcompile.factorize_(block_class(), config)
    ema = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(3):
        ema.update_parameters(model)
    assert slcompile.factors(ema.module)["up.weight"].seed == slcompile.factors(model)["up.weight"].seed
    with torch.device("meta"):
        twin = block_class()
    slcompile.factorize_(twin, config)
    assert all(p.is_meta for p in twin.parameters())
    twin.to_empty(device="cpu")
    twin.up.weight_sl.seed.fill_(77)  # what to_empty may leave there
    with pytest.raises(RuntimeError, match="the seed buffer holds 77"):
        twin.state_dict()
    with pytest.raises(RuntimeError, match="the seed buffer holds 77"):
        slcompile.merge_(twin)
    assert type(twin.up).__name__ == "SLLinear"
    for module in twin.modules():
        if isinstance(module, slcompile.SLWeight):
            module.reset_parameters()
    assert torch.equal(twin.up.weight != 0, model.up.weight != 0)


def test_auto_init_keeps_what_was_learned(block_class, batch):
    model = block_class()
    with torch.no_grad():
        model.up.weight += 3 * torch.randn(96, 4) @ torch.randn(4, 64) / 8  # a few strong directions
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    slcompile.factorize_(model, slcompile.SLConfig(rank=16, density=0.05))
    error = (model.up.weight - dense["up.weight"]).norm() / dense["up.weight"].norm()
    assert error < 0.25
    # The whole model is kept, also the weights that look random: 16 of 64 directions and 5 % of the entries.
    assert (model.down.weight - dense["down.weight"]).norm() < 0.8 * dense["down.weight"].norm()
    fresh = slcompile.factorize_(block_class(), slcompile.SLConfig(rank=16, density=0.05))
    assert fresh.up.weight_sl.B.count_nonzero() == 0


def test_an_explicit_init_holds_whatever_the_model_was_given_before():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[2].weight += torch.randn(64, 2) @ torch.randn(2, 64)
    dense = [layer.weight.detach().clone() for layer in model]
    for init, include in (("kaiming", "0.*"), ("spectral", "1.*"), ("auto", "2.*")):
        slcompile.factorize_(model, slcompile.SLConfig(rank=16, init=init, include=(include,)))
    assert model[0].weight_sl.B.count_nonzero() == 0
    for index in (1, 2):  # 16 of 64 singular directions of a random matrix hold more than a third of its squares
        assert (model[index].weight - dense[index]).norm() < 0.8 * dense[index].norm()


@pytest.mark.slow
def test_seeds_are_drawn_like_any_initialiser_or_fixed_by_name(block_class):
    def seeds(seed):
        model = slcompile.factorize_(block_class(), slcompile.SLConfig(rank=8, seed=seed))
        return [each.seed for each in slcompile.factors(model).values()]

    torch.manual_seed(1)
    first = seeds(None)
    torch.manual_seed(1)
    assert seeds(None) == first
    assert seeds(None) != first
    assert seeds(7) == seeds(7) != seeds(8)
    assert len(set(seeds(7))) == 2


@pytest.mark.slow
def test_a_graph_module_keeps_the_weights_that_it_reads_itself(block, batch):
    gm = fx.symbolic_trace(block)
    compiled = torch.compile(gm, backend="sltrain", options={"rank": 8})
    for _ in range(2):
        compiled(batch[0]).sum().backward()
    assert set(slcompile.factors(gm)) == {"up.weight", "down.weight"}
    assert {each.name: each.reason for each in slcompile.last_report().left}["mix"] == "graph_module"


@pytest.mark.slow
def test_capturing_works_however_often_it_is_done(block_class, batch):
    for _ in range(10):
        model = slcompile.factorize_(block_class(), CONFIG, example_args=(batch[0],))
        assert len(slcompile.factors(model)) == 3


def test_a_module_that_reduces_itself_is_copied_as_it_wants_to_be():
    model = nn.Sequential(Reduced(64, 64))
    slcompile.factorize_(model, CONFIG)
    twin = copy.deepcopy(model)
    assert twin[0].built
    assert type(twin[0]) is type(model[0])
    assert torch.equal(twin[0].weight, model[0].weight)


class Reduced(nn.Linear):
    built = False

    def __reduce__(self):
        return build_reduced, (self.in_features, self.out_features), self.__dict__


def build_reduced(inputs: int, outputs: int) -> Reduced:
    module = Reduced(inputs, outputs)
    module.built = True
    return module


def test_several_weights_of_one_module_come_and_go_in_any_order():
    attention = nn.MultiheadAttention(64, 4, kdim=96, vdim=96)
    keys = list(attention.state_dict())
    x, y = torch.randn(5, 2, 64), torch.randn(7, 2, 96)
    slcompile.factorize_(attention, CONFIG, example_args=(x, y, y))
    assert set(slcompile.factors(attention)) == {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"}
    assert type(copy.deepcopy(attention)) is type(attention)
    output = attention(x, y, y)[0]
    slcompile.merge_(attention)
    assert list(attention.state_dict()) == keys
    assert type(attention) is nn.MultiheadAttention
    torch.testing.assert_close(attention(x, y, y)[0], output, rtol=1e-5, atol=1e-6)


def test_functional_call_with_a_dense_weight_is_an_error(block, batch):
    slcompile.factorize_(block, CONFIG)
    with pytest.raises(AttributeError, match=r"slcompile\.merge_"):
        torch.func.functional_call(block, {"up.weight": torch.zeros(96, 64)}, (batch[0],))


class TestBadInput:
    def test_a_name_that_is_taken(self, block):
        block.up.weight_sl = 3
        with pytest.raises(ValueError, match=r"up\.weight cannot be factorized: its owner Linear already has"):
            slcompile.factorize_(block, CONFIG)
        assert type(block.up) is nn.Linear

    def test_not_a_module_or_config(self, block):
        with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, got dict"):
            slcompile.factorize_({}, CONFIG)
        with pytest.raises(ValueError, match="config must be an SLConfig, got dict"):
            slcompile.factorize_(block, {"rank": 3})
        with pytest.raises(ValueError, match=r"gm must be a torch\.fx\.GraphModule, got Block"):
            slcompile.rewrite(block, CONFIG)

    def test_no_eligible_weight(self):
        with pytest.raises(ValueError, match="no eligible weight; its 1 weights stay dense: too_small"):
            slcompile.factorize_(nn.Linear(8, 8))

    def test_a_pattern_that_matches_nothing(self, block):
        with pytest.raises(ValueError, match=r"include pattern 'upp\.\*' matches no parameter"):
            slcompile.factorize_(block, slcompile.SLConfig(rank=8, include=("upp.*",)))

    def test_a_rank_larger_than_any_weight_allows(self, block):
        with pytest.raises(ValueError, match="rank must be at most 64"):
            slcompile.factorize_(block, slcompile.SLConfig(rank=65))

    def test_a_scripted_module(self):
        with pytest.raises(ValueError, match=r"0\.weight is of a scripted module"):
            slcompile.factorize_(nn.Sequential(torch.jit.script(nn.Linear(64, 64))), CONFIG)

    def test_a_parametrized_weight(self, block):
        nn.utils.parametrizations.weight_norm(block.up)
        with pytest.raises(ValueError, match=r"up\.weight carries a parametrization"):
            slcompile.factorize_(block, CONFIG)
        slcompile.factorize_(block, slcompile.SLConfig(rank=8, exclude=("up.*",)))
        assert set(slcompile.factors(block)) == {"down.weight"}

    def test_a_class_with_a_metaclass_of_its_own(self):
        class Final(type):
            def __new__(cls, name, bases, namespace):
                if any(isinstance(base, Final) for base in bases):
                    raise TypeError("no subclasses")
                return super().__new__(cls, name, bases, namespace)

        class Sealed(nn.Linear, metaclass=Final):
            pass

        model = nn.Sequential(nn.Linear(64, 64), Sealed(64, 64))
        with pytest.raises(ValueError, match=r"1\.weight cannot be factorized: its class Sealed cannot be subclassed"):
            slcompile.factorize_(model, CONFIG)
        assert type(model[0]) is nn.Linear

    def test_after_wrapping_in_ddp(self, block, batch, tmp_path):
        with process_group(tmp_path):
            wrapped = nn.parallel.DistributedDataParallel(block)
            with pytest.raises(ValueError, match="already held by DistributedDataParallel"):
                slcompile.factorize_(wrapped, CONFIG)
            with pytest.raises(ValueError, match="already held by DistributedDataParallel"):
                torch.compile(block, backend="sltrain", options={"rank": 8})(batch[0])
        assert type(block.up) is nn.Linear

    def test_after_fully_shard(self, block, batch, tmp_path):
        with process_group(tmp_path):
            torch.distributed.fsdp.fully_shard(block, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
            with pytest.raises(ValueError, match="already held by FSDPModule"):
                slcompile.factorize_(block, CONFIG)

    def test_merging_shards(self, block, tmp_path):
        with process_group(tmp_path):
            slcompile.factorize_(block, CONFIG)
            torch.distributed.fsdp.fully_shard(block, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
            for merge in (
                slcompile.merge_,
                lambda model: slcompile.merged_state_dict(model)["up.weight"],
                lambda model: slcompile.save_merged(model, tmp_path / "dense"),
            ):
                with pytest.raises(RuntimeError, match="the factors are sharded among processes: get a full state"):
                    merge(block)
            assert sorted(slcompile.factors(block)) == ["down.weight", "up.weight"]


@pytest.mark.slow
def test_a_dense_weight_that_is_put_back_is_refused(block_class, batch, aten_kernels):
    first, other = block_class(), block_class()
    dense = first.up.weight
    torch.compile(first, backend="sltrain", options={"rank": 8})(batch[0])
    other.up.weight = dense
    with pytest.raises(
        RuntimeError, match=r"Linear holds as 'weight' a dense weight that no longer trains: up\.weight"
    ):
        torch.compile(other, backend="sltrain", options={"rank": 8})(batch[0])
    other.up.weight = torch.nn.Parameter(dense.detach().clone())
    torch.compile(other, backend="sltrain", options={"rank": 8})(batch[0])
    assert "up.weight" in slcompile.factors(other)


@pytest.mark.slow
def test_a_tensor_alone_is_one_argument_wherever_a_model_is_called():
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(8, 64)
    for given in (x, (x,)):
        assert slcompile.explain(model, given).summary.replaced == 1
        assert slcompile.estimate_memory(model, given).dense.peak > 0
        assert set(slcompile.suggest(model, 0.5, example_args=given).weights) == {"0.weight"}
        assert set(slcompile.factors(slcompile.factorize_(copy.deepcopy(model), example_args=given))) == {"0.weight"}
