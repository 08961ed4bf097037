"""Settings of every parameter: its tower and layer, learning rate, decay, and first step.

Patterns of the config are compared with the names of parameters, which are the same under every
strategy and in checkpoints.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from data_prep.errors import ConfigError
from pretrain.model.contrastive_model import ContrastiveModel, Tower
from pretrain.settings.model import Model, TowerSection
from pretrain.settings.optimizer import Optimizer
from pretrain.towers.blocks import blocks_of

TEMPERATURES = "temperatures"  # scales and biases, which belong to no tower
MOST_NAMES = 5  # in a message


@dataclass(frozen=True)
class Traits:
    """Settings of a parameter.

    Attributes:
        part: tower and layer, such as "image" or "image.block_3".
        rate_scale: learning rate, relative to optimizer.learning_rate.
        has_decay: whether a pattern leaves its weight decay as it is.
        from_step: number of steps done before it is trained; None: it is never trained.
    """

    part: str = ""
    rate_scale: float = 1.0
    has_decay: bool = True
    from_step: int | None = 0

    @property
    def label(self) -> str:
        """Name of the parameters of the same part that are trained from the same step on."""
        return f"{self.part}.from_step_{self.from_step}" if self.from_step else self.part


def set_traits(model: ContrastiveModel, config: Optimizer, *, sections: Model) -> dict[str, Traits]:
    """Returns the traits of every parameter, and freezes those that are never trained.

    Calling it again changes nothing.

    Args:
        model: model with its weights.
        config: config section `optimizer`.
        sections: config section `model`.

    Raises:
        ConfigError: if a pattern matches no parameter, or an entry of `unfreeze` opens none. Also
            if a tower has too few blocks, or no parameter is trained at the first step.
    """
    traits = {name: Traits(part=TEMPERATURES) for name, _ in model.named_parameters()}
    traits |= {
        name: each
        for tower, section in sections.towers.items()
        for name, each in _traits_of_tower(model, tower, section, sections.tower_key(tower))
    }
    for objective, module in model.objective_modules.items():
        ids = {id(parameter) for parameter in module.parameters()}
        own = (name for name, parameter in model.named_parameters() if id(parameter) in ids)
        traits |= dict.fromkeys(own, Traits(part=objective))
    for name in matching(config.no_decay, traits, where="optimizer.no_decay"):
        traits[name] = replace(traits[name], has_decay=False)
    for name in matching(config.frozen, traits, where="optimizer.frozen"):
        traits[name] = replace(traits[name], from_step=None)
    _open(traits, config, model, sections)
    closed = {id(p) for name, p in model.named_parameters() if traits[name].from_step != 0}
    for name, parameter in model.named_parameters():
        if traits[name].from_step is None:
            parameter.requires_grad_(False)
        elif not parameter.requires_grad:  # of a frozen tower, or not used by any feature
            traits[name] = replace(traits[name], from_step=None)
    if not any(each.from_step == 0 for each in traits.values()):
        raise ConfigError(
            "optimizer.frozen: no parameter is left to train at the first step; remove a pattern"
        )
    for tower in model.towers.values():
        tower.is_frozen = not any(p.requires_grad for p in tower.backbone.parameters())
        tower.held = list(_closed_parts(tower, closed))
    return traits


def _traits_of_tower(
    model: ContrastiveModel, name: str, section: TowerSection, key: str
) -> Iterator[tuple[str, Traits]]:
    tower, outer = model.towers[name], {id(p): n for n, p in model.named_parameters()}
    heads = [head for each, head in model.heads.items() if each.rpartition(":")[2] == name]
    inner = {id(p): n for n, p in tower.backbone.named_parameters()}
    top = 0 if tower.layers is None else tower.layers.top
    num_frozen = _num_frozen_blocks(tower, section.frozen_blocks, key)
    if section.layer_decay is not None and top < 2:
        raise ConfigError(f"{key}.layer_decay={section.layer_decay}: {_no_blocks(tower)}")
    for parameter in nn.ModuleList([tower, *heads]).parameters():
        layer = top
        if tower.layers is not None and id(parameter) in inner:
            layer = tower.layers.of_parameter[inner[id(parameter)]]
        decay = 1.0 if section.layer_decay is None else section.layer_decay ** (top - layer)
        yield (
            outer[id(parameter)],
            Traits(
                part=name if section.layer_decay is None else f"{name}.{_layer_name(layer, top)}",
                rate_scale=section.learning_rate_scale * decay,
                from_step=None if num_frozen is not None and layer <= num_frozen else 0,
            ),
        )


def _layer_name(layer: int, top: int) -> str:
    return {0: "embeddings", top: "top"}.get(layer, f"block_{layer}")


def _num_frozen_blocks(tower: Tower, frozen_blocks: int | None, key: str) -> int | None:
    """Number of the first blocks that are frozen with the embeddings; None: nothing is."""
    if frozen_blocks is None:
        return None
    where = f"{key}.frozen_blocks={frozen_blocks}"
    num_blocks = tower.layers.num_blocks
    if num_blocks == 0:
        raise ConfigError(f"{where}: {_no_blocks(tower)}")
    if not -num_blocks <= frozen_blocks <= num_blocks:
        raise ConfigError(
            f"{where}: expected {-num_blocks} to {num_blocks}, because the tower has {num_blocks} "
            "blocks"
        )
    return frozen_blocks if frozen_blocks >= 0 else num_blocks + frozen_blocks


def _no_blocks(tower: Tower) -> str:
    return (
        f"expected a tower of equal blocks, found {type(tower.backbone).__name__}, which has none; "
        "remove the key (optimizer.frozen takes patterns of parameters)"
    )


# ------------------------------------------------------------------------------------ patterns


def matching(patterns: Sequence[str], names: Collection[str], *, where: str) -> list[str]:
    """Returns the names that match any of the patterns, in their own order.

    Args:
        patterns: patterns of names.
        names: names of parameters.
        where: config key of the patterns.

    Raises:
        ConfigError: if a pattern matches no name; the message lists similar names.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=MOST_NAMES, cutoff=0.3)
            raise ConfigError(
                f"{where}: {pattern!r} matches no parameter; similar names: "
                f"{', '.join(near or list(names)[:MOST_NAMES])} (* is anything)"
            )
    return [name for name in names if any(fnmatchcase(name, each) for each in patterns)]


