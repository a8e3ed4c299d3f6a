"""The estimate of a training step's memory: against real steps, against sums made by hand, and what it refuses."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

import slcompile
from slcompile import models
from slcompile.memory.estimate import estimate_memory
from slcompile.memory.graphs import capture
from slcompile.memory.optimizer_bytes import OPTIMIZERS
from slcompile.ops.sparse_cpu import kept_bytes
from slcompile.optim import per_layer
from slcompile.passes.liveness import PARTS, Event, Plan, repeated, step_events
from slcompile.passes.workspace import kept_on_cpu, workspace
from tests.testing import example
from tests.zoo import tiny_config

IDS = {name: torch.zeros(2, 64, dtype=torch.int64) for name in ("input_ids", "labels")}
CONFIG = slcompile.SLConfig(rank=16, density=0.05)
ESTIMATE = "slcompile.memory.estimate"


@pytest.fixture(scope="module")
def table():
    """examples/memory_table.py, which measures real steps."""
    return example("memory_table")


def llama(layers: int = 2, **changes) -> LlamaConfig:
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 2, "vocab_size": 1000} | changes
    return tiny_config("llama", num_hidden_layers=layers, use_cache=False, **sizes)


@pytest.mark.long
def test_weights_are_those_that_the_string_factorizes_experts_among_them():
    config = tiny_config("mixtral", intermediate_size=96, num_hidden_layers=5, num_attention_heads=2, vocab_size=100)
    report = estimate_memory(config, kwargs=IDS, config=CONFIG)
    config.num_hidden_layers, config.use_cache = 5, False
    model = MixtralForCausalLM(config)
    assert report.dense.parameter_count == sum(each.numel() for each in model.parameters())
    slcompile.factorize_(model, CONFIG, example_kwargs=IDS)
    assert sum(name.endswith("gate_up_proj") for name in slcompile.factors(model)) == 5
    assert report.sltrain.parameter_count == sum(each.numel() for each in model.parameters())


@pytest.mark.slow
class TestAgainstReality:
    @pytest.mark.parametrize(
        "lowering", ["auto", *(pytest.param(each, marks=pytest.mark.long) for each in (None, "composed", "factored"))]
    )
    def test_peak_of_a_real_step(self, table, lowering):
        sl = slcompile.SLConfig(rank=16, density=0.05, lowering=lowering or "auto")
        estimate, real = table.compared(llama(1), sl, batch=2, factorized=lowering is not None)
        assert abs(estimate / real - 1) < 0.02, (estimate, real)  # 2e-7 when it was written

    def test_peak_where_one_kernel_makes_several_gradients(self, table):
        """Of SwiGLU those of both branches, and its result once more: made one by one, two of them would be there."""

        class SwiGLU(nn.Module):
            def __init__(self):
                super().__init__()
                self.gate, self.up = nn.Linear(64, 176, bias=False), nn.Linear(64, 176, bias=False)
                self.down = nn.Linear(176, 64, bias=False)

            def forward(self, x):
                return self.down(nn.functional.silu(self.gate(x)) * self.up(x)).sum()

        model, x = SwiGLU(), torch.randn(4096, 64)
        sl = slcompile.SLConfig(rank=16, density=0.05, lowering="factored")
        estimate = estimate_memory(model, x, config=sl, optimizer="sgd", device="cpu").sltrain.peak
        torch._dynamo.reset()
        gc.collect()  # what is left of another model would count
        compiled = torch.compile(slcompile.factorize_(model, sl), backend="sltrain")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)

        def step():
            compiled(x).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        step()
        held = sum(each.nbytes for each in (*model.parameters(), *model.buffers())) + kept_bytes()
        real = held + table.peak_above(step, "cpu")
        assert abs(estimate / real - 1) < 0.02, (estimate, real)  # 0.70 with a kernel for each

    @pytest.mark.long
    def test_peak_of_a_real_step_within_a_budget(self, table):
        ids = torch.empty(2, 256, dtype=torch.int64, device="meta")
        common = {"kwargs": {"input_ids": ids, "labels": ids}, "device": "cpu"}
        settings = {"rank": 16, "density": 0.05, "lowering": "factored"}
        most, least = (
            estimate_memory(llama(), config=slcompile.SLConfig(**settings, save=save), **common).peak
            for save in ("all", "low_rank")
        )
        budget = (most + 2 * least) // 3
        sl = slcompile.SLConfig(**settings, memory_budget=budget)
        report = estimate_memory(llama(), config=sl, **common)
        assert report.peak == report.budget.peak <= budget < report.budget.without == most
        assert str(report.budget) in str(report)
        estimate, real = table.compared(llama(), sl, batch=2, factorized=True)
        assert estimate == report.peak
        assert abs(estimate / real - 1) < 0.02, (estimate, real)

    @pytest.mark.long
    def test_peak_of_a_real_step_with_per_layer_updates_and_each_layer_compiled_by_itself(self, table):
        settings = {"config": CONFIG, "device": "cpu", "per_layer": True}
        ids = torch.randint(1000, (2, 64))
        estimate = estimate_memory(llama(), kwargs={"input_ids": ids, "labels": ids}, **settings).peak
        torch._dynamo.reset()
        gc.collect()  # what is left of another model would count
        model = slcompile.factorize_(LlamaForCausalLM(llama()), CONFIG)
        optimizer = per_layer(torch.optim.AdamW, model.parameters(), fused=True)
        for layer in model.model.layers:
            layer.compile(backend="sltrain")

        def step():
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

        step()
        step()
        held = sum(3 * each.nbytes for each in model.parameters()) + sum(each.nbytes for each in model.buffers())
        real = held + kept_bytes() + table.peak_above(step, "cpu")
        assert abs(estimate / real - 1) < 0.1, (estimate, real)  # what is outside the layers ran eagerly

    @pytest.mark.parametrize("name", ["adamw", "adamw-foreach", "sgd", "sgd-momentum", "adamw8bit"])
    def test_state_and_scratch_of_a_real_optimizer(self, table, name):
        sizes = [(64, 256), (300,), (17, 1000)]
        parameters = [nn.Parameter(torch.randn(size)) for size in sizes]
        if name == "adamw8bit":
            bitsandbytes = pytest.importorskip("bitsandbytes")
            optimizer = bitsandbytes.optim.AdamW8bit(parameters)
        elif name.startswith("sgd"):
            optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9 * name.endswith("momentum"), fused=True)
        else:
            optimizer = torch.optim.AdamW(parameters, fused=name == "adamw" or None, foreach="foreach" in name or None)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        # Step counters, and the tables of 8-bit codes that all parameters share.
        left_out = ("step", "qmap1", "qmap2")
        states = [optimizer.state[each] for each in parameters]
        kept = [sum(v.nbytes for k, v in each.items() if torch.is_tensor(v) and k not in left_out) for each in states]
        assert kept == [OPTIMIZERS[name].state(each.numel(), 4) for each in parameters]
        scratch = [OPTIMIZERS[name].scratch_on("cpu")(each.numel(), 4) for each in parameters]
        expected = sum(scratch) if OPTIMIZERS[name].together else max(scratch)
        # Scalars and lists of them beside.
        assert expected <= table.peak_above(optimizer.step, "cpu") <= expected + 4096

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_state_of_four_bits(self, dtype):
        optim = pytest.importorskip("torchao.optim")
        parameters = [nn.Parameter(torch.randn(size, dtype=dtype)) for size in [(64, 256), (300,), (17, 1000)]]
        optimizer = optim.AdamW4bit(parameters)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        with torch.compiler.set_stance("force_eager"):  # its update is compiled once for each shape
            optimizer.step()
        kept = []
        for parameter in parameters:
            moments = [optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
            inner = [[getattr(m, n) for n in getattr(m, "tensor_attrs", ())] or [m] for m in moments]
            kept.append(sum(each.nbytes for tensors in inner for each in tensors))
        assert kept == [OPTIMIZERS["adamw4bit"].state(each.numel(), each.itemsize) for each in parameters]
        assert kept[0] < 1.1 * 64 * 256


class Two(nn.Module):
    """[8, 64] -> [8, 96] -> [8, 64]: little enough to add up by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96, bias=False)
        self.down = nn.Linear(96, 64, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x))).square().sum()


