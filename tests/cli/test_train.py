"""``moe-mt train`` fine-tunes a folder, and goes on where it was interrupted."""

import json

import pytest
import torch
from safetensors.torch import load_file

import moe_mt
from moe_mt.cli import train
from moe_mt.training import Trainer
from tests.translators import random_checkpoint

LINES = [
    f"{english} {day}, {year}\t{day} {french} {year}"
    for english, french in (("May", "mai"), ("June", "juin"), ("August", "août"))
    for day, year in ((2, 1999), (13, 2047), (30, 2012), (7, 1962))
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = random_checkpoint(tmp_path_factory.mktemp("model"))
    config = json.loads((folder / "config.json").read_text())
    config["moe_mt"] = {"languages": ["eng_Latn", "fra_Latn"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 3}))
    return folder


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{line}\n" for line in LINES), encoding="utf-8")
    return path


@pytest.fixture
def arguments(model, pairs, tmp_path):
    options = "--steps 10 --max-batch-tokens 60 --learning-rate 0.01 --warmup-steps 2"
    return (
        *("train", "-m", model, "--device", "cpu", "-p", pairs, "-o", tmp_path / "out"),
        *("-s", "eng_Latn", "-t", "fra_Latn", "--save-every", "4", *options.split()),
    )


def interrupt_at(monkeypatch, step):
    """Let Ctrl-C come in the middle of a step."""
    genuine = Trainer._train_on

    def train_on(trainer, batch):
        if trainer.step == step:
            raise KeyboardInterrupt
        return genuine(trainer, batch)

    monkeypatch.setattr(Trainer, "_train_on", train_on)


def weights(folder):
    return load_file(folder / "model.safetensors")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_trained_folder_is_a_model_like_the_one_it_came_from(run, arguments, model, tmp_path):
    outcome = run(*arguments)
    assert (outcome.code, outcome.out, outcome.err) == (0, b"", "")
    out = tmp_path / "out"
    assert names(out) == names(model)
    assert json.loads((out / "config.json").read_text())["moe_mt"]["languages"] == [
        "eng_Latn",
        "fra_Latn",
    ]
    translator = moe_mt.from_pretrained(out, device="cpu")
    assert translator.generation_config.num_beams == 3
    assert isinstance(translator.translate("May 2", "en", "fr", max_new_tokens=4), str)
    before, after = weights(model), weights(out)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_loss_falls(run, arguments, caplog, monkeypatch):
    losses = []
    genuine = Trainer._train_on

    def train_on(trainer, batch):
        progress = genuine(trainer, batch)
        losses.append(progress.loss)
        return progress

    monkeypatch.setattr(Trainer, "_train_on", train_on)
    assert run(*arguments, "--steps", "40").code == 0
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_resumed_is_uninterrupted_bit_for_bit(run, arguments, tmp_path, monkeypatch):
    assert run(*arguments, "-o", tmp_path / "whole").code == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        outcome = run(*arguments)
    assert outcome.code == 130
    assert f"the last state is in {out / 'training_state.pt'}; continue with" in outcome.err
    # No half-trained model lies there for somebody to use.
    assert names(out) == ["training_state.pt"]
    outcome = run(*arguments, "--resume")
    assert outcome.code == 0
    # Steps 5 and 6 are done again.
    assert "continuing behind step 4" in outcome.err
    found, expected = weights(out), weights(tmp_path / "whole")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert "training_state.pt" not in names(out)


@pytest.fixture
def interrupted(run, arguments, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        assert run(*arguments).code == 130
    return arguments


def test_an_interrupted_training_is_not_overwritten_unasked(run, interrupted):
    outcome = run(*interrupted)
    assert outcome.code == 2
    assert "continue it with --resume, or remove it" in outcome.err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--learning-rate", "0.02"), "of another training"),
        (("--steps", "11"), "of another training"),
        (("--seed", "1"), "of another training"),
        (("-t", "deu_Latn"), "resume with the same model, pairs and languages"),
        (("-m", "tiny"), "resume with the same model"),
        (("--dtype", "bfloat16"), "resume with the same model"),
    ],
)
def test_resume_with_other_options(run, interrupted, extra, message):
    outcome = run(*interrupted, "--resume", *extra)
    assert outcome.code == 2
    assert message in outcome.err