def _open(
    traits: dict[str, Traits], config: Optimizer, model: ContrastiveModel, sections: Model
) -> None:
    """Sets the first step of the parameters that `unfreeze` opens."""
    parameters = dict(model.named_parameters())
    for number, entry in enumerate(config.unfreeze):
        where = f"optimizer.unfreeze.{number}.parameters"
        names = matching(entry.parameters, traits, where=where)
        opened = [n for n in names if traits[n].from_step is None and parameters[n].requires_grad]
        if not opened:
            frozen = [key for key, tower in sections.towers.items() if tower.frozen]
            advice = (
                f"; towers with frozen=true ({', '.join(frozen)}) stay frozen: remove it there, "
                "and use optimizer.frozen with a pattern"
            )
            raise ConfigError(
                f"{where}={entry.parameters}: expected frozen parameters that this entry opens, "
                f"found none; freeze them with optimizer.frozen or frozen_blocks"
                f"{advice if frozen else ''}"
            )
        for name in opened:
            traits[name] = replace(traits[name], from_step=entry.from_step)


def refuse_untrained_streams(model: ContrastiveModel, parts: Mapping[str, Collection[str]]) -> None:
    """Refuses a stream whose loss depends on no parameter that is trained.

    Args:
        model: model with frozen parameters.
        parts: stream -> names of its towers, temperatures, heads and modules in the model.

    Raises:
        ConfigError: if all of them are frozen.
    """
    for stream, names in parts.items():
        groups = (model.towers, model.heads, model.objective_modules)
        found = [each[name] for each in groups for name in names if name in each]
        parameters = [parameter for part in found for parameter in part.parameters()]
        for each in (model.log_logit_scale, model.logit_bias):
            parameters += [each[name] for name in names if name in each]
        if not any(parameter.requires_grad for parameter in parameters):
            raise ConfigError(
                f"optimizer.frozen: nothing is left to train in streams.{stream} "
                f"({', '.join(names)}); remove a pattern, or the stream"
            )


# ---------------------------------------------------------------------------- evaluation mode


def _closed_parts(tower: Tower, closed: Collection[int]) -> Iterator[nn.Module]:
    """Yields the backbone and the blocks without a parameter that is trained at the first step.

    Args:
        tower: tower, with parameters frozen.
        closed: ids of the parameters that the config freezes, also for some steps alone.
    """
    for part in (tower.backbone, *blocks_of(tower.backbone)):
        parameters = list(part.parameters())
        is_idle = all(id(each) in closed or not each.requires_grad for each in parameters)
        if is_idle and any(id(each) in closed for each in parameters):
            yield part


def release_parts(tower: Tower, opened: Collection[int]) -> None:
    """Removes backbone and blocks with opened parameters from those in evaluation mode.

    Args:
        tower: tower in training; its mode must be set again.
        opened: ids of parameters.
    """
    tower.held = [
        part for part in tower.held if not any(id(each) in opened for each in part.parameters())
    ]
