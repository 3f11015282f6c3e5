"""`--config run.yaml`: sections with the option names of RunConfig."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindspeed_llm.errors import UserError


def read_yaml(path: str) -> list[tuple[str, str, Any]]:
    """The (section, option, value) entries of a YAML file.

    Raises:
        UserError: there is no such file, it is not YAML, a key stands twice, or it is not a mapping of mappings.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(k) for k, _ in node.value]
            if twice := sorted({str(k) for k in keys if keys.count(k) > 1}):
                raise UserError(f"--config: {path}: {', '.join(twice)} stands twice; keep one")
            return super().construct_mapping(node, deep)

    # YAML 1.1 reads 1e-5 as text; every number a person writes should be a number.
    import re

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    if not Path(path).is_file():
        raise UserError(f"--config: there is no file {path}; legal: a YAML file with sections of options")
    try:
        document = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except yaml.YAMLError as wrong:
        raise UserError(f"--config: {path} is not YAML: {' '.join(str(wrong).split())}") from None
    if not isinstance(document, dict) or not all(isinstance(v, dict) for v in document.values()):
        raise UserError(f"--config: {path} must hold sections (model:, data:, ...) with options in them")
    return [(s, str(name), value) for s, options in document.items() for name, value in options.items()]
