"""The policy as data: what follows from a verdict, what a deployer may write, what is refused."""

import copy
import json
import math

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import safe_model

from safevlm import ACTIONS, POLICY_PRESETS, SafetyPolicy, SafeVlmConfig
from safevlm.safety_labels import PAPER_LABELS, SafetyLabels
from safevlm.safety_verdict import SafetyVerdict, assess_logits, assess_rows, strictest

CATEGORY_NAMES, LEVEL_NAMES = PAPER_LABELS.category_names, PAPER_LABELS.level_names
LOGITS = st.floats(-20, 20, width=32)


def assess(policy, level_logits, category_logits=(3.0, 0, 0, 0, 0, 0, 0)):
    level, category = torch.tensor([level_logits]), torch.tensor([list(category_logits)])
    return assess_logits(level, category, SafetyPolicy.from_value(policy), PAPER_LABELS)


def level_logits(*probabilities):
    return torch.tensor(probabilities).log().tolist()


@pytest.mark.parametrize(
    ("preset", "probabilities", "level", "action"),
    [
        ("default", (0.51, 0.01, 0.01, 0.47), "none", "allow"),  # 0.49 < 0.5
        ("default", (0.4, 0.3, 0.2, 0.1), "low", "caution"),
        ("default", (0.4, 0.1, 0.3, 0.2), "medium", "warn"),
        ("default", (0.4, 0.1, 0.2, 0.3), "high", "refuse"),
        ("strict", (0.81, 0.01, 0.01, 0.17), "none", "allow"),  # 0.19 < 0.2
        ("strict", (0.7, 0.2, 0.06, 0.04), "low", "warn"),
        ("strict", (0.7, 0.04, 0.2, 0.06), "medium", "refuse"),
        ("paper", (0.4, 0.1, 0.2, 0.3), "high", "refuse"),
        ("off", (0.0, 0.0, 0.0, 1.0), "high", "allow"),
    ],
)
def test_presets_map_probabilities_to_actions(preset, probabilities, level, action):
    verdict = assess(preset, level_logits(*probabilities))
    assert (LEVEL_NAMES[verdict.level], verdict.actions) == (level, [action])


@settings(max_examples=300, deadline=None)
@given(st.lists(LOGITS, min_size=4, max_size=4), st.lists(LOGITS, min_size=7, max_size=7))
def test_strict_is_never_milder_than_default(level, category):
    assert assess("strict", level, category).action >= assess("default", level, category).action


@settings(max_examples=200, deadline=None)
@given(
    st.lists(LOGITS, min_size=4, max_size=4),
    st.lists(LOGITS, min_size=7, max_size=7),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_a_lower_threshold_is_never_milder(level, category, a, b):
    low, high = (assess({"risk_threshold": threshold}, level, category).action for threshold in sorted((a, b)))
    assert low >= high


@settings(deadline=None)
@given(st.lists(LOGITS, min_size=4, max_size=4), st.lists(LOGITS, min_size=7, max_size=7))
def test_risk_and_category_never_contradict_each_other(level, category):
    verdict = assess("default", level, category)
    assert bool(verdict.level == 0) == bool(verdict.category == PAPER_LABELS.safe_category_id)
    assert 0 <= verdict.score <= 1


def test_category_overrides_of_threshold_and_action_apply_to_their_category_only():
    policy = {
        "category_risk_thresholds": {"privacy": 0.9},
        "category_actions": {"fairness": {"high": "warn"}},
    }
    risky = level_logits(0.2, 0.1, 0.1, 0.6)
    category = {name: [5.0 * (name == other) for other in CATEGORY_NAMES] for name in CATEGORY_NAMES}
    assert assess(policy, risky, category["politics"]).actions == ["refuse"]
    assert assess(policy, risky, category["privacy"]).actions == ["allow"]  # 0.8 < 0.9
    assert assess(policy, risky, category["fairness"]).actions == ["warn"]


def test_temperature_calibrates_the_score():
    logits = [0.0, 0.0, 0.0, 4.0]
    hot = assess({"level_temperature": 2.0}, logits).score
    log_odds = torch.tensor([[0.0, 0.0, 4.0]]).logsumexp(-1) - 0.0  # of any risk, which the temperature divides
    torch.testing.assert_close(hot, torch.sigmoid(log_odds / 2))
    assert hot < assess("default", logits).score


def test_rows_without_image_are_allowed_whatever_the_logits():
    risky = torch.tensor([[0.0, 0.0, 0.0, 50.0]]), torch.tensor([[3.0, 0, 0, 0, 0, 0, 0]])
    verdict = assess_rows(*risky, torch.tensor([1]), 2, POLICY_PRESETS["strict"], PAPER_LABELS)[:1]
    assert verdict.actions == ["allow"] and verdict.score == 0


# -- policies as files -----------------------------------------------------------------------------------------------

# PyYAML turns some control characters into spaces.
TEXT = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=20).filter(str.strip)
ACTION = st.sampled_from(ACTIONS)
PROBABILITY = st.floats(0, 1)
LEVEL_ACTIONS = st.dictionaries(st.sampled_from(LEVEL_NAMES), ACTION)
POLICIES = st.builds(
    SafetyPolicy,
    name=TEXT,
    enabled=st.booleans(),
    risk_threshold=PROBABILITY,
    category_risk_thresholds=st.dictionaries(st.sampled_from(CATEGORY_NAMES), PROBABILITY),
    level_actions=LEVEL_ACTIONS.map(lambda actions: {"none": "allow", **actions}),
    category_actions=st.dictionaries(st.sampled_from(CATEGORY_NAMES), LEVEL_ACTIONS),
    hints=st.dictionaries(ACTION, TEXT),
    forced_refusal=st.booleans(),
    refusals=st.dictionaries(st.sampled_from(["no", "null", "1", "zh"]), TEXT).map(lambda d: {"en": "No.", **d}),
    level_temperature=st.floats(0.1, 10),
    category_temperature=st.floats(0.1, 10),
)


