"""What quantised weights, bfloat16 and native kernels cost in quality: perplexity of a fixed text.

    python bench/perplexity.py [--model M] [--json bench/results/perplexity.json]

Every encoding that the `gguf` package can write is made from the model's own weights; each is then run in bfloat16 and
in float32, and compared with the same file's weights dequantised exactly and multiplied in float32 by plain torch.
The text is the beginning of Alice's Adventures in Wonderland (Lewis Carroll, 1865).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from octavo.model.block_tables import BlockTables
from octavo.model.config import ModelConfig
from octavo.model.forward_batch import build_forward_batch
from octavo.model.runner import ModelRunner
from octavo.model.weights.resolve import resolve_model
from octavo.scheduler.batch import ScheduledBatch, ScheduledRow
from octavo.scheduler.sampling_params import SamplingParams
from octavo.server.tokenizer import load_tokenizer

TEXT = Path(__file__).parent / "data" / "alice.txt"
ENCODINGS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16")
_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Score:
    weights: str
    """As stored."""
    dtype: str
    backend: str
    perplexity: float


def perplexity(path: Path, token_ids: list[int], *, dtype: str, backend: str) -> Score:
    """Of tokens 1 … n - 1, each given those before it, computed as one prompt of a server's step."""
    config = ModelConfig(path=str(path), dtype=dtype, device="cpu", kernel_backend=backend)  # type: ignore[arg-type]
    runner = ModelRunner(config, block_size=_BLOCK)
    count = len(token_ids)
    runner.allocate_cache(
        kv_cache_memory=2**28, max_num_seqs=count, max_model_len=count, max_num_batched_tokens=count + 1
    )
    blocks = (list(range(1, -(-count // _BLOCK) + 1)),) * runner.num_groups
    with torch.inference_mode():
        logits = _at_once(runner, token_ids, blocks).float()
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(token_ids[1:]))
    weights = path.stem.rpartition(".")[2]
    return Score(weights, dtype, runner.backend.name, math.exp(losses.item()))


def _at_once(runner: ModelRunner, token_ids: list[int], blocks: tuple[list[int], ...]) -> torch.Tensor:
    count = len(token_ids)
    row = ScheduledRow("text/0", token_ids, count, 0, count, blocks, SamplingParams(), 0)
    tables = [BlockTables(group) for group in range(runner.num_groups)]
    batch = build_forward_batch(ScheduledBatch([row], 0), _BLOCK, torch.device("cpu"), tables)
    return runner._forward(replace(batch, logits_indices=torch.arange(count - 1)))


def requantised(path: Path, encoding: str, folder: Path) -> Path:
    """The same model with its matrices in another encoding."""
    import gguf
    from gguf.quants import dequantize, quantize

    reader = gguf.GGUFReader(path)
    kind = gguf.GGMLQuantizationType[encoding]
    target = folder / f"model.{encoding}.gguf"
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        item = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=item)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if len(tensor.shape) == 2:
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def measure(path: Path, token_ids: list[int]) -> list[Score]:
    """The reference first."""
    combinations = [("float32", "reference"), ("float32", "auto"), ("bfloat16", "auto")]
    return [perplexity(path, token_ids, dtype=dtype, backend=backend) for dtype, backend in combinations]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a .gguf file (default: the default model)")
    parser.add_argument("--json", type=Path, help="write the scores here too")
    arguments = parser.parse_args()
    files = resolve_model(arguments.model)
    token_ids = load_tokenizer(files).encode(TEXT.read_text(), add_special_tokens=True)
    scores: list[Score] = []
    print(
        f"{files.path.name}, {len(token_ids)} tokens\n\n| weights | dtype | backend | perplexity | over the reference |"
    )
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="octavo-perplexity-") as folder:
        paths = [files.path, *(requantised(files.path, encoding, Path(folder)) for encoding in ENCODINGS)]
        for path in paths:
            measured = measure(path, token_ids)
            for score in measured:
                over = score.perplexity / measured[0].perplexity - 1
                print(
                    f"| {score.weights} | {score.dtype} | {score.backend} | {score.perplexity:.4f} | {over:+.3%} |",
                    flush=True,
                )
            scores += measured
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(score) for score in scores], indent=1) + "\n")


if __name__ == "__main__":
    main()
