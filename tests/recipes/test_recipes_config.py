"""Configs: every wrong key is refused by its dotted name, with what came and what was expected."""

import json
import shutil
from pathlib import Path

import pytest
import recipe_cases

import gradroute.recipes
from gradroute.recipes import command, data, files
from gradroute.recipes.command import keys
from gradroute.recipes.config import Config, ConfigError, load, to_yaml
from gradroute.recipes.keys import keys_of
from gradroute.recipes.plain_yaml import dump, parse
from gradroute.recipes.reading import leaves

CONFIGS = sorted(Path(gradroute.recipes.__file__).parent.glob("configs/*.yaml"))

#: A setting → what the error says.
WRONG = {
    "model.path=nowhere": r"model\.path: got '.*/nowhere', expected a path that exists",
    "model.path=package:nowhere/x": r"model\.path: got 'package:nowhere/x', .* no package nowhere is",
    "data.sources.forget.path=distribution:nowhere/*": r"forget\.path: got .*, .* no distribution nowhere is installed",
    "data.sources.forget.path=distribution:numpy/*.nothing": r"forget\.path: got .*, expected a path that exists",
    "model.pth=1": r"model\.pth: got 1, expected one of the keys path, .* \(did you mean path\?\)",
    "modle.path=1": r"modle: got .*, expected one of the keys model, .* \(did you mean model\?\)",
    "model.dtype=float23": r"model\.dtype: got 'float23', expected one of auto, .* \(did you mean float32\?\)",
    "seed=true": r"seed: got True, expected a whole number of at least 0 and of at most 4294967295",
    "seed=-1": r"seed: got -1, expected a whole number of at least 0",
    "seed=1.0": r"seed: got 1\.0, expected a whole number",
    "seed=": r"seed: got None, expected a whole number",
    "data.heldout=1": r"data\.heldout: got 1, expected a number above 0 and of at most 0\.9",
    "data.heldout=.nan": r"data\.heldout: got nan, expected a number",
    "data.sources={}": r"data\.sources: got \{\}, expected at least 1",
    "data.sources.forget.pat=x": r"data\.sources\.forget\.pat: got 'x', .* \(did you mean path\?\)",
    "data.sources.wiki={path: .}": r"labels\.routes: got \{\}, expected a route for the source wiki",
    "data.sources.wiki={}": r"data\.sources\.wiki\.path: got nothing, expected a path",
    "data.sources.wiki=[1]": r"data\.sources\.wiki: got \[1\], expected a mapping with the keys path",
    "data.sources.a b={path: .}": r"data\.sources: got 'a b', expected names of letters, digits, - and _",
    "data.sources.forget.characters=7": r"data\.sources\.forget\.characters: got 7, expected nothing, unless split is",
    "data.sources.forget={path: ., format: parquet, split: blank_lines}": r"forget\.split: got 'blank_lines', expected",
    "routes=forget": r"routes: got 'forget', expected a list, each item a string",
    "routes=[retain]": r"routes: got \['retain'\], expected at least two different names",
    "routes=[retain, retain]": r"routes: got .*, expected at least two different names",
    "routes=[retain, 3]": r"routes\[1\]: got 3, expected a string",
    "labels.by=word": r"labels\.by: got 'word', expected one of source, .* \(did you mean words\?\)",
    "labels.by=words": r"labels\.words: got \{\}, expected at least one route",
    "labels.by=column": r"data\.sources\.forget\.label: got None, expected a column",
    "labels.words.forget=[a]": r"labels\.words: got .*, expected nothing, because labels.by is source",
    "labels.words.forgt=[a]": r"labels\.words: got 'forgt', expected a name of routes: .* \(did you mean forget\?\)",
    "labels={by: regex, patterns: {forget: '('}}": r"labels\.patterns\.forget: got '\(', expected a regular expression",
    "labels={by: words, words: {forget: []}}": r"labels\.words\.forget: got .*, expected at least one word",
    "labels.frequency.bias=1": r"labels\.frequency: got settings, expected none, because labels.by is source",
    "labels={by: frequency, frequency: {forget: x}}": r"labels\.frequency\.forget: got 'x', expected a name of data",
    "labels={by: frequency, frequency: {retain: forget}}": r"frequency\.retain: got 'forget', expected another source",
    "labels={by: frequency, frequency: {smoothing: []}}": r"smoothing: got \[\], expected one or two numbers",
    "labels={by: frequency, frequency: {smoothing: [-1]}}": r"smoothing: got \[-1.0\], expected one or two numbers",
    "labels.errors.route=retain": r"labels\.errors\.route: got 'retain', expected another route than the base route",
    "labels={by: regex, patterns: {forget: a}, errors: {false_negative: 0.5}}": r"labels\.errors\.of: got 'documents'",
    "labels.unlabelled=retain": r"labels\.unlabelled: got 'retain', expected null, because labels.share is 1",
    "labels.sources=[retain]": r"labels\.sources: got .*, expected nothing, because labels.by is source",
    "labels.routes.wiki=retain": r"labels\.routes: got 'wiki', expected a name of data\.sources",
    "seed": r"--set: got 'seed', expected key\.sub=value",
    "seed.x=1": r"seed: got \{'x': 1\}, expected a whole number",
    "labels={a: 1, a: 2}": r"--set labels: got .*, expected YAML \(the key a stands there twice, line 1\)",
    "labels={a: [": r"--set labels: got '\{a: \[', expected YAML",
}


@pytest.mark.parametrize("setting", WRONG)
def test_a_wrong_setting_is_refused_by_its_key(recipe_config, setting):
    with pytest.raises(ConfigError, match=WRONG[setting]):
        load(recipe_config, [setting])