@settings(deadline=None, max_examples=80)
@given(policy=POLICIES, ending=st.sampled_from([".yaml", ".yml", ".json"]))
def test_any_policy_survives_file_and_config(policy, ending, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"policy{ending}"
    policy.to_file(path)
    assert SafetyPolicy.from_value(path) == SafetyPolicy.from_value(str(path)) == policy
    assert SafetyPolicy.from_value(json.loads(json.dumps(policy.to_dict()))) == policy
    assert SafetyPolicy.from_value(SafeVlmConfig(safety_policy=policy).safety_policy) == policy


def test_a_short_policy_file_keeps_the_other_defaults(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("risk_threshold: 0.3\nlevel_actions: {low: refuse}\n")
    policy = SafetyPolicy.from_file(path)
    assert policy.risk_threshold == 0.3 and policy.hints == SafetyPolicy().hints
    assert assess(policy, level_logits(0.4, 0.3, 0.2, 0.1)).actions == ["refuse"]
    assert assess(policy, level_logits(0.4, 0.1, 0.2, 0.3)).actions == ["refuse"]  # "high" was left out


def test_a_policy_of_another_copy_of_the_class_is_understood():
    """A model loaded from the Hub has its own copy of the class."""
    import dataclasses

    other = dataclasses.make_dataclass("SafetyPolicy", [f.name for f in dataclasses.fields(SafetyPolicy)])
    policy = other(**SafetyPolicy(name="mine").to_dict())
    assert SafetyPolicy.from_value(policy) == SafetyPolicy(name="mine")


def test_levels_in_the_wrong_order_are_told():
    found = SafetyPolicy().weaknesses(SafetyLabels(level_names=LEVEL_NAMES[::-1]))
    assert found == ["a higher level leads to a milder action; the levels are high, medium, low, none"]


def test_a_threshold_that_is_no_number_lets_nothing_through():
    policy = SafetyPolicy()
    policy.category_risk_thresholds["politics"] = math.nan  # behind the back of the checks
    logits = [20.0 * (name == "politics") for name in CATEGORY_NAMES]
    assert assess(policy, level_logits(0.01, 0.01, 0.01, 0.97), logits).actions == ["refuse"]


def test_texts_fill_in_the_category():
    policy = SafetyPolicy(hints={"warn": "Mind {category}: {x}"}, refusals={"en": "No {category} {0}."})
    assert policy.hint("warn", "privacy") == "Mind privacy: {x}" and policy.hint("allow", "privacy") is None
    assert policy.refusal("fairness") == "No fairness {0}."
    assert policy.texts(SafetyLabels(("a", "b"), safe_category="b")) == {
        "hints": ["Mind a: {x}", "Mind b: {x}"],
        "refusals": ["No a possible safety risk {0}.", "No a {0}.", "No b {0}."],
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("sloppy", "presets default, paper, strict, off; got 'sloppy'"),
        (3, "got 3"),
        (["refuse"], "got"),
        ({"thresold": 0.2}, "Unknown policy field.*'thresold'; known: .*risk_threshold"),
        ({"risk_threshold": 1.5}, "`risk_threshold` must be a probability.*1.5"),
        ({"risk_threshold": float("nan")}, "nan"),
        ({"risk_threshold": "0.5"}, "'0.5'"),
        ({"risk_threshold": True}, "True"),
        ({"category_risk_thresholds": {"privacy": -1}}, "`privacy`.*-1"),
        ({"category_risk_thresholds": 0.5}, "`category_risk_thresholds` must be a mapping.*0.5"),
        ({"level_actions": {"high": "block"}}, "'high' the action 'block'; use one of allow, caution, warn, refuse"),
        ({"level_actions": ["refuse"]}, "`level_actions` must be a mapping"),
        ({"category_actions": {"privacy": "refuse"}}, "`privacy` must map level names to actions, got 'refuse'"),
        ({"category_actions": {"privacy": {"high": "no"}}}, "'no'"),
        ({"hints": {"deny": "x"}}, "unknown action 'deny'"),
        ({"hints": {"warn": " "}}, "`hints` entry 'warn' must be a non-empty text"),
        ({"hints": "Mind."}, "`hints` must be a mapping"),
        ({"refusals": {"en": 5}}, "`refusals` entry 'en'.*5"),
        ({"refusals": {False: "Nei."}}, "`refusals` must be a mapping from names"),  # YAML's `no:`
        ({"language": "it"}, "language 'it' has no refusal text.*de, en, es, fr, zh"),
        ({"enabled": "off"}, "`enabled` must be true or false, got 'off'"),
        ({"forced_refusal": 1}, "`forced_refusal`"),
        ({"level_temperature": 0}, r"`level_temperature` must be a number in \[0.1, 10\], got 0"),
        ({"level_temperature": 1e9}, "got 1000000000.0"),
        ({"category_temperature": float("inf")}, "inf"),
    ],
)
def test_wrong_policies_are_refused_with_field_value_and_fix(value, message):
    with pytest.raises(ValueError, match=message):
        SafetyPolicy.from_value(value)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"level_actions": {"severe": "refuse"}}, "`level_actions` names 'severe'.*It has: none, low, medium, high"),
        ({"category_actions": {"weapons": {"high": "refuse"}}}, "`category_actions` names 'weapons'.*politics"),
        ({"category_actions": {"privacy": {"severe": "refuse"}}}, "'severe'"),
        ({"category_risk_thresholds": {"weapons": 0.1}}, "'weapons'"),
        ({"level_actions": {"high": "refuse"}}, "names neither level 'low' nor a milder one"),
        ({"level_actions": {}}, "names neither level 'low' nor a milder one"),
    ],
)
def test_labels_the_model_does_not_have_are_refused_everywhere(model, batch, policy, message):
    for use in (
        lambda: model.generate(**batch, safety_policy=policy),
        lambda: model.assess(**batch, safety_policy=policy),
        lambda: model.set_safety_policy(policy),
        lambda: SafeVlmConfig(safety_policy=policy),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_a_policy_file_that_holds_no_mapping_is_refused(tmp_path):
    (tmp_path / "policy.yaml").write_text("- refuse\n")
    with pytest.raises(ValueError, match="must hold a mapping of policy fields, got list"):
        SafetyPolicy.from_file(tmp_path / "policy.yaml")
    with pytest.raises(FileNotFoundError, match="missing.yaml does not exist; write it, or use a preset: default,"):
        SafetyPolicy.from_value(str(tmp_path / "missing.yaml"))


def test_a_saved_policy_file_is_readable_yaml(tmp_path):
    POLICY_PRESETS["strict"].to_file(tmp_path / "policy.yaml")
    text = (tmp_path / "policy.yaml").read_text()
    assert "risk_threshold: 0.2" in text and "抱歉" in text
    assert yaml.safe_load(text)["level_actions"]["medium"] == "refuse"


@pytest.mark.parametrize(
    ("actions", "expected"),
    [
        ({"none": "allow", "low": "warn"}, ["allow", "warn", "warn", "warn"]),
        ({"none": "caution", "medium": "refuse"}, ["caution", "caution", "refuse", "refuse"]),
        ({"low": "refuse"}, ["allow", "refuse", "refuse", "refuse"]),
    ],
)
def test_a_level_that_is_not_named_gets_the_action_of_the_next_milder_one(actions, expected):
    table = SafetyPolicy(level_actions=actions).action_table(PAPER_LABELS)
    assert [[ACTIONS[i] for i in row] for row in table.tolist()] == [expected] * len(CATEGORY_NAMES)


def test_nobody_can_change_a_preset():
    POLICY_PRESETS["default"].level_actions["high"] = "allow"
    POLICY_PRESETS["default"].refusals["en"] = "Sure!"
    assert POLICY_PRESETS["default"] == SafetyPolicy() and SafetyPolicy.from_value("default") == SafetyPolicy()
    with pytest.raises(TypeError):
        POLICY_PRESETS["default"] = SafetyPolicy(enabled=False)
    given = {"none": "allow", "low": "refuse"}
    policy = SafetyPolicy(level_actions=given)
    given["low"] = "allow"
    assert policy.level_actions["low"] == "refuse"


@pytest.mark.parametrize("own", [{"enabled": False}, {"level_temperature": 10.0}, {"risk_threshold": 1.0}])
def test_a_preset_is_the_preset_whatever_the_models_own_policy_is_called(model, own):
    config = model.config.safety_policy
    try:
        model.set_safety_policy(SafetyPolicy(name="default", **own))
        found = model.resolve_policy("default")
        assert found.replace(level_temperature=1.0) == SafetyPolicy()
    finally:
        model.config.safety_policy = config


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.yaml", "risk_threshold: 0.1\nrisk_threshold: 0.9\n"),
        ("p.yaml", "level_actions:\n  none: allow\n  high: refuse\n  high: allow\n"),
        ("p.json", '{"risk_threshold": 0.1, "risk_threshold": 0.9}'),
        ("p.json", '{"level_actions": {"high": "refuse", "high": "allow"}}'),
    ],
)
def test_a_repeated_key_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="(risk_threshold|high)' occurs twice"):
        SafetyPolicy.from_file(tmp_path / name)


