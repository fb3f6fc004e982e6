"""The folder's README names every module. (Its commands are run by tests/docs.)"""

import inspect
import re
from pathlib import Path

from safevlm import model_card

FOLDER = Path(inspect.getfile(model_card)).parent


def test_the_table_names_every_module():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+\.py)`", readme.split("| file |")[1].split("\n\n")[0]))
    assert named == {path.name for path in FOLDER.glob("*.py")} - {"__init__.py"}
