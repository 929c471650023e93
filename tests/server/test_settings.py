"""A flag beats the environment beats the default; errors name the setting, the rule and the value."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import PurePath

import pytest

from server.settings import (
    EMBEDDED_WEIGHTS,
    MODELS,
    InvalidSetting,
    Settings,
    environment_variable,
    flag,
    read_settings,
)

NAMES = [setting.name for setting in fields(Settings)]


def test_without_flags_and_environment_every_setting_has_its_default() -> None:
    settings, sources = read_settings([], {})
    assert settings == Settings()
    assert sources == dict.fromkeys(NAMES, "default")


def test_the_fixed_defaults_of_the_public_surface() -> None:
    settings = Settings()
    assert (settings.host, settings.port, settings.max_wait_ms) == ("127.0.0.1", 50051, 0)


def test_a_flag_beats_the_environment_which_beats_the_default() -> None:
    settings, sources = read_settings(
        ["--port", "1"], {"MNIST_GRPC_PORT": "2", "MNIST_GRPC_MAX_WAIT_MS": "2.5", "MNIST_GRPC_HOST": "::1"}
    )
    assert (settings.port, settings.max_wait_ms, settings.host, settings.grace) == (1, 2.5, "::1", 8)
    assert (sources["port"], sources["max_wait_ms"], sources["grace"]) == ("flag", "environment", "default")


def test_a_bad_value_in_the_environment_does_not_matter_where_a_flag_beats_it() -> None:
    settings, _ = read_settings(["--port", "1"], {"MNIST_GRPC_PORT": "none"})
    assert settings.port == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_a_flag_and_an_environment_variable(name: str) -> None:
    value = str(getattr(Settings(), name))
    for arguments, environment, source in (
        ([flag(name), value], {}, "flag"),
        ([f"{flag(name)}={value}"], {}, "flag"),
        ([], {environment_variable(name): value}, "environment"),
    ):
        settings, sources = read_settings(arguments, environment)
        assert settings == Settings()
        assert sources[name] == source


@pytest.mark.parametrize(
    ("name", "model", "file"),
    [("cnn", "cnn", "mnist_cnn.pth"), ("CNN", "cnn", "mnist_cnn.pth"), ("ImprovedNN", "improvednn", "mnist_model.pth")],
)
def test_a_model_is_named_in_any_case_and_has_its_embedded_weights(name: str, model: str, file: str) -> None:
    for settings in (
        read_settings(["--model", name], {})[0],
        read_settings([], {"MNIST_GRPC_MODEL": name})[0],
        Settings(model=name),
    ):
        assert (settings.model, settings.weights) == (model, MODELS[model])
        assert PurePath(settings.weights).name == file


@pytest.mark.parametrize("model", ["cnn", "improvednn"])
@pytest.mark.parametrize("weights", ["mine.pth", EMBEDDED_WEIGHTS])
def test_a_model_and_a_file_of_weights_are_not_given_together(model: str, weights: str) -> None:
    for arguments, environment, told in (
        (["--model", model, "--weights", weights], {}, f"is {model!r} (flag) and --weights is {weights!r} (flag)"),
        (["--weights", weights], {"MNIST_GRPC_MODEL": model}, f"--model is {model!r} (environment) and --weights"),
        (["--model", model], {"MNIST_GRPC_WEIGHTS": weights}, f"--weights is {weights!r} (environment)"),
    ):
        with pytest.raises(InvalidSetting, match=r"^--model, .* and --weights, .* are not given together: ") as error:
            read_settings(arguments, environment)
        assert told in str(error.value)


def test_help_names_every_flag_and_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        read_settings(["--help"], {})
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name in NAMES:
        assert re.search(rf"^  {flag(name)} ", text, re.MULTILINE)
    assert "MNIST_GRPC_PORT" in text
    assert "50051" in text


def test_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        read_settings(["--version"], {})
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("mnist-grpc ")


@pytest.mark.parametrize("arguments", [["--prot", "1"], ["--port"], ["extra"]])
def test_an_unknown_or_unfinished_flag_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        read_settings(arguments, {})
    assert exit_.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("port", "-1", "--port is from 0 to 65535, not -1"),
        ("port", "65536", "--port is from 0 to 65535, not 65536"),
        ("max_batch_size", "0", "--max-batch-size is from 1 to 65536, not 0"),
        ("max_batch_size", "65537", "--max-batch-size is from 1 to 65536, not 65537"),
        ("max_wait_ms", "-0.5", "--max-wait-ms is from 0 to 60000, not -0.5"),
        ("max_wait_ms", "nan", "--max-wait-ms is from 0 to 60000, not nan"),
        ("max_queue_size", "0", "--max-queue-size is 1 or more, not 0"),
        ("stream_window", "0", "--stream-window is 1 or more, not 0"),
        ("max_message_bytes", "1023", "--max-message-bytes is from 1024 to 1073741824, not 1023"),
        ("grace", "-1", "--grace is 0 or more, not -1.0"),
        ("grace", "inf", "--grace is 0 or more, not inf"),
        ("model", "lenet", "--model is improvednn or cnn, not 'lenet'"),
        ("model", "", "--model is improvednn or cnn, not ''"),
        ("log_format", "xml", "--log-format is text or json, not 'xml'"),
        ("log_level", "loud", "--log-level is debug, info, warning or error, not 'loud'"),
    ],
)
def test_a_value_that_breaks_its_rule_is_named_with_the_rule(name: str, value: str, message: str) -> None:
    for arguments, environment in (([f"{flag(name)}={value}"], {}), ([], {environment_variable(name): value})):
        with pytest.raises(InvalidSetting) as error:
            read_settings(arguments, environment)
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("port", "http", "a whole number"), ("port", "1.5", "a whole number"), ("grace", "", "a number")],
)
def test_a_value_that_is_no_number_is_named_with_where_it_came_from(name: str, value: str, kind: str) -> None:
    for arguments, environment, source in (
        ([f"{flag(name)}={value}"], {}, flag(name)),
        ([], {environment_variable(name): value}, environment_variable(name)),
    ):
        with pytest.raises(InvalidSetting) as error:
            read_settings(arguments, environment)
        assert str(error.value) == f"{source} is {kind}, not {value!r}"