def test_a_policy_file_may_use_anchors(tmp_path):
    (tmp_path / "p.yaml").write_text(
        "level_actions: &all {none: allow, low: warn, high: refuse}\n"
        "category_actions:\n  privacy:\n    <<: *all\n    low: refuse\n"
    )
    assert SafetyPolicy.from_file(tmp_path / "p.yaml").category_actions["privacy"]["low"] == "refuse"


def test_a_models_configuration_cannot_name_a_policy_file(tmp_path):
    SafetyPolicy(enabled=False).to_file(tmp_path / "off.yaml")
    for path in (str(tmp_path / "off.yaml"), tmp_path / "off.yaml"):
        with pytest.raises(ValueError, match="configuration holds the policy itself"):
            SafeVlmConfig(safety_policy=path)


@pytest.mark.parametrize("field", ["level_names", "category_names"])
def test_labels_of_one_name_are_refused(field):
    names = {"level_names": [*LEVEL_NAMES, "low"], "category_names": [*CATEGORY_NAMES, "privacy"]}[field]
    with pytest.raises(ValueError, match=f"`{field}` has the same name more than once"):
        SafeVlmConfig(**{field: names})


@pytest.mark.parametrize(
    ("policy", "sentences"),
    [
        ("default", []),
        ("strict", []),
        ({"risk_threshold": 0.3, "level_temperature": 3.0}, []),
        ("off", ["it is off"]),
        ("paper", ["`forced_refusal` is false"]),
        ({"whole_conversation": False}, ["`whole_conversation` is false"]),
        ({"risk_threshold": 0.9}, ["`risk_threshold` of every category is 0.9, above 0.5"]),
        ({"category_risk_thresholds": {"privacy": 0.75}}, ["`risk_threshold` of privacy is 0.75, above 0.5"]),
        (
            {"risk_threshold": 0.6, "category_risk_thresholds": {"privacy": 0.75, "politics": 0.5}},
            ["misleading is 0.6, above 0.5; of privacy is 0.75, above 0.5"],
        ),
        (
            {"level_actions": {"none": "allow", "low": "caution"}},
            ["'medium' leads to 'caution', not 'warn'", "'high'"],
        ),
        ({"category_actions": {"fairness": {"high": "warn"}}}, ["'high' leads to 'warn', not 'refuse' (in fairness)"]),
        ({"hints": {}}, ["no hint for 'caution'", "no hint for 'warn'", "no hint for 'refuse'"]),
    ],
)
def test_a_policy_says_where_it_is_weaker_than_the_default(policy, sentences):
    found = SafetyPolicy.from_value(policy).weaknesses(PAPER_LABELS)
    assert len(found) == len(sentences)
    for sentence, part in zip(found, sentences, strict=True):
        assert part in sentence


