"""Writes GGUF files of tiny models with random weights and a vocabulary of single bytes.

For what no small published model has: an odd head size, an unknown architecture, attention sinks, a
soft cap, ALiBi, layers without a KV cache. A function for each architecture; write() for the bytes.
"""

import random
import struct

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
F32, ALIGNMENT = 0, 32
N_VOCAB = 257  # the bytes and an end
HIDDEN = 64    # width of feed-forward layers


def _text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(kind, value):
    if kind == STRING:
        return _text(value)
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}[kind], value)


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


def write(path, architecture, pairs, shapes):
    """`pairs`: (key without the architecture, kind, value); `shapes`: tensor name -> ggml's ne."""
    pairs = [("general.architecture", STRING, architecture),
             *((f"{architecture}.{key}", kind, value) for key, kind, value in pairs),
             ("tokenizer.ggml.model", STRING, "gpt2"),
             ("tokenizer.ggml.pre", STRING, "gpt-2"),
             ("tokenizer.ggml.tokens", STRING, [*_byte_tokens(), "<end>"]),
             ("tokenizer.ggml.token_type", INT32, [1] * 256 + [3]),
             ("tokenizer.ggml.merges", STRING, ["a b"]),
             ("tokenizer.ggml.bos_token_id", UINT32, 256),
             ("tokenizer.ggml.eos_token_id", UINT32, 256)]
    draw = random.Random(1)
    infos, data = b"", b""
    for name, shape in shapes.items():
        count = 1
        for size in shape:
            count *= size
        infos += _text(name) + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", F32, len(data))
        if name.endswith(".bias") or "norm" in name or name.endswith("ssm_d"):
            values = [0.0 if name.endswith(".bias") else 1.0] * count
        elif name.endswith("ssm_a"):
            values = [-1.0] * count
        else:  # outputs as large as inputs; embeddings, often also the output matrix, small
            deviation = (0.3 if name.startswith("token_embd") else 1.0 if len(shape) == 1
                         else shape[0] ** -0.5)
            values = [draw.gauss(0, deviation) for _ in range(count)]
        data += struct.pack(f"<{count}f", *values)
        data += b"\0" * (-len(data) % ALIGNMENT)

    header = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(pairs))
    header += b"".join(_pair(*pair) for pair in pairs) + infos
    with open(path, "wb") as file:
        file.write(header + b"\0" * (-len(header) % ALIGNMENT) + data)


# ---- parts that architectures share ----------------------------------------------------------------


def _common(width, n_layers, epsilon="layer_norm_rms_epsilon"):
    return [("context_length", UINT32, 1024), ("embedding_length", UINT32, width),
            ("block_count", UINT32, n_layers), ("feed_forward_length", UINT32, HIDDEN),
            (f"attention.{epsilon}", FLOAT32, 1e-5)]


def _heads(n_heads, n_kv_heads, head_dim):
    return [("attention.head_count", UINT32, n_heads),
            ("attention.head_count_kv", UINT32, n_kv_heads),
            ("attention.key_length", UINT32, head_dim),
            ("attention.value_length", UINT32, head_dim),
            ("rope.dimension_count", UINT32, head_dim)]


def _layers(n_layers, width, tensors, output_norm="output_norm"):
    """`tensors`: layer -> {name: shape}, names without "blk.N." and, where they end in it, ".weight"."""
    shapes = {"token_embd.weight": (width, N_VOCAB), f"{output_norm}.weight": (width,)}
    for layer in range(n_layers):
        for name, shape in tensors(layer).items():
            whole = name.endswith((".bias", "ssm_a", "ssm_d"))
            shapes[f"blk.{layer}.{name}" + ("" if whole else ".weight")] = shape
    return shapes


def _attention(width, n_heads, n_kv_heads, head_dim):
    return {"attn_norm": (width,), "attn_q": (width, n_heads * head_dim),
            "attn_k": (width, n_kv_heads * head_dim), "attn_v": (width, n_kv_heads * head_dim),
            "attn_output": (n_heads * head_dim, width)}


def _feed_forward(width):
    return {"ffn_norm": (width,), "ffn_gate": (width, HIDDEN), "ffn_up": (width, HIDDEN),
            "ffn_down": (HIDDEN, width)}


# ---- architectures ---------------------------------------------------------------------------------


def llama(path, head_dim=32, n_heads=2, n_layers=2, architecture="llama"):
    width = head_dim * n_heads
    tensors = _attention(width, n_heads, n_heads, head_dim) | _feed_forward(width)
    write(path, architecture, _common(width, n_layers) + _heads(n_heads, n_heads, head_dim),
          _layers(n_layers, width, lambda _: tensors))


def soft_cap(path):
    """Gemma 2: capped attention scores; a sliding window of 64 in every other layer."""
    width, n_heads, n_kv_heads, head_dim = 64, 4, 2, 32
    tensors = _attention(width, n_heads, n_kv_heads, head_dim) | _feed_forward(width)
    tensors |= {"post_attention_norm": (width,), "post_ffw_norm": (width,)}
    pairs = [("attention.sliding_window", UINT32, 64), ("attn_logit_softcapping", FLOAT32, 2.0),
             ("final_logit_softcapping", FLOAT32, 30.0)]
    write(path, "gemma2", _common(width, 2) + _heads(n_heads, n_kv_heads, head_dim) + pairs,
          _layers(2, width, lambda _: tensors))