def test_resume_with_other_pairs_as_many_as_before(run, interrupted, pairs):
    pairs.write_text(pairs.read_text().replace("1999", "1998"), encoding="utf-8")
    outcome = run(*interrupted, "--resume")
    assert outcome.code == 2
    assert "resume with the same model, pairs and languages" in outcome.err


def test_resume_of_nothing_begins(run, arguments, tmp_path):
    assert run(*arguments, "--resume").code == 0
    assert "model.safetensors" in names(tmp_path / "out")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no tab", "line 13: found 1 columns"),
        ("a\tb\tc", "line 13: found 3 columns"),
        ("May 2\t", "line 13: an empty source or target"),
        ("eng_Latn\tFrensh\ta\tb", "line 13: Language 'Frensh'"),
    ],
)
def test_bad_pairs_are_named_by_line(run, arguments, pairs, tmp_path, line, message):
    with pairs.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    outcome = run(*arguments)
    assert outcome.code == 2
    assert f"{pairs}, {message}" in outcome.err
    assert not (tmp_path / "out").exists()


def test_pairs_in_four_columns_name_their_own_languages(run, arguments, pairs, tmp_path):
    run(*arguments, "-o", tmp_path / "two")
    four = tmp_path / "four.tsv"
    four.write_text("".join(f"en\tfra_Latn\t{line}\n" for line in LINES), encoding="utf-8")
    mixed = (*arguments, "-p", four, "-s", "deu_Latn", "-t", "deu_Latn", "-o", tmp_path / "four")
    assert run(*mixed).code == 0
    found = weights(tmp_path / "four")
    for name, tensor in weights(tmp_path / "two").items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("-p", "nowhere.tsv"), "there is no file nowhere.tsv; name the sentence pairs with -p"),
        (("--save-every", "0"), "--save-every is 0"),
        (("--steps", "0"), "steps is 0; it must be positive"),
        (("--device", "abacus"), "device 'abacus' is unknown"),
    ],
)
def test_a_wrong_command_makes_no_folder(run, arguments, tmp_path, extra, message):
    outcome = run(*arguments, *extra)
    assert outcome.code == 2
    assert message in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_model_is_not_trained_over(run, arguments, model, pairs):
    before = (model / "model.safetensors").read_bytes()
    outcome = run(*arguments, "-o", model)
    assert outcome.code == 2
    assert "is the model that is trained; name another folder" in outcome.err
    assert (model / "model.safetensors").read_bytes() == before
    assert "is a file; name a folder" in run(*arguments, "-o", pairs).err


def test_a_missing_model(run, arguments):
    assert run(*arguments, "-m", "./nowhere").code == 3


def test_a_state_that_cannot_be_written_is_named_and_the_last_one_kept(
    run, arguments, tmp_path, monkeypatch
):
    genuine = torch.save

    def save(state, path):
        if state["step"] == 8:
            path.write_bytes(b"half a state")
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        genuine(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(train.torch, "save", save)
        outcome = run(*arguments)
    assert outcome.code == 1
    assert "training_state.pt.partial behind step 8 (PytorchStreamWriter failed" in outcome.err
    assert names(tmp_path / "out") == ["training_state.pt"]
    assert run(*arguments, "--resume").code == 0


def test_progress_averages_over_what_this_run_has_seen(run, interrupted, monkeypatch, caplog):
    # A resumed run that divided by all steps would show a loss near zero.
    outcome = run(*interrupted, "--resume", "-v")
    (line,) = [line for line in outcome.err.splitlines() if "step 8: loss" in line]
    assert float(line.rpartition(" ")[2]) > 4


def test_a_folder_that_holds_a_model_is_refused(run, tmp_path):
    pairs, full = tmp_path / "pairs.tsv", tmp_path / "full"
    pairs.write_text("8 days ago\til y a 8 jours\n", encoding="utf-8")
    full.mkdir()
    (full / "config.json").write_text("mine")
    command = ("train", "-m", "tiny", "-p", str(pairs), "-o", str(full), "-s", "en", "-t", "fr")
    outcome = run(*command)
    assert outcome.code == 2
    assert "holds a model already" in outcome.err
    assert (full / "config.json").read_text() == "mine"