def events_of(model, x, *, factorized=False, per_layer=False, by_layers=False, config=CONFIG):
    plan = Plan("cpu", lambda count, itemsize: 0, False, per_layer, by_layers)
    return step_events(capture(model.to("meta"), ((x,), {}), None, "cpu", config if factorized else None), plan)


class TestLiveness:
    def test_every_allocation_of_a_small_step(self):
        """Dense. Saved: relu(up(x)) and y = down(...); x and the weights are held by the caller."""
        weight, wide, narrow = 4 * 64 * 96, 4 * 8 * 96, 4 * 8 * 64
        events = [(each.place, each.part, each.size) for each in events_of(Two(), torch.empty(8, 64))]
        forward, backward, update = "forward", "backward", "optimizer step"
        assert [each for each in events if each[0] == forward] == [
            (forward, "temporaries", wide),  # up(x), over which relu is written
            (forward, "temporaries", -wide),
            (forward, "activations", wide),
            (forward, "activations", narrow),
            (forward, "temporaries", 4),  # the loss, without squares that a kernel would write
            (forward, "temporaries", -4),
        ]
        assert [each for each in events if each[0] != forward] == [
            (backward, "temporaries", 4),  # the loss's gradient
            (backward, "temporaries", narrow),  # y's gradient, not over y, which the graph was given
            (backward, "temporaries", -4),
            (backward, "activations", -narrow),
            (backward, "gradients", weight),  # of down
            (backward, "temporaries", wide),  # of relu(up(x))
            (backward, "temporaries", -narrow),
            (backward, "temporaries", -wide),  # over which that of up(x) is written
            (backward, "temporaries", wide),
            (backward, "activations", -wide),
            (backward, "gradients", weight),  # of up
            (backward, "temporaries", -wide),
            (update, "gradients", -weight),
            (update, "gradients", -weight),
        ]

    def test_everything_is_freed_and_nothing_twice(self):
        for factorized in (False, True):
            model = slcompile.factorize_(Two(), CONFIG) if factorized else Two()
            now = dict.fromkeys(PARTS, 0)
            for event in events_of(model, torch.empty(8, 64), factorized=factorized):
                now[event.part] += event.size
                assert min(now.values()) >= 0
            assert sum(now.values()) - now["indices"] == 0

    @pytest.mark.slow
    def test_composed_weights_are_not_kept_for_the_backward_pass(self):
        for keep in (False, True):
            config = slcompile.SLConfig(rank=4, lowering="composed", keep_weights=keep)
            model = slcompile.factorize_(Two(), config)
            events = events_of(model, torch.empty(8, 64), factorized=True, config=config)
            composed = [(each.place, each.size) for each in events if each.part == "composed weights"]
            dense = 4 * 64 * 96
            assert (backward := [size for place, size in composed if place == "backward"])
            assert sum(size for place, size in composed if place == "forward") == dense * keep
            assert sum(backward) == -dense * keep

    def test_per_layer_updates_free_gradients_only_where_graphs_end(self):
        gradients = {}
        for by_layers in (False, True):
            now = most = 0
            for event in events_of(Two(), torch.empty(8, 64), per_layer=True, by_layers=by_layers):
                now += event.size if event.part == "gradients" else 0
                most = max(most, now)
            assert now == 0
            gradients[by_layers] = most
        assert gradients == {False: 2 * 4 * 64 * 96, True: 4 * 64 * 96}

    @pytest.mark.parametrize(("vector", "tokens"), [(16, 300), (8, 300), (16, 256)])
    def test_kernels_for_many_tokens_copy_and_write(self, vector, tokens):
        """The vector support's on GPUs: x^T, the products with blocks of S, sums of each 2048 tokens."""
        ops, rows, columns, groups = torch.ops.slcompile, 64, 48, 5

        def step(x, grad, B, A, values, seed):
            forward = ops.linear_factored(x, [x[:, :8]], [B], [values], [seed], [None], False, vector)
            backward = ops.linear_factored(grad, [x[:, :8]], [A], [values], [seed], [None], True, vector)
            return *forward, *backward, ops.values_grad(grad, x, values, seed, vector)

        shapes = ((tokens, columns), (tokens, rows), (rows, 8), (8, columns), (rows, groups))
        inputs = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
        graph = make_fx(step)(*inputs, torch.empty(1, dtype=torch.int64, device="meta")).graph
        nodes = [node for node in graph.nodes if str(node.target).startswith("slcompile.")]
        x_T, z, sums = 2 * tokens * columns, 2 * tokens * rows * groups // vector, 4 * rows * groups
        is_many = vector == 16 and tokens == 300
        dense = 2 * rows * columns
        assert [workspace(node, "cuda") for node in nodes] == ([x_T, z, x_T + sums] if is_many else [0, 0, dense])
        assert [workspace(node, "cpu") for node in nodes] == [0, 0, 0]

    @pytest.mark.parametrize("vector", [16, 1])
    @pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "stack"])
    def test_columns_that_composing_keeps_on_a_cpu(self, lead, vector):
        ops, rows, columns, groups = torch.ops.slcompile, 40, 48, 5

        def step(B, A, values, seed, grad):
            weight = ops.compose(B, A, values, seed, 2.0, None, vector)
            return weight, *ops.compose_backward(grad, B, A, values, seed, 2.0, vector)

        shapes = ((rows, 8), (8, columns), (rows, groups))
        B, A, values = (torch.randn(*lead, *shape) for shape in shapes)
        inputs = (B, A, values, torch.tensor([7]), torch.randn(*lead, rows, columns))
        graph = make_fx(step, tracing_mode="fake")(*inputs).graph
        estimated = {kept_on_cpu(node) for node in graph.nodes} - {None}
        before = kept_bytes()
        step(*inputs)
        assert sum(size for *_, size in estimated) == kept_bytes() - before
        assert bool(estimated) == (vector > 1)

    @pytest.mark.slow
    def test_a_parameter_with_two_names_is_counted_once(self, report):
        tied = estimate_memory(llama(tie_word_embeddings=True), kwargs=IDS, config=CONFIG, device="cpu")
        assert report.dense.largest["parameters"] - tied.dense.largest["parameters"] == 4 * 1000 * 128
        assert report.dense.largest["gradients"] - tied.dense.largest["gradients"] == 4 * 1000 * 128


