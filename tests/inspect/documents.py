"""Documents of a LLaMA-like model of any depth, as the page shows them."""

from __future__ import annotations

from typing import Any

from slcompile.inspect.explanation import Explanation
from slcompile.inspect.graph_diff import GraphDiff, Link
from slcompile.inspect.nodes import SIDES, Node
from slcompile.inspect.rows import Break, Change, MatmulRow, PassRow, Summary

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
HOSTILE = "</script><img src=x onerror=window.hit=1>"


def node(name: str, target: str, inputs: list[str], module: list[list[str]], status: str = "kept", **more: Any) -> dict:
    fields = {
        "id": name,
        "op": "call_function",
        "target": target,
        "args": f"({', '.join(inputs)})",
        "inputs": inputs,
        "shape": "[2048, 512]",
        "dtype": "float32",
        "module": module,
        "status": status,
        "from": [] if status in ("new", "removed") else [name],
        "weight": "",
        "source": "modeling_llama.py:252 in forward: hidden_states = self.norm(hidden_states)",
    }
    return {**fields, **more}


def parameter(weight: str, status: str = "kept") -> dict:
    name = "p_" + weight.replace(".", "_")
    return node(name, name, [], [], status, op="placeholder", weight=weight, args="", source="")


def graphs(layers: int, elementwise: int) -> tuple[list[dict], list[dict]]:
    """Before and after: each projection's weight becomes a compose of three factors and a seed."""
    sides: dict[str, list[dict]] = {"before": [], "after": []}
    weights: dict[str, list[dict]] = {"before": [], "after": []}
    root = [["", "LlamaForCausalLM"], ["model", "LlamaModel"]]
    table = parameter("model.embed_tokens.weight")
    ids = node("input_ids", "input_ids", [], [], op="placeholder", shape="[4, 512]", dtype="int64", source="")
    embedding = [["model.embed_tokens", "Embedding"]]
    for side in ("before", "after"):
        weights[side] += [table, ids]
        sides[side].append(node("embedding", "aten.embedding.default", [table["id"], "input_ids"], root + embedding))

    def both(name: str, target: str, inputs: list[str], module: list[list[str]]) -> str:
        for side in sides.values():
            side.append(node(name, target, inputs, module))
        return name

    def project(weight: str, hidden: str, module: list[list[str]]) -> str:
        stem = weight.replace(".", "_")
        dense = parameter(f"{weight}.weight", "removed")
        factors = [parameter(f"{weight}.weight_sl.{name}", "new") for name in ("B", "A", "values", "seed")]
        weights["before"].append(dense)
        weights["after"] += factors
        sides["before"].append(node(f"t_{stem}", "aten.t.default", [dense["id"]], module, "removed"))
        names = [each["id"] for each in factors]
        sides["after"].append(node(f"compose_{stem}", "slcompile.compose.default", names, module, "new"))
        sides["after"].append(node(f"t_{stem}_1", "aten.t.default", [f"compose_{stem}"], module, "new"))
        sides["before"].append(node(f"mm_{stem}", "aten.mm.default", [hidden, f"t_{stem}"], module, "rewritten"))
        sides["after"].append(node(f"mm_{stem}", "aten.mm.default", [hidden, f"t_{stem}_1"], module, "rewritten"))
        return f"mm_{stem}"

    hidden = "embedding"
    for layer in range(layers):
        path = f"model.layers.{layer}"
        module = root + [[path, "LlamaDecoderLayer"]]
        norm = both(f"norm_{layer}", "aten.rms_norm.default", [hidden], module)
        attention = module + [[f"{path}.self_attn", "LlamaAttention"]]
        heads = [
            project(f"{path}.{name}", norm, attention + [[f"{path}.{name}", "Linear"]]) for name in PROJECTIONS[:3]
        ]
        mixed = both(f"sdpa_{layer}", "aten.scaled_dot_product_attention.default", heads, attention)
        out = project(f"{path}.{PROJECTIONS[3]}", mixed, attention + [[f"{path}.{PROJECTIONS[3]}", "Linear"]])
        hidden = both(f"add_{layer}", "aten.add.Tensor", [hidden, out], module)
        mlp = module + [[f"{path}.mlp", "LlamaMLP"]]
        up = project(f"{path}.{PROJECTIONS[4]}", hidden, mlp + [[f"{path}.{PROJECTIONS[4]}", "Linear"]])
        for index in range(elementwise):
            up = both(f"mul_{layer}_{index}", "aten.mul.Tensor", [up], mlp)
        hidden = both(f"add_{layer}_1", "aten.add.Tensor", [hidden, up], module)
    for side, nodes in sides.items():
        nodes.append(node("output", "output", [hidden], [], op="output", shape="", dtype="", source=""))
        weights[side] += nodes
    return weights["before"], weights["after"]


