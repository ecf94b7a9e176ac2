import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_engine.model import hf_config, weights
from grpo_engine.model.config import ModelConfig
from grpo_engine.model.decoder import Model

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2,
)  # fmt: skip


def theirs(*, tied=True, dtype=torch.float32, **sizes):
    """A random Qwen2 of transformers, biases and norms random as well, so that no misplaced row hides."""
    torch.manual_seed(7)
    config = transformers.Qwen2Config(**(SIZES | sizes), tie_word_embeddings=tied)
    model = transformers.Qwen2ForCausalLM(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
    return model


def ours(*, tied=True, dtype=torch.float32):
    config = ModelConfig(**SIZES, head_dim=4, tie_word_embeddings=tied, rope_theta=5e5)
    return Model(config, dtype).init_weights(3)


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    weights.save_checkpoint(ours(tied=False), folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture
def sharded(tmp_path):
    weights.save_checkpoint(ours(tied=False), tmp_path / "sharded", max_shard_bytes=12_000)
    return tmp_path / "sharded"


# ------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shard", ["5GB", "10KB"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_round_trip_with_transformers(tmp_path, tied, shard, dtype):
    first = theirs(tied=tied, dtype=dtype)
    first.save_pretrained(tmp_path / "a", max_shard_size=shard)
    assert (tmp_path / "a" / hf_config.INDEX_FILE).exists() == (shard == "10KB")

    model = weights.load_model(tmp_path / "a", dtype=dtype)
    assert model.dtype == dtype and all(p.requires_grad for p in model.parameters())
    weights.save_checkpoint(model, tmp_path / "b", max_shard_bytes=10**10 if shard == "5GB" else 10_000)
    assert (tmp_path / "b" / hf_config.INDEX_FILE).exists() == (shard == "10KB")

    second, info = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "b", dtype="auto", output_loading_info=True)
    assert same(first.state_dict(), second.state_dict())
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert second.config.rope_parameters == first.config.rope_parameters
    assert second.config.tie_word_embeddings == tied


def test_fused_rows_are_q_then_k_then_v_and_gate_then_up(tmp_path):
    first = theirs()
    first.save_pretrained(tmp_path)
    layer, got = first.model.layers[1], weights.load_model(tmp_path).layers[1]
    attention = layer.self_attn
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert torch.equal(got.qkv_weight, torch.cat([x.weight for x in qkv]))
    assert torch.equal(got.qkv_bias, torch.cat([x.bias for x in qkv]))
    assert torch.equal(got.gate_up_weight, torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]))
    assert torch.equal(got.attn_norm, layer.input_layernorm.weight)
    assert torch.equal(got.mlp_norm, layer.post_attention_layernorm.weight)


def test_pieces_cover_every_row_once():
    for tied in (True, False):
        model = ours(tied=tied)
        rows = {name: [0] * len(p) for name, p in model.named_parameters()}
        for piece in weights.pieces(model.config).values():
            for r in range(piece.start, piece.start + piece.shape[0]):
                rows[piece.parameter][r] += 1
        assert all(count == 1 for counts in rows.values() for count in counts)


def test_our_own_round_trip_keeps_every_config_field(saved):
    model = weights.load_model(saved)
    assert model.config == ours(tied=False).config
    assert same(model.state_dict(), ours(tied=False).state_dict())


def test_head_dim_that_is_not_the_quotient(tmp_path):
    model = Model(ModelConfig(**SIZES, head_dim=6)).init_weights(1)
    weights.save_checkpoint(model, tmp_path / "m")
    assert hf_config.read_config(tmp_path / "m").head_dim == 6
    assert same(weights.load_model(tmp_path / "m").state_dict(), model.state_dict())
    assert transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "m").model.layers[0].self_attn.head_dim == 6


def test_load_converts_to_the_wanted_dtype(saved):
    got = weights.load_model(saved, dtype=torch.bfloat16).state_dict()
    wanted = {k: v.to(torch.bfloat16) for k, v in ours(tied=False).state_dict().items()}
    assert same(got, wanted)
    half = load_file(saved / hf_config.SINGLE_FILE)
    assert half["lm_head.weight"].dtype == torch.float32  # the file is untouched


