#!/usr/bin/env python3
"""Writes a GGUF model of the Llama-3-8B shape (or another) with random Q4_0 weights.

For measuring speed and memory where no model can be had: same seed, same bytes. The vocabulary is
of single bytes, padded; text means nothing to it. Needs numpy; 8B takes half a minute and 4.3 GiB.
"""

import argparse
import pathlib
import struct
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))
import tiny_gguf as gguf  # noqa: E402

Q4_0, BLOCK = 2, 32
SHAPES = {
    # width, layers, heads, kv heads, head_dim, feed-forward, vocabulary
    "8b": (4096, 32, 32, 8, 128, 14336, 128256),
    "1b": (2048, 16, 32, 8, 64, 8192, 128256),
    "tiny": (256, 2, 4, 2, 64, 512, 512),
}


def tensor_shapes(width, layers, heads, kv_heads, head_dim, hidden, vocabulary):
    shapes = {"token_embd.weight": (width, vocabulary), "output_norm.weight": (width,),
              "output.weight": (width, vocabulary)}
    for layer in range(layers):
        for name, shape in {
                "attn_norm": (width,), "attn_q": (width, heads * head_dim),
                "attn_k": (width, kv_heads * head_dim), "attn_v": (width, kv_heads * head_dim),
                "attn_output": (heads * head_dim, width), "ffn_norm": (width,),
                "ffn_gate": (width, hidden), "ffn_up": (width, hidden),
                "ffn_down": (hidden, width)}.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
    return shapes


def write_q4_0(file, shape, random):
    """Rows of blocks of [fp16 scale][16 bytes: 32 codes of value scale * (code - 8)]."""
    width, n_rows = shape
    scale = np.float16(width ** -0.5 / 4.6)  # a uniform code's deviation is 4.6
    per_row = width // BLOCK
    step = max(1, (1 << 26) // (per_row * 18))
    for first in range(0, n_rows, step):
        n = min(step, n_rows - first) * per_row
        blocks = np.empty((n, 18), np.uint8)
        blocks[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
        blocks[:, 2:] = random.integers(0, 256, (n, 16), np.uint8)
        file.write(blocks.tobytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    width, layers, heads, kv_heads, head_dim, hidden, vocabulary = SHAPES[args.shape]

    tokens = [*gguf._byte_tokens(), "<end>"]
    tokens += [f"<{n}>" for n in range(len(tokens), vocabulary)]
    pairs = [("general.architecture", gguf.STRING, "llama")]
    pairs += [(f"llama.{key}", kind, value) for key, kind, value in [
        ("context_length", gguf.UINT32, args.context), ("embedding_length", gguf.UINT32, width),
        ("block_count", gguf.UINT32, layers), ("feed_forward_length", gguf.UINT32, hidden),
        ("attention.layer_norm_rms_epsilon", gguf.FLOAT32, 1e-5),
        ("rope.freq_base", gguf.FLOAT32, 500000.0),
        *gguf._heads(heads, kv_heads, head_dim)]]
    pairs += [("tokenizer.ggml.model", gguf.STRING, "gpt2"),
              ("tokenizer.ggml.pre", gguf.STRING, "gpt-2"),
              ("tokenizer.ggml.tokens", gguf.STRING, tokens),
              ("tokenizer.ggml.token_type", gguf.INT32, [1] * 256 + [3] * (len(tokens) - 256)),
              ("tokenizer.ggml.merges", gguf.STRING, ["a b"]),
              ("tokenizer.ggml.bos_token_id", gguf.UINT32, 256),
              ("tokenizer.ggml.eos_token_id", gguf.UINT32, 256)]

    shapes = tensor_shapes(width, layers, heads, kv_heads, head_dim, hidden, vocabulary)
    infos, offset = b"", 0
    for name, shape in shapes.items():
        quantized = len(shape) == 2
        size = shape[0] * shape[1] // BLOCK * 18 if quantized else shape[0] * 4
        infos += gguf._text(name) + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}Q", *shape)
        infos += struct.pack("<IQ", Q4_0 if quantized else gguf.F32, offset)
        offset += size + -size % gguf.ALIGNMENT
    header = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(pairs))
    header += b"".join(gguf._pair(*pair) for pair in pairs) + infos

    random = np.random.default_rng(args.seed)
    with open(args.path, "wb") as file:
        file.write(header + b"\0" * (-len(header) % gguf.ALIGNMENT))
        for shape in shapes.values():
            if len(shape) == 2:
                write_q4_0(file, shape, random)
            else:
                file.write(np.ones(shape, np.float32).tobytes())
            file.write(b"\0" * (-file.tell() % gguf.ALIGNMENT))


if __name__ == "__main__":
    main()
