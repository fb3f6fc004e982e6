"""Replaces `pip` while documents run: `pip install` of packages that pyproject.toml names does nothing."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
named = {re.match(r"[\w.-]+", line)[0] for lines in (project["dependencies"], *extras.values()) for line in lines}

command, *arguments = sys.argv[1:]
if command != "install":
    sys.exit(f"pip {command}: only `pip install` is known here")
for argument in arguments:
    if argument in ("-e", "--no-deps"):
        continue
    name, _, wanted = re.fullmatch(r"([\w.-]+)(\[([\w,]+)\])?(?:==[\d.]+)?", argument).groups()
    if wanted and (name not in (".", project["name"]) or set(wanted.split(",")) - set(extras)):
        sys.exit(f"{argument}: {wanted} are not all extras of pyproject.toml")
    if not wanted and name not in named:
        sys.exit(f"{argument}: pyproject.toml does not name it")
