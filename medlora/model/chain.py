"""A stage's chain of LoRA adapters on one base: add, load, switch, save.

PEFT turns an adapter's name into an attribute and a part of parameter names; `_key` keeps a phase called `0` or `train`
from meaning a layer or a method.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from transformers import PreTrainedModel

from medlora.artifacts.adapter_checks import ROWS, Checked, check_adapter
from medlora.artifacts.adapters import find_adapter
from medlora.config.model import LoraSettings
from medlora.errors import InputError
from medlora.kernels.lora_forward import lighten
from medlora.model.adapter_files import read_config, read_tensors, write_adapter
from medlora.model.targets import (
    adopt_embeddings,
    check_fit,
    choose_rows,
    choose_targets,
    decoder_name,
    has_turned_weights,
)
from medlora.tokens.tokenizer import Tokenizer

Model: TypeAlias = PreTrainedModel | PeftModel
Number = TypeVar("Number", int, float)


def _get_base(model: Model) -> PreTrainedModel:
    """The model below the adapters."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def _key(name: str) -> str:
    return f"adapter-{name}"


def add_adapter(
    model: Model, name: str, lora: LoraSettings, train_token_ids: Sequence[int] = (), seed: int = 0
) -> PeftModel:
    """Add a new adapter on top of the active ones and make it the only trainable part of the model.

    It sits on linear layers of the text decoder alone; `train_token_ids` are the vocabulary rows it trains too, from
    where the active adapters left them. One seed gives the same initial bytes after any earlier work.
    Raises InputError for a target that the decoder does not have, a name that is taken, or DoRA on int8 weights on CPU.
    """
    base = _get_base(model)
    below = _active(model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes a fraction, too
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        lora_dropout=lora.dropout,
        fan_in_fan_out=has_turned_weights(base),
        target_modules=choose_targets(base, lora.targets),
        trainable_token_indices=choose_rows(base, train_token_ids),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            model = _inject(model, name, config)
        except ValueError as error:
            raise InputError(f"lora: {type(base).__name__} takes no such adapter: {error}") from error
    for wrapper in _token_wrappers(model).values():
        _inherit_rows(wrapper, below, _key(name))
    _switch(model, [*below, _key(name)], _key(name))
    return model.eval()


def load_chain(model: Model, adapters: Sequence[tuple[str, str | Path]], trainable: str | None = None) -> Model:
    """Put saved adapters (name, folder) on one base, all of them active and all frozen but the one named `trainable`.

    The model comes back in eval mode, without adapters as it was. Raises InputError for an adapter that is none, holds
    more than its own tensors, or is of another base.
    """
    for name, place in adapters:
        folder = find_adapter(place)
        checked = check_adapter(folder)
        config, tensors = read_config(folder), read_tensors(folder)
        config.inference_mode = False
        config.base_model_name_or_path = None  # PEFT would warn that the base has another name where it was trained
        base = _get_base(model)
        exact = check_fit(base, folder, tensors, checked)
        adopt_embeddings(base, folder, config, tensors)
        try:
            model = (
                _inject(model, name, config) if exact is None else _inject_exact(model, name, config, checked, exact)
            )
        except ValueError as error:
            raise InputError(f"{folder}: this adapter does not fit the base: {error}") from error
        _set_tensors(model, name, folder, tensors)
    if adapters:
        activate(model, [name for name, _ in adapters], trainable)
        model.eval()  # PEFT leaves new layers in training mode, where their dropout changes every plain forward pass
    return model


def activate(model: Model, names: Sequence[str], trainable: str | None = None) -> None:
    """Switch to the stage of exactly these adapters, in chain order; none of them is the plain base.

    Nothing is trainable but the adapter named `trainable`. Where two adapters hold the same vocabulary rows, the later
    one counts. Raises KeyError for an adapter that the model does not hold.
    """
    held = model.peft_config if isinstance(model, PeftModel) else {}
    for name in [*names, trainable]:
        if name is not None and _key(name) not in held:
            raise KeyError(name)
    if isinstance(model, PeftModel):
        _switch(model, [_key(name) for name in names], None if trainable is None else _key(trainable))


def save_adapter(
    model: Model,
    name: str,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    base_model_name: str | None = None,
) -> None:
    """Write one adapter as an ordinary PEFT folder of deterministic bytes, the tokenizer beside it when given."""
    model = cast(PeftModel, model)
    key = _key(name)
    absent = _absent_rows(model, key)
    state = {f"{row}.{key}": empty for row, empty in absent.items()}
    state |= {name: p.detach() for name, p in model.named_parameters() if key in name.split(".")}
    # Without the last argument PEFT adds the whole embedding after a resize, and asks the hub about it.
    tensors = get_peft_model_state_dict(model, state, adapter_name=key, save_embedding_layers=False)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in absent}
    config = model.peft_config[key]
    assert isinstance(config, LoraConfig)
    write_adapter(Path(folder), config, tensors, base_model_name)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def load_adapter_weights(model: Model, name: str, folder: str | Path) -> None:
    """Load a saved adapter's tensors into the adapter of that name; raises InputError when they do not fit it."""
    folder = find_adapter(folder)
    check_adapter(folder)
    _set_tensors(cast(PeftModel, model), name, folder, read_tensors(folder))


