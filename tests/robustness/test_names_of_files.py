"""Names of data: characters that `datasets` takes for patterns or chains are part of a name, or are refused."""

import pytest
from datasets import Dataset

from decaf_lora.errors import UserError
from inputs import ROWS, album, examples, quiet, table

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.mark.parametrize("name", ["data [v2]", "a*b", "what?"])
def test_names_are_no_patterns(name, tmp_path):
    """`datasets` takes names for patterns: `a*b` held the rows of the folder `axb` too, and `[v2]` held nothing."""
    other = name.replace("*", "x").replace("?", "x").replace("[v2]", "v")
    for folder, rows in ((name, ROWS), (other, [("not asked for", "no")] * 8)):
        for part in ("tables", "parquet"):
            (tmp_path / part / folder).mkdir(parents=True)
        table(tmp_path / "tables" / folder / "train.csv", rows)
        Dataset.from_dict({"text": [t for t, _ in rows], "label": [k for _, k in rows]}).to_parquet(
            tmp_path / "parquet" / folder / "a.parquet"
        )
        album(tmp_path / "images" / folder, count=4 if folder == name else 7)
    assert examples(quiet(tmp_path / "tables" / name)) == sorted(ROWS)
    assert examples(quiet(tmp_path / "parquet" / name)) == sorted(ROWS)
    assert examples(quiet(tmp_path / "parquet" / name / "a.parquet")) == sorted(ROWS)
    found = quiet(tmp_path / "images" / name, columns=[], image="image", test_split="test")
    assert (len(found.train), len(found.test)) == (8, 8)


@pytest.mark.parametrize("name", ["data [v2]", "a*b", "what?"])
def test_a_folder_that_describes_itself_is_no_pattern(name, tmp_path):
    """`a*b` with a card held the rows of `axb`, too. A name without such characters is read as its card says."""
    card = "---\nconfigs:\n- config_name: default\n  data_files: some/*.csv\n---\n"
    for folder in (name, "axb"):
        table(tmp_path / folder / "some" / "one.csv", ROWS if folder == "axb" else ROWS[:5])
        table(tmp_path / folder / "left out.csv", [("not asked for", "no")] * 8)
        (tmp_path / folder / "README.md").write_text(card)
    assert examples(quiet(tmp_path / "axb")) == sorted(ROWS)
    with pytest.raises(UserError, match=r"task\.data: .* has '[*?[]' in its name, and its README\.md .* Rename it"):
        quiet(tmp_path / name)


@pytest.mark.parametrize("where", ["folder", "saved", "file", "inside"])
def test_a_name_that_chains_files_is_refused(where, tmp_path):
    """`datasets` reads `a` where `a::b` is asked for."""
    rows = Dataset.from_dict({"text": ["a cat", "a dog"], "label": ["no", "yes"]})
    path = tmp_path / "a::b"
    if where == "saved":
        rows.save_to_disk(str(tmp_path / "a"))
        (tmp_path / "a").rename(path)
        rows.select([0]).save_to_disk(str(tmp_path / "a"))
    elif where == "inside":
        path = table(tmp_path / "a" / "train::x.csv").parent
    else:
        path = table(path / "train.csv").parent if where == "folder" else table(tmp_path / "a::b.csv")
    with pytest.raises(UserError, match=r"task\.data: .*::.* has '::' in its name, which names another file; rename"):
        quiet(path)
