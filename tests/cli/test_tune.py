"""Whole runs, in process: the numbers, the files, determinism, resuming."""

import html.parser
import json
import shutil

import numpy as np
import pytest

from curvax.cli import main
from helpers.reports import assert_same, comparable

HOSTILE = '</td><script>alert("1")</script>'
KEY = "<script>key</script>"
FORMULA = "$x^{2$ & [red]b[/red]"
STEPS = ["--steps", "4", "--quiet"]


def write_regression(path):
    """Numbers, categories, gaps, one column of keys."""
    rng = np.random.default_rng(0)
    lines = [f'{KEY},size,"{FORMULA}",kind,price']
    for i in range(90):
        size, other, kind = rng.uniform(1, 5), rng.normal(), "uvw"[rng.integers(3)]
        price = 1000 * size + 300 * "uvw".index(kind) + 50 * rng.normal()
        cell = "" if i % 9 == 0 else f"{size:.3f}"
        lines.append(f"k{i},{cell},{other:.3f},{'' if i % 11 == 0 else kind},{price:.1f}")
    path.write_text("\n".join(lines) + "\n")


def write_classes(path):
    """Classes and columns with names that must not act as markup anywhere."""
    rng = np.random.default_rng(1)
    quoted = HOSTILE.replace('"', '""')
    lines = [f'"{quoted}",{FORMULA},"=cmd|x"']
    for _ in range(100):
        a, b = rng.normal(size=2)
        label = f'"{quoted}"' if a > 0 else FORMULA
        lines.append(f"{a:.3f},{b:.3f},{label}")
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the runs of this module lie."""
    place = tmp_path_factory.mktemp("runs")
    write_regression(place / "houses.csv")
    write_classes(place / "kinds.csv")
    return place


@pytest.fixture(scope="module")
def regression(place):
    """A finished run on numbers."""
    argv = [
        "tune",
        str(place / "houses.csv"),
        "--target",
        "price",
        "--tune",
        "sample-weights,l2,l2-per-feature",
    ]
    assert main([*argv, *STEPS, "--out", str(place / "r")]) == 0
    return place / "r"


@pytest.fixture(scope="module")
def classes(place):
    """A finished run on classes, with labels made wrong."""
    argv = ["tune", str(place / "kinds.csv"), "--target", "=cmd|x", "--corrupt", "0.2"]
    assert main([*argv, *STEPS, "--out", str(place / "c")]) == 0
    return place / "c"


def test_regression_result(regression):
    result, arrays = comparable(regression)
    assert result["data"]["task"] == "regression"
    assert result["model"] == {"name": "ridge", "sizes": [7, 1]}
    assert KEY in result["data"]["notes"][1]
    assert [row["key"] for row in result["methods"]] == ["untuned", "grid", "tuned"]
    assert [row["inner_solves"] for row in result["methods"]] == [1, 5, 5], "the same budget"
    assert result["hyperparameters"] == {"l2": 1, "l2-per-feature": 7, "sample-weights": 54, "total": 62}
    assert result["methods"][2]["hyperparameters"] == 62
    assert result["references"] == []
    assert result["steps"] == 4
    history = result["history"]
    assert len(history["value"]) == len(history["stopping_loss"]) == 5
    assert history["value"][-1] < history["value"][0]
    assert result["chosen_step"] == int(np.argmin(history["stopping_loss"]))
    assert 0 <= result["hypergradient"]["relative_error_largest"] < 0.011, "as accurate as asked for"
    assert np.isclose(arrays["weights"].mean(), 1)
    assert len(arrays["train_rows"]) == len(arrays["weights"]) == 54
    assert arrays["theta/0/weight"].shape == arrays["penalty_0"].shape == (7, 1)
    named = json.loads((regression / "hyperparameters.json").read_text())
    assert named["sample-weights"][0]["place"] == f"line {arrays['train_rows'][0] + 2}"
    assert [row["input"] for row in named["l2-per-feature, mean of each input"]][2] == FORMULA


def test_first_row_of_the_history_is_the_untuned_model(regression):
    """Two ways to the same number: the driver's outer loss, and the parts of the validation split measured."""
    result, _ = comparable(regression)
    history, untuned = result["history"], result["methods"][0]["validation"]
    # Half the mean squared standardised error; the part that stops has 5 of 18 rows.
    y = np.loadtxt(regression.parent / "houses.csv", delimiter=",", skiprows=1, usecols=4)
    with np.load(regression / "hyperparameters.npz", allow_pickle=False) as content:
        scale = y[content["train_rows"]].std()
    parts = (13 * history["value"][0] + 5 * history["stopping_loss"][0]) / 18
    assert np.isclose(parts, 0.5 * (untuned["rmse"] / scale) ** 2, rtol=1e-3)


