"""The scripts for Azure as modules. `import azureml.score` would shadow Microsoft's packages of that name."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent


def load_script(name: str = "azureml/score.py") -> ModuleType:
    """Load a script by its path, as Azure's server does."""
    spec = importlib.util.spec_from_file_location("entry_module", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


score = load_script()
batch_score = load_script("azureml_batch/batch_score.py")
wire = sys.modules["wire"]
weights = sys.modules["weights"]
