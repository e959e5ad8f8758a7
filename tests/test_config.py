"""What may be said in YAML, and the one line that each mistake gets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from raypipe.config.load import config_hash, load, to_dict
from raypipe.config.schema import RunConfig
from raypipe.errors import ConfigError
from raypipe.run import load_run

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
PART = "a part is written as a word or as {name: ..., setting: ...}"
LETTERS = "holds letters, digits, '.', '_' and '-', at most 63, no spaces"
PACE = "pace: 'fedbuf' is not one of paced, wait_for_all, k_of_n, fedbuff, delta_async. Did you mean 'fedbuff'?"
SMALL = """
name: try
stores: [{id: mall}, {id: suburb}]
stop: {max_versions: 2}
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def to(text: str, name: str = "try.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return to


def problems(path: Path | None, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert all("\n" not in line for line in caught.value.problems)
    return caught.value.problems


def keys(value: Any, above: str = "") -> set[str]:
    """Every dotted key, in a part only its name."""
    if isinstance(value, list):
        return {key for i, item in enumerate(value) for key in keys(item, f"{above}{i}.")}
    if not isinstance(value, dict):
        return {above}
    if "name" in value and above:
        return {above}
    return {inner for key, item in value.items() for inner in keys(item, f"{above}{key}.")}


def test_there_are_these_scenarios() -> None:
    tables = ["image_sales", "lending_club", "orange_juice"]
    others = ["fashion_niid", "fedbuff", "quickstart", "resnet", "shelves_detection", "sync"]
    assert [path.stem for path in CONFIGS] == sorted(tables + others)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_loads_and_says_every_key(path: Path) -> None:
    config = load_run(path)  # its parts too
    raw = yaml.safe_load(path.read_text())
    raw["train"]["schedule"] = {"name": raw["train"]["schedule"]}
    unsaid = r"stores\.\d+\.(transport|ranks)\."  # as `store` says; as its GPUs
    said = {key for key in keys(to_dict(config)) if not re.fullmatch(unsaid, key)}
    assert keys(raw) == said
    assert config.name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_begins_with_its_command_and_explains_its_keys(path: Path) -> None:
    text = path.read_text()
    assert f"\n#     python jobs/federate.py configs/{path.name}\n" in text
    bare = [line for line in text.splitlines() if ":" in line and "#" not in line]
    assert len(bare) < 25, "keys without a word beside them"
    assert max(map(len, text.splitlines())) <= 120


def test_the_pace_of_the_quickstart_is_the_one_key_to_change() -> None:
    path = next(path for path in CONFIGS if path.stem == "quickstart")
    assert load(path).pace == "paced"
    assert load(path).stores[-1].slowdown == 5
    for pace in ("fedbuff", "wait_for_all"):
        assert f"pace: {pace}" in path.read_text().split("\nname:")[0]
        assert load(path, [f"pace={pace}"]).pace == pace


def test_the_schema_alone_and_the_written_defaults_agree(write: Any) -> None:
    config = load(write(SMALL))
    assert RunConfig.model_validate(to_dict(config)) == config
    assert config.train.optimizer == {"name": "sgd"}


def test_an_override_sets_numbers_words_parts_and_stores_by_place_or_id(write: Any) -> None:
    said = ["train.lr=1e-3", "stores.0.cpus=2", "stores.suburb.slowdown=3", "pace=fedbuff", "server.lr=0.3"]
    config = load(write(SMALL), [*said, "update.0=bfloat16", "local.max_images=9", "stop.max_seconds=~"])
    assert (config.train.lr, config.pace, config.server) == (0.001, "fedbuff", {"name": "sgd", "lr": 0.3})
    assert [(s.cpus, s.slowdown) for s in config.stores] == [(2.0, 1.0), (1.0, 3.0)]
    assert config.update == [{"name": "bfloat16"}]
    assert config.local is not None
    assert config.local.max_images == 9


def test_an_override_on_one_alias_leaves_the_other(write: Any) -> None:
    path = write(SMALL.replace("[{id: mall}, {id: suburb}]", "[&a {id: mall}, {<<: *a, id: suburb}]"))
    assert [s.cpus for s in load(path, ["stores.0.cpus=4"]).stores] == [4.0, 1.0]


def test_a_part_as_a_word_takes_settings_from_an_override(write: Any) -> None:
    config = load(write(SMALL + "server: adam\n"), ["server.lr=0.1"])
    assert config.server == {"name": "adam", "lr": 0.1}


def test_a_setting_of_a_part_reads_1e_4_as_a_number(write: Any) -> None:
    assert load(write(SMALL + "server: {name: adam, eps: 1e-4}\n")).server == {"name": "adam", "eps": 0.0001}


def test_a_section_with_nothing_under_it_is_its_defaults(write: Any) -> None:
    assert load(write(SMALL + "train:\npacing:\n")) == load(write(SMALL))


def test_equal_meaning_has_an_equal_hash_and_a_changed_value_another(write: Any) -> None:
    path = write(SMALL)
    assert config_hash(load(path)) == config_hash(load(path, ["train.lr=5e-2", "server={name: sgd}"]))
    assert config_hash(load(path)) != config_hash(load(path, ["seed=1"]))


@pytest.mark.parametrize(
    ("added", "line"),
    [
        ("trian: {lr: 1}", "trian: no such key. Did you mean 'train'?"),
        ("lr: 1", "lr: no such key. Did you mean 'train.lr'?"),
        ("train: {lr: -1}", "train.lr: must be greater than 0, found -1"),
        ("train: {lr: .nan}", "train.lr: must be a finite number, found nan"),
        ("train: {lr: fast}", "train.lr: must be a number, found 'fast'"),
        ("train: {batch_size: 2.5}", "train.batch_size: must be a whole number, found 2.5"),
        ("train: {batch_size: 0}", "train.batch_size: must be at least 1, found 0"),
        ("train: {batchsize: 8}", "train.batchsize: no such key. Did you mean 'batch_size'?"),
        ("train: 3", "train: must be a section of keys, found 3"),
        (
            "train: {optimizer: {momentum: 1}}",
            f"train.optimizer: {PART}",
        ),
        ("model: 3", f"model: {PART}; found 3"),
        (
            "pace: fedbuf",
            PACE,
        ),
        ("pacing: {quorum: 3}", "pacing.quorum 3 is more than the 2 stores there are"),
        ("evaluate: {alone: maybe}", "evaluate.alone: must be true or false, found 'maybe'"),
        (
            "data: my data",
            f"data: a name {LETTERS}; found 'my data'",
        ),
        ("data: 12", "data: must be text, found 12; write it in quotes"),
    ],
)
def test_a_wrong_key_or_value_gets_one_line(write: Any, added: str, line: str) -> None:
    assert problems(write(SMALL + added)) == [f"try.yaml: {line}"]


@pytest.mark.parametrize(
    ("stores", "line"),
    [
        ("[{id: mall}, {id: mall}]", "stores: ids must differ, found twice: mall"),
        (
            "[{id: city centre}]",
            f"stores.0.id: a store id {LETTERS}; found 'city centre'",
        ),
        ("[]", "stores: must hold at least 1, found []"),
        ("[{cpus: 1}]", "stores.0.id: is missing"),
        ("mall", "stores: must be a list, found 'mall'"),
    ],
)
def test_wrong_stores_get_one_line(write: Any, stores: str, line: str) -> None:
    assert problems(write(f"name: try\nstop: {{max_versions: 1}}\nstores: {stores}")) == [f"try.yaml: {line}"]


def test_all_problems_are_shown_together(write: Any) -> None:
    text = "name: try\ntrian: 1\ntrain: {lr: -1}\nname: again\nstores: [{id: a, cpus: 0}, {id: a}]\nstop: {}\n"
    assert problems(write(text), "pace=fedbuf", "stores.9.cpus=1", "lr") == [
        "try.yaml: line 4: key 'name' is there twice",
        "--set stores.9.cpus: stores has no '9', only 2 entries counted from 0. Allowed: a.",
        "--set lr: write it as key=value",
        "try.yaml: stores.0.cpus: must be greater than 0, found 0",
        "try.yaml: train.lr: must be greater than 0, found -1",
        f"--set: {PACE}",
        "try.yaml: stop: set max_versions or max_seconds, else the run has no end",
        "try.yaml: trian: no such key. Did you mean 'train'?",
        "try.yaml: stores: ids must differ, found twice: a",
    ]


def test_an_empty_file_lacks_what_must_be_there(write: Any) -> None:
    assert problems(write("")) == [f"try.yaml: {key}: is missing" for key in ("name", "stores", "stop")]
    assert problems(None)[0] == "configuration: name: is missing"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("trian.lr=1", "--set: trian: no such key. Did you mean 'train'?"),
        ("train.lrr=1", "--set: train.lrr: no such key. Did you mean 'lr'?"),
        ("pace.k=1", "--set pace.k: pace is a single value ('paced') and holds no keys"),
        (
            "stores.maal.cpus=1",
            "--set stores.maal.cpus: stores has no 'maal', only 2 entries counted from 0. Did you mean 'mall'?",
        ),
        ("train.lr", "--set train.lr: write it as key=value"),
        ("=1", "--set =1: write it as key=value"),
        ("train.lr={a: 1, a: 2}", "--set train.lr={a: 1, a: 2}: line 1: key 'a' is there twice"),
        ("train.lr=[", "--set train.lr=[: line 1, column 2: expected the node content, but found '<stream end>'"),
    ],
)
def test_a_wrong_override_gets_one_line(write: Any, override: str, line: str) -> None:
    assert problems(write(SMALL), override) == [line]


