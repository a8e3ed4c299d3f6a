"""Sparse-plus-low-rank training of any PyTorch model by one string: ``torch.compile(model, backend="sltrain")``."""

from slcompile import optim
from slcompile.benchmark import BenchReport, bench
from slcompile.config import SLConfig
from slcompile.convert.ledger import last_report
from slcompile.export.checkpoint import load_factorized, save_factorized
from slcompile.export.onnx import ExportReport, export_onnx
from slcompile.export.peft import load_peft, save_peft
from slcompile.export.safetensors import save_merged
from slcompile.factorize import factorize_, factors, merge_, merged_state_dict
from slcompile.health import CheckReport, check
from slcompile.inspect.compress import Compression, compress
from slcompile.inspect.explain import explain
from slcompile.inspect.explanation import Explanation
from slcompile.inspect.graph_diff import GraphDiff, graph_diff
from slcompile.inspect.spectra import Spectra, spectra
from slcompile.inspect.suggest import SuggestedRank, Suggestion, suggest
from slcompile.memory.estimate import estimate_memory
from slcompile.memory.report import MemoryReport
from slcompile.optim.step_limit import StepLimit, limit_steps
from slcompile.passes import Decision, PassReport
from slcompile.rewrite import rewrite
from slcompile.weight.parallelize import parallelize
from slcompile.weight.sharing import share_factors
from slcompile.weight.sl_weight import Factors, SLWeight

__version__ = "0.1.0"

__all__ = [
    "BenchReport",
    "CheckReport",
    "Compression",
    "Decision",
    "Explanation",
    "ExportReport",
    "Factors",
    "GraphDiff",
    "MemoryReport",
    "PassReport",
    "SLConfig",
    "SLWeight",
    "Spectra",
    "StepLimit",
    "SuggestedRank",
    "Suggestion",
    "bench",
    "check",
    "compress",
    "estimate_memory",
    "explain",
    "export_onnx",
    "factorize_",
    "factors",
    "graph_diff",
    "last_report",
    "limit_steps",
    "load_factorized",
    "load_peft",
    "merge_",
    "merged_state_dict",
    "optim",
    "parallelize",
    "rewrite",
    "save_factorized",
    "save_merged",
    "save_peft",
    "share_factors",
    "spectra",
    "suggest",
]