class TestRepeating:
    @pytest.mark.long
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_repeated_layers_are_what_their_own_graphs_are(self, device, monkeypatch):
        settings = {"kwargs": IDS, "config": CONFIG, "device": device, "optimizer": "adamw8bit", "per_layer": True}
        short = estimate_memory(llama(6), **settings)
        assert (short.layers, short.captured_layers) == (6, 4)
        monkeypatch.setattr(f"{ESTIMATE}.PROOF_LAYERS", 5)  # 6 are few then
        whole = estimate_memory(llama(6), **settings)
        assert (whole.layers, whole.captured_layers) == (6, 6)
        assert short.variants() == whole.variants()

    @pytest.mark.slow
    def test_layers_that_differ_are_all_captured(self, monkeypatch):
        depths = []
        kinds = [1000 * (index == 3) for index in range(6)]

        def events(graphs, plan):
            return graphs

        def captured(model, call, dtype, device, config):
            depth = len(model.model.layers)
            depths.append(depth)
            return [
                Event("forward", index, "temporaries", sign * (8 + kinds[index]))
                for index in range(depth)
                for sign in (1, -1)
            ]

        monkeypatch.setattr(f"{ESTIMATE}.capture", captured)
        monkeypatch.setattr(f"{ESTIMATE}.step_events", events)
        report = estimate_memory(llama(6), kwargs=IDS, config=CONFIG)
        assert depths == [3, 4, 6, 3, 4, 6]
        assert report.dense.largest["temporaries"] == 1008

    def test_the_middle_layer_is_repeated_in_both_directions(self):
        events = [
            Event(place, layer, "activations", 1)
            for place, order in (("forward", (0, 1, 2)), ("backward", (2, 1, 0)))
            for layer in order
        ]
        layers = [(each.place, each.layer) for each in repeated(events, 5)]
        assert layers == [("forward", n) for n in range(5)] + [("backward", n) for n in reversed(range(5))]


