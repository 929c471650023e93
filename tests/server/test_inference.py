"""Serving says what plain torch says of the same weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from digits.checkpoint import Checkpoint, Manifest, load_checkpoint, save_checkpoint
from digits.network import ARCHITECTURES, CNN, ImprovedNN
from digits.preprocessing import normalize
from digits.snapshot import InvalidCheckpoint, take_snapshot
from server.inference import (
    CACHED_ROWS,
    GOLDEN_TOGETHER,
    MANY_ROWS,
    ROWS,
    Classifier,
    Scores,
    UnfitModel,
    check_golden,
    load_classifier,
)
from server.inputs import Rows
from server.settings import EMBEDDED_WEIGHTS

Golden = tuple[npt.NDArray[np.uint8], list[int]]

ROOT = Path(__file__).parents[2]
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 784), np.uint8)


def classifier_of(manifest: Manifest | None = None) -> Classifier:
    torch.manual_seed(0)
    return Classifier(Checkpoint(ImprovedNN(), manifest or Manifest(), "0123456789ab" + 52 * "0"))


@torch.inference_mode()
def logits_of_plain_torch(network: torch.nn.Module, pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    """As a person would write it: ToTensor, Normalize(0.5, 0.5), flatten, network."""
    scaled = (torch.from_numpy(pixels.copy()).float() / 255 - 0.5) / 0.5
    logits: torch.Tensor = network.eval()(scaled)
    return logits


@pytest.mark.parametrize("form", ["pixels", "features", "features that may not be written to"])
def test_the_embedded_weights_say_what_plain_torch_says_of_them(form: str, golden: Golden) -> None:
    classifier = load_classifier(take_snapshot(EMBEDDED_WEIGHTS), max_batch_size=32)
    rows: Rows = golden[0] if form == "pixels" else normalize(golden[0])
    rows.flags.writeable = form == "features"
    scores = classifier.predict(rows)
    expected = logits_of_plain_torch(load_checkpoint(EMBEDDED_WEIGHTS).network, golden[0])
    temperature = classifier.checkpoint.manifest.temperature
    np.testing.assert_allclose(scores.logits, expected.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scores.probabilities, torch.softmax(expected / temperature, 1).numpy(), atol=1e-6)
    np.testing.assert_allclose(scores.digit_scores, torch.logsumexp(expected / temperature, 1).numpy(), atol=1e-4)
    assert scores.digits.tolist() == expected.argmax(1).tolist()
    assert (scores.digits == golden[1]).mean() >= 0.9
    assert scores.model_version == classifier.checkpoint.sha256[:12]


@pytest.mark.parametrize("rows", [1, 2, CACHED_ROWS + 1])
def test_a_convolutional_network_says_what_plain_torch_says_of_it(rows: int) -> None:
    torch.manual_seed(0)
    network = CNN()
    pixels = np.random.default_rng(1).integers(0, 256, (rows, 784), np.uint8)
    expected = logits_of_plain_torch(network, pixels)
    classifier = Classifier(Checkpoint(network, Manifest(architecture="CNN"), 64 * "0"))
    for block in (pixels, normalize(pixels)):
        scores = classifier.predict(block)
        np.testing.assert_allclose(scores.logits, expected.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(scores.digit_scores, torch.logsumexp(expected, 1).numpy(), rtol=1e-4, atol=1e-4)
        assert scores.digits.tolist() == expected.argmax(1).tolist()


@pytest.mark.parametrize("rows", [1, 2, CACHED_ROWS + 1])
@pytest.mark.parametrize("classes", [11, 26, 100])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_of_other_classes_says_what_plain_torch_says_of_it(architecture: str, classes: int, rows: int) -> None:
    torch.manual_seed(classes)
    network = ARCHITECTURES[architecture](classes)
    labels = tuple(f"class {number}" for number in range(classes))
    manifest = Manifest(architecture=architecture, labels=labels, temperature=1.5)
    pixels = np.random.default_rng(1).integers(0, 256, (rows, 784), np.uint8)
    expected = logits_of_plain_torch(network, pixels)
    classifier = Classifier(Checkpoint(network, manifest, 64 * "0"))
    blocks: list[Rows] = [pixels, normalize(pixels)]
    for scores in (*map(classifier.predict, blocks), *classifier.run_batch(blocks)):
        np.testing.assert_allclose(scores.logits, expected.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(scores.probabilities, torch.softmax(expected / 1.5, 1).numpy(), atol=1e-5)
        np.testing.assert_allclose(scores.digit_scores, torch.logsumexp(expected / 1.5, 1).numpy(), rtol=1e-4)
        assert scores.digits.tolist() == expected.argmax(1).tolist()
        assert (scores.probabilities.shape, str(scores.probabilities.dtype)) == ((rows, classes), "float32")
        assert (str(scores.digits.dtype), scores.labels) == ("uint8", labels)


def test_the_last_of_a_hundred_classes_is_told_by_its_number() -> None:
    network = ImprovedNN(100)
    with torch.no_grad():
        network.fc3.bias[99] = 1e4
    classifier = Classifier(Checkpoint(network, Manifest(labels=("class",) * 100), 64 * "0"))
    assert [classifier.predict(PIXELS[:rows]).digits.tolist() for rows in (1, 3)] == [[99], [99, 99, 99]]


def test_only_a_perceptron_is_quick() -> None:
    assert classifier_of().is_quick
    assert not Classifier(Checkpoint(CNN(), Manifest(architecture="CNN"), 64 * "0")).is_quick


def test_scores_have_the_types_of_their_docstring_and_probabilities_sum_to_one() -> None:
    scores = classifier_of().predict(PIXELS[:3])
    assert (scores.digits.shape, str(scores.digits.dtype)) == ((3,), "uint8")
    assert (scores.probabilities.shape, str(scores.probabilities.dtype)) == ((3, 10), "float32")
    assert (scores.logits.shape, str(scores.logits.dtype)) == ((3, 10), "float32")
    assert (scores.digit_scores.shape, str(scores.digit_scores.dtype)) == ((3,), "float32")
    np.testing.assert_allclose(scores.probabilities.sum(axis=1), 1, atol=1e-6)
    assert len(scores) == 3


@pytest.mark.parametrize("rows", [1, 4], ids="{} rows".format)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_digit_score_is_the_log_of_the_sum_of_what_the_probabilities_are_shares_of(
    temperature: float, rows: int
) -> None:
    scores = classifier_of(Manifest(temperature=temperature)).predict(PIXELS[:rows])
    expected = torch.logsumexp(torch.from_numpy(scores.logits) / temperature, 1).numpy()
    np.testing.assert_allclose(scores.digit_scores, expected, rtol=1e-5)
    assert (scores.digit_scores.shape, str(scores.digit_scores.dtype)) == ((rows,), "float32")


def test_scores_say_what_the_manifest_says_of_all_images_also_those_of_a_part() -> None:
    labels = tuple("abcdefghij")
    other = classifier_of(Manifest(digit_threshold=3.5, labels=labels))
    blocks: list[Rows] = [PIXELS[:1], PIXELS[1:4]]
    for scores in (other.predict(PIXELS[:1]), *other.run_batch(blocks)):
        assert (scores.digit_threshold, scores.labels, len(scores.digit_scores)) == (3.5, labels, len(scores))
    plain = classifier_of().predict(PIXELS[:2])
    assert (plain.digit_threshold, plain.labels) == (None, ())


def test_inference_is_without_dropout_and_repeats_itself() -> None:
    classifier = classifier_of()
    assert np.array_equal(classifier.predict(PIXELS).logits, classifier.predict(PIXELS).logits)


def test_a_batch_of_blocks_is_split_back_into_the_same_blocks() -> None:
    classifier = classifier_of()
    blocks: list[Rows] = [PIXELS[:1], PIXELS[1:4], PIXELS[4:20]]
    for block, scores in zip(blocks, classifier.run_batch(blocks), strict=True):
        alone = classifier.predict(block)
        assert len(scores) == len(block)
        np.testing.assert_allclose(scores.logits, alone.logits, rtol=1e-4, atol=1e-4)
        assert scores.digits.tolist() == alone.digits.tolist()
        assert scores.model_version == "0123456789ab"


def test_pixels_and_features_share_a_batch() -> None:
    classifier = classifier_of(Manifest(mean=0.1307, std=0.3081))
    blocks: list[Rows] = [PIXELS[:2], normalize(PIXELS[2:5], 0.1307, 0.3081), PIXELS[5:6]]
    together = classifier.run_batch(blocks)
    logits = np.concatenate([scores.logits for scores in together])
    np.testing.assert_allclose(logits, classifier.predict(PIXELS[:6]).logits, rtol=1e-4, atol=1e-4)


def test_a_block_alone_in_its_batch_is_answered_as_one() -> None:
    (scores,) = classifier_of().run_batch([PIXELS[:7]])
    assert len(scores) == 7


def test_the_manifests_normalisation_is_used() -> None:
    plain, other = classifier_of(), classifier_of(Manifest(mean=0.1307, std=0.3081))
    assert not np.allclose(plain.predict(PIXELS).logits, other.predict(PIXELS).logits)
    np.testing.assert_allclose(
        other.predict(PIXELS).logits, plain.predict(normalize(PIXELS, 0.1307, 0.3081)).logits, rtol=1e-5, atol=1e-5
    )


def test_temperature_softens_probabilities_and_leaves_logits_and_digits() -> None:
    sharp, soft = classifier_of().predict(PIXELS), classifier_of(Manifest(temperature=4.0)).predict(PIXELS)
    assert np.array_equal(sharp.logits, soft.logits)
    assert np.array_equal(sharp.digits, soft.digits)
    expected = torch.softmax(torch.from_numpy(sharp.logits) / 4, dim=1).numpy()
    np.testing.assert_allclose(soft.probabilities, expected, atol=1e-6)
    assert (soft.probabilities.max(axis=1) < sharp.probabilities.max(axis=1)).all()


def test_a_network_that_was_never_trained_is_not_served(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "mnist_model.pth"
    save_checkpoint(weights, ImprovedNN(), Manifest())
    with pytest.raises(UnfitModel, match=r"mnist_model.pth: .* at least 90% of the 20 golden digits, .* reads \d+$"):
        load_classifier(take_snapshot(weights), max_batch_size=4)


@pytest.mark.parametrize("threshold", [1000.0, 1e38])
def test_a_model_that_takes_most_golden_digits_for_none_is_not_served(tmp_path: Path, threshold: float) -> None:
    weights = tmp_path / "mnist_model.pth"
    save_checkpoint(weights, load_checkpoint(EMBEDDED_WEIGHTS).network, Manifest(digit_threshold=threshold))
    with pytest.raises(
        UnfitModel, match="at most 50% of the 20 golden digits for no digit, this one takes 20: "
    ) as told:
        load_classifier(take_snapshot(weights), max_batch_size=4)
    assert f"the digit_threshold of {threshold:g} in its manifest is too high" in str(told.value)


def test_a_threshold_that_half_of_the_golden_digits_reach_will_do(tmp_path: Path, golden: Golden) -> None:
    weights = tmp_path / "mnist_model.pth"
    network = load_checkpoint(EMBEDDED_WEIGHTS).network
    save_checkpoint(weights, network, Manifest())
    scores = load_classifier(take_snapshot(weights), max_batch_size=4).predict(golden[0]).digit_scores
    save_checkpoint(weights, network, Manifest(digit_threshold=float(np.median(scores))))
    load_classifier(take_snapshot(weights), max_batch_size=4)


def test_a_network_whose_answers_are_not_finite_is_not_served() -> None:
    classifier = load_classifier(take_snapshot(EMBEDDED_WEIGHTS), max_batch_size=4)
    with torch.no_grad():
        classifier.checkpoint.network.get_parameter("fc3.bias")[3] = float("inf")
    with pytest.raises(UnfitModel):
        check_golden(classifier, "weights")


def test_a_model_of_other_things_need_not_read_digits_but_gives_numbers(tmp_path: Path) -> None:
    weights = tmp_path / "mnist_model.pth"
    save_checkpoint(weights, ImprovedNN(26), Manifest(labels=tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")))
    assert len(load_classifier(take_snapshot(weights), max_batch_size=4).checkpoint.manifest.labels) == 26
    fashion = Manifest(
        labels=("shirt", "bag", "boot", "coat", "dress", "sandal", "trouser", "pullover", "sneaker", "top")
    )
    save_checkpoint(weights, ImprovedNN(), fashion)
    assert load_classifier(take_snapshot(weights), max_batch_size=4).checkpoint.manifest.labels[1] == "bag"
    classifier = classifier_of(fashion)
    with torch.no_grad():
        classifier.checkpoint.network.get_parameter("fc3.bias")[0] = float("nan")
    with pytest.raises(UnfitModel, match="weights: a model gives probabilities"):
        check_golden(classifier, "weights")


def test_a_bare_state_dict_made_elsewhere_is_served(tmp_path: Path, golden: Golden) -> None:
    weights = tmp_path / "mnist_model.pth"
    torch.save(load_checkpoint(EMBEDDED_WEIGHTS).network.state_dict(), weights)
    scores = load_classifier(take_snapshot(weights), max_batch_size=4).predict(golden[0])
    assert (scores.digits == golden[1]).mean() >= 0.9


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "meta"])
def test_a_device_that_cannot_be_used_is_named(device: str) -> None:
    with pytest.raises(UnfitModel, match=f"^device '{device}' cannot be used: "):
        load_classifier(take_snapshot(EMBEDDED_WEIGHTS), device=device, max_batch_size=4)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"absent\.pth: cannot be read: No such file"):
        take_snapshot(tmp_path / "absent.pth")


@pytest.mark.parametrize(("accuracy", "told"), [(0.98, "not 0.98"), (None, "not unknown")])
def test_weights_below_the_least_accuracy_are_not_served(accuracy: float | None, told: str, tmp_path: Path) -> None:
    weights = tmp_path / "mnist_model.pth"
    checkpoint = load_checkpoint(EMBEDDED_WEIGHTS)
    save_checkpoint(weights, checkpoint.network, Manifest(test_accuracy=accuracy))
    with pytest.raises(UnfitModel, match=rf"the test accuracy that the manifest gives is at least 0.99, {told}"):
        load_classifier(take_snapshot(weights), max_batch_size=4, min_accuracy=0.99)
    save_checkpoint(weights, checkpoint.network, Manifest(test_accuracy=0.99))
    assert load_classifier(take_snapshot(weights), max_batch_size=4, min_accuracy=0.99).checkpoint.parameter_count


@pytest.mark.parametrize("has_onednn", [True, False])
def test_an_image_is_read_alike_among_any_number_of_others(
    has_onednn: bool, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One and a few go through NumPy, and many through oneDNN's products if torch has it, else through MKL's."""
    if not has_onednn:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    classifier = Classifier(load_checkpoint(EMBEDDED_WEIGHTS))
    pixels = np.resize(golden[0], (3 * ROWS[-1], 784))
    with torch.inference_mode():
        expected = classifier.checkpoint.network(torch.from_numpy(normalize(pixels))).numpy()
    for count in (1, 2, MANY_ROWS - 1, MANY_ROWS, MANY_ROWS + 1, ROWS[-1] - 1, ROWS[-1] + 1, 2 * ROWS[-1] + 40):
        for rows in (pixels[:count], normalize(pixels[:count])):
            scores = classifier.predict(rows)
            np.testing.assert_allclose(scores.logits, expected[:count], rtol=1e-4, atol=1e-4)
            assert scores.digits.tolist() == expected[:count].argmax(axis=1).tolist()


