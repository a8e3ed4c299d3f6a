"""transformers: ``from_pretrained`` of factors, and Trainer. Importing this registers the first.

Factors travel as transformers' quantized weights do: ``config.json`` has a ``quantization_config`` of the method
``slcompile``. Without this import transformers says that it does not know the method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from transformers import TrainerCallback
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from slcompile.config import SLConfig, checked_config
from slcompile.convert.ledger import EXPLICIT
from slcompile.export.checkpoint import described_weights, install
from slcompile.factorize import factorize_
from slcompile.models import METHOD, unwrapped
from slcompile.names import SUFFIX
from slcompile.weight.placing import shapes_only
from slcompile.weight.sharing import share_again, sharing
from slcompile.weight.structure import FactorizedWeight, weights_in


@register_quantization_config(METHOD)
class FactorsConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a factorized model: which weights are factorized, and how.

    Args:
        weights: Dense name -> structure, rank, density and so on, as ``save_factorized`` writes them.
    """

    def __init__(self, weights: Mapping[str, Mapping[str, Any]], quant_method: str = METHOD) -> None:
        self.quant_method = cast(Any, quant_method)  # transformers' enum has its own methods only
        self.weights = {name: dict(described) for name, described in weights.items()}


@register_quantizer(METHOD)
class FactorsLoader(HfQuantizer):
    """Puts factorized weights into a model before ``from_pretrained`` fills it."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config of slcompile reads factors that were saved; to factorize a dense model, call "
                "slcompile.factorize_(model, config)"
            )
        install(model, cast(FactorsConfig, self.quantization_config).weights)
        ties = getattr(model, "all_tied_weights_keys", {})  # of transformers 5: else it misses what a file holds once
        for name, first in sharing(model).items():
            parts = cast(FactorizedWeight, model.get_submodule(name + SUFFIX)).sharable
            ties.update({f"{name}{SUFFIX}.{part}": f"{first}{SUFFIX}.{part}" for part in parts})
        # transformers initializes what is not loaded, and reads weights on the way whose buffers it has not filled.
        self._unread = contextlib.ExitStack()
        self._unread.enter_context(shapes_only(weights_in(model)))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._unread.close()
        weights = cast(FactorsConfig, self.quantization_config).weights
        shares = {name: each["shares"] for name, each in weights.items() if "shares" in each}
        share_again({name: model.get_submodule(name + SUFFIX) for name in weights} if shares else {}, shares)
        for weight in weights_in(model):
            weight.loaded()
            if weight.base is not None:
                weight.base.requires_grad_(False)  # transformers makes every floating-point tensor trainable
            if error := weight.misfit(weight.state_dict(), ""):
                raise ValueError(f"the factors do not fit the model: {error}")
        vars(model)[EXPLICIT] = SLConfig()
        config = model.config.quantization_config
        self.remove_quantization_config(model)  # it trains, moves and casts as any model
        model.config.quantization_config = config  # and is saved as it was
        return model

    @property
    def is_trainable(self) -> bool:
        """Whether Trainer may train the model."""
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Returns whether ``save_pretrained`` may write the model."""
        return True


class FactorizeCallback(TrainerCallback):
    """Factorizes and compiles Trainer's model as soon as Trainer is made; its checkpoints are ``from_pretrained``'s.

    A model that Trainer makes anew before it trains (``model_init``) is factorized then.

    Args:
        config: Defaults to ``SLConfig()``.
        compile: Whether to compile the model with ``backend="sltrain"``.
        options: Of that backend, beside and above what ``config`` says: ``{"inductor": {...}}``.

    Trainer raises what ``factorize_`` raises, and ValueError where its arguments ask for another compilation around
    this one. A model that is factorized already is taken as it is.
    """

    def __init__(
        self, config: SLConfig | None = None, *, compile: bool = True, options: Mapping[str, Any] | None = None
    ) -> None:
        self.config, self.compile, self.options = checked_config(config), compile, dict(options or {})

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Factorizes the model; Trainer calls it."""
        if self.compile and args.torch_compile:
            raise ValueError(
                "torch_compile of TrainingArguments must be False: it compiles the model with another backend around "
                "sltrain, which then does nothing. Or give FactorizeCallback compile=False"
            )
        self._factorize(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Factorizes a model that was made since; Trainer calls it."""
        if not weights_in(model):
            self._factorize(model)

    def _factorize(self, model: Any) -> None:
        inner: Any = unwrapped(model)
        if not weights_in(inner):
            factorize_(inner, self.config)
        config: Any = getattr(inner, "config", None)
        if hasattr(config, "save_pretrained"):  # else it is no model of transformers, which Trainer takes, too
            config.quantization_config = FactorsConfig(described_weights(inner))
        if self.compile:
            model.compile(backend="sltrain", options=self.options)
