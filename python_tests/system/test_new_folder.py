"""Files and folders that are whole or not there, and where caches lie."""

import os

import pytest

from grpo_engine.system import files


def test_cache_root_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_root() == tmp_path / "grpo_engine"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert os.fspath(files.cache_root()) == f"{tmp_path}/home/.cache/grpo_engine"


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    with files.new_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("1", encoding="utf-8")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text(encoding="utf-8") == "1"
    with pytest.raises(RuntimeError, match="half way"), files.new_folder(tmp_path / "c") as folder:
        (folder / "x").touch()
        raise RuntimeError("half way")
    assert sorted(os.listdir(tmp_path)) == ["a"]
    with (
        pytest.raises(FileExistsError, match="b: must be absent or an empty folder"),
        files.new_folder(tmp_path / "a" / "b"),
    ):
        pass


def test_a_fingerprint_of_several_files_depends_on_each_and_on_their_order(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1", encoding="utf-8"), b.write_text("2", encoding="utf-8")
    both = files.fingerprint(a, b)
    assert both == files.fingerprint(a, b) != files.fingerprint(b, a) and both != files.fingerprint(a)
    b.write_text("3", encoding="utf-8")
    assert files.fingerprint(a, b) != both
