"""Noise on each logit, in every Python process that has this folder on PYTHONPATH: what another processor's rounding
does, only larger. RERANKER_NOISE is the seed.

    PYTHONPATH=tests/noise RERANKER_NOISE=1 pytest BGE_Reranker_Local.ipynb

As rounding does, it depends on the tokens alone: equal pairs stay equal, and each way to compute a logit agrees.
"""

import functools
import importlib.abc
import importlib.util
import os
import random
import sys

SIZE = 1e-4
"""Standard deviation. Processors differ by about 1e-6 in float32."""


def noise(token_ids: list[int]) -> float:
    return random.Random(f"{os.environ['RERANKER_NOISE']} {token_ids}").gauss(0, SIZE)


def add_noise(scoring) -> None:
    """Add noise to both ways that `reranker_helpers.scoring` gets logits: the packed path, and the model itself."""
    import torch
    import transformers

    def run_packed(windows, *reranker):
        return packed(windows, *reranker) + torch.tensor([[noise(window.token_ids)] for window in windows])

    packed, scoring.run_packed = scoring.run_packed, run_packed
    model = transformers.XLMRobertaForSequenceClassification

    @functools.wraps(model.forward)
    def forward(self, input_ids=None, attention_mask=None, **options):
        output = plain(self, input_ids, attention_mask, **options)
        masks = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, masks, strict=True)]
        output["logits"] = output["logits"] + torch.tensor([[noise(row)] for row in rows])
        return output

    plain, model.forward = model.forward, forward


class Finder(importlib.abc.MetaPathFinder):
    """Waits for the module, so that processes that do not score are left alone."""

    def find_spec(self, name, path=None, target=None):
        if name != "reranker_helpers.scoring":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), add_noise(module))
        return spec


sys.meta_path.insert(0, Finder())
