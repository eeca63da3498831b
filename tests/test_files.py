"""Folders that are written completely or not at all."""

import pytest

from gflowtrl.files import new_folder


def test_a_new_folder_is_complete_or_missing(tmp_path):
    out = tmp_path / "a" / "out"
    with pytest.raises(RuntimeError), new_folder(out) as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
    out.mkdir()  # an empty one is replaced
    with new_folder(out) as folder:
        (folder / "sub").mkdir()
        for path in (folder / "one", folder / "sub" / "two"):
            path.touch(0o600)
        assert list(out.iterdir()) == []
    (tmp_path / "usual").touch()
    assert {path.stat().st_mode for path in out.rglob("*") if path.is_file()} == {(tmp_path / "usual").stat().st_mode}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in (out, out / "one", tmp_path / "link"):
        with pytest.raises(FileExistsError, match=f"{taken.name} exists and is not an empty folder"):
            new_folder(taken).__enter__()
