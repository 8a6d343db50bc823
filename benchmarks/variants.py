"""The ways to get the scores: functions that load a model and return a function (query, documents) -> scores.

All get the same pairs and the same limit of 512 tokens, and return raw logits in the order of the documents. Each
imports its library itself: every variant runs in a process of its own, and some in another environment.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.workload import CACHE

Scorer = Callable[[str, list[str]], list[float]]


def plain(model_name: str, device: str, dtype: str) -> Scorer:
    """The function that tutorials show: all pairs in one padded batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForSequenceClassification.from_pretrained(model_name, dtype=getattr(torch, dtype))
    model.eval().to(device)

    def run(query: str, documents: list[str]) -> list[float]:
        pairs = [[query, document] for document in documents]
        with torch.no_grad():
            inputs = tokenizer(pairs, padding=True, truncation=True, max_length=512, return_tensors="pt").to(device)
            return model(**inputs).logits.view(-1).float().tolist()

    return run


def rerank(model_name: str, device: str, dtype: str) -> Scorer:
    """This repository's function."""
    from reranker_helpers import load_reranker

    return _reranking(*load_reranker(model_name, device=device, dtype=dtype))


def _reranking(model, tokenizer, device) -> Scorer:
    from reranker_helpers import rerank

    def run(query: str, documents: list[str]) -> list[float]:
        results = rerank(query, documents, model, tokenizer, device)
        return [result.score for result in sorted(results, key=lambda result: result.index)]

    return run


def rerank_int8_then_float32(model_name: str, device: str, dtype: str) -> Scorer:
    """The recipe of the Local notebook's chapter on speed, for the top 10."""
    from reranker_helpers import load_reranker, score

    exact, fast = (load_reranker(model_name, device=device, dtype=name) for name in ("float32", "int8"))

    def run(query: str, documents: list[str]) -> list[float]:
        pairs = [(query, document) for document in documents]
        return top_n_in_float32(pairs, 10, lambda pairs: score(pairs, *fast), lambda pairs: score(pairs, *exact))

    return run


def top_n_in_float32(pairs, top_n: int, fast, exact) -> list[float]:
    """Return logits whose best `top_n` are those of float32, if no logit moved by more than the largest move seen."""
    logits = fast(pairs)
    order = sorted(range(len(pairs)), key=lambda place: -logits[place])
    border, moved, done, wanted = logits[order[:top_n][-1]], 0.0, 0, top_n
    while done < wanted:
        places, done = order[done:wanted], wanted
        for place, logit in zip(places, exact([pairs[place] for place in places]), strict=True):
            moved, logits[place] = max(moved, abs(logit - logits[place])), logit
        wanted += sum(logits[place] > border - 2 * moved for place in order[done:])
    return logits


def cross_encoder(
    model_name: str, device: str, dtype: str, backend: str = "torch", options: dict | None = None
) -> Scorer:
    """sentence-transformers. Its default batch size is 32, and it sorts by length."""
    from sentence_transformers import CrossEncoder

    options = {"dtype": getattr(torch, dtype)} if options is None else options
    raw = torch.nn.Identity()
    model = CrossEncoder(
        model_name, device=device, max_length=512, backend=backend, activation_fn=raw, model_kwargs=options
    )
    return lambda query, documents: model.predict([(query, document) for document in documents]).tolist()


def flag_reranker(model_name: str, device: str, dtype: str) -> Scorer:
    """FlagEmbedding, by the authors of the model, at its own batch size of 128."""
    from FlagEmbedding import FlagReranker

    model = FlagReranker(model_name, use_fp16=dtype == "float16", devices=[device], max_length=512)
    return lambda query, documents: model.compute_score([(query, document) for document in documents])


def rerankers(model_name: str, device: str, dtype: str) -> Scorer:
    """AnswerDotAI's rerankers, at its own batch size of 16."""
    from rerankers import Reranker

    model = Reranker(model_name, model_type="cross-encoder", device=device, dtype=dtype, verbose=0)

    def run(query: str, documents: list[str]) -> list[float]:
        results = model.rank(query, documents, doc_ids=list(range(len(documents)))).results
        return [result.score for result in sorted(results, key=lambda result: result.document.doc_id)]

    return run


