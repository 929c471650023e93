"""Weights on disk: they travel both ways, whole or not at all, and nothing in a file is ever run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from digits.checkpoint import (
    MAX_WEIGHTS_BYTES,
    InvalidCheckpoint,
    Manifest,
    load_checkpoint,
    manifest_path,
    save_checkpoint,
    write_atomically,
)
from digits.network import ARCHITECTURES, ImprovedNN


class OriginsNN(nn.Module):
    """The class as it stands elsewhere, written without a look at ours."""

    def __init__(self, input_size: int = 784, hidden1: int = 256, hidden2: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_size, hidden1)
        self.fc2 = nn.Linear(hidden1, hidden2)
        self.fc3 = nn.Linear(hidden2, classes)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc3(self.relu(self.fc2(self.dropout(self.relu(self.fc1(x.view(-1, 784)))))))
        return out


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Where a weights file may lie; nothing lies there yet."""
    return tmp_path / "mnist_model.pth"


def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(ImprovedNN().state_dict())


def saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


# There and back -------------------------------------------------------------


def test_what_is_saved_is_loaded(weights: Path) -> None:
    network = ImprovedNN()
    manifest = Manifest(
        mean=0.1307,
        std=0.3081,
        temperature=1.5,
        digit_threshold=-2.5,
        labels=tuple("abcdefghij"),
        dataset="Fashion-MNIST",
        test_accuracy=0.9875,
        training={"seed": 7, "epochs": 12},
    )
    sha256 = save_checkpoint(weights, network, manifest)
    loaded = load_checkpoint(weights)
    assert loaded.manifest == replace(manifest, sha256=sha256)
    assert loaded.sha256 == sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert loaded.version == sha256[:12]
    assert not loaded.network.training
    for key, tensor in network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[key], tensor)


def test_a_bare_state_dict_made_elsewhere_loads_with_the_default_manifest(weights: Path) -> None:
    origin = OriginsNN().eval()
    torch.save(origin.state_dict(), weights)
    loaded = load_checkpoint(str(weights))
    assert loaded.manifest == Manifest()
    assert (loaded.manifest.architecture, loaded.manifest.mean, loaded.manifest.std) == ("ImprovedNN", 0.5, 0.5)
    assert loaded.manifest.labels == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    assert (loaded.manifest.temperature, loaded.manifest.test_accuracy) == (1, None)
    assert loaded.manifest.digit_threshold is None
    x = torch.randn(16, 784)
    assert torch.equal(loaded.network(x), origin(x))


def test_ours_loads_elsewhere(weights: Path) -> None:
    network = ImprovedNN().eval()
    save_checkpoint(weights, network, Manifest())
    origin = OriginsNN().eval()
    origin.load_state_dict(torch.load(weights))
    x = torch.randn(16, 784)
    assert torch.equal(origin(x), network(x))


def test_a_view_of_a_larger_tensor_is_saved_alone(weights: Path) -> None:
    network = ImprovedNN()
    network.fc1.weight.data = torch.randn(100, 256, 784)[0]
    save_checkpoint(weights, network, Manifest())
    assert weights.stat().st_size < 1_000_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_weights_are_served_as_float32(dtype: torch.dtype, weights: Path) -> None:
    torch.save({key: tensor.to(dtype) for key, tensor in state().items()}, weights)
    loaded = load_checkpoint(weights).network.state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    for key, tensor in state().items():
        assert torch.equal(loaded[key], tensor.to(dtype).to(torch.float32))


def test_the_older_format_of_torch_is_read(weights: Path) -> None:
    weights.write_bytes(saved(state(), _use_new_zipfile_serialization=False))
    assert load_checkpoint(weights).parameter_count == 235_146


def test_parameters_in_place_of_tensors_are_read(weights: Path) -> None:
    torch.save(dict(ImprovedNN().named_parameters()), weights)
    assert load_checkpoint(weights).parameter_count == 235_146


def test_the_manifest_lies_beside_the_weights(tmp_path: Path) -> None:
    assert manifest_path(tmp_path / "mnist_model.pth") == tmp_path / "mnist_model.json"
    assert manifest_path("model.v2.pth") == Path("model.v2.json")


# Manifests ------------------------------------------------------------------


