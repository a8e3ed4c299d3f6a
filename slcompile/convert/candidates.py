"""The weights of a model, gathered with owners, names and uses, and decided on once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, fx, nn

from slcompile.config import SLConfig
from slcompile.convert.eligibility import decide, require_possible_rank
from slcompile.convert.ledger import EXPLICIT
from slcompile.convert.weight_uses import weight_modules
from slcompile.passes.find_matmuls import WeightUse
from slcompile.passes.graph import Decision, PassReport
from slcompile.weight.owners import LiveObjects, owners_among
from slcompile.weight.structure import matrix_shape, weights_in


@dataclass
class Candidate:
    """A dense weight, what holds it, and whether it is to be converted.

    Attributes:
        decision: Its fully qualified name, and the reason why it stays dense, if it does.
        weight: The dense parameter, [rows, columns], [experts, rows, columns] or [out, in, *kernel].
        owners: Every (module, attribute) that holds it.
        use: How it is read.
        config: Its own options, which do not depend on names any more.
    """

    decision: Decision
    weight: nn.Parameter
    owners: list[tuple[nn.Module, str]]
    use: WeightUse
    config: SLConfig

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, or the stack of them, that the weight is."""
        return matrix_shape(self.weight.shape, self.use.convolved)

    @property
    def input_dim(self) -> int:
        """Dimension of the matrix that its matmul contracts."""
        return self.use.input_dim

    @property
    def matrix(self) -> Tensor:
        """The weight's numbers, detached, of ``shape``."""
        return self.weight.detach().reshape(self.shape)

    @property
    def name(self) -> str:
        """Fully qualified name."""
        return self.decision.name

    @property
    def is_chosen(self) -> bool:
        """Whether it is to be converted."""
        return not self.decision.reason


@dataclass
class Candidates:
    """All weights that were asked about, in order."""

    weights: list[Candidate] = field(default_factory=list)

    @property
    def chosen(self) -> list[Candidate]:
        """Those to be converted."""
        return [candidate for candidate in self.weights if candidate.is_chosen]

    @property
    def misshapen(self) -> list[tuple[int, ...]]:
        """Shapes of those that stay dense for their shape alone, under the options."""
        return [each.shape for each in self.weights if each.decision.reason in ("no_saving", "shape")]

    def require_some(self, model: nn.Module, config: SLConfig) -> None:
        """Raises ValueError where none is to be converted, and says why."""
        if self.chosen:
            return
        require_possible_rank(self.misshapen, config)
        if weights_in(model):
            raise ValueError("model is factorized already; call slcompile.merge_ first, to factorize it anew")
        if not self.weights:
            raise ValueError(
                "model has no eligible weight: no product with a parameter was found. slcompile.explain(model, args) "
                "says why layers are not captured"
            )
        number, reasons = len(self.weights), sorted({each.decision.reason for each in self.weights})
        raise ValueError(f"model has no eligible weight; its {number} weights stay dense: {', '.join(reasons)}")

    def report(self) -> PassReport:
        """Returns the decisions, those to be converted as replaced."""
        report = PassReport("weights")
        for candidate in self.weights:
            report.add(candidate.decision, candidate.is_chosen)
        return report


def gather(
    uses: Iterable[tuple[nn.Parameter, WeightUse]],
    config: SLConfig,
    live: LiveObjects,
    *,
    model: nn.Module | None = None,
    rewriting: bool = False,
) -> Candidates:
    """Finds who owns each weight and what it is called, and decides whether it is to be converted.

    Args:
        uses: Weights, and how they are used.
        config: The options.
        live: The objects of the process.
        model: In which names begin, whatever contains it. None: each weight's own outermost module; then weights below
            a model that was factorized explicitly stay as they are.
        rewriting: Whether ``rewrite`` asks, which edits the graph ``model`` itself: only then a weight that a
            GraphModule owns is converted, and only what ``model`` owns is.
    """
    uses = list(uses)
    weights = [weight for weight, _ in uses]
    found = owners_among(model.modules(), weights) if rewriting and model is not None else live.owners(weights)
    result = Candidates()
    for weight, use in uses:
        owners = found[id(weight)]
        modules = [module for module, _ in owners]
        names = _names(weight, modules, live, model)
        decision = decide(names, weight, use, config, modules)
        if model is None and any(EXPLICIT in vars(each) for module in modules for each in live.ancestors(module)):
            decision = replace(decision, reason="explicit", detail="left by an explicit factorize_ of the model")
        elif decision.reason == "" and not rewriting and any(isinstance(module, fx.GraphModule) for module in modules):
            detail = "a GraphModule owns it and reads it itself; use slcompile.rewrite"
            decision = replace(decision, reason="graph_module", detail=detail)
        result.weights.append(Candidate(decision, weight, owners, use, config.at(*names) or config))
    return result


def gather_layers(root: nn.Module, config: SLConfig, live: LiveObjects) -> Candidates:
    """Gathers the weights of a model's layers in training that are likely to be converted sooner or later."""
    uses: dict[int, tuple[nn.Parameter, WeightUse]] = {}
    for _, module, use in weight_modules(root):
        weight = module._parameters.get("weight")
        if weight is not None and module.training:
            uses[id(weight)] = weight, use
    return gather(uses.values(), config, live)


def _names(weight: nn.Parameter, owners: Sequence[nn.Module], live: LiveObjects, model: nn.Module | None) -> list[str]:
    if model is None and not owners:
        return []
    return live.names(model if model is not None else live.root(owners[0])).get(id(weight), [])