def test_a_config_written_out_is_the_same_config(recipe_config, tmp_path):
    recipe_config["labels"] = {"routes": {"forget": "forget", "*": "retain"}}
    config = load(recipe_config, ["data.heldout=2e-1", "model.device=on"])
    assert config.data.heldout == 0.2
    assert config.model.device == "on"
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "config.yaml") == config
    assert {key for key, *_ in keys()} >= {
        "seed",
        "model.path",
        "data.sources.NAME.path",
        "labels.errors.of",
    }


def test_a_file_in_json_with_paths_from_its_own_folder(recipe_config, recipe_files, tmp_path, monkeypatch):
    recipe_cases.save_texts(tmp_path / "beside")
    recipe_config["data"]["sources"]["forget"]["path"] = "beside/*.jsonl"
    (tmp_path / "config.json").write_text(json.dumps(recipe_config))
    monkeypatch.chdir(recipe_files)
    config = load(tmp_path / "config.json", ["data.sources.retain.path=texts/retain.txt", "data.length=9"])
    assert config.data.sources["forget"].path == str(tmp_path / "beside/*.jsonl")
    assert config.data.sources["retain"].path == str(recipe_files / "texts/retain.txt")
    assert config.data.sources["retain"].split == "blank_lines"
    assert config.data.length == 9


def test_the_shipped_configs_are_named_inside_the_package_and_are_whole(tmp_path):
    recipes = [path for path in CONFIGS if not path.name.startswith("plan_")]
    for path in recipes:
        name = f"package:gradroute/recipes/configs/{path.name}"
        # Neither the model nor all of the packages are in every environment of the tests.
        settings = [f"model.path={tmp_path}", "data.sources={retain: {path: .}, forget: {path: .}}"]
        config = load(name, [*settings, "labels.routes={}"])
        assert config == load(path, [*settings, "labels.routes={}"])
    assert recipes
    with pytest.raises(
        ConfigError, match=r"config: got 'package:nowhere/x\.yaml', expected .* \(no package nowhere"
    ):
        load("package:nowhere/x.yaml")


def test_files_of_distributions_are_found_by_their_record():
    found = files.matched("distribution:numpy, pytest/*.dist-info/METADATA")
    assert [path.parent.name.partition("-")[0] for path in found] == ["numpy", "pytest"]
    assert files.located("distribution:numpy/METADATA") == found[0]
    with pytest.raises(FileNotFoundError, match="2 files match, and one is needed"):
        files.located("distribution:numpy,pytest/METADATA")


def test_the_place_of_a_model_is_in_no_key(recipe_config, recipe_files, tmp_path):
    before = keys_of("unlearn", [data.STAGE], load(recipe_config))
    shutil.copytree(recipe_files / "model", tmp_path / "model")
    recipe_config["model"]["path"] = str(tmp_path / "model")
    assert keys_of("unlearn", [data.STAGE], load(recipe_config)) == before
    (tmp_path / "model/tokenizer.json").write_text("{}")
    assert keys_of("unlearn", [data.STAGE], load(recipe_config)) != before


@pytest.mark.parametrize("text", ["", "a list", "- 1", "a: [", "seed: 1\nseed: 2\n", b"\xff"])
def test_a_file_that_is_no_config_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"config .*: got .*, expected"):
        load(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"config .*: got .*, expected"):
        load(tmp_path / "no.yaml")


def test_yaml_is_that_of_version_1_2():
    text = "[1e-5, 1E5, on, no, 2026-01-01, 1:30, .5, 0x10, ~, null, -3, 'true', true, 1_0, .inf]"
    read = [
        1e-5,
        1e5,
        "on",
        "no",
        "2026-01-01",
        "1:30",
        0.5,
        16,
        None,
        None,
        -3,
        "true",
        True,
        "1_0",
        float("inf"),
    ]
    assert parse(text) == read
    assert list(map(type, parse(text))) == list(map(type, read))
    strings = ["1e-5", "on", "true", "", "~", "0x10", "a: b", "- x", "#", "3", "ü"]
    assert parse(dump({"a": strings, "b": read})) == {"a": strings, "b": read}


def test_the_command_says_what_is_wrong_and_loads_nothing(recipe_config, tmp_path, capsys, monkeypatch):
    (tmp_path / "config.yaml").write_text(dump(recipe_config))
    monkeypatch.chdir(tmp_path)
    assert command.main(["unlearn", "--config", "config.yaml", "--set", "seed=x"]) == 2
    assert "error: seed: got 'x', expected a whole number" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    with pytest.raises(SystemExit):
        command.main(["unlern", "--config", "config.yaml"])
    assert "unlern" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["unlearn"])
    assert "--config: got nothing, expected a file" in capsys.readouterr().err
    assert command.main(["keys", "data"]) == 0
    assert "data.length: the most tokens of a document" in capsys.readouterr().out


def test_every_key_has_a_meaning(recipe_config):
    assert [key for key, *_, meaning in keys() if not meaning] == []
    given = {key for key, *_ in leaves(load(recipe_config))}
    assert len(given) > 40
    assert isinstance(load(recipe_config), Config)


def test_an_unknown_recipe_is_refused(recipe_config, tmp_path):
    with pytest.raises(
        ValueError, match=r"name: got 'unlern', expected one of .* \(did you mean unlearn\?\)"
    ):
        gradroute.recipes.run("unlern", recipe_config, tmp_path)


def test_keys_of_the_command(capsys):
    for word, key in (("memory", "memory.gpu_gb"), ("data.sources.wiki.path", "data.sources.NAME.path")):
        assert command.main(["keys", word]) == 0
        assert f"{key}: " in capsys.readouterr().out
    assert command.main(["keys", "trian"]) == 2
    assert "keys: got 'trian', expected a key or one of the sections model, " in (
        err := capsys.readouterr().err
    )
    assert "did you mean train?" in err