def test_float16_files_are_read(copy):
    tensors = {k: v.half() for k, v in load_file(copy / hf_config.SINGLE_FILE).items()}
    save_file(tensors, copy / hf_config.SINGLE_FILE)
    got = dict(weights.split_parameters(weights.load_model(copy)))
    assert same(got, {k: v.float() for k, v in tensors.items()})


def test_load_into_writes_in_place(saved):
    model = ours(tied=False).init_weights(99)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    weights.load_into(model, saved)
    assert same(model.state_dict(), ours(tied=False).state_dict())
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}


def test_obsolete_rotary_buffers_are_left_out(copy):
    edit(copy, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert same(weights.load_model(copy).state_dict(), ours(tied=False).state_dict())


def test_a_tied_head_that_is_stored_must_equal_the_embedding(tmp_path):
    weights.save_checkpoint(ours(), tmp_path / "m")
    edit(tmp_path / "m", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert same(weights.load_model(tmp_path / "m").state_dict(), ours().state_dict())
    edit(tmp_path / "m", lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"model\.safetensors: lm_head\.weight must equal model\.embed_tokens\.weight"):
        weights.load_model(tmp_path / "m")


# ------------------------------------------------------------------------------------------ config.json


def set_fields(folder, **values):
    path = folder / hf_config.CONFIG_FILE
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


BAD_FIELDS = {
    "another architecture": (
        dict(model_type="gemma"), "model_type must be one of 'qwen2', 'llama', 'qwen3', 'mistral', got 'gemma'",
    ),
    "no architecture": (dict(model_type=...), "model_type must be one of 'qwen2', 'llama', 'qwen3', 'mistral', got None"),
    "another's architecture": (dict(model_type="llama"), "architectures must be ['LlamaForCausalLM'], got ['Qwen2For"),
    "biases that Llama has not": (
        dict(model_type="llama", architectures=None, attention_bias=True), "attention_bias must be false, got True",
    ),
    "half of llama3": (
        dict(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "rope_parameters.low_freq_factor must be a finite",
    ),
    "llama3 upside down": (
        dict(rope_parameters={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
                              "original_max_position_embeddings": 64}),
        "needs 0 < low_freq_factor < high_freq_factor, got 4.0 and 1.0",
    ),
    "a reward model": (dict(architectures=["Qwen2ForSequenceClassification"]), "architectures must be"),
    "another activation": (dict(hidden_act="gelu"), "hidden_act must be 'silu', got 'gelu'"),
    "sliding window": (dict(use_sliding_window=True), "use_sliding_window must be false, got True"),
    "sliding layers": (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types must all"),
    "dropout": (dict(attention_dropout=0.1), "attention_dropout must be 0, got 0.1"),
    "quantized": (dict(quantization_config={"bits": 4}), "quantization_config must be absent"),
    "yarn, transformers 4": (dict(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_scaling must be null"),
    "linear, transformers 5": (
        dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}), "rope_parameters must be null",
    ),
    "rope by layer type": (
        dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "rope_parameters must be null",
    ),
    "half a rotation": (
        dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "rope_parameters must be null",
    ),
    "two thetas": (dict(rope_theta=1e4), "rope_theta must be given once"),
    "theta of zero": (dict(rope_theta=0, rope_parameters=None), "rope_theta must be a finite number > 0, got 0"),
    "eps as text": (dict(rms_norm_eps="1e-6"), "rms_norm_eps must be a finite number > 0, got '1e-6'"),
    "no width": (dict(hidden_size=...), "hidden_size must be an integer >= 1, got None (absent)"),
    "no kv heads": (dict(num_key_value_heads=...), "num_key_value_heads must be an integer >= 1"),
    "no layers": (dict(num_hidden_layers=0), "num_hidden_layers must be an integer >= 1, got 0"),
    "width as a float": (dict(hidden_size=24.0), "hidden_size must be an integer >= 1, got 24.0"),
    "heads as a bool": (dict(num_attention_heads=True), "num_attention_heads must be an integer >= 1, got True"),
    "heads that do not divide": (dict(num_attention_heads=7), "hidden_size must be a multiple"),
    "kv heads that do not divide": (dict(num_key_value_heads=4), "must be a multiple of num_key_value_heads=4"),
    "odd head": (dict(head_dim=5), "head_dim must be even"),
    "tied by number": (dict(tie_word_embeddings=1), "tie_word_embeddings must be true or false, got 1"),
}  # fmt: skip


@pytest.mark.parametrize("values, message", BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_a_config_that_changes_the_arithmetic_is_refused(copy, values, message):
    set_fields(copy, **values)
    with pytest.raises(ValueError) as error:
        weights.load_model(copy)
    assert str(error.value).startswith(f"{copy / hf_config.CONFIG_FILE}: ") and message in str(error.value)


def test_config_as_transformers_4_wrote_it(copy):
    set_fields(copy, rope_parameters=..., rope_theta=5e5, rope_scaling=None, sliding_window=131072, max_window_layers=2)
    assert hf_config.read_config(copy) == ours(tied=False).config


def test_absent_fields_take_the_defaults_of_transformers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "qwen2"}))
    got, wanted = hf_config.read_config(tmp_path), transformers.Qwen2Config(**SIZES)
    assert got.rope_theta == wanted.rope_parameters["rope_theta"]
    assert got.rms_norm_eps == wanted.rms_norm_eps
    assert got.tie_word_embeddings == wanted.tie_word_embeddings
    assert got.max_position_embeddings == wanted.max_position_embeddings


def test_load_into_another_size_names_the_field(saved):
    sizes = SIZES | {"intermediate_size": 41}
    model = Model(ModelConfig(**sizes, head_dim=4, tie_word_embeddings=False, rope_theta=5e5))
    with pytest.raises(ValueError, match=r"config\.json: intermediate_size must be 41 \(the model's\), got 40"):
        weights.load_into(model, saved)


# ------------------------------------------------------------------------------------------ bad files


def edit(folder, change, file=hf_config.SINGLE_FILE):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit_index(folder, change):
    index = json.loads((folder / hf_config.INDEX_FILE).read_text())
    change(index["weight_map"])
    (folder / hf_config.INDEX_FILE).write_text(json.dumps(index))


def truncate(path, by):
    os.truncate(path, path.stat().st_size - by)


def raw_header(path, change):
    """Rewrites the header of a safetensors file as text."""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + n])
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
BAD_SINGLE = {
    "truncated by a byte": (lambda d: truncate(d / "model.safetensors", 1), "truncated or overlong: wanted"),
    "cut in the header": (lambda d: os.truncate(d / "model.safetensors", 100), "truncated, or not safetensors: wanted"),
    "empty": (lambda d: os.truncate(d / "model.safetensors", 0), "wanted at least 8 bytes, got 0"),
    "a byte too many": (lambda d: open(d / "model.safetensors", "ab").write(b"x"), "truncated or overlong"),
    "not safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"PK" * 99), "or not safetensors"),
    "LFS pointer": (
        lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "Git LFS pointer",
    ),
    "header is no JSON": (
        lambda d: raw_header(d / "model.safetensors", lambda t: b"}" * len(t)), "no safetensors header",
    ),
    "missing tensor": (lambda d: edit(d, lambda t: t.pop(DOWN)), f"tensor {DOWN} is missing, wanted shape [24, 40]"),
    "missing head": (lambda d: edit(d, lambda t: t.pop("lm_head.weight")), "tensor lm_head.weight is missing"),
    "missing bias": (
        lambda d: edit(d, lambda t: t.pop("model.layers.0.self_attn.k_proj.bias")), "k_proj.bias is missing",
    ),
    "extra tensor": (lambda d: edit(d, lambda t: t.update(surprise=torch.ones(1))), "tensor surprise is unknown"),
    "extra layer": (
        lambda d: edit(d, lambda t: t.update({"model.layers.2.mlp.down_proj.weight": t[DOWN].clone()})),
        "tensor model.layers.2.mlp.down_proj.weight is unknown",
    ),
    "a bias that Qwen2 has not": (
        lambda d: edit(d, lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(24)})),
        "tensor model.layers.0.self_attn.o_proj.bias is unknown",
    ),
    "transposed": (
        lambda d: edit(d, lambda t: t.update({DOWN: t[DOWN].T.contiguous()})),
        f"tensor {DOWN} must have shape [24, 40], got [40, 24]",
    ),
    "flat": (
        lambda d: edit(d, lambda t: t.update({NORM: t[NORM][:, None]})),
        f"tensor {NORM} must have shape [24], got [24, 1]",
    ),
    "integers": (lambda d: edit(d, lambda t: t.update({NORM: t[NORM].int()})), f"tensor {NORM} must be one of F32"),
    "doubles": (lambda d: edit(d, lambda t: t.update({NORM: t[NORM].double()})), "BF16, F16, got F64"),
    "twice in one header": (
        lambda d: raw_header(
            d / "model.safetensors",
            lambda t: t.replace(b'"model.norm.weight"', b'"model.norm.bogus!"').rstrip(b" }")
            + b'},"lm_head.weight":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        ),
        "tensor lm_head.weight is there twice",
    ),
    "a size that the config denies": (lambda d: set_fields(d, vocab_size=54), "must have shape [54, 24], got [53, 24]"),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", BAD_SINGLE.values(), ids=BAD_SINGLE.keys())
def test_a_bad_file_is_named(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError) as error:
        weights.load_model(copy)
    assert str(error.value).startswith(f"{copy / hf_config.SINGLE_FILE}: ") and message in str(error.value)


FIRST = "model-00001-of-"


def first_shard(folder):
    return next(folder.glob(FIRST + "*"))


BAD_SHARDS = {
    "missing shard": (lambda d: first_shard(d).unlink(), (hf_config.INDEX_FILE, FIRST, "is missing")),
    "truncated shard": (lambda d: truncate(first_shard(d), 4), (FIRST, "truncated or overlong")),
    "index forgets a tensor": (
        lambda d: edit_index(d, lambda m: m.pop("model.embed_tokens.weight")),
        (FIRST, "tensor model.embed_tokens.weight is there, but model.safetensors.index.json does not place it here"),
    ),
    "index in the wrong place": (
        lambda d: edit_index(d, lambda m: m.update({NORM: first_shard(d).name})),
        (FIRST, f"tensor {NORM} is missing, {hf_config.INDEX_FILE} places it here"),
    ),
    "index invents a tensor": (
        lambda d: edit_index(d, lambda m: m.update({"bogus": first_shard(d).name})), (FIRST, "tensor bogus is missing"),
    ),
    "twice": (
        lambda d: edit(d, lambda t: t.update({NORM: torch.ones(24)}), first_shard(d).name),
        (FIRST, f"tensor {NORM} is there"),
    ),
    "missing everywhere": (
        lambda d: (edit_index(d, lambda m: m.pop("model.embed_tokens.weight")),
                   edit(d, lambda t: t.pop("model.embed_tokens.weight"), first_shard(d).name)),
        (hf_config.INDEX_FILE, "tensor model.embed_tokens.weight is missing, wanted shape [53, 24]"),
    ),
    "index outside the folder": (
        lambda d: edit_index(d, lambda m: m.update({NORM: "../x.safetensors"})), (hf_config.INDEX_FILE, "'../x.safetens"),
    ),
    "index without a map": (
        lambda d: (d / hf_config.INDEX_FILE).write_text("{}"), (hf_config.INDEX_FILE, "weight_map must be", "None"),
    ),
    "index no JSON": (lambda d: (d / hf_config.INDEX_FILE).write_text("{"), (hf_config.INDEX_FILE, "not JSON")),
    "both kinds": (
        lambda d: shutil.copy(first_shard(d), d / hf_config.SINGLE_FILE), (hf_config.INDEX_FILE, "got both"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage, words", BAD_SHARDS.values(), ids=BAD_SHARDS.keys())
def test_bad_shards_are_named(sharded, damage, words):
    assert len(list(sharded.glob("model-*"))) > 2
    damage(sharded)
    with pytest.raises(ValueError) as error:
        weights.load_model(sharded)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_bad_last_shard_changes_no_weight(sharded):
    truncate(sorted(sharded.glob("model-*"))[-2], 1)
    model = ours(tied=False).init_weights(5)
    with pytest.raises(ValueError, match="truncated"):
        weights.load_into(model, sharded)
    assert same(model.state_dict(), ours(tied=False).init_weights(5).state_dict())


def test_absent_things(tmp_path, copy):
    with pytest.raises(FileNotFoundError, match="Qwen/Qwen2.5-0.5B: no such folder"):
        weights.load_model("Qwen/Qwen2.5-0.5B")
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        weights.load_model(tmp_path)
    (copy / hf_config.SINGLE_FILE).rename(copy / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor .*; pytorch_model\.bin is not read"):
        weights.load_model(copy)
    (copy / hf_config.CONFIG_FILE).write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json: must hold a JSON object, got list"):
        weights.load_model(copy)
    with pytest.raises(TypeError, match=r"dtype must be a floating type, got torch\.int32"):
        weights.load_model(copy, dtype=torch.int32)


# ------------------------------------------------------------------------------------------ saving


def test_shards_keep_to_the_limit(sharded):
    sizes = [sum(t.nbytes for t in load_file(p).values()) for p in sharded.glob("model-*")]
    assert max(sizes) <= 12_000
    index = json.loads((sharded / hf_config.INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert set(index["weight_map"]) == set(weights.pieces(ours(tied=False).config))


def test_a_tensor_above_the_limit_gets_a_shard_of_its_own(tmp_path):
    weights.save_checkpoint(ours(), tmp_path / "m", max_shard_bytes=1)
    assert len(list(tmp_path.glob("m/model-*"))) == len(weights.pieces(ours().config))
    assert same(weights.load_model(tmp_path / "m").state_dict(), ours().state_dict())


def test_save_does_not_mix_with_other_files(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="must be absent or an empty folder"):
        weights.save_checkpoint(ours(), tmp_path / "full")
    (tmp_path / "empty").mkdir()
    weights.save_checkpoint(ours(), tmp_path / "empty")
    weights.save_checkpoint(ours(), tmp_path / "new" / "deep")
    for name in ("empty", "new/deep"):
        assert same(weights.load_model(tmp_path / name).state_dict(), ours().state_dict())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full", "new"]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        weights.save_checkpoint(ours(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_bad_save_arguments(tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes must be >= 1, got 0"):
        weights.save_checkpoint(ours(), tmp_path / "m", max_shard_bytes=0)
    with pytest.raises(TypeError, match=r"model must be one of float32, bfloat16, float16, got torch\.float64"):
        weights.save_checkpoint(ours(dtype=torch.float64), tmp_path / "m")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer there \(tokenizer\.json is missing\)"):
        weights.save_checkpoint(ours(), tmp_path / "m", tokenizer_folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_goes_along(tmp_path):
    (tmp_path / "t").mkdir()
    for name in ("tokenizer.json", "generation_config.json", "unrelated.txt", "config.json"):
        (tmp_path / "t" / name).write_text("{}")
    weights.save_checkpoint(ours(), tmp_path / "m", tokenizer_folder=tmp_path / "t")
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    assert hf_config.read_config(tmp_path / "m") == ours().config
    # an end that stood in config.json alone, which the copy writes anew
    (tmp_path / "t" / "config.json").write_text('{"eos_token_id": [5, 7]}')
    weights.save_checkpoint(ours(), tmp_path / "n", tokenizer_folder=tmp_path / "t")
    assert json.loads((tmp_path / "n" / "generation_config.json").read_text()) == {"eos_token_id": [5, 7]}