def _set_tensors(model: PeftModel, name: str, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    key = _key(name)
    absent = _absent_rows(model, key)
    try:
        result = set_peft_model_state_dict(model, {**absent, **tensors}, adapter_name=key)
    except (RuntimeError, KeyError) as error:
        raise InputError(f"{folder}: this adapter does not fit the base or its own config: {error}") from error
    # A tied head names its rows once more; named_parameters has them once.
    own = {name for name, _ in model.named_parameters() if key in name.split(".")}
    # PEFT makes the class of this pair within the function that returns it.
    missing = sorted(own & set(result.missing_keys))  # type: ignore[attr-defined]
    strange = set(result.unexpected_keys)  # type: ignore[attr-defined]
    unexpected = sorted(strange - set(absent) - {f"{row}.{key}" for row in absent})
    if missing or unexpected:
        wrong = f"lacks {missing[0]}" if missing else f"holds {unexpected[0]}, which has no place there"
        raise InputError(f"{folder}: this adapter does not fit the base or its own config: it {wrong}")


def _inject(model: Model, name: str, config: LoraConfig) -> PeftModel:
    if config.use_dora and any(p.dtype == torch.int8 and p.device.type == "cpu" for p in model.parameters()):
        # Dequantizing for DoRA's norms, PEFT 0.21 moves the weights and bitsandbytes loses their scales on the way.
        raise InputError(
            f"adapter {name!r}: DoRA (lora.dora) on an int8 base needs a GPU; on CPU set base.quantization to nf4 or none"
        )
    if isinstance(model, PeftModel) and _key(name) in model.peft_config:
        raise InputError(f"adapter {name!r} is on the model already; the names of a chain must differ")
    with warnings.catch_warnings():
        # PEFT asks for a property that transformers has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # PEFT warns that it corrects this flag of the config where the layer is of the other kind.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        if isinstance(model, PeftModel):
            model.add_adapter(_key(name), config)
        else:
            model = get_peft_model(model, config, adapter_name=_key(name))
    lighten(model)
    return model


_PATTERNS = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "r", "lora_alpha"),
)


