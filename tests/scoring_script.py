"""The scripts of azureml/ as modules. `import azureml.score` would shadow Microsoft's packages of that name."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent


def load_script(name: str = "score") -> ModuleType:
    """Load a script of azureml/ by its path, as Azure's server does."""
    spec = importlib.util.spec_from_file_location("entry_module", ROOT / "azureml" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


score = load_script()
batch_score = load_script("batch_score")
wire = sys.modules["wire"]
weights = sys.modules["weights"]
