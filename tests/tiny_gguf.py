"""Writes a GGUF file of a tiny llama model with random weights and a vocabulary of single bytes.

For models that nobody publishes: an odd head size, an unknown architecture.
"""

import random
import struct

UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9
F32, ALIGNMENT = 0, 32


def _text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(kind, value):
    if kind == STRING:
        return _text(value)
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f"}[kind], value)


def _pair(key, kind, value):
    if isinstance(value, list):
        items = b"".join(_value(kind, item) for item in value)
        return _text(key) + struct.pack("<IIQ", ARRAY, kind, len(value)) + items
    return _text(key) + struct.pack("<I", kind) + _value(kind, value)


def _byte_tokens():
    """The 256 characters that stand for bytes in GPT-2's vocabularies."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(code) for code in plain] + [chr(256 + i) for i in range(len(others))]


def write_llama(path, head_dim, n_heads=2, n_layers=2, architecture="llama"):
    width, hidden, tokens = head_dim * n_heads, 64, [*_byte_tokens(), "<end>"]
    pairs = [
        ("general.architecture", STRING, architecture),
        (architecture + ".context_length", UINT32, 512),
        (architecture + ".embedding_length", UINT32, width),
        (architecture + ".block_count", UINT32, n_layers),
        (architecture + ".feed_forward_length", UINT32, hidden),
        (architecture + ".attention.head_count", UINT32, n_heads),
        (architecture + ".attention.head_count_kv", UINT32, n_heads),
        (architecture + ".attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        (architecture + ".rope.dimension_count", UINT32, head_dim),
        ("tokenizer.ggml.model", STRING, "gpt2"),
        ("tokenizer.ggml.pre", STRING, "gpt-2"),
        ("tokenizer.ggml.tokens", STRING, tokens),
        ("tokenizer.ggml.token_type", INT32, [1] * 256 + [3]),
        ("tokenizer.ggml.merges", STRING, ["a b"]),
        ("tokenizer.ggml.eos_token_id", UINT32, 256),
    ]
    shapes = {"token_embd.weight": (width, len(tokens)), "output_norm.weight": (width,)}
    for layer in range(n_layers):
        shapes.update({
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (width,), "ffn_norm": (width,),
                "attn_q": (width, width), "attn_k": (width, width),
                "attn_v": (width, width), "attn_output": (width, width),
                "ffn_gate": (width, hidden), "ffn_up": (width, hidden),
                "ffn_down": (hidden, width),
            }.items()
        })

    draw = random.Random(1)
    infos, data = b"", b""
    for name, shape in shapes.items():
        count = 1
        for size in shape:
            count *= size
        infos += _text(name) + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", F32, len(data))
        is_norm = len(shape) == 1
        values = [1.0 if is_norm else draw.gauss(0, 0.1) for _ in range(count)]
        data += struct.pack(f"<{count}f", *values)
        data += b"\0" * (-len(data) % ALIGNMENT)

    header = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(pairs))
    header += b"".join(_pair(*pair) for pair in pairs) + infos
    with open(path, "wb") as file:
        file.write(header + b"\0" * (-len(header) % ALIGNMENT) + data)