def test_classes_result(classes):
    result, arrays = comparable(classes)
    assert result["data"]["task"] == "classification"
    assert result["data"]["wrong_labels"] == 12
    assert result["data"]["classes"] == sorted([HOSTILE, FORMULA])
    assert [row["key"] for row in result["references"]] == ["oracle", "validation-only"]
    assert 0 <= result["label_noise"]["auc"] <= 1
    weights = [row["weight"] for row in result["lowest_weights"]]
    assert weights == sorted(weights)
    assert np.isclose(weights[0], arrays["weights"].min())
    pairs, test = result["tuned_against_grid"], result["data"]["test"]
    gain = result["methods"][2]["test"]["accuracy"] - result["methods"][1]["test"]["accuracy"]
    assert np.isclose((pairs["better"] - pairs["worse"]) / test, gain)


class Document(html.parser.HTMLParser):
    """What a browser would make of it."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.open = [], [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if "style" not in self.open else ""


@pytest.mark.parametrize("name", ["regression", "classes"])
def test_report_is_one_safe_document(name, request):
    folder = request.getfixturevalue(name)
    content = (folder / "report.html").read_text(encoding="utf-8")
    document = Document()
    document.feed(content)
    assert document.open == [], "every element is closed"
    assert not {"script", "iframe", "object", "link", "base", "form"} & set(document.tags)
    for attribute, value in document.attributes:
        assert attribute not in ("href", "srcdoc", "onerror", "onload", "onclick")
        assert attribute != "src" or value.startswith("data:image/png;base64,")
    assert "http:" not in content.lower()
    assert "https:" not in content.lower()
    assert "url(" not in content.lower()
    assert "default-src 'none'" in content
    pictures = document.tags.count("img")
    assert pictures == len(list(folder.glob("*.png"))) == 3
    assert {"regression": KEY, "classes": HOSTILE}[name] in document.text, "shown as it is written"


def test_folder_holds_what_it_says_and_nothing_else(regression):
    names = {path.name for path in regression.iterdir()}
    pictures = {"curves.png", "weights.png", "penalties.png"}
    files = {
        "run.json",
        "result.json",
        "hyperparameters.json",
        "hyperparameters.npz",
        "best.npz",
        "report.html",
    }
    assert names == files | pictures | {"checkpoint"}
    for picture in pictures:
        assert (regression / picture).read_bytes().startswith(b"\x89PNG")
    for path in regression.glob("*.npz"):
        with np.load(path, allow_pickle=False) as content:
            assert all(content[name].dtype != object for name in content.files)


def test_same_seed_same_numbers_and_json_is_the_result(regression, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    argv = [
        "tune",
        "houses.csv",
        "--target",
        "price",
        "--tune",
        "l2-per-feature,l2,sample-weights",
        "--steps",
        "4",
    ]
    assert main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == json.loads((place / "reports/houses/result.json").read_text())
    assert_same(comparable(place / "reports/houses"), comparable(regression))
    assert (place / "reports/houses/report.html").read_bytes()[:4000] == (
        regression / "report.html"
    ).read_bytes()[:4000]
    # The next run does not overwrite it.
    assert main([*argv[:-1], "1", "--seed", "1", "--quiet"]) == 0
    assert capsys.readouterr().out == "reports/houses-2/report.html\n"
    rows = comparable(place / "reports/houses-2")[1]["train_rows"]
    assert not np.array_equal(rows, comparable(regression)[1]["train_rows"]), "another seed, other splits"


def test_resume_is_the_uninterrupted_run(regression, place):
    """Two steps, then two more: the same bits as four at once."""
    argv = [
        "tune",
        str(place / "houses.csv"),
        "--target",
        "price",
        "--tune",
        "sample-weights,l2,l2-per-feature",
    ]
    assert main([*argv, "--steps", "2", "--quiet", "--out", str(place / "half")]) == 0
    assert main(["tune", "--resume", str(place / "half"), "--steps", "4", "--quiet"]) == 0
    assert json.loads((place / "half/result.json").read_text())["resumed"] is True
    assert_same(comparable(place / "half"), comparable(regression))


def test_a_lost_best_point_is_not_passed_over(regression, place, capsys):
    folder = place / "lost"
    shutil.copytree(regression, folder)
    for content in (None, b"PK\x03\x04", b"\x80\x04\x95pickle"):
        (folder / "best.npz").unlink() if content is None else (folder / "best.npz").write_bytes(content)
        assert main(["tune", "--resume", str(folder), "--quiet"]) == 2
        assert "best.npz' is missing or cannot be read" in capsys.readouterr().err


def test_resume_needs_the_same_data(regression, place, capsys):
    folder = place / "moved"
    shutil.copytree(regression, folder)
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**content, "digest": "other"}))
    assert main(["tune", "--resume", str(folder)]) == 2
    assert "has changed since the run" in capsys.readouterr().err
    for text in ("", "[]", '{"format": 1}', json.dumps({**content, "options": {}}), "[" * 100_000):
        (folder / "run.json").write_text(text)
        assert main(["tune", "--resume", str(folder)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("curvax: error: ")
        assert err.count("\n") == 1


def test_out_is_never_overwritten_unasked(regression, place, capsys):
    before = {path: path.read_bytes() for path in regression.iterdir() if path.is_file()}
    argv = ["tune", str(place / "houses.csv"), "--target", "price", "--quiet", "--out"]
    assert main([*argv, str(regression)]) == 2
    assert "is not empty: name another folder, or add --overwrite" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in regression.iterdir() if path.is_file()} == before
    precious = place / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    assert main([*argv, str(precious), "--overwrite"]) == 2
    assert "holds no report of curvax" in capsys.readouterr().err
    assert main([*argv, str(precious / "thesis.txt")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main([*argv, str(precious / "thesis.txt" / "deeper")]) == 2
    assert "cannot be made" in capsys.readouterr().err
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]
    # With --overwrite an earlier report goes, and what else lies there stays.
    folder = place / "again"
    shutil.copytree(regression, folder)
    (folder / "notes.txt").write_text("mine")
    assert main([*argv, str(folder), "--overwrite", "--steps", "1", "--tune", "l2"]) == 0
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "weights.png").exists()
    assert json.loads((folder / "result.json").read_text())["steps"] == 1


def test_table_in_the_terminal(place, capsys):
    argv = [
        "tune",
        str(place / "kinds.csv"),
        "--target",
        "=cmd|x",
        "--steps",
        "1",
        "--model",
        "mlp",
        "--hidden",
        "3",
    ]
    assert main([*argv, "--tune", "l2-per-layer,class-weights", "--out", str(place / "m")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "kinds.csv: 60 training, 20 validation, 20 test examples; mlp on 2 inputs" in out
    for label in ("untuned", "grid search", "tuned"):
        (line,) = [line for line in out.splitlines() if line.strip().startswith(label)]
        assert line.count("%") == 2
        assert "…" not in line
    assert max(map(len, out.splitlines()[2:8])) <= 80
    assert "Relative error of the hypergradients, as estimated: median" in out
    result = json.loads((place / "m/result.json").read_text())
    assert result["hyperparameters"] == {"class-weights": 2, "l2-per-layer": 2, "total": 4}
