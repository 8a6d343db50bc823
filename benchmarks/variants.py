"""The ways to get the scores: functions that load a model and return a function (query, documents) -> scores.

All get the same pairs and the same limit of 512 tokens, and return raw logits in the order of the documents. Each
imports its library itself: every variant runs in a process of its own.
"""

from collections.abc import Callable

Scorer = Callable[[str, list[str]], list[float]]


def plain(model_name: str, device: str, dtype: str) -> Scorer:
    """The function that tutorials show: all pairs in one padded batch."""
    import torch
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
    from reranker_helpers import load_reranker, rerank

    reranker = load_reranker(model_name, device=device, dtype=dtype)

    def run(query: str, documents: list[str]) -> list[float]:
        results = rerank(query, documents, *reranker)
        return [result.score for result in sorted(results, key=lambda result: result.index)]

    return run


def rerank_int8_then_float32(model_name: str, device: str, dtype: str) -> Scorer:
    """The recipe of the Local notebook's chapter on speed, for the top 10."""
    from reranker_helpers import load_reranker, score

    exact = load_reranker(model_name, device=device)
    fast = load_reranker(model_name, device=device, dtype="int8")

    def run(query: str, documents: list[str]) -> list[float]:
        pairs = [(query, document) for document in documents]
        return list(top_n_in_float32(pairs, 10, lambda pairs: score(pairs, *fast), lambda pairs: score(pairs, *exact)))

    return run


def top_n_in_float32(pairs, top_n: int, fast, exact) -> list[float]:
    """Return logits whose best `top_n` are those of float32, if no logit moved by more than the largest move seen."""
    logits = fast(pairs)
    order = sorted(range(len(pairs)), key=lambda place: -logits[place])
    done, moved = 0, 0.0
    border = logits[order[min(top_n, len(pairs)) - 1]]
    wanted = top_n
    while done < wanted:
        places = order[done:wanted]
        for place, logit in zip(places, exact([pairs[place] for place in places]), strict=True):
            moved = max(moved, abs(logit - logits[place]))
            logits[place] = logit
        done = wanted
        wanted = max(done, sum(logits[place] > border - 2 * moved for place in order[done:]) + done)
    return logits


def cross_encoder(model_name: str, device: str, dtype: str, backend: str = "torch", **options) -> Scorer:
    """sentence-transformers. Its default batch size is 32, and it sorts by length."""
    import torch
    from sentence_transformers import CrossEncoder

    options = options or {"torch_dtype": getattr(torch, dtype)}
    model = CrossEncoder(
        model_name,
        device=device,
        max_length=512,
        backend=backend,
        activation_fn=torch.nn.Identity(),
        model_kwargs=options,
    )

    def run(query: str, documents: list[str]) -> list[float]:
        pairs = [(query, document) for document in documents]
        return model.predict(pairs, batch_size=32, show_progress_bar=False).tolist()

    return run


def flag_reranker(model_name: str, device: str, dtype: str) -> Scorer:
    """FlagEmbedding, by the authors of the model, at its own batch size of 128."""
    from FlagEmbedding import FlagReranker

    model = FlagReranker(model_name, use_fp16=dtype == "float16", devices=[device], max_length=512)

    def run(query: str, documents: list[str]) -> list[float]:
        return model.compute_score([(query, document) for document in documents], normalize=False)

    return run


def rerankers(model_name: str, device: str, dtype: str) -> Scorer:
    """AnswerDotAI's rerankers, at its own batch size of 16."""
    from rerankers import Reranker

    model = Reranker(model_name, model_type="cross-encoder", device=device, dtype=dtype, verbose=0)

    def run(query: str, documents: list[str]) -> list[float]:
        results = model.rank(query, documents, doc_ids=list(range(len(documents)))).results
        return [result.score for result in sorted(results, key=lambda result: result.document.doc_id)]

    return run


def openvino(model_name: str, device: str, dtype: str) -> Scorer:
    """OpenVINO behind sentence-transformers, told to compute in float32 and not in what it would choose."""
    folder = exported(model_name, "openvino")
    return cross_encoder(folder, device, dtype, "openvino", ov_config={"INFERENCE_PRECISION_HINT": "f32"})


def openvino_auto(model_name: str, device: str, dtype: str) -> Scorer:
    """OpenVINO in the precision that it chooses, which is bfloat16 where the processor has units for it."""
    return cross_encoder(exported(model_name, "openvino"), device, dtype, "openvino", ov_config={})


def openvino_int8(model_name: str, device: str, dtype: str) -> Scorer:
    """OpenVINO with weights in 8 bits, and activations as it chooses."""
    folder = exported(model_name, "openvino", suffix="-int8", load_in_8bit=True)
    return cross_encoder(folder, device, dtype, "openvino", ov_config={})


def rerank_openvino_int8(model_name: str, device: str, dtype: str) -> Scorer:
    """`rerank` over the model of "OpenVINO int8": its batches, sorted by length within a budget of tokens."""
    from sentence_transformers import CrossEncoder

    from reranker_helpers import rerank

    folder = exported(model_name, "openvino", suffix="-int8", load_in_8bit=True)
    encoder = CrossEncoder(folder, device="cpu", backend="openvino", model_kwargs={"ov_config": {}})

    def run(query: str, documents: list[str]) -> list[float]:
        results = rerank(query, documents, encoder.model, encoder.tokenizer, "cpu")
        return [result.score for result in sorted(results, key=lambda result: result.index)]

    return run


def onnx(model_name: str, device: str, dtype: str) -> Scorer:
    """ONNX Runtime behind sentence-transformers."""
    return cross_encoder(exported(model_name, "onnx"), device, dtype, "onnx", provider="CPUExecutionProvider")


def onnx_int8(model_name: str, device: str, dtype: str) -> Scorer:
    """ONNX Runtime, quantised by sentence-transformers' own function (dynamic, for AVX2)."""
    from pathlib import Path

    from sentence_transformers import CrossEncoder, export_dynamic_quantized_onnx_model

    folder, file = exported(model_name, "onnx"), "model_qint8_avx2.onnx"
    if not (Path(folder) / "onnx" / file).exists():
        model = CrossEncoder(folder, device="cpu", backend="onnx")
        export_dynamic_quantized_onnx_model(model, "avx2", folder, file_suffix="qint8_avx2")
    return cross_encoder(folder, device, dtype, "onnx", provider="CPUExecutionProvider", file_name=file)


def exported(model_name: str, backend: str, suffix: str = "", **options) -> str:
    """Return the folder of an export, made once."""
    from pathlib import Path

    from sentence_transformers import CrossEncoder

    from benchmarks.workload import CACHE

    folder = CACHE / f"{Path(model_name).name}-{backend}{suffix}"
    if not (folder / "config.json").exists():
        model = CrossEncoder(model_name, device="cpu", backend=backend, model_kwargs={"export": True, **options})
        model.save_pretrained(str(folder))
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
    "rerank int8": (rerank, "int8", "main"),
    "rerank int8 then float32": (rerank_int8_then_float32, None, "main"),
    "CrossEncoder bfloat16": (cross_encoder, "bfloat16", "main"),
    "OpenVINO auto": (openvino_auto, None, "backends"),
    "rerank over OpenVINO int8": (rerank_openvino_int8, None, "backends"),
    "OpenVINO int8": (openvino_int8, None, "backends"),
    "ONNX Runtime int8": (onnx_int8, None, "backends"),
}
ON_A_GPU = ["plain", "rerank", "CrossEncoder", "FlagReranker", "rerankers"]
