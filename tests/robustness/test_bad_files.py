"""Tables as people have them: the one clear reading is taken and told, two are refused, all faults come at once."""

import bz2
import gzip
import json
import lzma
import os
import warnings
import zipfile

import datasets
import numpy as np
import pytest
from datasets import Dataset

from decaf_lora import data
from decaf_lora.config import RunConfig, TaskConfig
from decaf_lora.data.places import PLACE
from decaf_lora.errors import UserError
from inputs import ROWS, TEXT, examples, lines, load, model, quiet, table

pytestmark = pytest.mark.usefixtures("datasets_cache")


def silent(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(*args, **kwargs)


# Delimiters


@pytest.mark.parametrize(("delimiter", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")])
def test_another_delimiter_is_found_and_told(delimiter, name, tmp_path):
    rows = [(f"{text}, really, yes" if i % 2 else text, label) for i, (text, label) in enumerate(ROWS)]
    path = table(tmp_path / "a.csv", rows, delimiter=delimiter)
    for _ in range(2):  # also from the cache
        with pytest.warns(UserWarning, match=rf"task\.delimiter: a\.csv is separated by {name}"):
            assert examples(load(path)) == sorted(rows)
    named = "tab" if delimiter == "\t" else delimiter
    assert examples(silent(path, delimiter=named)) == sorted(rows)


@pytest.mark.parametrize("name", ["a.csv", "A.CSV", "a.tsv"])
def test_the_usual_delimiter_is_no_news(name, tmp_path):
    path = table(tmp_path / name, delimiter="\t" if name == "a.tsv" else ",")
    assert examples(silent(path)) == sorted(ROWS)


def test_a_delimiter_that_the_columns_prove_is_taken_though_another_fits(tmp_path):
    (tmp_path / "a.csv").write_text("text;label;a,b\n" + "".join(f"{t};{k};1,5\n" for t, k in ROWS))
    assert examples(quiet(tmp_path / "a.csv")) == sorted(ROWS)


def test_two_delimiters_are_refused_with_both_readings(tmp_path):
    (tmp_path / "a.csv").write_text("x;y,z\n" + "".join(f"{t};1,{k}\n" for t, k in ROWS))
    message = r"task\.delimiter: .* commas \(columns 'x;y', 'z'\) or with semicolons \(columns 'x', 'y,z'\); say which"
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"task\.text_column: 'text' is not known\. .*: x, y,z\."):
        load(tmp_path / "a.csv", delimiter=";")


def test_a_single_column_may_hold_commas(tmp_path):
    texts = [f"{text}, or not" for text, _ in ROWS]
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(texts) + "\n")
    found = load(tmp_path / "a.csv", label=None)
    assert sorted([*found.train["text"], *found.test["text"]]) == sorted(texts)


@pytest.mark.parametrize("value", ["", "ab", '"', "\n"])
def test_a_delimiter_is_one_character(value):
    with pytest.raises(ValueError, match="one character"):
        TaskConfig(delimiter=value)


def test_options_without_a_file_for_them_are_refused(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": t, "label": k} for t, k in ROWS])
    for option in ({"delimiter": ";"}, {"quoting": "none"}):
        (field,) = option
        with pytest.raises(UserError, match=rf"task\.{field}: .* has no file that it is for"):
            load(path, **option)


# Quotes


def test_quotes_that_enclose_nothing_are_plain_characters(tmp_path):
    """Two of 18 lines begin with a quote that is never closed; read as one text, six lines vanished."""
    rows = [(('"' if i in (3, 9) else "") + text, label) for i, (text, label) in enumerate(ROWS[:18])]
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{t}\t{k}\n" for t, k in rows))
    with pytest.warns(UserWarning, match=r"task\.quoting: line 5 of a\.tsv has a quote that encloses no field"):
        assert examples(load(tmp_path / "a.tsv")) == sorted(rows)
    assert examples(silent(tmp_path / "a.tsv", quoting="none")) == sorted(rows)


def test_quotes_that_enclose_rows_or_are_characters_are_refused(tmp_path):
    rows = [("the cat", "no"), ('"the dog', "no"), ("a", "yes"), ('the bird"', "no"), ("b", "yes")]
    (tmp_path / "a.tsv").write_text("label\ttext\n" + "".join(f"{k}\t{t}\n" for t, k in rows))
    with pytest.raises(UserError, match=r"task\.quoting: .* the quote in line 3 encloses a text of 3 lines, or"):
        load(tmp_path / "a.tsv")
    assert examples(load(tmp_path / "a.tsv", quoting="none")) == sorted(rows)
    enclosed = examples(quiet(tmp_path / "a.tsv", quoting="standard"))
    assert ("the dog\nyes\ta\nno\tthe bird", "no") in enclosed
    assert len(enclosed) == 3


def test_quoted_fields_keep_delimiters_quotes_and_line_breaks(tmp_path):
    rows = [(f'{t}, "so"\nor not', k) for t, k in ROWS]
    assert examples(silent(table(tmp_path / "a.csv", rows))) == sorted(rows)


def test_an_open_quote_in_a_table_that_needs_quotes_is_refused(tmp_path):
    text = "text,label\n" + "".join(f'"{t}, or",{k}\n' for t, k in ROWS) + '"the end, or,no\n'
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=r"task\.data: .*a\.csv, line 38: a quote is not closed"):
        load(tmp_path / "a.csv")


# Lines


def test_all_faulty_lines_are_named_by_their_number_in_the_file(tmp_path):
    text = 'text,label\n"two\nlines",no\n\na,b,no\nc\n' + "".join(f"{t},{k}\n" for t, k in ROWS) + "d,e,f,g\n"
    (tmp_path / "a.csv").write_text(text)
    expected = r"3 lines have another number of fields than the 2 of line 1: line 5 \(3 fields\), line 6 \(1 fields\), "
    with pytest.raises(UserError, match=rf"task\.data: .*a\.csv: {expected}line 43 \(4 fields\); mend or remove"):
        load(tmp_path / "a.csv")


def test_the_column_of_places_is_no_column_of_a_file(tmp_path):
    header = ("text", "label", PLACE)
    table(tmp_path / "a.csv", [(*row, "x") for row in ROWS], header)
    lines(tmp_path / "a.jsonl", [dict(zip(header, (*row, "x"), strict=True)) for row in ROWS])
    for name in ("a.csv", "a.jsonl"):
        with pytest.raises(UserError, match=rf"task\.data: .*{name} has a column 'decaf:place', a name kept for this"):
            load(tmp_path / name)


def test_missing_values_are_named_by_their_line(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",no\n\nb,yes\n,no\nc,yes\n')
    with pytest.raises(
        UserError, match=r"1 of 4 train examples have nothing in column 'text' \(first: line 6 of a\.csv\)"
    ):
        load(tmp_path / "a.csv")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_all_systems(end, tmp_path):
    (tmp_path / "a.csv").write_bytes(end.join(["text,label", *(f"{t},{k}" for t, k in ROWS), ""]).encode())
    assert examples(silent(tmp_path / "a.csv")) == sorted(ROWS)


def test_an_empty_last_field_of_every_line_is_no_fault(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{t},{k},\n" for t, k in ROWS))
    assert examples(silent(tmp_path / "a.csv")) == sorted(ROWS)


def test_two_columns_of_one_name(tmp_path):
    (tmp_path / "a.csv").write_text("text,text,label\n" + "".join(f"{t},x,{k}\n" for t, k in ROWS))
    with pytest.raises(UserError, match=r"has 2 columns 'text'; rename all but one"):
        load(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("x,x,text,label\n" + "".join(f"1,2,{t},{k}\n" for t, k in ROWS))
    assert examples(load(tmp_path / "b.csv")) == sorted(ROWS)


def test_long_texts_are_whole(tmp_path):
    rows = [("x" * 300_000, k) for _, k in ROWS[:6]]
    assert examples(quiet(table(tmp_path / "a.csv", rows))) == sorted(rows)


# Encodings

FRENCH = [(f"le café n°{i} est très bon, dit-il – « voilà »", "été" if i % 2 else "hiver") for i in range(12)]
RUSSIAN = [(f"хорошая кошка {i}", "да" if i % 2 else "нет") for i in range(12)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_is_no_news(encoding, tmp_path):
    for rows in (FRENCH, RUSSIAN):
        assert examples(silent(table(tmp_path / "a.csv", rows, encoding=encoding))) == sorted(rows)


@pytest.mark.parametrize(
    ("rows", "encoding", "name"),
    [
        (FRENCH, "cp1252", "Windows-1252"),
        (FRENCH, "utf-16-le", "UTF-16"),
        (RUSSIAN, "utf-16-be", r"UTF-16 \(big-endian\)"),
        (ROWS, "utf-16-le", "UTF-16"),
    ],
)
def test_the_only_sensible_encoding_is_taken_and_told(rows, encoding, name, tmp_path):
    path = table(tmp_path / "a.csv", rows, encoding=encoding)
    with pytest.warns(UserWarning, match=rf"task\.encoding: a\.csv is not UTF-8 and is read as {name}"):
        assert examples(load(path)) == sorted(rows)
    assert examples(silent(path, encoding=encoding)) == sorted(rows)


JAPANESE = [(f"良い猫 {i}", "はい" if i % 2 else "いいえ") for i in range(12)]
POLISH = [(f"mały żółty kot {i}", "tak" if i % 2 else "nie") for i in range(12)]
GERMAN = [(f"die schöne Tür {i} für Ärzte", "ja" if i % 2 else "nein") for i in range(12)]


@pytest.mark.parametrize(
    ("rows", "encoding"),
    [(RUSSIAN, "cp1251"), (JAPANESE, "shift_jis"), (POLISH, "cp1250"), (GERMAN, "cp850"), (FRENCH, "mac_roman"),
     (RUSSIAN, "koi8-r"), (JAPANESE, "euc_jp")],
)  # fmt: skip
def test_what_could_be_many_encodings_is_refused(rows, encoding, tmp_path):
    if encoding == "mac_roman":
        rows = [(text.replace("°", ""), label) for text, label in rows]
    path = table(tmp_path / "a.csv", rows, encoding=encoding)
    with pytest.raises(
        UserError, match=r"task\.encoding: a\.csv is not UTF-8 \(byte 0x.. in line \d+\), and no single"
    ):
        load(path)
    assert examples(silent(path, encoding=encoding)) == sorted(rows)


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("klingon", "is no text encoding that Python knows"),
        ("rot13", "is no text encoding that Python knows"),
        ("utf-8", "a.csv is not utf-8: byte 0xe9 in line 2"),
        ("ascii", "a.csv is not ascii: byte 0xe9 in line 2"),
    ],
)
def test_a_wrong_encoding_is_refused(encoding, message, tmp_path):
    path = table(tmp_path / "a.csv", FRENCH, encoding="cp1252")
    with pytest.raises(UserError, match=rf"task\.encoding: .*{message}"):
        load(path, encoding=encoding)


def test_zeros_in_names_of_columns_are_named(tmp_path):
    path = table(tmp_path / "a.csv", encoding="utf-16-le")
    with pytest.raises(
        UserError, match=r"task\.encoding: a\.csv is not cp1252, or it would hold zero characters; try utf-16"
    ):
        load(path, encoding="cp1252")
    (tmp_path / "b.jsonl").write_text('{"a\\u0000": 1, "text": "x", "label": "a"}\n')
    with pytest.raises(UserError, match="has a zero character"):
        load(tmp_path / "b.jsonl")


def test_encodings_of_json_lines_and_texts(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        "".join(json.dumps({"text": t, "label": k}, ensure_ascii=False) + "\n" for t, k in FRENCH).encode("cp1252")
    )
    assert examples(quiet(tmp_path / "a.jsonl")) == sorted(FRENCH)
    (tmp_path / "a.txt").write_bytes("\n\n".join(t for t, _ in FRENCH).encode("utf-16"))
    found = silent(tmp_path / "a.txt", label=None)
    assert sorted([*found.train["text"], *found.test["text"]]) == sorted(t for t, _ in FRENCH)


# JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null", r"line 1 \(null\)"),
        ("[null]", r"line 1 \(null\)"),
        ("3\n4\n", r"2 lines have no JSON object with the columns of an example: line 1 \(a number\), line 2"),
        ("[1, 2]", r"line 1 \(a number\), line 2 \(a number\)"),
        ('"text"', r"line 1 \(text\)"),
        ("[]", "is empty"),
        ("", "is empty"),
        ("{}", "not known"),
        ('[{"text": "a"},\n{"text": ]', r"cannot be read as JSON: line 2: Expecting value"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"a": ' * 100_000, "cannot be read as JSON"),
        ("1" * 5000, "cannot be read as JSON"),
        ("\0\0\0", "no single other encoding makes sense"),
        ('{"text": "\\ud800", "label": "no"}\n', "holds values that no table can"),
        ('{"text": "a", "label": 99999999999999999999999999}', "holds|no table can"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_that_holds_no_examples_is_one_line(text, message, name, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        load(tmp_path / name, test_split="train")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    if name == "a.json":
        assert error.match(message)


def test_all_faulty_lines_of_json_are_named(tmp_path):
    good = [json.dumps({"text": t, "label": k}) for t, k in ROWS]
    (tmp_path / "a.jsonl").write_text("\n".join([good[0], "", "null", good[1], '{"text": ', "[]", *good]) + "\n")
    with pytest.raises(
        UserError, match=r"3 lines have no JSON object.*: line 3 \(null\), line 5 \(no JSON: .*\), line 6"
    ):
        load(tmp_path / "a.jsonl")


@pytest.mark.parametrize("form", ["lines", "list", "columns", "field", "pretty"])
def test_forms_of_json(form, tmp_path):
    rows = [{"text": t, "label": k} for t, k in ROWS]
    whole = {"list": rows, "columns": {"text": [t for t, _ in ROWS], "label": [k for _, k in ROWS]}}
    whole |= {"field": {"data": rows}, "pretty": rows}
    if form == "lines":
        lines(tmp_path / "a.json", rows)
    else:
        (tmp_path / "a.json").write_text(json.dumps(whole[form], indent=1 if form == "pretty" else None))
    assert examples(silent(tmp_path / "a.json")) == sorted(ROWS)


def test_a_column_of_several_kinds_matters_only_where_it_is_used(tmp_path):
    rows = [{"text": t, "label": k, "more": [1, "a", {"b": 2}, None][i % 4]} for i, (t, k) in enumerate(ROWS)]
    assert examples(silent(lines(tmp_path / "a.jsonl", rows))) == sorted(ROWS)
    with pytest.raises(UserError, match=r"column 'more' of .* several kinds: a number \(line 1 .*\), text \(line 2"):
        load(tmp_path / "a.jsonl", columns=[("text_column", "more")])


# Excel


def workbook(path, sheets):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_a_sheet_is_a_table(tmp_path):
    rows = [("text", "label"), *ROWS]
    assert examples(silent(workbook(tmp_path / "a.xlsx", {"one": rows, "empty": []}))) == sorted(ROWS)
    both = workbook(tmp_path / "b.xlsx", {"one": rows, "two": [("text", "label"), ("x", "a"), ("y", "b"), ("z", "a")]})
    with pytest.raises(UserError, match=r"task\.subset: .*b\.xlsx has 2 sheets with data \('one', 'two'\); name one"):
        load(both)
    assert len(examples(quiet(both, subset="two"))) == 3
    with pytest.raises(UserError, match=r"task\.subset: .* has no sheet 'three'; it has 'one', 'two'"):
        load(both, subset="three")


def test_cells_of_a_sheet(tmp_path):
    rows = [("text", "label"), ("a", 1), (None, None), (3, 2.0), ("c", 1), ("d", 2)]
    found = quiet(workbook(tmp_path / "a.xlsx", {"one": rows}))
    assert examples(found) == [("3", 2), ("a", 1), ("c", 1), ("d", 2)]
    missing = workbook(tmp_path / "b.xlsx", {"one": [*rows, (None, 1)]})
    with pytest.raises(UserError, match=r"nothing in column 'text' \(first: line 7 of b\.xlsx\)"):
        load(missing)
    workbook(tmp_path / "c.xlsx", {"one": []})
    with pytest.raises(UserError, match=r"c\.xlsx is empty"):
        load(tmp_path / "c.xlsx")
    (tmp_path / "d.xlsx").write_bytes(b"PK no zip")
    with pytest.raises(UserError, match=r"d\.xlsx cannot be read"):
        load(tmp_path / "d.xlsx")


# Files that are not what they seem


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.txt", "a.parquet", "a.xlsx"])
def test_broken_files_are_one_line(name, tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 12345\n"
    contents = {"lfs": pointer, "empty": b"", "blank": b" \n \n", "zeros": b"\0" * 300, "noise": bytes(range(256)) * 4}
    for what, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)
        assert "task." in str(error.value)
        if what == "lfs":
            assert "is a pointer of Git LFS, not the file itself" in str(error.value)


def test_what_libraries_say_of_a_broken_file_is_left_out(tmp_path, capfd):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read"):
        load(tmp_path / "a.parquet")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("pack", ["gz", "bz2", "xz", "zip"])
def test_packed_files_are_read_and_broken_ones_named(pack, tmp_path):
    plain = table(tmp_path / "a.csv").read_bytes()
    path = tmp_path / f"b.csv.{pack}"
    if pack == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inside.csv", plain)
    else:
        path.write_bytes({"gz": gzip, "bz2": bz2, "xz": lzma}[pack].compress(plain))
    assert examples(silent(path)) == sorted(ROWS)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=rf"b\.csv\.{pack} cannot be unpacked"):
        load(path)


def test_files_of_a_folder_that_are_not_read_are_counted(tmp_path):
    table(tmp_path / "train.csv")
    table(tmp_path / "test.csv", ROWS[:6])
    (tmp_path / "notes.txt").write_text("where it is from")
    (tmp_path / "LICENSE").write_text("free")
    with pytest.warns(UserWarning, match=r"task\.data: 1 of the files in .* are not read: notes\.txt\.") as seen:
        found = load(tmp_path, test_split="test")
    assert (len(found.train), len(found.test), len(seen)) == (36, 6, 1)


def test_files_of_one_split_that_do_not_fit_are_named(tmp_path):
    table(tmp_path / "a.csv", [(t, 1) for t, _ in ROWS])
    table(tmp_path / "b.csv")
    with pytest.raises(UserError, match=r"a\.csv, b\.csv belong to one split, but their columns differ in kind"):
        load(tmp_path)


def test_a_folder_of_several_kinds_of_tables(tmp_path):
    table(tmp_path / "train.csv")
    lines(tmp_path / "test.jsonl", [{"text": t, "label": k} for t, k in ROWS[:4]])
    found = silent(tmp_path, test_split="test")
    assert (len(found.train), len(found.test)) == (36, 4)


# What is cached is keyed by content


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt", "parquet", "folder of csv", "folder of parquet"])
def test_a_replaced_file_of_the_same_time_is_read_again(kind, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    suffix = kind.split()[-1]
    path = folder / f"train.{suffix}"

    def write(prefix):
        rows = [(prefix + t, prefix + k) for t, k in ROWS]
        if suffix == "csv":
            table(path, rows)
        elif suffix == "jsonl":
            lines(path, [{"text": t, "label": k} for t, k in rows])
        elif suffix == "txt":
            path.write_text("\n\n".join(t for t, _ in rows))
        else:
            Dataset.from_dict({"text": [t for t, _ in rows], "label": [k for _, k in rows]}).to_parquet(path)
        os.utime(path, (10**9, 10**9))

    source = folder if kind.startswith("folder") else path
    label = None if suffix == "txt" else "label"
    contents = set()
    for prefix in ("new-", "old-", "new-"):
        write(prefix)
        found = load(source, label=label)
        contents.add(found.content)
        assert all(text.startswith(prefix) for text in found.train["text"])
    assert len(contents) == 2


def test_a_replaced_file_is_read_again_within_one_process(tmp_path, monkeypatch):
    """The model and the data of a process are kept for its next run, unless a file of theirs has changed."""
    from decaf_lora.runs import build

    path = table(tmp_path / "a.csv")
    options = {"data": str(path), "model": str(model("bert", tmp_path)), "test_share": 0.3}
    config = RunConfig(task=TaskConfig(name="sequence-classification", **options), agents=2, partition="iid")

    def classes():
        run = build.build_run(config, device="cpu")
        run.close()
        return run.task, run.task.classes

    first, names = classes()
    assert names == ["no", "yes"]
    assert classes()[0] is first
    state = path.stat()
    table(path, [(t, {"no": "on", "yes": "sey"}[k]) for t, k in ROWS])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert classes()[1] == ["on", "sey"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    path = table(tmp_path / "a.csv")
    for place in ("/dev/null/x", "/sys/x", "/proc/x"):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place)
        with pytest.raises((UserError, OSError)) as error:
            load(path)
        assert isinstance(error.value, UserError)
        assert str(error.value).startswith(f"HF_DATASETS_CACHE: {place} cannot be written (")


def test_nothing_is_left_of_a_table_that_was_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = table(tmp_path / "a.csv")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        load(path)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


# Properties


def test_whatever_is_written_is_read(tmp_path):
    """Random texts with every sign that means something in a table, through every format."""
    signs = np.array([*"abc ,;|\t\"'\n\\#é猫0-", "null", "NA", "1", "{}", "=A1"])
    generator = np.random.default_rng(0)
    for trial in range(15):
        texts = ["x" + "".join(generator.choice(signs, generator.integers(1, 12))) for _ in range(20)]
        rows = [(text, f"k{i % 2}") for i, text in enumerate(texts)]
        table(tmp_path / f"{trial}.csv", rows)
        assert examples(quiet(tmp_path / f"{trial}.csv", quoting="standard", delimiter=",")) == sorted(rows)
        lines(tmp_path / f"{trial}.jsonl", [{"text": t, "label": k} for t, k in rows])
        assert examples(silent(tmp_path / f"{trial}.jsonl")) == sorted(rows)


def test_numbers_and_truth_values_of_a_table_are_those_of_python(tmp_path):
    columns = {
        "whole": (["1", "-2", "+3", " 4", "0"], [1, -2, 3, 4, 0]),
        "real": (["1.5", "-2e3", ".5", "4.", "0"], [1.5, -2000.0, 0.5, 4.0, 0.0]),
        "true": (["true", "False", "TRUE", "false", "True"], [True, False, True, False, True]),
        "code": (["01", "2", "3", "4", "5"], ["01", "2", "3", "4", "5"]),
        "long": (["123456789012345678901", "2", "3", "4", "5"], ["123456789012345678901", "2", "3", "4", "5"]),
        "under": (["1_0", "2", "3", "4", "5"], ["1_0", "2", "3", "4", "5"]),
        "other": (["٣", "2", "²", "4", "5"], ["٣", "2", "²", "4", "5"]),
        "gap": (["1", "", "3", "", "5"], [1, None, 3, None, 5]),
    }
    table(tmp_path / "a.csv", list(zip(*(written for written, _ in columns.values()), strict=True)), list(columns))
    rows = data.load(TaskConfig(data=str(tmp_path / "a.csv"), test_split="train"), [], label=None).train
    for name, (_, expected) in columns.items():
        assert rows[name][:] == expected, name
    assert TEXT
