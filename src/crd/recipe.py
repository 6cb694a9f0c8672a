"""Settings in files: reading a recipe with overrides, writing it, explaining what is wrong, comparing two."""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from crd.config import CRDConfig, RewardConfig
from crd.errors import CRDError

#: settings that may change between the sessions of one run
CHANGEABLE = (
    "output_dir",
    "train.epochs",
    "evaluation.every",
    "checkpoint",
    "trackers",
    "reward_failure_limit",
    "alarm",
    # these change memory and speed; results stay the same to rounding
    "train.micro_batch",
    "train.gradient_checkpointing",
    "rollout.batch_size",
)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, but a key is given once, and what looks like a date stays text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def build_config(data: dict[str, Any]) -> CRDConfig:
    """Validates a tree of plain values; raises CRDError that names every wrong key with its value."""
    try:
        return CRDConfig.model_validate(data)
    except ValidationError as error:
        raise CRDError("the configuration is not valid:\n" + "\n".join(_explain(problem) for problem in error.errors())) from None


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "settings"
    if problem["type"] == "extra_forbidden":
        return f"  {where}: there is no such setting. {_nearest(problem['loc'])}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"  {where}: {message}" + (f", got {problem['input']!r}" if problem["loc"] else "")


def _nearest(location: tuple[int | str, ...]) -> str:
    """What could have been meant: the settings beside a key that does not exist."""
    section: Any = CRDConfig
    for part in location[:-1]:
        field = section.model_fields.get(part) if isinstance(part, str) and issubclass(section, BaseModel) else None
        annotation = field.annotation if field else None
        section = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else RewardConfig
    names = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), names, 1)
    return f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(names)}."


def load_config(path: Path, overrides: list[str]) -> CRDConfig:
    """Reads a YAML recipe and applies ``section.key=value`` overrides; raises CRDError for anything wrong."""
    try:
        data = yaml.load(path.read_text(), _Loader)  # noqa: S506  it is a safe one
    except FileNotFoundError:
        raise CRDError(f"there is no recipe {path}.") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CRDError(f"the recipe {path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CRDError(f"the recipe {path} must hold 'section: settings' lines, it holds {type(data).__name__}.")
    for override in overrides:
        _apply(data, override)
    return build_config(data)


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise CRDError(f"{override!r} is no setting: write section.key=value, e.g. train.learning_rate=1e-3.")
    *sections, last = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise CRDError(f"{override!r}: {section} is not a section.")
    try:
        data[last] = _value(text)
    except (ValueError, yaml.YAMLError):
        raise CRDError(f"{override!r}: the value cannot be read.") from None


def _value(text: str) -> Any:
    """A YAML value; also reads 1e-3, which YAML 1.1 takes for a string."""
    value = yaml.load(text, _Loader)  # noqa: S506
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def plain(config: CRDConfig) -> dict[str, Any]:
    """The configuration as values that YAML and JSON know."""
    return config.model_dump(mode="json")


def dump_config(config: CRDConfig) -> str:
    return yaml.safe_dump(plain(config), sort_keys=False)


def describe(section: type[BaseModel], prefix: str = "") -> list[str]:
    """One line per setting: key, default, meaning."""
    lines = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            lines += describe(type(default), key + ".")
        else:
            if isinstance(default, tuple):
                default = [entry.model_dump() if isinstance(entry, BaseModel) else entry for entry in default]
            lines.append(f"{key} = {default}\n    {field.description or ''}")
    return lines


def differences(a: CRDConfig, b: CRDConfig) -> list[str]:
    """Settings that differ between two runs and may not, as 'key: a -> b'."""

    def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {k: v for name, part in tree.items() for k, v in flatten(part, f"{prefix}.{name}".strip(".")).items()}

    left, right = flatten(plain(a)), flatten(plain(b))
    keys = [k for k in left | right if left.get(k) != right.get(k)]
    fixed = [k for k in keys if not any(k == c or k.startswith(c + ".") for c in CHANGEABLE)]
    return [f"{k}: {left.get(k)} -> {right.get(k)}" for k in fixed]
