"""Arguments: what is understood, and the one line for what is not."""

import dataclasses
import json

import pytest

from curvax.cli import main
from curvax.cli._errors import UsageError
from curvax.cli._options import GROUPS, Options, parse

WRONG = [
    ([], "required: COMMAND"),
    (["frobnicate"], "invalid choice"),
    (["tune"], "name a CSV file"),
    (["tune", "data.csv"], "--target is missing"),
    (["tune", "digit"], "did you mean the bundled 'digits'"),
    (["tune", "digits", "extra"], "unrecognized arguments"),
    (["tune", "digits", "--target", "x"], "bundled data set"),
    (["tune", "wine", "--drop", "x"], "bundled data set"),
    (["tune", "digits", "--steps", "0"], "is not a number from 1"),
    (["tune", "digits", "--steps", "ten"], "is not a number from 1"),
    (["tune", "digits", "--steps", "1e3"], "is not a number from 1"),
    (["tune", "digits", "--seed", "-1"], "is not a number from 0"),
    (["tune", "digits", "--corrupt", "1.5"], "is not a fraction"),
    (["tune", "digits", "--corrupt", "nan"], "is not a fraction"),
    (["tune", "digits", "--split", "50/50"], "60/20/20"),
    (["tune", "digits", "--split", "90/5/6"], "100 in all"),
    (["tune", "digits", "--split", "98/1/1"], "5 or more"),
    (["tune", "digits", "--tune", "l2,l3"], "'l3' is none of"),
    (["tune", "digits", "--tune", "l2,l2"], "twice"),
    (["tune", "digits", "--tune", ""], "is none of"),
    (["tune", "digits", "--model", "tree"], "invalid choice: 'tree'"),
    (["tune", "digits", "--task", "ranking"], "invalid choice: 'ranking'"),
    (["tune", "digits", "--hidden", "4"], "--hidden is for --model mlp"),
    (["tune", "digits", "--model", "logistic", "--task", "regression"], "logistic is for classification"),
    (["tune", "digits", "--model", "ridge", "--task", "classification"], "ridge is for regression"),
    (["tune", "digits", "--tune", "l2-per-layer"], "l2-per-layer is for --model mlp"),
    (
        ["tune", "digits", "--tune", "class-weights", "--task", "regression"],
        "class-weights is for classification",
    ),
    (["tune", "digits", "--corrupt", "0.1", "--task", "regression"], "--corrupt is for classification"),
    (["tune", "digits", "--overwrite"], "--overwrite needs --out"),
    (["tune", "a.csv", "--target", "y", "--drop", "y"], "--drop names the target"),
    (["tune", "a.csv", "--target", "y", "--categorical", "y"], "take --task classification"),
    (["tune", "digits", "--resume", "there"], "leave DATA out"),
    (["tune", "--resume", "there", "--seed", "1"], "leave --seed out"),
    (["tune", "digits", "--st", "5"], "unrecognized arguments"),
    # Combinations that show only once the data are known.
    (["tune", "digits", "--model", "ridge"], "digits is classification"),
    (["tune", "diabetes", "--model", "logistic"], "diabetes is regression"),
    (["tune", "diabetes", "--tune", "class-weights"], "diabetes is regression"),
    (["tune", "diabetes", "--corrupt", "0.1"], "--corrupt is for classification"),
    (["tune", "wine", "--task", "regression"], "classification data set"),
    (["tune", "--resume", "nowhere"], "no run of curvax tune"),
]


@pytest.mark.parametrize(("argv", "message"), WRONG, ids=[" ".join(argv) or "nothing" for argv, _ in WRONG])
def test_wrong_use_is_one_line_and_exit_code_2(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("curvax: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_options_survive_json():
    options, _, _ = parse(
        ["tune", "a b.csv", "--target", "y,z", "--drop", "p", "--drop", "q,r", "--tune", "l2,sample-weights"]
    )
    assert options.drop == ("p", "q,r")
    assert options.tune == ("sample-weights", "l2"), "in the order of GROUPS, whatever the order given"
    assert Options.from_json(json.loads(json.dumps(options.as_json()))) == options


def test_options_of_another_version_are_refused():
    values = Options(data="digits").as_json()
    with pytest.raises(UsageError, match="not those of this version"):
        Options.from_json({**values, "surprise": 1})


def test_resume_takes_steps_and_what_is_printed():
    options, folder, given = parse(["tune", "--resume", "there", "--steps", "7", "--quiet"])
    assert folder == "there"
    assert given == {"steps", "quiet"}
    assert (options.steps, options.quiet) == (7, True)


def test_help_names_every_group_and_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tune", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for name in GROUPS:
        assert name in text
    for field in dataclasses.fields(Options):
        assert field.name == "data" or f"--{field.name}" in text


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("curvax 0.")