def test_weakness_is_told_for_other_labels_too():
    policy = SafetyPolicy(level_actions={"fine": "allow", "bad": "warn"})
    labels = SafetyLabels(("x", "safe"), ("fine", "bad"))
    assert policy.weaknesses(labels) == ["level 'bad' leads to 'warn', not 'refuse'"]


# -- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("preset", ["default", "paper", "strict"])
@pytest.mark.parametrize("where", range(11))
def test_logits_that_are_not_finite_give_the_strictest_action(value, preset, where):
    numbers = [20.0, 0.0, 0.0, 0.0, *[0.0] * 6, 20.0]  # surely safe
    numbers[where] = value
    verdict = assess(preset, numbers[:4], numbers[4:])
    assert verdict.actions == ["refuse"] and verdict.failed.tolist() == [True]
    row = verdict.to_list()[0]
    assert row["action"] == "refuse" and "not finite" in row["error"] and row["score"] is None
    json.dumps(row, allow_nan=False)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(width=32), min_size=4, max_size=4), st.lists(st.floats(width=32), min_size=7, max_size=7))
def test_any_numbers_give_a_verdict_or_the_strictest_action(level, category):
    verdict = assess({"level_temperature": 0.1, "category_temperature": 0.1}, level, category)
    finite = all(math.isfinite(number) for number in (*level, *category))
    assert finite or verdict.actions == ["refuse"]
    assert verdict.failed[0] or 0 <= verdict.score[0] <= 1
    json.dumps(verdict.to_list(), allow_nan=False)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_an_image_that_is_no_number_does_not_lift_anothers_refusal(order):
    level = torch.tensor([[0.0, 0.0, 0.0, 9.0], [float("nan")] * 4])[order]
    category = torch.tensor([[9.0, 0, 0, 0, 0, 0, 0], [0.0] * 7])[order]
    images = assess_logits(level, category, SafetyPolicy(), PAPER_LABELS)
    none = SafetyVerdict.unassessed(1, PAPER_LABELS)
    assert strictest(images, torch.tensor([0, 0]), none).actions == ["refuse"]
    assert none.actions == ["allow"] and not none.failed.any()