@pytest.mark.parametrize(("text", "threshold"), [("{}", None), ('{"digit_threshold": null}', None), ("-3", -3.0)])
def test_a_manifest_may_say_which_digit_score_is_too_low(text: str, threshold: float | None, weights: Path) -> None:
    torch.save(state(), weights)
    manifest_path(weights).write_text(text if text.startswith("{") else f'{{"digit_threshold": {text}}}')
    assert load_checkpoint(weights).manifest.digit_threshold == threshold


def test_a_manifest_may_say_little_or_more_than_is_known(weights: Path) -> None:
    torch.save(state(), weights)
    manifest_path(weights).write_text('{"temperature": 2, "colour": "blue"}')
    assert load_checkpoint(weights).manifest == Manifest(temperature=2)


def test_weights_of_another_manifest_are_refused(weights: Path) -> None:
    save_checkpoint(weights, ImprovedNN(), Manifest())
    torch.save(ImprovedNN().state_dict(), weights)
    with pytest.raises(InvalidCheckpoint, match=r"SHA-256 is [0-9a-f]{64}, but mnist_model\.json says [0-9a-f]{64}"):
        load_checkpoint(weights)


@pytest.mark.parametrize("text", ["", "{", "\udcff", "[1, 2]", '"text"', "null", "NaN"])
def test_a_manifest_that_is_no_json_object_is_refused(text: str, weights: Path) -> None:
    torch.save(state(), weights)
    manifest_path(weights).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InvalidCheckpoint, match=r"mnist_model\.json: a manifest is a JSON"):
        load_checkpoint(weights)


def test_a_manifest_nested_beyond_reason_is_refused(weights: Path) -> None:
    torch.save(state(), weights)
    manifest_path(weights).write_text("[" * 100_000)
    with pytest.raises(InvalidCheckpoint, match="a manifest is a JSON"):
        load_checkpoint(weights)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", "LeNet"),
        ("architecture", None),
        ("architecture", ["ImprovedNN"]),
        ("architecture", {}),
        ("mean", "0.5"),
        ("mean", None),
        ("mean", True),
        ("mean", float("nan")),
        ("mean", float("inf")),
        ("mean", 10**400),
        ("std", 0),
        ("std", -1),
        ("std", float("inf")),
        ("temperature", 0),
        ("temperature", -1.5),
        ("temperature", "1"),
        ("digit_threshold", "2.5"),
        ("digit_threshold", True),
        ("digit_threshold", float("nan")),
        ("digit_threshold", float("-inf")),
        ("digit_threshold", 1e300),
        ("digit_threshold", -3.5e38),
        ("labels", "0123456789"),
        ("labels", ["0", "1"]),
        ("labels", [*"012345678"]),
        ("labels", ["A"] * 101),
        ("labels", []),
        ("labels", list(range(10))),
        ("labels", None),
        ("sha256", 5),
        ("sha256", None),
        ("dataset", ["MNIST"]),
        ("dataset", None),
        ("dataset", "M" * 101),
        ("dataset", "a\nb"),
        ("test_accuracy", 98.7),
        ("test_accuracy", -0.1),
        ("test_accuracy", "0.98"),
        ("test_accuracy", True),
        ("training", []),
        ("training", None),
    ],
)
def test_a_bad_field_of_a_manifest_is_named_with_its_value(key: str, value: object, weights: Path) -> None:
    torch.save(state(), weights)
    manifest_path(weights).write_text(json.dumps({key: value}))
    with pytest.raises(InvalidCheckpoint) as refused:
        load_checkpoint(weights)
    message = str(refused.value)
    assert f"mnist_model.json: {key} is " in message
    assert repr(value)[:20] in message


@pytest.mark.parametrize("label", ["a" * 101, "b" * 100_000, "\ud800", "two\nlines", "\x1b[31mred", "tab\t"])
def test_a_label_that_cannot_be_shown_or_sent_is_named_with_the_rule(label: str, weights: Path) -> None:
    torch.save(state(), weights)
    manifest_path(weights).write_text(json.dumps({"labels": [*"012345678", label]}))
    with pytest.raises(InvalidCheckpoint, match="is empty or a text of 1 to 100 printable characters") as refused:
        load_checkpoint(weights)
    assert f"not one of {len(label)} that begins with {label[:20]!r}" in str(refused.value)
    assert len(str(refused.value)) < 500


