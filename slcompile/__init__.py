"""Sparse-plus-low-rank training of any PyTorch model by one string: ``torch.compile(model, backend="sltrain")``."""

from slcompile.config import SLConfig
from slcompile.conversion import last_report
from slcompile.export.checkpoint import load_factorized, save_factorized
from slcompile.export.onnx import ExportReport, export_onnx
from slcompile.export.safetensors import save_merged
from slcompile.factorize import factorize_, factors, merge_, merged_state_dict
from slcompile.inspect.explain import explain
from slcompile.inspect.explanation import Explanation
from slcompile.inspect.graph_diff import GraphDiff, graph_diff
from slcompile.memory import MemoryReport, estimate_memory
from slcompile.passes import Decision, PassReport
from slcompile.rewrite import rewrite
from slcompile.spectra import Spectra, spectra
from slcompile.step_limit import StepLimit, limit_steps
from slcompile.weight import Factors, SLWeight

__version__ = "0.1.0"

__all__ = [
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
    "estimate_memory",
    "explain",
    "export_onnx",
    "factorize_",
    "factors",
    "graph_diff",
    "last_report",
    "limit_steps",
    "load_factorized",
    "merge_",
    "merged_state_dict",
    "rewrite",
    "save_factorized",
    "save_merged",
    "spectra",
]
