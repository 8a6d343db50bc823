"""A process of a batch job: `batch_worker.py ROOT SCRIPT DESCRIPTOR`. batch_engine.py starts it and feeds it.

It loads the script as Azure's engine does: as a dotted module below the root of the uploaded code, which is all that is
added to the path, when azureml-core has loaded its package `azureml`.

It reads mini-batches from its standard input, lists of paths in JSON, and writes what `run()` returned to the file
descriptor: standard output is the script's.
"""

import importlib
import json
import sys
import traceback
from contextlib import suppress
from types import ModuleType


def load_package() -> None:
    """Load Microsoft's package, or where it is not installed an empty one, which has no room for the upload either."""
    with suppress(ModuleNotFoundError):
        importlib.import_module("azureml.core")
        return
    sys.modules["azureml"] = ModuleType("azureml")
    sys.modules["azureml"].__path__ = []


def main(root: str, script: str, descriptor: int) -> None:
    load_package()
    sys.path.insert(0, root)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    module.init()
    with open(descriptor, "w") as answers:
        print('{"rows": []}', file=answers, flush=True)  # init() has run
        for mini_batch in sys.stdin:
            try:
                answer = {"rows": [str(row) for row in module.run(json.loads(mini_batch))]}
            except Exception:
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