def _inject_exact(model: Model, name: str, config: LoraConfig, checked: Checked, layers: list[str]) -> PeftModel:
    """Inject an adapter by the layers' names: PEFT would match the config's patterns by an engine that can hang."""
    ranks = {layer: checked.targets.find_rank(layer) for layer in layers}
    alphas = {layer: checked.targets.find_alpha(layer) for layer in layers}
    plain = copy.copy(config)
    plain.target_modules, plain.exclude_modules = set(layers), None  # type: ignore[assignment]  # PEFT makes a set of it
    plain.layers_to_transform = plain.layers_pattern = None
    plain.r = _most_common(ranks.values())
    plain.lora_alpha = _most_common(alphas.values())  # type: ignore[assignment]  # PEFT takes a fraction, too
    plain.rank_pattern = {layer: rank for layer, rank in ranks.items() if rank != plain.r}
    plain.alpha_pattern = {layer: alpha for layer, alpha in alphas.items() if alpha != plain.lora_alpha}
    model = _inject(model, name, plain)
    held = model.peft_config[_key(name)]
    for field in _PATTERNS:  # so that it is saved as it was
        setattr(held, field, getattr(config, field))
    return model


def _most_common(values: Iterable[Number]) -> Number:
    return Counter(values).most_common(1)[0][0]


def _active(model: Model) -> list[str]:
    layer = next((module for module in model.modules() if isinstance(module, LoraLayer)), None)
    return [] if layer is None or layer.disable_adapters else list(layer.active_adapters)


def _switch(model: PeftModel, keys: list[str], trainable: str | None) -> None:
    """PEFT's own set_adapter refuses two adapters with vocabulary rows and makes all that it activates trainable."""
    tuner = cast(BaseTuner, model.base_model)
    if keys:
        tuner.enable_adapter_layers()
        tuner.active_adapter = keys
        model.active_adapter = keys[-1]
        for module in model.modules():
            if isinstance(module, TrainableTokensWrapper):
                module.set_adapter(_row_owners(module, keys))
            elif isinstance(module, AuxiliaryTrainingWrapper):
                module.set_adapter([key for key in keys if key in module._adapters][-1:])
            elif isinstance(module, LoraLayer):
                module.set_adapter(keys)
    else:
        tuner.disable_adapter_layers()
    decoder = f"base_model.model.{decoder_name(_get_base(model))}."
    for name, parameter in model.named_parameters():
        # An adapter from elsewhere may sit on a vision tower too, which text never gives a gradient.
        reached = ".lora_" not in name or name.startswith(decoder)
        parameter.requires_grad_(trainable is not None and trainable in name.split(".") and reached)


def _token_wrappers(model: PeftModel) -> dict[str, TrainableTokensWrapper]:
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainableTokensWrapper)}


def _absent_rows(model: PeftModel, key: str) -> dict[str, torch.Tensor]:
    """Empty stand-ins for the vocabulary rows that this adapter does not have.

    PEFT 0.21 asks every embedding with trained rows for those of the adapter it saves or loads. It raises KeyError when
    only another adapter of the chain has some.
    """
    wrappers = _token_wrappers(model).items()
    lacking = [name for name, wrapper in wrappers if key not in wrapper.token_adapter.token_indices]
    return {f"{name}.{ROWS}": torch.empty(0) for name in lacking}


def _row_owners(wrapper: TrainableTokensWrapper, keys: list[str]) -> list[str]:
    """The active adapters whose rows count: a later adapter with the rows of an earlier one replaces it."""
    owners: list[str] = []
    taken: set[int] = set()
    for key in reversed(keys):
        rows = set(wrapper.token_adapter.token_indices.get(key, ()))
        if rows & taken and rows - taken:
            raise InputError(
                f"adapter {key.removeprefix(_key(''))!r}: a later adapter of the chain trains some of its vocabulary "
                "rows again but not all; train all of them or none"
            )
        if rows - taken:
            owners.insert(0, key)
        taken |= rows
    return owners


@torch.no_grad()
def _inherit_rows(wrapper: TrainableTokensWrapper, below: list[str], key: str) -> None:
    """Start an adapter's vocabulary rows from where the adapters below left them instead of from the base."""
    indices, deltas = wrapper.token_adapter.token_indices, wrapper.token_adapter.trainable_tokens_delta
    place = {token: position for position, token in enumerate(indices.get(key, ()))}
    for earlier in below:
        for position, token in enumerate(indices.get(earlier, ())):
            if token in place:
                deltas[key][place[token]] = deltas[earlier][position]