def test_a_verdict_prints_as_one_line_a_row():
    levels, categories = torch.eye(4)[[0, 3]] * 9, torch.eye(7)[[6, 1]] * 9
    verdict = assess_rows(levels, categories, torch.tensor([0, 1]), 3, SafetyPolicy(), PAPER_LABELS)
    assert repr(verdict).splitlines() == [
        "SafetyVerdict:",
        "  row 0: allow (safe, none, risk 0.000)",
        "  row 1: refuse (illegal risk, high, risk 1.000)",
        "  row 2: allow (not assessed)",
    ]
    assert str(verdict[1:2]) == "SafetyVerdict:\n  row 0: refuse (illegal risk, high, risk 1.000)"


@pytest.mark.parametrize(
    ("levels", "default", "strict"),
    [
        (["fine", "bad"], ["allow", "refuse"], ["allow", "refuse"]),
        (["ok", "mild", "grave"], ["allow", "warn", "refuse"], ["allow", "refuse", "refuse"]),
        (["0", "1", "2", "3"], ["allow", "caution", "warn", "refuse"], ["allow", "warn", "refuse", "refuse"]),
        (
            ["a", "b", "c", "d", "e"],
            ["allow", "caution", "warn", "refuse", "refuse"],
            ["allow", "warn", "refuse", "refuse", "refuse"],
        ),
    ],
)
def test_presets_work_on_levels_of_ones_own_by_rank(base, processor, levels, default, strict):
    labels = {"level_names": levels, "category_names": ["harm", "fine"], "safe_category": "fine"}
    model = safe_model(copy.deepcopy(base), processor, **labels)
    for name, actions in (("default", default), ("strict", strict), ("paper", default)):
        assert list(model.resolve_policy(name).level_actions.values()) == actions
        model.set_safety_policy(name, processor)
        assert model.policy_weaknesses() == (["`forced_refusal` is false"] if name == "paper" else [])
    assert not model.resolve_policy("off").enabled


def test_a_policy_of_ones_own_must_name_the_models_levels(base, processor):
    model = safe_model(copy.deepcopy(base), processor, level_names=["ok", "mild", "grave"])
    with pytest.raises(ValueError, match="`level_actions` names 'medium'"):
        model.resolve_policy({"level_actions": {"ok": "allow", "medium": "refuse"}})