def test_a_file_that_cannot_be_read_gets_one_line(write: Any, tmp_path: Path) -> None:
    path = write(SMALL, "quickstart.yaml")
    assert problems(path.with_name("quikstart.yaml"))[0].endswith("no such file. Did you mean 'quickstart.yaml'?")
    assert "no such folder" in problems(tmp_path / "none" / "a.yaml")[0]
    assert problems(tmp_path)[0].endswith("cannot be read: is a directory")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\xff")
    assert problems(tmp_path / "b.yaml")[0].endswith("is not text in UTF-8")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: try\nstop: a: b\n", "try.yaml: line 2, column 8: mapping values are not allowed here"),
        ("- 1\n", "try.yaml: must be a section of keys, found a list"),
        ("a: &a [*a]\n", "try.yaml: keys are nested more than 32 deep"),
        ("a: !!python/object/apply:os.system [ls]\n", "try.yaml: line 1, column 4: could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "try.yaml: line 2, column 1: but found another document"),
        ("? [a]\n: 1\n", "try.yaml: line 1, column 3: found unhashable key"),
    ],
)
def test_what_is_not_a_configuration_gets_one_line_with_its_place(write: Any, text: str, line: str) -> None:
    assert problems(write(text))[0].startswith(line)
    assert len(problems(write(text))) == 1
