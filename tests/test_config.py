"""YAML and JSON round trips, overrides, and the one-sentence errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoestring.config import (
    DataConfig,
    LoggingConfig,
    NoiseConfig,
    Ramp,
    RunConfig,
    SamplingConfig,
    StageConfig,
    StoreConfig,
    TransformerConfig,
    apply_overrides,
    from_json,
    load_yaml,
    parse_yaml,
    to_yaml,
)
from shoestring.config.explain import dotted, keys_of, root
from shoestring.runtime import UserError

CONFIG = RunConfig(
    name="test",
    data=DataConfig(stores=(StoreConfig(path="a"),)),
    stages=(
        StageConfig(name="pretrain", nimg=1000, lr=1e-3, stores=(StoreConfig(path="b"),)),
        StageConfig(name="tune it", nimg=1000, lr=1e-5, mask_ratio=0.5),
    ),
)

positive = st.floats(min_value=1e-300, max_value=1e300)
share = st.floats(min_value=0, max_value=1)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
awkward = st.sampled_from(
    [
        "on",
        "null",
        "~",
        "1e3",
        "0x10",
        "1_000",
        "- a",
        "a: b",
        "# x",
        " a ",
        "'",
        '"',
        "\n",
        "é😀",
        "<<",
        "*a",
    ]
)
stages = st.builds(
    StageConfig,
    name=st.one_of(text.filter(len), awkward),
    nimg=st.integers(1, 10**12),
    lr=positive,
    mask_ratio=st.floats(0, 1, exclude_max=True),
    mask_ratio_end=st.none() | st.floats(0, 1, exclude_max=True),
    clip_norm=st.none() | positive,
    noise=st.builds(NoiseConfig, mean=st.floats(-10, 10), std=positive),
    keep_optimizer=st.booleans(),
)
wide = st.floats(min_value=0.01, max_value=1e300)  # layers have at least a channel or two
multipliers = st.builds(Ramp, first=wide, last=wide) | st.tuples(wide, wide)
configs = st.builds(
    RunConfig,
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z"),
    seed=st.integers(0, 2**70),
    device=awkward | text,
    model=st.builds(TransformerConfig, qkv_multipliers=multipliers, ffn_multipliers=multipliers),
    stages=st.lists(stages, min_size=1, max_size=3, unique_by=lambda stage: stage.name).map(tuple),
    sampling=st.builds(
        SamplingConfig,
        guidance=st.floats(allow_nan=False, allow_infinity=False),
        guidance_interval=st.none() | st.tuples(share, share).map(lambda pair: tuple(sorted(pair))),
    ),
    logging=st.builds(LoggingConfig, prompts=st.lists(awkward | text, max_size=8).map(tuple)),
)


@given(configs, text)
def test_yaml_and_json_round_trip(config: RunConfig, header: str) -> None:
    assert parse_yaml(to_yaml(config, header)) == config
    assert from_json(config.model_dump_json()) == config


def test_yaml_is_complete_and_explained() -> None:
    text = to_yaml(CONFIG, "Two\nlines")
    assert text.startswith("# Two\n# lines\n\n")
    assert max(map(len, text.splitlines())) <= 110
    for model in (RunConfig, TransformerConfig, StageConfig, NoiseConfig, LoggingConfig):
        for name, field in model.model_fields.items():
            assert f"{name}:" in text
            assert text.count(f"# {field.description}") >= 1, name


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("model.mixer.depth=0", lambda c: c.model.mixer.depth, 0),
        ("stages.0.lr=2e-3", lambda c: c.stages[0].lr, 2e-3),
        ("stages.pretrain.lr=.5", lambda c: c.stages[0].lr, 0.5),
        ("stages.tune it.lr=1E-4", lambda c: c.stages[1].lr, 1e-4),
        ("stages.0.nimg=1_500_000", lambda c: c.stages[0].nimg, 1_500_000),
        ("stages.0.nimg=1.5e6", lambda c: c.stages[0].nimg, 1_500_000),
        ("stages.0.clip_norm=null", lambda c: c.stages[0].clip_norm, None),
        ("stages.0.noise={mean: 0}", lambda c: (c.stages[0].noise.mean, c.stages[0].noise.std), (0, 1.2)),
        ("compile=on", lambda c: c.compile, True),
        ("compile=False", lambda c: c.compile, False),
        ("name=on", lambda c: c.name, "on"),
        ("name=2026-11-21", lambda c: c.name, "2026-11-21"),
        ("name='007'", lambda c: c.name, "007"),
        ("data.path=C:\\x: y", lambda c: c.data.path, "C:\\x: y"),
        ("data.path=a=b", lambda c: c.data.path, "a=b"),
        ("data.path=", lambda c: c.data.path, None),
        ("optimizer={kind: muon}", lambda c: (c.optimizer.kind, c.optimizer.beta1), ("muon", 0.9)),
        ("model.ffn_multipliers=[1, 2.5]", lambda c: c.model.ffn_multipliers, (1.0, 2.5)),
        ("model.ffn_multipliers.last=3", lambda c: c.model.ffn_multipliers, Ramp(first=0.5, last=3)),
        ("sampling.guidance_interval=[0.2, 5]", lambda c: c.sampling.guidance_interval, (0.2, 5.0)),
        ("logging.prompts=[red apple, a dog]", lambda c: c.logging.prompts, ("red apple", "a dog")),
        ("stages=[{name: only, nimg: 5, lr: 1}]", lambda c: [s.name for s in c.stages], ["only"]),
    ],
)
def test_overrides(override: str, read, value) -> None:
    assert read(apply_overrides(CONFIG, [override])) == value


def test_overrides_do_not_touch_the_original_and_the_last_wins() -> None:
    changed = apply_overrides(CONFIG, ["model.depth=4", "model.depth=8"])
    assert (changed.model.depth, CONFIG.model.depth) == (8, 16)
    assert apply_overrides(CONFIG, []) == CONFIG


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.deph=3", "unknown key 'model.deph'; did you mean 'model.depth'?"),
        (
            "depth=3",
            "unknown key 'depth'; did you mean 'model.depth', 'model.mixer.depth' or 'model.decoder.depth'?",
        ),
        ("lr=1", "unknown key 'lr'; did you mean 'stages.0.lr'?"),
        ("optimizer={kid: muon}", "unknown key 'optimizer.kid'; did you mean 'optimizer.kind'?"),
        ("model.depth.x=3", "unknown key 'model.depth.x'; model.depth is a single value"),
        ("stages.tun.lr=1", "has 2 entries, counted from 0 or by name: pretrain and tune it"),
        ("model.depth=abc", "is 'abc'; it must be a whole number of at least 1 and at most 256"),
        ("model.depth=true", "model.depth is true; it must be a whole number of at least 1"),
        ("model.depth='4'", "model.depth is '4'; it must be a whole number"),
        ("model.depth=", "model.depth is null; it must be a whole number"),
        ("model.depth=[1,", "model.depth is '[1,', which cannot be read: line 1"),
        ("stages.0.mask_ratio=1", "mask_ratio is 1; it must be a number of at least 0 and below 1"),
        ("sampling.steps=0", "sampling.steps is 0; it must be a whole number of at least 1"),
        ("sampling.guidance=.nan", "sampling.guidance is nan; it must be finite"),
        ("sampling.guidance=nan", "sampling.guidance is 'nan'; it must be a number"),
        ("precision=fp16", "precision is 'fp16'; it must be bf16 or fp32"),
        ("compile=maybe", "compile is 'maybe'; it must be true or false"),
        ("model.qkv_multipliers=[1, -1]", "a mapping with the keys first and last, or a list, each item a"),
        (
            "model.qkv_multipliers={frist: 1}",
            "a mapping with the keys first and last, or a list, each item a",
        ),
        ("model.dim=33", "model.dim is 33; it must be a multiple of 4 and of head_dim (32)"),
        ("stages.0.micro_batch=7", "stages.0.batch is 256; it must be a multiple of micro_batch (7)"),
        ("sampling.guidance_interval=[1]", "is [1]; it must be a list of 2 values, each a number, or null"),
        ("stages=[{name: a, lr: 1}]", "stages.0.nimg is missing; it must be a whole number above 0"),
        ("stages=[]", "stages is []; it must be a list of at least 1"),
        (
            "stages.1.name=pretrain",
            "stages has the name 'pretrain' twice; give every stage a name of its own",
        ),
        ("stages.0.stores=[{weight: 2}]", "stages.0.stores.0.path is missing"),
        ("stages.0.min_side=0", "stages.0.min_side is 0; it must be a whole number above 0"),
        ("logging.prompts=[a, 1]", "logging.prompts.1 is 1; it must be text; put it in quotes"),
        ("model=&a [*a]", "which cannot be read"),
        ("seed=" + "9" * 5000, "seed is"),
        ("model.depth", "cannot read 'model.depth'; write key=value"),
        ("=3", "cannot read '=3'; write key=value"),
        ("model..depth=3", "unknown key 'model.'"),
    ],
)
def test_wrong_overrides_get_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_overrides(CONFIG, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [dotted(key) for key in keys_of(root(RunConfig, {}))])
def test_a_misspelt_key_finds_its_neighbour(key: str) -> None:
    stem, _, last = key.rpartition(".")
    wrong = f"{stem}.{last}x" if stem else f"{last}x"
    with pytest.raises(UserError, match="unknown key") as caught:
        apply_overrides(CONFIG, [f"{wrong}=1"])
    assert f"did you mean '{key}'" in str(caught.value)


@given(st.sampled_from([dotted(key) for key in keys_of(root(RunConfig, {}))]), text | awkward)
def test_any_value_gives_a_config_or_a_sentence(key: str, value: str) -> None:
    try:
        changed = apply_overrides(CONFIG, [f"{key}={value}"])
    except UserError:
        return
    assert parse_yaml(to_yaml(changed)) == changed


@given(text)
def test_any_text_is_a_config_or_a_sentence(value: str) -> None:
    for read in (parse_yaml, from_json):
        with pytest.raises(UserError):
            read(value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("name: a\nstages: [\n", "is not valid YAML: line 3"),
        ("name: a\nname: b\n", "line 2: the key 'name' is given twice"),
        ("- 1\n", "it must be a mapping"),
        ("", "holds null; it must be a mapping"),
        ("name: a\n", "stages is missing"),
        ("nam: a\nname: b\nstages: [{name: a, nimg: 1, lr: 1}]", "unknown key 'nam'; did you mean 'name'?"),
        ("name: yes\nstages: [{name: a, nimg: 1, lr: 1}]", "name is true; it must be text"),
        ("name: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("name: \x00\n", "is not allowed in YAML"),
        ("a: " + "[" * 5000, "is not valid YAML"),
        (b"\xff\xfe\x00\x01", "is not a text file"),
    ],
)
def test_wrong_files_get_one_sentence(tmp_path: Path, content: str | bytes, sentence: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load_yaml(path)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(UserError, match="cannot read the configuration"):
            load_yaml(path)
    (tmp_path / "big.yaml").write_bytes(b"#" * 2_000_000)
    with pytest.raises(UserError, match=r"has 2,000,000 bytes"):
        load_yaml(tmp_path / "big.yaml")


def test_a_file_may_use_anchors_and_leave_out_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: short\nstages:\n"
        "- &first {name: a, nimg: 1e3, lr: 1e-3}\n"
        "- {<<: *first, name: b, mask_ratio: 0}\n"
    )
    config = load_yaml(path)
    assert [(stage.name, stage.nimg, stage.lr) for stage in config.stages] == [
        ("a", 1000, 1e-3),
        ("b", 1000, 1e-3),
    ]


def test_json_of_a_newer_version_names_the_key() -> None:
    data = json.loads(CONFIG.model_dump_json())
    data["model"]["future"] = 1
    with pytest.raises(UserError, match=r"the file: unknown key 'model.future'"):
        from_json(json.dumps(data), "the file")
