"""Which layers do the names of a LoRA configuration mean? Every name must match a layer, or it is refused.

PEFT ignores a name that matches nothing as long as another name matches. A misspelt layer would then never be trained,
without a word.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence

from peft import LoraConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from peft.utils.other import get_pattern_key
from torch import nn

from decaf_lora.errors import UserError, nearest


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers of a model, GPT-2's `Conv1D` among them."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]


def meant(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """`config` with its targets in the form that PEFT takes.

    Unset targets become PEFT's defaults for the model's family, and a single name becomes a collection of one.

    Raises:
        UserError: a name, pattern or block matches nothing (the message gives the nearest names), the family has no
            default targets, or a module cannot be trained in full.
    """
    out = copy.deepcopy(config)
    every = [name for name, _ in model.named_modules() if name]
    for field in ("target_modules", "exclude_modules"):
        setattr(out, field, _names(every, getattr(out, field), field, model))
    if out.target_modules is None:
        out.target_modules = _family_default(model)
    if isinstance(out.modules_to_save, str):
        out.modules_to_save = [out.modules_to_save]
    for name in out.modules_to_save or []:
        if not name or not any(module.endswith(name) for module in every):
            raise _matches_nothing("modules_to_save", name, every, model)
    layers = _adaptable(every, out)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(out, field) or {}:
            if not any(get_pattern_key([pattern], layer) == pattern for layer in layers):
                raise _matches_nothing(field, pattern, layers, model)
    _check_blocks(out, layers)
    out.modules_to_save = _outermost(model, out.modules_to_save)
    _check_whole(model, out, layers)
    return out


def _outermost(model: nn.Module, names: Sequence[str] | None) -> list[str] | None:
    """`names` of the modules to train in full, without those that lie within another one of them.

    Raises UserError for a name that means both a module and another one inside it: PEFT cannot wrap both.
    """
    if not names:
        return None
    every = [name for name, _ in model.named_modules(remove_duplicate=False)]
    found = {name: [module for module in every if module.endswith(name)] for name in dict.fromkeys(names)}
    for name, modules in found.items():
        pairs = [(outer, inner) for outer in modules for inner in modules if inner.startswith(f"{outer}.")]
        if pairs:
            raise UserError(
                f"lora.modules_to_save: {name} means modules within one another ({pairs[0][0]} and {pairs[0][1]}); "
                "give the longer name of the one that is meant."
            )
    all_of = {name: set(modules) for name, modules in found.items()}
    return [name for name, own in all_of.items() if not _lies_within(own, all_of, name)]


def _check_whole(model: nn.Module, config: LoraConfig, layers: Sequence[str]) -> None:
    """Raises UserError for a module that cannot be trained in full, or that the targets `layers` adapt as well."""
    names = config.modules_to_save or []
    # For PEFT a name excludes every layer whose path has the name as one of its parts. But a module is trained in full
    # if the text of its path ends with the name, which also happens in the middle of a part.
    left = [layer for layer in layers if not any(re.match(rf"(^|.*\.){name}($|\..*)", layer) for name in names)]
    for module, part in model.named_modules():
        if not any(module.endswith(name) for name in names):
            continue
        parameters = list(part.parameters())
        if not parameters or not all(p.is_floating_point() for p in parameters):
            what = "its weights are quantized" if parameters else "it has no parameters"
            raise UserError(f"lora.modules_to_save: {module} cannot be trained in full, {what}; give a longer name.")
        if any(layer == module or layer.startswith(f"{module}.") for layer in left):
            raise UserError(
                f"lora.modules_to_save: {module} is, or holds, a layer of lora.target_modules, and both would train "
                "it; give a longer name, or leave it out of one of them."
            )


def _lies_within(own: set[str], all_of: dict[str, set[str]], name: str) -> bool:
    outer = set().union(*(modules for other, modules in all_of.items() if other != name))
    return all(any(module.startswith(f"{o}.") for o in outer) for module in own)


def _check_blocks(config: LoraConfig, layers: Sequence[str]) -> None:
    """Raises UserError if `layers_to_transform` names a block that holds none of the targets `layers`."""
    asked = config.layers_to_transform
    if asked is None:
        return
    # For PEFT the first number in a layer's name is its block.
    found = {int(next(part for part in name.split(".") if part.isdecimal())) for name in layers if _has_number(name)}
    missing = [i for i in ([asked] if isinstance(asked, int) else asked) if i not in found]
    if missing:
        blocks = f"they lie in blocks {min(found)} to {max(found)}" if found else "they lie in no numbered blocks"
        raise UserError(
            f"lora.layers_to_transform: block {missing[0]} holds no layer of lora.target_modules; {blocks}."
        )


def _has_number(name: str) -> bool:
    return any(part.isdecimal() for part in name.split("."))


def _family_default(model: nn.Module) -> list[str] | str:
    """PEFT's default targets for the model's family. Raises UserError if PEFT has none."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family in PEFT_DEFAULTS:
        targets = PEFT_DEFAULTS[family]
        return targets if isinstance(targets, str) else sorted(targets)
    short = list(dict.fromkeys(name.rpartition(".")[2] for name in linear_layers(model)))
    raise UserError(
        f"lora.target_modules: unset, and there is no default for {type(model).__name__}; name some of its linear "
        f"layers: {', '.join(short[:12])}."
    )


def _names(every: list[str], given: str | Iterable[str] | None, field: str, model: nn.Module) -> str | set[str] | None:
    """`given` once every name in it is known to match. A single name that matches no full path becomes a set."""
    if not given:
        return None
    if isinstance(given, str):
        if given.lower() == "all-linear" or any(re.fullmatch(given, module) for module in every):
            return given
        given = [given]
    known = linear_layers(model) if field == "target_modules" else every
    for name in given:
        if not any(_ends(module, name) for module in every):
            raise _matches_nothing(field, name, known, model)
    return set(given)


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _adaptable(every: list[str], config: LoraConfig) -> list[str]:
    """The layers among `every` that the targets of `config` name; exclusions are not applied yet."""
    targets = config.target_modules or []
    if isinstance(targets, str):
        return every if targets.lower() == "all-linear" else [m for m in every if re.fullmatch(targets, m)]
    return [module for module in every if any(_ends(module, name) for name in targets)]


def _matches_nothing(field: str, name: str, known: Iterable[str], model: nn.Module) -> UserError:
    short = list(dict.fromkeys(module.rpartition(".")[2] for module in known))
    close = nearest(name, short, 3) or short[:8]
    kind = "module" if field in ("modules_to_save", "exclude_modules") else "linear layer"
    return UserError(
        f"lora.{field}: {name} matches no {kind} of {type(model).__name__}. Nearest names: {', '.join(close)}."
    )