@pytest.fixture(scope="module")
def report():
    return estimate_memory(llama(), kwargs=IDS, config=CONFIG, device="cpu", optimizer="adamw")


class TestReport:
    @pytest.mark.slow
    def test_parts_add_up(self, report):
        for usage in report.variants().values():
            assert sum(usage.at_peak.values()) == usage.peak == max(usage.places.values())
            assert usage.places[usage.place] == usage.peak
            assert all(usage.at_peak[part] <= usage.largest[part] for part in PARTS)
        assert report.peak == report.sltrain.peak

    def test_parameters_gradients_and_state_are_those_of_the_model(self, report):
        dense = LlamaForCausalLM(llama())
        model = slcompile.factorize_(LlamaForCausalLM(llama()), CONFIG)
        values = sum(each.values.numel() for each in slcompile.factors(model).values())
        counts = {"dense": dense, "sltrain": model}
        counts = {name: sum(p.numel() for p in each.parameters()) for name, each in counts.items()}
        counts["low rank"] = counts["sltrain"] - values
        for name, usage in report.variants().items():
            assert usage.parameter_count == counts[name]
            assert usage.largest["parameters"] == usage.largest["gradients"] == 4 * counts[name]
            assert usage.largest["optimizer state"] == 8 * counts[name]
        assert report.low_rank.largest["indices"] == 0

    def test_text_and_json_say_the_same(self, report):
        text, data = str(report), report.to_dict()
        assert max(map(len, text.splitlines())) <= 120
        assert data["variants"]["sltrain"]["peak"] == report.peak
        assert f"{report.peak / 1e6:,.2f}" in text
        assert f"the peak of sltrain is in: {data['variants']['sltrain']['place']}" in text

    @pytest.mark.slow
    def test_a_module_is_left_as_it_is_and_found_by_its_graph(self, block, batch):
        before = {name: each.clone() for name, each in block.state_dict().items()}
        report = estimate_memory(block, (batch[0],), config=slcompile.SLConfig(rank=4), device="cpu")
        assert type(block.up) is nn.Linear
        assert all(torch.equal(each, before[name]) for name, each in block.state_dict().items())
        # mix is no Linear's weight: only the graph shows that a matmul reads it.
        converted = slcompile.factorize_(block, slcompile.SLConfig(rank=4), example_args=(batch[0],))
        assert "mix" in slcompile.factors(converted)
        assert report.sltrain.parameter_count == sum(each.numel() for each in converted.parameters())
        assert report.layers is None

    @pytest.mark.slow
    def test_bfloat16_halves(self, report):
        half = estimate_memory(llama(), kwargs=IDS, config=CONFIG, device="cpu", dtype=torch.bfloat16)
        assert 2 * half.dense.largest["parameters"] == report.dense.largest["parameters"]
        assert 2 * half.sltrain.largest["gradients"] == report.sltrain.largest["gradients"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"optimizer": "adam8bit"}, "optimizer got 'adam8bit', did you mean 'adamw8bit'"),
            ({"device": "tpu"}, "device got 'tpu'.*; allowed: cpu, cuda"),
            ({"compiled": "layer"}, "compiled got 'layer', did you mean 'layers'"),
            ({"dtype": torch.int8}, "dtype must be a floating-point torch.dtype, got torch.int8"),
            ({"dtype": "bfloat16"}, "dtype must be a floating-point torch.dtype, got 'bfloat16'"),
            ({"config": slcompile.SLConfig(rank=500)}, "rank"),
        ],
    )
    def test_refuses(self, changes, message):
        with pytest.raises(ValueError, match=message):
            estimate_memory(llama(), **({"kwargs": IDS, "config": CONFIG} | changes))

    @pytest.mark.slow
    def test_a_model_that_dynamo_gave_up_compiling(self):
        compiled = torch.compile(Two(), backend="eager", dynamic=False)
        with torch._dynamo.config.patch(recompile_limit=1):
            for tokens in (2, 3, 4):
                compiled(torch.randn(tokens, 64))
        report = estimate_memory(Two(), (torch.empty(8, 64),), config=CONFIG, device="cpu")
        assert report.dense.parameter_count == 2 * 64 * 96

    def test_refuses_what_it_cannot_estimate(self):
        with pytest.raises(ValueError, match="got a factorized one"):
            estimate_memory(slcompile.factorize_(Two(), CONFIG), (torch.empty(8, 64),))
        with pytest.raises(ValueError, match="with num_hidden_layers, got dict"):
            estimate_memory({})
        frozen = Two().requires_grad_(False)
        with pytest.raises(ValueError, match="frozen"):
            estimate_memory(frozen, (torch.empty(8, 64),))
        with pytest.raises(ValueError, match="For a frozen base leave requires_grad as it is"):
            estimate_memory(frozen, (torch.empty(8, 64),), config=slcompile.SLConfig(rank=4, base="frozen"))
        with pytest.raises(ValueError, match="model got 'llama-7', did you mean 'llama-7b'"):
            models.known_config("llama-7")
        with pytest.raises(ValueError, match="path of the configuration must be a file or a directory"):
            models.hf_config("no/such/file.json")