def test_labels_of_any_script_are_taken_and_empty_ones_where_there_is_no_class(weights: Path) -> None:
    labels = ("a" * 100, "七", "семь", "T-shirt/top", "👟", *[""] * 5)
    save_checkpoint(weights, ImprovedNN(), Manifest(labels=labels))
    assert load_checkpoint(weights).manifest.labels == labels


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("classes", [11, 26, 100])
def test_a_network_has_an_output_for_each_label(architecture: str, classes: int, weights: Path) -> None:
    labels = tuple(f"class {number}" for number in range(classes))
    network = ARCHITECTURES[architecture](classes).eval()
    save_checkpoint(weights, network, Manifest(architecture=architecture, labels=labels))
    loaded = load_checkpoint(weights)
    x = torch.randn(3, 784)
    assert loaded.manifest.labels == labels
    assert torch.equal(loaded.network(x), network(x))
    assert loaded.network(x).shape == (3, classes)


@pytest.mark.parametrize(
    ("manifest", "outputs", "labels"),
    [(None, 26, 10), ({"architecture": "ImprovedNN"}, 11, 10), ({"labels": ["A"] * 26}, 10, 26), ({}, 9, 10)],
)
def test_weights_and_labels_that_disagree_are_refused_with_both_numbers(
    manifest: dict[str, object] | None, outputs: int, labels: int, weights: Path
) -> None:
    torch.save(ImprovedNN(outputs).state_dict(), weights)
    if manifest is not None:
        manifest_path(weights).write_text(json.dumps(manifest))
    with pytest.raises(InvalidCheckpoint) as refused:
        load_checkpoint(weights)
    assert str(refused.value) == (
        f"{weights}: the weights have an output for each of the {labels} labels that mnist_model.json gives, "
        f"or of the ten digits where it gives none; fc3.bias has {outputs}"
    )


def test_of_a_wrong_value_the_message_repeats_the_beginning(weights: Path) -> None:
    torch.save(state(), weights)
    manifest_path(weights).write_text(json.dumps({"dataset": "M" * 100_000}))
    with pytest.raises(InvalidCheckpoint, match=r"not 'M{199}\.\.\.$"):
        load_checkpoint(weights)


# Weights that are refused ---------------------------------------------------


def changed(**tensors: Tensor) -> bytes:
    return saved(state() | {key.replace("_", "."): tensor for key, tensor in tensors.items()})


def without(key: str) -> bytes:
    return saved({name: tensor for name, tensor in state().items() if name != key})


def with_value(value: float) -> Tensor:
    bias = torch.zeros(10)
    bias[3] = value
    return bias