def diff_document(before: list[dict], after: list[dict], name: str = "graph 0, captured") -> dict:
    return {"name": name, "before": {"nodes": before}, "after": {"nodes": after}}


def matmul(name: str, mm: str) -> dict:
    return {
        "name": f"{name}.weight",
        "shape": [512, 512],
        "tokens": 2048,
        "graph": 0,
        "decision": "replaced",
        "reason": "",
        "detail": "",
        "rank": 128,
        "density": 0.03,
        "nonzeros": 7864,
        "lowering": "composed",
        "costs": {"composed": 0.0012, "factored": 0.0019},
        "bytes": {"before": 4194304, "after": 2222981},
        "flops": {"before": 3221225472, "after": 2900000000},
        "source": "modeling_llama.py:252 in forward: query_states = self.q_proj(hidden_states)",
        "node": mm,
    }


def explanation(layers: int = 4, elementwise: int = 1) -> dict:
    before, after = graphs(layers, elementwise)
    names = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in PROJECTIONS]
    rows = [matmul(name, f"mm_{name.replace('.', '_')}") for name in names]
    head = {**matmul("lm_head", ""), "decision": "left", "reason": "excluded", "rank": None, "density": None}
    head |= {"detail": "by the include and exclude patterns", "nonzeros": None, "lowering": "", "costs": {}}
    head |= {"shape": [32000, 512], "bytes": {"before": 262144000, "after": 262144000}}
    rewrite = {"graph": 0, "stage": "captured", "name": "parameterize_weights", "seconds": 0.0123, "changed": True}
    rewrite |= {"created": len(names), "erased": 3, "replaced": len(names), "left": 1}
    rewrite["diff"] = "  ...\n  norm_0\n- t = aten.t(p_weight)\n+ compose = slcompile.compose(B, A)\n  mm"
    idle = {**rewrite, "stage": "joint", "name": "fuse_weight_grads", "changed": False, "created": 0, "erased": 0}
    idle |= {"replaced": 0, "left": 0, "diff": ""}
    return {
        "model": "LlamaForCausalLM",
        "versions": {"slcompile": "0.1.0", "torch": "2.13.0"},
        "config": {"rank": 0.25, "density": 0.03, "exclude": ["*lm_head*", "*embed*"]},
        "summary": {
            "matmuls": {"replaced": len(names), "total": len(names) + 1},
            "parameters": {"before": 5261568, "after": 3447040},
            "bytes": {"before": 84185088, "after": 55152640},
            "flops": {"before": 8_200_000_000, "after": 9_100_000_000},
        },
        "matmuls": [*rows, head],
        "passes": [rewrite, idle],
        "breaks": [{"reason": "call to print", "source": "model.py:12 in forward"}],
        "graphs": [diff_document(before, after), diff_document(after, after, "graph 0, joint")],
    }


def written(document: dict) -> dict:
    """A document as the package writes it: what stands in a test by hand is made the package's own rows and nodes."""
    if "graphs" not in document:
        return diff(document).to_dict()
    summary = document["summary"]
    totals = [Change(**summary[key]) for key in ("parameters", "bytes", "flops")]
    return Explanation(
        document["model"],
        document["versions"],
        document["config"],
        Summary(**summary["matmuls"], **dict(zip(("parameters", "bytes", "flops"), totals, strict=True))),
        tuple(
            MatmulRow(**{**row, "shape": tuple(row["shape"])} | {key: Change(**row[key]) for key in ("bytes", "flops")})
            for row in document["matmuls"]
        ),
        tuple(PassRow(**row) for row in document["passes"]),
        tuple(Break(**row) for row in document["breaks"]),
        tuple(map(diff, document["graphs"])),
    ).to_dict()


def diff(document: dict) -> GraphDiff:
    def made(given: dict) -> Node:
        fields = {key: value for key, value in given.items() if key != "from"}
        fields |= {"inputs": tuple(given["inputs"]), "origins": tuple(given["from"])}
        return Node(**{**fields, "module": tuple((path, kind) for path, kind in given["module"])})

    sides = [tuple(map(made, document[side]["nodes"])) for side in SIDES]
    return GraphDiff(document["name"], *sides, tuple(Link(**each) for each in document.get("matmuls", ())))
