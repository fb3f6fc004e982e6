"""The operator's settings: read from the environment, refused if they are invalid."""

import pytest


@pytest.fixture
def read(modules):
    return lambda **variables: modules.settings.Settings.from_environment(
        {"HOME": "/", "SAFEVLM_MODEL": "me/m", **variables}
    )


def test_only_the_model_is_needed(read):
    settings = read()
    assert (settings.model, settings.policies, settings.compare, settings.proxies) == (
        "me/m",
        ("default", "strict"),
        True,
        0,
    )


def test_values_are_read_by_kind(read):
    settings = read(SAFEVLM_POLICIES=" strict , mine.yaml,", SAFEVLM_COMPARE="false", SAFEVLM_QUEUE_SIZE="3")
    assert (settings.policies, settings.compare, settings.queue_size) == (("strict", "mine.yaml"), False, 3)


def test_a_space_has_one_proxy_unless_it_says_otherwise(read):
    assert read(SPACE_ID="me/s").proxies == 1
    assert read(SPACE_ID="me/s", SAFEVLM_PROXIES="2").proxies == 2


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SAFEVLM_MODEL": " "}, "Set SAFEVLM_MODEL"),
        ({"SAFEVLM_POLICY": "off"}, "Unknown setting SAFEVLM_POLICY; known: SAFEVLM_MODEL"),
        ({"SAFEVLM_QUEUE_SIZE": "0"}, "SAFEVLM_QUEUE_SIZE must be a whole number from 1, got '0'"),
        ({"SAFEVLM_MAX_FILE_MB": "1.5"}, "SAFEVLM_MAX_FILE_MB must be a whole number"),
        ({"SAFEVLM_COMPARE": "no"}, "SAFEVLM_COMPARE must be true or false, got 'no'"),
        ({"SAFEVLM_POLICIES": " , "}, "must name at least one policy"),
    ],
)
def test_a_bad_value_is_named(read, variables, message):
    with pytest.raises(ValueError, match=message):
        read(**variables)


def test_the_readme_lists_every_setting(modules, space_folder):
    readme = (space_folder / "README.md").read_text(encoding="utf-8")
    listed = {line.split("`")[1] for line in readme.splitlines() if line.startswith("| `SAFEVLM_")}
    assert listed == {f"SAFEVLM_{name.upper()}" for name in modules.settings.Settings.__dataclass_fields__}
