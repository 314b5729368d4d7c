"""Files that cannot be used: one clear line, exit code 2, and nothing left behind."""

import numpy as np
import pytest

from curvax.cli import main
from curvax.cli._table import read_table

N = 60


def table(**columns):
    """A CSV file with N rows; the defaults are usable."""
    usable = {"a": [f"{i * 0.7 % 5:.2f}" for i in range(N)], "y": [f"{i * 1.3 % 7:.2f}" for i in range(N)]}
    usable |= columns
    lines = [",".join(usable)] + [",".join(cells) for cells in zip(*usable.values(), strict=True)]
    return ("\n".join(lines) + "\n").encode()


def one(value, rest, place=10):
    """N cells, one of them different."""
    return [value if i == place else rest(i) for i in range(N)]


def number(i):
    """A cell."""
    return str(i)


BAD = {
    "empty": (b"", [], "is empty"),
    "blank": (b"\n \n\n", [], "is empty"),
    "header only": (b"a,y\n", [], "no rows"),
    "binary": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(100), [], "binary file"),
    "pickle": (b"\x80\x04\x95\x00\x00\x00.", [], "binary file"),
    "latin-1": ("a,y\ncafé,1\n".encode("latin-1"), [], "line 2: not UTF-8"),
    "ragged": (b"a,y\n1,2\n1,2,3\n", [], "line 3: 3 cells, but the header has 2"),
    "open quote": (b'a,y\n"1,2\n3,4\n', [], "cannot be read as a table"),
    "same name twice": (b"a,y,a\n1,2,3\n", [], "two columns named 'a'"),
    "few rows": (b"a,y\n" + b"1,2\n3,4\n" * 20, [], "40 rows; at least 50"),
    "no such target": (table(price=["1"] * N), ["--target", "Price"], "did you mean 'price'"),
    "no such column": (table(), ["--drop", "zzz"], "--drop: 'data.csv' has no column 'zzz'"),
    "no such category": (table(), ["--categorical", "zzz"], "--categorical: 'data.csv' has no column 'zzz'"),
    "constant target": (table(y=["3"] * N), [], "same value in every row"),
    "constant number": (
        table(y=["3", "3.0"] * (N // 2)),
        ["--task", "regression"],
        "same value in every row",
    ),
    "missing target": (table(y=one("", number)), [], "no value on line 12: remove"),
    "text target": (
        table(y=["x", "z"] * (N // 2)),
        ["--task", "regression"],
        "not numeric (for example 'x')",
    ),
    "many texts": (table(y=[f"t{i}" for i in range(N)]), [], "nor are they numbers (for example 't0'"),
    "decimal commas": (
        b"a;y\n" + b"".join(b"%d;%d,5\n" % (i, i) for i in range(N)),
        ["--task", "regression"],
        "'0,5'): write numbers as 1234.5",
    ),
    "other separator": (b"a|y\n" + b"1|2\n" * N, [], "its only column is 'a|y'"),
    "odd target": (table(y=one("oops", number)), [], "line 12: 'oops' is not a number"),
    "infinite target": (table(y=one("inf", number)), [], "line 12: 'inf' is infinite"),
    "overflowing target": (table(y=one("1e999", number)), [], "line 12: '1e999' is infinite"),
    "huge target": (table(y=one("1e200", number)), ["--task", "regression"], "too large"),
    "odd number": (table(a=one("1O", number)), [], "column 'a', line 12: '1O' is not a number"),
    "infinite number": (table(a=one("-Infinity", number)), [], "'-Infinity' is infinite"),
    "empty column": (table(b=[""] * N), [], "column 'b' has no values at all"),
    "constant columns": (table(a=["1"] * N), [], "no column is left"),
    "only names": (table(a=[f"n{i}" for i in range(N)]), [], "no column is left"),
    "too many classes": (table(), ["--task", "classification"], "too many for classes"),
    "small class": (table(y=one("c", lambda i: "ab"[i % 2])), [], "class 'c' of column 'y' has 1 row;"),
    "numbers as classes": (
        table(),
        ["--model", "logistic"],
        "leave --model logistic out, which is for classes only",
    ),
    "weights of no classes": (table(), ["--tune", "class-weights"], "leave --tune class-weights out"),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_file(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content, argv, message = BAD[case]
    (tmp_path / "data.csv").write_bytes(content)
    argv = argv if "--target" in argv else [*argv, "--target", "y"]
    assert main(["tune", "data.csv", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("curvax: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["data.csv"], "no report folder"


@pytest.mark.parametrize("name", ["nothing.csv", ".", "a\0b.csv", "x" * 5000])
def test_no_such_file(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", name, "--target", "y"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("curvax: error: ")
    assert err.count("\n") == 1


def test_names_cannot_reach_the_terminal_raw(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.csv").write_bytes(b'"\x1b[31mred\nline",y\n' + b"1,2\n" * 60)
    assert main(["tune", "data.csv", "--target", "z"]) == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert err.count("\n") == 1


def test_delimiters_quotes_and_encodings(tmp_path):
    path = tmp_path / "data.csv"
    for text, encoding in [
        ('"a,1";"b"\n1;"x ""y"""\n\n2;z\n', "utf-8-sig"),
        ('"a,1"\tb\r\n1\t"x ""y"""\r\n2\tz\r\n', "utf-16"),
    ]:
        path.write_bytes(text.encode(encoding))
        table = read_table(str(path))
        assert table.columns == {"a,1": ["1", "2"], "b": ['x "y"', "z"]}
    path.write_text('a,b\n"two\nlines",1\nx,2\n', encoding="utf-8")
    assert read_table(str(path)).lines == [2, 4], "a cell may span lines"


def test_one_column_has_a_name_if_the_header_has_none(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(",y\n1,2\n")
    assert list(read_table(str(path)).columns) == ["column 1", "y"]
    assert np.array_equal(read_table(str(path)).columns["y"], ["2"])
