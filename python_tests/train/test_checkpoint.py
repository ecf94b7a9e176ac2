import builtins
import io
import json
import os
import random
import shutil
import signal
import time
import warnings
from collections import deque

import pytest
import torch
from safetensors.torch import load_file

from grpo_engine.model import weights
from grpo_engine.model.config import ModelConfig
from grpo_engine.model.decoder import Model
from grpo_engine.train import checkpoint
from grpo_engine.train.checkpoint import CURRENT, NEW, PREVIOUS, DamagedError

CONFIG = ModelConfig(
    vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, tie_word_embeddings=False,
)  # fmt: skip
HASH = "a-configuration"


def make(*, dtype=torch.float32, config=CONFIG, seed=0, **settings):
    model = Model(config, dtype).init_weights(seed)
    return model, torch.optim.AdamW(model.parameters(), **({"lr": 1e-2, "betas": (0.9, 0.95)} | settings))


def train_step(model, optimizer, step):
    """A step whose gradient is a function of the step and the weights, as a deterministic run's is."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, generator=generator) + p.detach().float()).to(p.dtype)
    optimizer.param_groups[0]["lr"] = 1e-2 / step
    optimizer.step()


def put(run_dir, model, optimizer, step):
    checkpoint.save(
        run_dir, model=model, optimizer=optimizer, step=step, config_hash=HASH,
        lengths={"steps.jsonl": 100 * step}, meta={"counters": {"step": step, "flops": step / 3}},
    )  # fmt: skip


def bits(model, optimizer):
    """Every bit of a run: weights, moments, step counts, settings."""
    out = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        out |= {f"{name}:{k}": v.clone() for k, v in optimizer.state[p].items()}
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return out, settings


def same(a, b):
    (x, p), (y, q) = a, b
    return p == q and x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)


@pytest.fixture(scope="module")
def truth():
    """The bits of an undisturbed run after each step."""
    model, optimizer = make()
    out = {}
    for step in range(1, 8):
        train_step(model, optimizer, step)
        out[step] = bits(model, optimizer)
    return out


def run_to(last, run_dir):
    """Resumes from what is there, and saves after every step to `last`."""
    model, optimizer = make()
    state = checkpoint.load(run_dir, config_hash=HASH)
    if state is not None:
        state.restore(model, optimizer)
    for step in range((state.step if state else 0) + 1, last + 1):
        train_step(model, optimizer, step)
        put(run_dir, model, optimizer, step)


def whole(run_dir, truth):
    """Loads, compares every bit with the undisturbed run, and returns the step."""
    state = checkpoint.load(run_dir, config_hash=HASH)
    if state is None:
        return 0
    model, optimizer = make(seed=42)
    state.restore(model, optimizer)
    assert same(bits(model, optimizer), truth[state.step])
    assert state.lengths == {"steps.jsonl": 100 * state.step}
    assert state.meta == {"counters": {"step": state.step, "flops": state.step / 3}}
    return state.step


# ------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_resumed_steps_are_bit_identical(tmp_path, dtype, amsgrad):
    model, optimizer = make(dtype=dtype, amsgrad=amsgrad)
    for step in (1, 2, 3):
        train_step(model, optimizer, step)
    put(tmp_path, model, optimizer, 3)
    before = bits(model, optimizer)

    again, its_optimizer = make(dtype=dtype, amsgrad=amsgrad, seed=9)
    train_step(again, its_optimizer, 77)  # what it held before must not shine through
    pointers = [p.data_ptr() for p in again.parameters()]
    checkpoint.load(tmp_path, config_hash=HASH).restore(again, its_optimizer)
    assert same(bits(again, its_optimizer), before)
    assert pointers == [p.data_ptr() for p in again.parameters()]
    for step in (4, 5):
        train_step(model, optimizer, step)
        train_step(again, its_optimizer, step)
    assert same(bits(again, its_optimizer), bits(model, optimizer))


def test_an_optimizer_of_several_files_is_as_good_as_one(tmp_path, monkeypatch):
    model, optimizer = make()
    train_step(model, optimizer, 1)
    write = weights.write_tensors
    monkeypatch.setattr(weights, "write_tensors", lambda *args, **kwargs: write(*args, **kwargs | {"max_shard_bytes": 500}))
    put(tmp_path, model, optimizer, 1)
    names = {p.name for p in (tmp_path / CURRENT).iterdir()}
    assert sum(name.startswith("optimizer-") for name in names) > 1 and "optimizer.safetensors" not in names
    again, its_optimizer = make(seed=9)
    checkpoint.load(tmp_path, config_hash=HASH).restore(again, its_optimizer)
    assert same(bits(again, its_optimizer), bits(model, optimizer))


def test_odd_floats_survive(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = make(dtype=dtype)
        odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40, -1e-40, 3.4e38, 1 / 3, 0.0])
        with torch.no_grad():
            model.final_norm.copy_(odd)
        put(tmp_path, model, optimizer, 1)
        again, its_optimizer = make(dtype=dtype, seed=1)
        checkpoint.load(tmp_path, config_hash=HASH).restore(again, its_optimizer)
        view = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(again.final_norm.view(view), model.final_norm.view(view))


def test_before_the_first_optimizer_step(tmp_path):
    model, optimizer = make()
    put(tmp_path, model, optimizer, 0)
    again, its_optimizer = make(seed=5)
    train_step(again, its_optimizer, 1)
    checkpoint.load(tmp_path, config_hash=HASH).restore(again, its_optimizer)
    assert same(bits(again, its_optimizer), bits(model, optimizer)) and not optimizer.state[model.embed.weight]


def test_two_groups(tmp_path):
    def grouped(seed):
        model = Model(CONFIG).init_weights(seed)
        flat = [p for p in model.parameters() if p.dim() == 1]
        rest = [p for p in model.parameters() if p.dim() == 2]
        return model, torch.optim.AdamW([{"params": rest, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}])

    model, optimizer = grouped(0)
    train_step(model, optimizer, 1)
    put(tmp_path, model, optimizer, 1)
    again, its_optimizer = grouped(1)
    state = checkpoint.load(tmp_path, config_hash=HASH)
    state.restore(again, its_optimizer)
    assert same(bits(again, its_optimizer), bits(model, optimizer))
    with pytest.raises(ValueError, match="optimizer must have 2 groups with the parameters that were saved, got 1"):
        state.restore(*make())


def test_a_checkpoint_is_a_hugging_face_folder(tmp_path):
    model, optimizer = make(dtype=torch.bfloat16)
    put(tmp_path, model, optimizer, 1)
    got = weights.load_model(tmp_path / CURRENT, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), model.parameters(), strict=True))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / CURRENT, dtype="auto")
    assert torch.equal(theirs.model.layers[0].self_attn.v_proj.weight, model.layers[0].qkv_weight[-4:])


def test_the_newest_and_the_one_before_are_kept(tmp_path, truth):
    assert checkpoint.load(tmp_path, config_hash=HASH) is None
    for last in (1, 2, 3):
        run_to(last, tmp_path)
        assert whole(tmp_path, truth) == last
    assert sorted(p.name for p in tmp_path.iterdir()) == [CURRENT, PREVIOUS]
    assert json.loads((tmp_path / PREVIOUS / "meta.json").read_text())["step"] == 2


def test_load_changes_nothing_when_all_is_well(tmp_path):
    def listing():
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()}

    run_to(2, tmp_path)
    before = listing()
    checkpoint.load(tmp_path, config_hash=HASH)
    assert listing() == before


# ------------------------------------------------------------------------------------------ kills


# a forked child inherits OpenMP's state without its threads: a parallel region there would wait for ever
pytestmark = pytest.mark.usefixtures("one_thread")


CALLS = [(os, n) for n in ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync", "open")] + [
    (io, "open"), (builtins, "open"),
]  # fmt: skip


def killed_at(number, action):
    """Runs action in a forked process that dies, without any cleaning up, before its given system call.

    Returns whether it died. A file of tensors counts as three calls: before it, half of it, all of it.
    """
    pid = os.fork()
    if pid == 0:
        left = [number]

        def tick():
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)

        def wrapped(real):
            def call(*args, **kwargs):
                tick()
                return real(*args, **kwargs)

            return call

        def halved(tensors, path, metadata=None):
            tick()
            real_save_file(tensors, path, metadata=metadata)
            data = path.read_bytes()
            path.write_bytes(data[: len(data) // 2])
            tick()
            path.write_bytes(data)
            tick()

        try:
            real_save_file = weights.save_file
            weights.save_file = halved
            for module, name in CALLS:
                setattr(module, name, wrapped(getattr(module, name)))
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9), f"the process failed with {code} instead of being killed"
    return code == 9


def sweep(start, action, tmp_path):
    """A copy of a run directory for every call at which action can be killed, the last one not killed."""
    for number in range(1000):
        copy = tmp_path / f"{start.name}.{number}"
        shutil.copytree(start, copy)
        died = killed_at(number, lambda copy=copy: action(copy))
        yield copy, died
        shutil.rmtree(copy)
        if not died:
            assert number > 20  # the patched calls are those that save makes
            return
    raise AssertionError("the action never ended")


def test_a_kill_at_every_system_call(tmp_path, truth):
    start = tmp_path / "start"
    start.mkdir()
    run_to(2, start)
    model, optimizer = make()
    checkpoint.load(start, config_hash=HASH).restore(model, optimizer)
    train_step(model, optimizer, 3)

    layouts, found = {}, []
    for copy, died in sweep(start, lambda d: put(d, model, optimizer, 3), tmp_path):
        layout = tuple(sorted(p.name for p in copy.iterdir()))
        if died and layout not in layouts:
            layouts[layout] = shutil.copytree(copy, tmp_path / f"layout{len(layouts)}")
        found.append(whole(copy, truth))
    assert found == sorted(found) and set(found) == {2, 3}
    # the sweep went through every stage: nothing touched, emptied, writing, between the two renames
    assert set(layouts) == {(CURRENT, PREVIOUS), (CURRENT,), (CURRENT, NEW), (NEW, PREVIOUS)}

    # from each of them a run goes on, and survives a second kill at any call while it recovers and saves
    for layout, start in layouts.items():
        if layout == (CURRENT, PREVIOUS):
            continue
        for copy, died in sweep(start, lambda d: run_to(3, d), tmp_path):
            assert whole(copy, truth) in ((2, 3) if died else (3,))
            if not died:
                assert sorted(p.name for p in copy.iterdir()) == [CURRENT, PREVIOUS]


def test_a_kill_during_the_first_save(tmp_path, truth):
    start = tmp_path / "start"
    start.mkdir()
    found = []
    for copy, _ in sweep(start, lambda d: run_to(1, d), tmp_path):
        found.append(whole(copy, truth))
        run_to(2, copy)
        assert whole(copy, truth) == 2
    assert found == sorted(found) and set(found) == {0, 1}


@pytest.mark.filterwarnings("ignore:.*going on from step")
def test_a_kill_while_a_damaged_checkpoint_is_replaced(tmp_path, truth):
    start = tmp_path / "start"
    start.mkdir()
    run_to(3, start)
    os.truncate(start / CURRENT / "optimizer.safetensors", 100)
    for copy, died in sweep(start, lambda d: run_to(3, d), tmp_path):
        assert whole(copy, truth) >= 2
        if not died:
            assert whole(copy, truth) == 3


def test_a_kill_after_a_rename_that_failed(tmp_path, truth, monkeypatch):
    start = tmp_path / "start"
    start.mkdir()
    run_to(2, start)
    model, optimizer = make()
    checkpoint.load(start, config_hash=HASH).restore(model, optimizer)
    train_step(model, optimizer, 3)
    real = os.rename

    def rename(a, b):
        if b == start / CURRENT:
            raise OSError(5, "Input/output error")
        real(a, b)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        with pytest.raises(OSError, match="Input/output error"):
            put(start, model, optimizer, 3)
    assert sorted(p.name for p in start.iterdir()) == [NEW, PREVIOUS]
    # the process goes on and saves again without a load: the one whole checkpoint is `previous`
    found = [whole(copy, truth) for copy, _ in sweep(start, lambda d: put(d, model, optimizer, 3), tmp_path)]
    assert found == sorted(found) and set(found) == {2, 3}


def test_kills_at_random_moments(tmp_path, truth):
    moments = random.Random(3)
    last, save_seconds = 0, 0.02
    for _ in range(20):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                model, optimizer = make()
                state = checkpoint.load(tmp_path, config_hash=HASH)
                step = 0
                if state is not None:
                    state.restore(model, optimizer)
                    step = state.step
                while True:  # steps 1 to 7, then the last again and again
                    if step < 7:
                        step += 1
                        train_step(model, optimizer, step)
                    os.write(write, b".")
                    put(tmp_path, model, optimizer, step)
                    os.write(write, b".")
            except BaseException:
                os._exit(1)
        os.close(write)  # a child that fails then ends the read
        os.read(read, 1)  # the first save begins; how long one takes depends on how busy the machine is
        time.sleep(moments.uniform(0, 2 * save_seconds))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        os.close(read)
        step = whole(tmp_path, truth)
        assert step >= last
        if step == last < 7:
            save_seconds *= 1.5
        last = step
    assert last > 1


def test_files_are_synced_before_they_are_renamed(tmp_path, monkeypatch):
    events = deque()
    real_rename, real_fsync = os.rename, os.fsync

    def fsync(fd):
        events.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
        real_fsync(fd)

    def rename(a, b):
        events.append(("rename", os.path.basename(b)))
        real_rename(a, b)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc/self/fd to name descriptors with")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    put(tmp_path, *make(), 1)
    events.clear()
    put(tmp_path, *make(), 2)
    files = ["config.json", "meta.json", "model.safetensors", "optimizer.safetensors"]
    assert list(events) == [("fsync", f) for f in [*files, NEW]] + [
        ("rename", PREVIOUS), ("rename", CURRENT), ("fsync", tmp_path.name),
    ]  # fmt: skip


def test_a_full_disk_leaves_the_newest(tmp_path, truth, monkeypatch):
    run_to(2, tmp_path)

    def full(_tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(weights, "save_file", full)
        with pytest.raises(OSError, match="No space"):
            put(tmp_path, *make(), 3)
    assert whole(tmp_path, truth) == 2
    assert not (tmp_path / NEW).exists()


# ------------------------------------------------------------------------------------------ damage


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def meta(folder, **values):
    facts = json.loads((folder / "meta.json").read_text()) | values
    (folder / "meta.json").write_text(json.dumps(facts))


FILES = ("config.json", "model.safetensors", "optimizer.safetensors")
DAMAGE = {
    **{f"{f}: truncated": (lambda d, f=f: os.truncate(d / f, 50), f, "must have .* bytes, got 50") for f in FILES},
    **{f"{f}: empty": (lambda d, f=f: os.truncate(d / f, 0), f, "must have .* bytes, got 0") for f in FILES},
    **{f"{f}: a bit in its head": (lambda d, f=f: flip(d / f, 1), f, "sha256 must be") for f in FILES},
    **{f"{f}: a bit in its tail": (lambda d, f=f: flip(d / f, -1), f, "sha256 must be") for f in FILES},
    **{f"{f}: gone": (lambda d, f=f: (d / f).unlink(), f, "no such file, meta.json names it") for f in FILES},
    "longer": (lambda d: open(d / FILES[1], "ab").write(b"\0"), FILES[1], "must have .* bytes"),
    "exchanged": (lambda d: shutil.copy(d / FILES[1], d / FILES[2]), FILES[2], "must have .* bytes"),
    "meta: gone": (lambda d: (d / "meta.json").unlink(), "meta.json", "no such file"),
    "meta: empty": (lambda d: os.truncate(d / "meta.json", 0), "meta.json", "not JSON"),
    "meta: truncated": (lambda d: os.truncate(d / "meta.json", 60), "meta.json", "not JSON"),
    "meta: binary": (lambda d: (d / "meta.json").write_bytes(b"\xff\xfe\x00"), "meta.json", "not JSON"),
    "meta: a list": (lambda d: (d / "meta.json").write_text("[]"), "meta.json", "must hold a JSON object, got list"),
    "meta: a folder": (lambda d: ((d / "meta.json").unlink(), (d / "meta.json").mkdir()), "meta.json", "not JSON"),
    "meta: another schema": (lambda d: meta(d, schema=2), "meta.json", "schema must be 1, got 2"),
    "meta: another step": (lambda d: meta(d, step=1), "meta.json", "sha256 of its content must be"),
    "meta: another hash": (lambda d: meta(d, config_hash="x"), "meta.json", "sha256 of its content must be"),
    "meta: other lengths": (lambda d: meta(d, lengths={}), "meta.json", "sha256 of its content must be"),
    "meta: no checksum": (lambda d: meta(d, sha256=None), "meta.json", "sha256 of its content must be None"),
    "everything gone": (lambda d: (shutil.rmtree(d), d.mkdir()), "meta.json", "no such file"),
}  # fmt: skip


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    run_to(3, folder)
    return folder


@pytest.mark.parametrize("damage, file, message", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage(three, tmp_path, truth, damage, file, message):
    run = shutil.copytree(three, tmp_path / "run")
    damage(run / CURRENT)
    with pytest.warns(UserWarning, match=f"{CURRENT}/{file}: {message}.*; going on from step 2"):
        assert whole(run, truth) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the damaged one is gone
        assert whole(run, truth) == 2
    run_to(4, run)
    assert whole(run, truth) == 4

    alone = shutil.copytree(three, tmp_path / "alone")
    shutil.rmtree(alone / PREVIOUS)
    damage(alone / CURRENT)
    before = sorted(alone.rglob("*"))
    with pytest.raises(DamagedError, match=f"{CURRENT}/{file}: {message}"):
        checkpoint.load(alone, config_hash=HASH)
    assert sorted(alone.rglob("*")) == before

    both = shutil.copytree(three, tmp_path / "both")
    flip(both / PREVIOUS / FILES[2], -1)
    damage(both / CURRENT)
    with pytest.raises(DamagedError, match=f"{file}: {message}.*the one before it: .*{PREVIOUS}/{FILES[2]}: sha256"):
        checkpoint.load(both, config_hash=HASH)


def test_a_damaged_previous_one_does_not_matter(three, tmp_path, truth):
    run = shutil.copytree(three, tmp_path / "run")
    flip(run / PREVIOUS / FILES[1], 9)
    assert whole(run, truth) == 3


def test_another_configuration(three):
    wanted = r"checkpoint/meta\.json: config_hash must be other \(this configuration\), got a-configuration"
    with pytest.raises(ValueError, match=wanted) as error:
        checkpoint.load(three, config_hash="other")
    assert not isinstance(error.value, DamagedError)


def test_another_model_or_dtype(three):
    state = checkpoint.load(three, config_hash=HASH)
    with pytest.raises(ValueError, match=r"config\.json: dtype must be bfloat16 \(the model's\), got float32"):
        state.restore(*make(dtype=torch.bfloat16))
    wider = ModelConfig(
        vocab_size=12, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, tie_word_embeddings=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"config\.json: vocab_size must be 12 \(the model's\), got 11"):
        state.restore(*make(config=wider))


def test_bad_arguments_touch_nothing(tmp_path, truth):
    run_to(2, tmp_path)
    model, optimizer = make()
    with pytest.raises(TypeError, match="Tensor is not JSON"):
        checkpoint.save(
            tmp_path, model=model, optimizer=optimizer, step=3, config_hash=HASH, lengths={}, meta={"x": torch.ones(1)}
        )
    stranger = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=r"optimizer must hold parameters of the model, got another of shape \[3\]"):
        put(tmp_path, model, stranger, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CURRENT, PREVIOUS]
    assert whole(tmp_path, truth) == 2


def test_what_is_on_the_disk(three):
    tensors = load_file(three / CURRENT / "optimizer.safetensors")
    assert {k.partition(":")[2] for k in tensors} == {"step", "exp_avg", "exp_avg_sq"}
    assert tensors["layers.0.qkv_weight:step"].item() == 3.0
    assert tensors["layers.0.qkv_weight:exp_avg"].shape == (16, 8)
    facts = json.loads((three / CURRENT / "meta.json").read_text())
    assert set(facts["files"]) == set(FILES) and facts["step"] == 3 and facts["groups"][0]["lr"] == 1e-2 / 3