BAD_WEIGHTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "these 0 bytes are truncated, damaged"),
    "text": (lambda: b"weights, honestly\n" * 50, "truncated, damaged"),
    "a JSON text": (lambda: b'{"fc1.weight": []}', "truncated, damaged"),
    "noise": (lambda: torch.arange(100_000).to(torch.uint8).numpy().tobytes(), "truncated, damaged"),
    "cut in half": (lambda: saved(state())[:400_000], "these 400000 bytes are truncated"),
    "cut at its end": (lambda: saved(state())[:-1], "truncated, damaged"),
    "older format, cut": (
        lambda: saved(state(), _use_new_zipfile_serialization=False)[:-1_000],
        "truncated, damaged",
    ),
    "zip of nothing": (lambda: b"PK\x05\x06" + bytes(18), "truncated, damaged"),
    "a list": (lambda: saved([1, 2, 3]), r"names to tensors\), this is a list"),
    "a tensor": (lambda: saved(torch.zeros(3)), r"names to tensors\), this is a Tensor"),
    "a dict of numbers": (lambda: saved({"fc1.weight": 1}), r"names to tensors"),
    "a dict with numbers for names": (lambda: saved({1: torch.zeros(3)}), r"names to tensors"),
    "a training checkpoint around it": (lambda: saved({"epoch": 3, "model": state()}), r"names to tensors"),
    "a whole module": (lambda: saved(OriginsNN()), "a pickle of something else"),
    "a plain pickle": (lambda: pickle.dumps({"fc1.weight": [0.5]}, protocol=2), "truncated, damaged|names to tensors"),
    "no keys": (lambda: saved({}), "missing fc1.bias, fc1.weight, .*; unknown nothing"),
    "a missing key": (lambda: without("fc2.bias"), "missing fc2.bias; unknown nothing"),
    "an unknown key": (lambda: changed(fc4_bias=torch.zeros(3)), "missing nothing; unknown fc4.bias"),
    "another shape": (
        lambda: changed(fc3_weight=torch.zeros(10, 64)),
        r"fc3.weight has the shape \[10, 128\] in ImprovedNN, not \[10, 64\]",
    ),
    "a transposed shape": (lambda: changed(fc1_weight=torch.zeros(784, 256)), r"not \[784, 256\]"),
    "NaN": (lambda: changed(fc3_bias=with_value(float("nan"))), "fc3.bias holds finite numbers"),
    "infinity": (lambda: changed(fc3_bias=with_value(float("-inf"))), "fc3.bias holds finite numbers"),
    "infinity once it is float32": (
        lambda: changed(fc3_bias=with_value(1).to(torch.float64) * 1e300),
        "fc3.bias holds finite numbers",
    ),
    "integers": (
        lambda: changed(fc1_bias=torch.zeros(256, dtype=torch.int64)),
        "fc1.bias holds floating-point numbers, not torch.int64",
    ),
    "complex numbers": (lambda: changed(fc1_bias=torch.zeros(256, dtype=torch.complex64)), "not torch.complex64"),
    "a sparse tensor": (lambda: changed(fc1_weight=torch.zeros(256, 784).to_sparse()), "fc1.weight"),
    "a tensor of the meta device": (lambda: changed(fc1_bias=torch.zeros(256, device="meta")), "fc1.bias|truncated"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse:UserWarning")
@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_are_refused_with_the_file_the_rule_and_the_value(name: str, weights: Path) -> None:
    make, message = BAD_WEIGHTS[name]
    weights.write_bytes(make())
    with pytest.raises(InvalidCheckpoint, match=message) as refused:
        load_checkpoint(weights)
    assert str(refused.value).startswith(f"{weights}: ")


SMALL = {name: tensor[:1].clone() for name, tensor in state().items()}
SMALL_FILES = [saved(SMALL), saved(SMALL, _use_new_zipfile_serialization=False)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(SMALL_FILES),
    st.lists(st.tuples(st.integers(0, 1_500), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_no_damaged_file_raises_anything_but_invalid_checkpoint(
    weights: Path, file: bytes, changes: list[tuple[int, int]]
) -> None:
    damaged = bytearray(file)
    for place, value in changes:
        damaged[place] = value
    weights.write_bytes(damaged)
    with pytest.raises(InvalidCheckpoint):  # at best its shapes are wrong
        load_checkpoint(weights)


def test_a_missing_file_and_a_folder_are_refused(weights: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"mnist_model\.pth: cannot be read: No such file"):
        load_checkpoint(weights)
    weights.mkdir()
    with pytest.raises(InvalidCheckpoint, match=r"mnist_model\.pth: cannot be read: Is a directory"):
        load_checkpoint(weights)


def test_a_file_beyond_the_limit_is_refused_unread(weights: Path) -> None:
    with weights.open("wb") as file:
        file.truncate(MAX_WEIGHTS_BYTES + 1)  # sparse: it takes no room
    with pytest.raises(InvalidCheckpoint, match="at most 67108864 bytes, this has 67108865"):
        load_checkpoint(weights)


class Malice:
    """Unpickled, it would make a file."""

    def __init__(self, victim: Path) -> None:
        self._victim = victim

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self._victim), "w")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("form", ["pickle", "zip", "older format"])
def test_code_in_a_file_is_never_run(form: str, weights: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    payload: object = {"fc1.weight": Malice(victim)}
    content = {
        "pickle": lambda: pickle.dumps(payload, protocol=2),
        "zip": lambda: saved(payload),
        "older format": lambda: saved(payload, _use_new_zipfile_serialization=False),
    }[form]()
    weights.write_bytes(content)
    with pytest.raises(InvalidCheckpoint):
        load_checkpoint(weights)
    assert not victim.exists()
    with pytest.warns(ResourceWarning):  # armed: pickle itself does run it
        pickle.loads(pickle.dumps(payload))
    assert victim.exists()


# Writing --------------------------------------------------------------------


def test_writing_leaves_no_temporary_files_and_makes_folders(tmp_path: Path) -> None:
    weights = tmp_path / "runs" / "today" / "mnist_model.pth"
    for _ in range(2):
        save_checkpoint(weights, ImprovedNN(), Manifest())
    assert sorted(path.name for path in weights.parent.iterdir()) == ["mnist_model.json", "mnist_model.pth"]


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_keeps_the_old_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert [(entry, entry.read_bytes()) for entry in tmp_path.iterdir()] == [(path, b"old")]


def test_a_written_file_may_be_read_by_others(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
