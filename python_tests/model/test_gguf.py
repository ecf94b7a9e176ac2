"""GGUF files: written by the format's own library from random models, read back bit for bit; and what is refused."""

import json
import os
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from grpo_engine import load
from grpo_engine.cli import app
from grpo_engine.config import ModelSource
from grpo_engine.model import weights
from grpo_engine.model.config import ModelConfig, RopeScaling
from grpo_engine.model.decoder import rope_frequencies
from grpo_engine.model.gguf import convert
from grpo_engine.model.tokenizer import HFTokenizer, train_bpe

gguf = pytest.importorskip("gguf")
from gguf.quants import dequantize, quantize  # noqa: E402

TEXTS = ["what is 12 + 30? it's 42.", "don't stop", "x = 1\n\n  y = 2", "naïve café 日本 🙂"]
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
# the format's names of what a layer has
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> HFTokenizer:
    return train_bpe(TEXTS * 5, vocab_size=320, folder=tmp_path_factory.mktemp("tokenizer"))


def config_of(kind: str, vocab: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32 if kind == "qwen3" else 16, rope_theta=50_000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=kind != "llama", max_position_embeddings=512, qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3",
        model_type=kind,
    )  # fmt: skip


def rows_of_neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a head's rows, in which rotary pairs are neighbours: row by row."""
    E = weight.shape[0] // heads
    rows = [h * E + (j // 2 if j % 2 == 0 else E // 2 + j // 2) for h in range(heads) for j in range(E)]
    return weight[rows]


def write(path: Path, kind: str, tensors: dict, tokenizer: HFTokenizer, config: ModelConfig, *, kind_of=None, **changes):
    """A file as llama.cpp's converter writes it; what is None in changes is left out."""
    writer = gguf.GGUFWriter(path, kind)
    vocab = tokenizer._fast.get_vocab(with_added_tokens=True)
    texts = sorted(vocab, key=vocab.get)
    merges = json.loads((tokenizer.folder / "tokenizer.json").read_text())["model"]["merges"]
    fields = {
        f"{kind}.block_count": config.num_hidden_layers, f"{kind}.context_length": config.max_position_embeddings,
        f"{kind}.embedding_length": config.hidden_size, f"{kind}.feed_forward_length": config.intermediate_size,
        f"{kind}.attention.head_count": config.num_attention_heads,
        f"{kind}.attention.head_count_kv": config.num_key_value_heads, f"{kind}.attention.key_length": config.head_dim,
        f"{kind}.rope.freq_base": config.rope_theta, f"{kind}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [3 if t == "<|endoftext|>" else 1 for t in texts],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id, "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    } | changes  # fmt: skip
    for key, value in fields.items():
        if value is None:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool,
               list: writer.add_array}[type(value)]  # fmt: skip
        add(key, value)
    for name, tensor in tensors.items():
        quantization = kind_of(name) if kind_of and tensor.ndim == 2 else None
        if quantization is None:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, quantize(tensor, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors_of(model, kind: str) -> dict[str, np.ndarray]:
    """The file's tensors of a model."""
    out = {}
    for name, tensor in weights.split_parameters(model):
        values, (stem, ending) = tensor.float().numpy(), name.rsplit(".", 1)
        if stem in TOP:
            out[f"{TOP[stem]}.{ending}"] = values
            continue
        _, _, layer, module = stem.split(".", 3)
        if kind == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = model.config.num_attention_heads if "q_proj" in module else model.config.num_key_value_heads
            values = rows_of_neighbours(values, heads)
        out[f"blk.{layer}.{LAYER[module]}.{ending}"] = values
    return out


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3"])
def test_a_model_comes_back_bit_for_bit(kind, tokenizer, tmp_path):
    config = config_of(kind, tokenizer.vocab_size)
    model = models.random_model(config)
    write(tmp_path / "m.gguf", kind, tensors_of(model, kind), tokenizer, config)
    folder = convert(tmp_path / "m.gguf", tmp_path / "m")
    back = weights.load_model(folder)
    assert back.config == config and back.config.model_type == kind
    for (name, a), (_, b) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    again = HFTokenizer(folder)
    assert [again.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
    assert all(again.decode(again.encode(t)) == t for t in TEXTS)
    assert again.stop_ids == (tokenizer.eos_id,) and again.vocab_size == tokenizer.vocab_size
    assert again.encode_prompt("a question", chat=True) == tokenizer.encode("a question")


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3"])
def test_transformers_reads_the_folder_and_computes_the_same(kind, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = config_of(kind, tokenizer.vocab_size)
    write(tmp_path / "m.gguf", kind, tensors_of(models.random_model(config, scale=2.0), kind), tokenizer, config)
    folder = convert(tmp_path / "m.gguf", tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([HFTokenizer(folder).encode(TEXTS[0])])
    with torch.no_grad():
        want = torch.log_softmax(theirs(input_ids=ids).logits[0, :-1], dim=-1).gather(1, ids[0, 1:, None])[:, 0]
        T = ids.shape[1]
        got, _ = weights.load_model(folder).logprobs(
            ids[0], torch.tensor([0, T], dtype=torch.int32), cu_groups=torch.tensor([0, 1], dtype=torch.int32),
            rows=torch.arange(T - 1), target=ids[0, 1:], positions_T=torch.arange(T),
        )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    assert [fast.encode(t, add_special_tokens=False) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
    assert fast.eos_token == "<|endoftext|>"


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "Q5_0", "Q4_0"])
def test_quantised_weights_are_the_librarys(name, tokenizer, tmp_path):
    config = config_of("qwen2", tokenizer.vocab_size)
    tensors = tensors_of(models.random_model(config), "qwen2")
    quantization = getattr(gguf.GGMLQuantizationType, name)
    write(tmp_path / "m.gguf", "qwen2", tensors, tokenizer, config, kind_of=lambda _: quantization)
    model = weights.load_model(convert(tmp_path / "m.gguf", tmp_path / "m"))
    want = dequantize(quantize(tensors["blk.1.ffn_down.weight"], quantization), quantization)
    assert torch.equal(model.layers[1].down_weight, torch.from_numpy(want))
    assert not np.array_equal(want, tensors["blk.1.ffn_down.weight"])
    half = weights.load_model(convert(tmp_path / "m.gguf", tmp_path / "half", dtype="bfloat16"), dtype=torch.bfloat16)
    assert torch.equal(half.layers[1].down_weight, torch.from_numpy(want).bfloat16())


def test_llama_3s_scaling_of_positions_is_recognised_or_refused(tokenizer, tmp_path):
    config = config_of("llama", tokenizer.vocab_size)
    tensors = tensors_of(models.random_model(config), "llama")
    plain = 1.0 / config.rope_theta ** (np.arange(0, 16, 2) / 16)
    scaled = rope_frequencies(config.rope_theta, 16, SCALING, torch.device("cpu")).double().numpy()
    factors = (plain / scaled).astype(np.float32)
    assert factors[0] == pytest.approx(1, rel=1e-6) and factors[-1] == pytest.approx(8, rel=1e-6)
    write(tmp_path / "a.gguf", "llama", tensors | {"rope_freqs.weight": factors}, tokenizer, config)
    assert weights.load_model(convert(tmp_path / "a.gguf", tmp_path / "a")).config.rope_scaling == SCALING
    write(tmp_path / "b.gguf", "llama", tensors | {"rope_freqs.weight": factors * 1.1}, tokenizer, config)
    with pytest.raises(ValueError, match=r"b.gguf: tensor rope_freqs.weight must be that of Llama 3.1 to 3.3"):
        convert(tmp_path / "b.gguf", tmp_path / "b")


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer.ggml.model must be 'gpt2' \(merges of bytes\), got 'llama'"),
        ({"tokenizer.ggml.pre": "viking"}, r"tokenizer.ggml.pre must be one of gpt-2, smollm, qwen2, .*got 'viking'"),
        ({"tokenizer.ggml.eos_token_id": None}, "tokenizer.ggml.eos_token_id must be there, got none"),
        ({"tokenizer.ggml.add_bos_token": True}, "tokenizer.ggml.bos_token_id must be there .*got none"),
        ({"qwen2.rope.scaling.type": "yarn"}, "qwen2.rope.scaling.type must be 'none', got 'yarn'"),
        ({"qwen2.attention.head_count": None}, "qwen2.attention.head_count must be of type int, got none"),
        ({"qwen2.rope.dimension_count": 8}, "qwen2.rope.dimension_count must be the width of a head, 16, got 8"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes, says, tokenizer, tmp_path):
    config = config_of("qwen2", tokenizer.vocab_size)
    write(tmp_path / "m.gguf", "qwen2", tensors_of(models.random_model(config), "qwen2"), tokenizer, config, **changes)
    with pytest.raises(ValueError, match=rf"m.gguf: {says}"):
        convert(tmp_path / "m.gguf", tmp_path / "m")
    assert os.listdir(tmp_path) == ["m.gguf"]  # nothing is left


def test_wrong_tensors_architectures_and_files_are_named(tokenizer, tmp_path):
    config = config_of("qwen2", tokenizer.vocab_size)
    tensors = tensors_of(models.random_model(config), "qwen2")

    def converted(name, tensors, kind="qwen2"):
        write(tmp_path / name, kind, tensors, tokenizer, config)
        return convert(tmp_path / name, tmp_path / "out")

    with pytest.raises(ValueError, match="tensor blk.0.attn_sinks.weight is unknown to a qwen2 model"):
        converted("a.gguf", tensors | {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match="the tensor of model.layers.1.mlp.up_proj.weight is missing"):
        converted("b.gguf", {k: v for k, v in tensors.items() if k != "blk.1.ffn_up.weight"})
    with pytest.raises(ValueError, match=r"tensor blk.1.ffn_up.weight must have shape \(96, 64\), got \(90, 64\)"):
        converted("c.gguf", tensors | {"blk.1.ffn_up.weight": tensors["blk.1.ffn_up.weight"][:90]})
    with pytest.raises(ValueError, match="general.architecture must be one of llama, qwen2, qwen3, got 'gemma'"):
        converted("d.gguf", tensors, kind="gemma")
    with pytest.raises(FileNotFoundError, match="absent.gguf: no such file"):
        convert(tmp_path / "absent.gguf", tmp_path / "out")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:5000])
    (tmp_path / "text.gguf").write_text("hello")
    for name in ("cut.gguf", "text.gguf"):
        with pytest.raises(ValueError, match=f"{name}: not a whole GGUF file"):
            convert(tmp_path / name, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    write(tmp_path / "e.gguf", "qwen2", tensors, tokenizer, config)
    with pytest.raises(FileExistsError, match="full: must be absent or an empty folder"):
        convert(tmp_path / "e.gguf", tmp_path / "full")


def test_a_file_may_be_a_models_path_and_is_converted_once(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = config_of("qwen2", tokenizer.vocab_size)
    tensors = tensors_of(models.random_model(config), "qwen2")
    write(tmp_path / "m.gguf", "qwen2", tensors, tokenizer, config)
    source = load.model_files(ModelSource(path=str(tmp_path / "m.gguf")))
    times = (source.folder / "model.safetensors").stat().st_mtime_ns
    assert load.model_files(ModelSource(path=str(tmp_path / "m.gguf"))) == source
    assert (source.folder / "model.safetensors").stat().st_mtime_ns == times and source.revision in source.folder.name
    write(tmp_path / "m.gguf", "qwen2", tensors | {"output_norm.weight": np.ones(64, np.float32)}, tokenizer, config)
    other = load.model_files(ModelSource(path=str(tmp_path / "m.gguf")))
    assert other.folder != source.folder and weights.load_model(other.folder).final_norm.eq(1).all()
    with pytest.raises(FileNotFoundError, match="model.path=absent.gguf: no such file"):
        load.model_files(ModelSource(path="absent.gguf"))


def test_the_command_converts(tokenizer, tmp_path):
    config = config_of("qwen2", tokenizer.vocab_size)
    write(tmp_path / "m.gguf", "qwen2", tensors_of(models.random_model(config), "qwen2"), tokenizer, config)
    result = CliRunner().invoke(
        app, ["convert", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "m"), "--dtype", "bfloat16"]
    )
    assert result.exit_code == 0 and "MB" in result.output
    assert json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


@pytest.fixture(scope="module", params=["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"])
def real_file(request) -> Path:
    path = Path(os.environ.get("GRPO_ENGINE_MODELS", "../shared/models")) / f"{request.param}.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is not there: GRPO_ENGINE_MODELS names the folder of real models")
    return path


def test_a_real_file_gives_the_librarys_weights(real_file, tmp_path):
    model = weights.load_model(convert(real_file, tmp_path / "m"))
    tensors = {t.name: t for t in gguf.GGUFReader(real_file).tensors}
    for name, parameter in (("token_embd", model.embed.weight), ("blk.3.ffn_down", model.layers[3].down_weight)):
        tensor = tensors[f"{name}.weight"]
        assert torch.equal(parameter, torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))))
    assert model.final_norm.isfinite().all()
