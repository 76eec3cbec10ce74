"""The files of a script's numbers."""

import json

import pytest
from matplotlib.figure import Figure

from experiments import output


@pytest.mark.parametrize(
    ("out", "name"),
    [("result.json", "result.json"), ("result", "result.json"), ("gsa-1.3b", "gsa-1.3b.json")],
)
def test_a_name_with_dots_is_kept_and_its_plot_stands_beside_it(tmp_path, out, name):
    file = output.json_file(tmp_path / "deep" / out)
    assert file == tmp_path / "deep" / name and not list(file.parent.iterdir())
    output.write(file, {"ms": 1.0}, Figure())
    assert {path.name for path in file.parent.iterdir()} == {name, name.replace(".json", ".png")}


def test_what_cannot_be_written_leaves_the_result_before(tmp_path):
    file = tmp_path / "result.json"
    output.write(file, {"ms": 1.0})
    with pytest.raises(TypeError):
        output.write(file, {"ms": object()})
    assert json.loads(file.read_text()) == {"ms": 1.0}


def test_a_place_that_takes_no_file_is_refused(tmp_path):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match=r"out: .*folder.json is a folder, expected a file"):
        output.json_file(tmp_path / "folder")
    (tmp_path / "text").write_text("")
    with pytest.raises(ValueError, match=r"out: .*text/result.json can't be written \(.*exists.*\), expected"):
        output.json_file(tmp_path / "text" / "result.json")


@pytest.mark.parametrize(
    ("text", "message"), [(None, "can't be read"), ("# no", "can't be read"), ("[]", "has no 'ms'")]
)
def test_a_file_that_no_script_wrote_is_named(tmp_path, text, message):
    file = tmp_path / "result.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=f"peers: .*result.json {message}"):
        output.read(file, "peers", "ms")


def test_a_folder_that_is_new_or_empty_is_taken(tmp_path):
    for _ in range(2):  # new, then empty
        assert output.new_folder(tmp_path / "new" / "folder").is_dir()
    with pytest.raises(ValueError, match="out: .* is not empty and is left as it is, expected a new folder"):
        output.new_folder(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="out: .*file can't be made"):
        output.new_folder(tmp_path / "file")