@pytest.mark.parametrize("count", GOLDEN_TOGETHER)
def test_the_golden_digits_are_read_alone_in_few_and_in_many(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = Classifier(load_checkpoint(EMBEDDED_WEIGHTS))
    check_golden(classifier, "weights")
    predict = classifier.predict

    def blind(rows: Rows) -> Scores:  # in batches of one size
        return predict(np.zeros_like(rows) if len(rows) == count else rows)

    monkeypatch.setattr(classifier, "predict", blind)
    with pytest.raises(UnfitModel, match="this one reads"):
        check_golden(classifier, "weights")


def test_batches_of_all_sizes_are_computed_in_a_few_that_were_there_before(tmp_path: Path) -> None:
    """oneDNN keeps 2 MB for each number of rows: 450 MB for those up to 256, before these were made even."""
    program = tmp_path / "program.py"
    program.write_text(
        "import numpy as np, psutil\n"
        "from digits.snapshot import take_snapshot\n"
        "from server.inference import load_classifier\n"
        "from server.settings import EMBEDDED_WEIGHTS\n"
        "classifier = load_classifier(take_snapshot(EMBEDDED_WEIGHTS), max_batch_size=256)\n"
        "pixels = np.zeros((600, 784), np.uint8)\n"
        "classifier.predict(pixels)\n"
        "before = psutil.Process().memory_info().rss\n"
        "for count in range(1, 600):\n"
        "    classifier.predict(pixels[:count])\n"
        "print(psutil.Process().memory_info().rss - before)\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 64 << 20


def test_folded_layers_say_of_pixels_what_the_network_says_of_features(golden: Golden) -> None:
    """Whatever normalisation the manifest gives."""
    network = load_checkpoint(EMBEDDED_WEIGHTS).network
    classifier = Classifier(Checkpoint(network, Manifest(mean=0.1307, std=0.3081, temperature=1.5), 64 * "0"))
    pixels, features = classifier.predict(golden[0]), classifier.predict(normalize(golden[0], 0.1307, 0.3081))
    np.testing.assert_allclose(pixels.logits, features.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pixels.probabilities, features.probabilities, atol=1e-5)
    together = classifier.run_batch([golden[0][:5], normalize(golden[0][5:], 0.1307, 0.3081)])
    np.testing.assert_allclose(np.concatenate([s.logits for s in together]), features.logits, rtol=1e-4, atol=1e-4)