def sinks(path):
    """GPT-OSS: an attention sink per head, experts, a sliding window of 64 in every other layer."""
    width, n_heads, n_kv_heads, head_dim, n_experts = 64, 4, 2, 32, 2
    tensors = _attention(width, n_heads, n_kv_heads, head_dim) | {
        "attn_output.bias": (width,), "attn_sinks": (n_heads,), "post_attention_norm": (width,),
        "ffn_gate_inp": (width, n_experts), "ffn_gate_inp.bias": (n_experts,),
        "ffn_gate_exps": (width, HIDDEN, n_experts), "ffn_gate_exps.bias": (HIDDEN, n_experts),
        "ffn_up_exps": (width, HIDDEN, n_experts), "ffn_up_exps.bias": (HIDDEN, n_experts),
        "ffn_down_exps": (HIDDEN, width, n_experts), "ffn_down_exps.bias": (width, n_experts)}
    pairs = [("attention.sliding_window", UINT32, 64), ("expert_count", UINT32, n_experts),
             ("expert_used_count", UINT32, 1), ("expert_feed_forward_length", UINT32, HIDDEN)]
    shapes = _layers(2, width, lambda _: tensors)
    write(path, "gpt-oss", _common(width, 2) + _heads(n_heads, n_kv_heads, head_dim) + pairs,
          shapes | {"output.weight": (width, N_VOCAB)})


def alibi(path, n_heads=3, head_dim=32):
    """BLOOM: no rotary embedding, a bias on scores that grows with distance."""
    width = n_heads * head_dim
    tensors = {"attn_norm": (width,), "attn_norm.bias": (width,), "attn_qkv": (width, 3 * width),
               "attn_qkv.bias": (3 * width,), "attn_output": (width, width),
               "attn_output.bias": (width,), "ffn_norm": (width,), "ffn_norm.bias": (width,),
               "ffn_up": (width, HIDDEN), "ffn_up.bias": (HIDDEN,), "ffn_down": (HIDDEN, width),
               "ffn_down.bias": (width,)}
    shapes = _layers(2, width, lambda _: tensors)
    norms = {name: (width,) for name in
             ("token_embd_norm.weight", "token_embd_norm.bias", "output_norm.bias")}
    write(path, "bloom", _common(width, 2, "layer_norm_epsilon") +
          [("attention.head_count", UINT32, n_heads)], shapes | norms)


def hybrid(path):
    """LFM2: a layer of short convolutions, which keep a state of their own, then attention."""
    width, n_heads, head_dim, window = 64, 2, 32, 3
    convolution = {"attn_norm": (width,), "shortconv.conv": (window, width),
                   "shortconv.in_proj": (width, 3 * width), "shortconv.out_proj": (width, width)}
    attention = _attention(width, n_heads, n_heads, head_dim) | {
        "attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,)}
    pairs = [pair for pair in _heads(n_heads, n_heads, head_dim)
             if pair[0] != "attention.head_count_kv"]
    pairs += [("attention.head_count_kv", INT32, [0, n_heads]),
              ("shortconv.l_cache", UINT32, window), ("vocab_size", UINT32, N_VOCAB)]
    write(path, "lfm2", _common(width, 2) + pairs, _layers(
        2, width, lambda layer: (attention if layer == 1 else convolution) | _feed_forward(width),
        output_norm="token_embd_norm"))


def recurrent(path):
    """Mamba: no KV cache at all."""
    width, inner, state, rank, window = 64, 128, 16, 4, 4
    tensors = {"attn_norm": (width,), "ssm_in": (width, 2 * inner),
               "ssm_conv1d": (window, inner), "ssm_conv1d.bias": (inner,),
               "ssm_x": (inner, rank + 2 * state), "ssm_dt": (rank, inner),
               "ssm_dt.bias": (inner,), "ssm_a": (state, inner), "ssm_d": (inner,),
               "ssm_out": (inner, width)}
    pairs = [("ssm.conv_kernel", UINT32, window), ("ssm.inner_size", UINT32, inner),
             ("ssm.state_size", UINT32, state), ("ssm.time_step_rank", UINT32, rank),
             ("attention.head_count", UINT32, 0)]
    write(path, "mamba", _common(width, 2) + pairs, _layers(2, width, lambda _: tensors))


def latent(path):
    """DeepSeek 2: values are a part of the keys (MLA)."""
    width, n_heads, rank, rope, head = 64, 2, 32, 16, 32
    tensors = {"attn_norm": (width,), "attn_q_a_norm": (rank,), "attn_kv_a_norm": (rank,),
               "attn_q_a": (width, rank), "attn_q_b": (rank, n_heads * (head + rope)),
               "attn_kv_a_mqa": (width, rank + rope), "attn_k_b": (head, rank, n_heads),
               "attn_v_b": (rank, head, n_heads), "attn_output": (n_heads * head, width)}
    pairs = [("leading_dense_block_count", UINT32, 2), ("attention.q_lora_rank", UINT32, rank),
             ("attention.kv_lora_rank", UINT32, rank), ("expert_shared_count", UINT32, 0),
             ("attention.key_length_mla", UINT32, head + rope),
             ("attention.value_length_mla", UINT32, head),
             ("attention.head_count", UINT32, n_heads), ("attention.head_count_kv", UINT32, 1),
             ("attention.key_length", UINT32, rank + rope),
             ("attention.value_length", UINT32, rank), ("rope.dimension_count", UINT32, rope),
             ("expert_feed_forward_length", UINT32, HIDDEN)]
    write(path, "deepseek2", _common(width, 2) + pairs,
          _layers(2, width, lambda _: tensors | _feed_forward(width)))