def openvino(model_name: str, device: str, dtype: str) -> Scorer:
    """OpenVINO behind sentence-transformers: made to compute in float32, or in what it chooses ("auto", which is
    bfloat16 where the processor has units for it), or with weights in int8 and activations as it chooses."""
    return cross_encoder(exported(model_name, "openvino", dtype), device, dtype, "openvino", openvino_options(dtype))


def rerank_over_openvino(model_name: str, device: str, dtype: str) -> Scorer:
    """`rerank` over the model of "OpenVINO int8": its batches, sorted by length within a budget of tokens."""
    from sentence_transformers import CrossEncoder

    folder = exported(model_name, "openvino", dtype)
    encoder = CrossEncoder(folder, device="cpu", backend="openvino", model_kwargs=openvino_options(dtype))
    return _reranking(encoder.model, encoder.tokenizer, "cpu")


def openvino_options(dtype: str) -> dict:
    config = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}  # by itself it takes all cores
    return {"ov_config": config | ({"INFERENCE_PRECISION_HINT": "f32"} if dtype == "float32" else {})}


def onnx(model_name: str, device: str, dtype: str) -> Scorer:
    """ONNX Runtime behind sentence-transformers; int8 by its own function for dynamic quantisation."""
    from onnxruntime import SessionOptions
    from sentence_transformers import CrossEncoder, export_dynamic_quantized_onnx_model

    folder, options = exported(model_name, "onnx", "float32"), {"provider": "CPUExecutionProvider"}
    if dtype == "int8":
        kind = "avx512_vnni" if torch.cpu._is_vnni_supported() else "avx2"
        options["file_name"] = f"model_qint8_{kind}.onnx"
        if not (Path(folder) / "onnx" / options["file_name"]).exists():
            model = CrossEncoder(folder, device="cpu", backend="onnx")
            export_dynamic_quantized_onnx_model(model, kind, folder)
    options["session_options"] = SessionOptions()
    options["session_options"].intra_op_num_threads = torch.get_num_threads()
    return cross_encoder(folder, device, dtype, "onnx", options)


def exported(model_name: str, backend: str, dtype: str) -> str:
    """Return the folder of an export, made once."""
    from sentence_transformers import CrossEncoder

    folder = CACHE / "-".join([*Path(model_name).parts[1:], backend, *["int8"] * (dtype == "int8")])
    if not (folder / "config.json").exists():
        options = {"export": True} | ({"load_in_8bit": True} if dtype == "int8" else {})
        CrossEncoder(model_name, device="cpu", backend=backend, model_kwargs=options).save_pretrained(str(folder))
    return str(folder)


VARIANTS: dict[str, tuple[Callable[[str, str, str], Scorer], str | None, str]] = {
    # name in the table: (loader, dtype or None for the device's usual one, which environment)
    "plain": (plain, None, "main"),
    "rerank": (rerank, None, "main"),
    "CrossEncoder": (cross_encoder, None, "main"),
    "FlagReranker": (flag_reranker, None, "main"),
    "rerankers": (rerankers, None, "main"),
    "OpenVINO": (openvino, None, "backends"),
    "ONNX Runtime": (onnx, None, "backends"),
    "rerank bfloat16": (rerank, "bfloat16", "main"),
    "CrossEncoder bfloat16": (cross_encoder, "bfloat16", "main"),
    "OpenVINO auto": (openvino, "auto", "backends"),
    "rerank int8": (rerank, "int8", "main"),
    "rerank int8 then float32": (rerank_int8_then_float32, "int8", "main"),
    "rerank over OpenVINO int8": (rerank_over_openvino, "int8", "backends"),
    "OpenVINO int8": (openvino, "int8", "backends"),
    "ONNX Runtime int8": (onnx, "int8", "backends"),
}
ON_A_GPU = [name for name, (_, dtype, environment) in VARIANTS.items() if not dtype and environment == "main"]
