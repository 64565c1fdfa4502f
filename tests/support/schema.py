"""``python -m tests.support.schema``: writes the part ``recipe`` of the manifest's schema
anew, from the table of settings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import loftq_cli
from loftq_cli.settings.recipe import recipe_schema

PATH = Path(loftq_cli.__file__).with_name("manifest.schema.json")


def rewritten(text: str) -> str:
    """``text`` of the schema, with one line for each property of the recipe."""
    schema = recipe_schema()
    lines = [
        f"        {json.dumps(name)}: {json.dumps(value)}"
        for name, value in schema["properties"].items()
    ]
    part = (
        '    "recipe": {\n      "type": "object",\n      "additionalProperties": false,\n'
        f'      "required": {json.dumps(schema["required"])},\n      "properties": {{\n'
        + ",\n".join(lines)
        + "\n      }\n    }"
    )
    return re.sub(
        r'    "recipe": \{\n.*?\n    \}(?=,\n)', lambda _: part, text, count=1, flags=re.DOTALL
    )


if __name__ == "__main__":
    PATH.write_text(rewritten(PATH.read_text("utf-8")), "utf-8")
