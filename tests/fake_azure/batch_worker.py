"""A process of a batch job: `batch_worker.py SCRIPT DESCRIPTOR`. batch_engine.py starts it and gives it mini-batches.

It reads mini-batches from its standard input, lists of paths in JSON, and writes what `run()` returned to the file
descriptor: standard output is the script's.
"""

import importlib.util
import json
import sys
import traceback


def main(script: str, descriptor: int) -> None:
    spec = importlib.util.spec_from_file_location("entry_module", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
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
    main(sys.argv[1], int(sys.argv[2]))
