"""The MQAR experiment as a whole, at a size that trains in seconds."""

import dataclasses
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import tyro

from experiments.mqar import __main__ as mqar
from experiments.mqar.__main__ import main
from experiments.mqar.config import Config
from experiments.mqar.report import best_runs, plot, summarize
from experiments.mqar.task import IGNORE, generate
from experiments.mqar.train import Report, accuracy, make_examples, make_functions, num_right, rate_of_epoch, train
from gsa_jax.layers import MIXERS

TINY = Config(
    length=8,
    num_pairs=2,
    vocab_size=32,
    hidden_sizes=(16,),
    learning_rates=(1e-2,),
    epochs=2,
    batch_size=64,
    steps_a_test=15,
    num_slots=8,
    train_examples=1024,
    test_examples=128,
)


def run_command(*arguments):
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.mqar", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120"},
    )


@pytest.fixture(scope="module")
def softmax_model():
    """The tiny setting, a model that compiles fast, and its examples."""
    config = dataclasses.replace(TINY, conv_size=0).resolved()
    task = (config.length, config.num_pairs, config.vocab_size)
    sets = make_examples(0, config.train_examples, *task), make_examples(1, config.test_examples, *task)
    return config, make_functions(config.model("softmax", 16)), *sets


def test_the_command_trains_and_leaves_results_and_a_plot(tmp_path):
    out = tmp_path / "runs" / "mqar"
    sizes = "--length 8 --num-pairs 2 --vocab-size 32 --hidden-sizes 16 --num-slots 8 --train-examples 1024"
    steps = "--test-examples 128 --conv-size 0 --epochs 2 --batch-size 64 --steps-a-test 15"
    process = run_command(*sizes.split(), *steps.split(), "--learning-rates", "1e-2", "1e-4", "--out", out)
    assert process.returncode == 0, process.stderr
    assert "[2/2] gsa, width 16, learning rate 0.0001" in process.stdout
    assert "step 30/32 · loss" in process.stdout and "examples/s" in process.stdout

    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["length"] == 8 and results["settings"]["num_slots"] == 8
    assert {"device", "versions", "date"} <= results.keys() and "--length 8" in results["command"]
    fast, slow = results["runs"]
    assert [point["step"] for point in fast["curve"]] == [15, 30, 32]
    assert fast["curve"][-1]["loss"] < 0.9 * fast["curve"][0]["loss"]
    assert fast["curve"][-1]["loss"] < slow["curve"][-1]["loss"]
    assert [best["accuracy"] for best in results["best"]] == [max(fast["accuracy"], slow["accuracy"])]
    assert matplotlib.image.imread(out / "accuracy.png").std() > 0


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("protocol", ["small", "figure"])
@pytest.mark.parametrize("width", [64, 512])
def test_every_mixer_is_made_at_the_figure_widths(mixer, protocol, width):
    model = Config(protocol=protocol).resolved().model(mixer, width)
    make_functions(model)
    assert (model.num_layers, model.mlp_size, model.tie_embeddings, model.vocab_size) == (2, 0, True, 8192)


def test_figure_protocol_is_the_papers():
    for length, batch_size in ((64, 512), (128, 512), (256, 256), (512, 128)):
        config = Config(protocol="figure", length=length).resolved()
        assert config.batch_size == batch_size
    assert (config.epochs, config.train_examples, config.test_examples) == (64, 100_000, 3_000)
    assert config.hidden_sizes == (64, 128, 256, 512)
    np.testing.assert_allclose(config.learning_rates, [1e-4, 10**-3.3333333, 10**-2.6666667, 1e-2])
    assert config.steps_a_test is None  # an epoch
    assert Config(protocol="figure", epochs=2).resolved().epochs == 2


def test_learning_rate_is_a_cosine_over_epochs():
    rates = [rate_of_epoch(2.0, epoch, 4) for epoch in range(4)]
    np.testing.assert_allclose(rates, 1 + np.cos(np.pi * np.arange(4) / 4))


def test_examples_hold_what_the_targets_held():
    tokens, targets = generate(3, 50, 16, 3, vocab_size=40)
    examples = make_examples(3, 50, 16, 3, 40)
    np.testing.assert_array_equal(examples.tokens, tokens)
    rebuilt = np.full_like(targets, IGNORE)
    np.put_along_axis(rebuilt, examples.positions, examples.answers, axis=1)
    np.testing.assert_array_equal(rebuilt, targets)


def test_right_answers_by_hand():
    logits = jnp.array([[[0.0, 2.0, 1.0], [3.0, -1.0, 0.0]], [[0.1, 0.2, 0.3], [5.0, 6.0, 4.0]]])
    assert num_right(logits, jnp.array([[1, 2], [2, 1]])) == 3
    assert num_right(logits, jnp.array([[0, 1], [0, 0]])) == 0


def test_accuracy_is_the_share_of_all_queries(softmax_model):
    """Also when the batch size does not divide the examples."""
    _, functions, _, _ = softmax_model
    examples = make_examples(0, 10, 8, 2, 32)
    answers = iter([np.int32(4), np.int32(5), np.int32(1)])
    hand_made = functions._replace(count_right=lambda params, batch: next(answers))
    assert accuracy(hand_made, None, examples, 4) == 10 / 20


@pytest.mark.parametrize("rate, solved, ended", [(1e-2, 0.0, "above"), (1e30, 0.99, "loss not finite")])
def test_training_stops_early(monkeypatch, softmax_model, rate, solved, ended):
    monkeypatch.setattr("experiments.mqar.train.SOLVED", solved)
    monkeypatch.setattr("experiments.mqar.report.SOLVED", solved)
    config, functions, train_set, test_set = softmax_model
    reports = list(train(functions, train_set, test_set, config, rate))
    run = summarize({"mixer": "softmax", "hidden_size": 16, "learning_rate": rate}, reports)
    assert run["ended"].startswith(ended) and run["steps"] <= 30
    json.dumps(run, allow_nan=False)
    plot({"runs": [run], "settings": vars(config)})


def test_the_best_run_of_a_mixer_and_width_counts():
    def run(mixer, width, rate, value):
        report = Report(1, 1, rate, 1.0, value, 1.0, 1.0)
        return summarize({"mixer": mixer, "hidden_size": width, "learning_rate": rate}, [report])

    runs = [
        run("gsa", 64, 1e-3, 0.2),
        run("gsa", 64, 1e-2, 0.9),
        run("gsa", 128, 1e-2, 0.95),
        run("gla", 64, 1e-3, 0.1),
    ]
    assert best_runs(runs) == runs[1:]
    figure = plot({"runs": runs, "settings": vars(TINY)})
    steps, widths = figure.axes
    assert [text.get_text() for text in widths.get_legend().get_texts()] == ["gsa", "gla", "0.99: training stops"]
    assert len(steps.get_legend().get_texts()) == 4


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(mixers=("gsa", "nope")), "mixers must be among gsa, abc, gla"),
        (dict(mixers=()), "mixers: there is none"),
        (dict(length=9), "length is 9"),
        (dict(num_pairs=3), "length is 8"),
        (dict(hidden_sizes=(0,)), "hidden_sizes: 0"),
        (dict(hidden_sizes=(16, 386)), "hidden_sizes: 386 must be a multiple of 6"),
        (dict(learning_rates=(-1.0,)), "learning_rates"),
        (dict(conv_size=-1), "conv_size must be at least 0, got -1"),
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(batch_size=1025), "batch_size: 1025, expected at most train_examples=1024"),
        (dict(test_examples=0), "test_examples must be at least 1, got 0"),
    ],
)
def test_bad_settings_exit_with_2_and_a_message(tmp_path, capsys, settings, message):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as exit_:
        main(dataclasses.replace(TINY, out=out, **settings))
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_an_unknown_mixer_on_the_command_line_lists_the_known_ones(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        tyro.cli(Config, args=["--mixers", "nope", "--out", str(tmp_path / "out")])
    assert exit_.value.code == 2
    message = "".join(capsys.readouterr())
    assert all(mixer in message for mixer in MIXERS)


def test_a_folder_is_taken_from_the_start_and_free_again_if_nothing_came_of_it(tmp_path, monkeypatch):
    def interrupted(*_):
        with pytest.raises(SystemExit):
            main(dataclasses.replace(TINY, out=tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(mqar, "sweep", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main(dataclasses.replace(TINY, out=tmp_path))
    assert exit_.value.code == 130
    assert not list(tmp_path.iterdir())


def test_an_interrupted_study_goes_on(tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(TINY, out=tmp_path / "study", learning_rates=(1e-2, 1e-3))
    train, trained = mqar.train, []

    def train_once(functions, train_set, test_set, config, rate):
        trained.append(rate)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(functions, train_set, test_set, config, rate)

    monkeypatch.setattr(mqar, "train", train_once)
    with pytest.raises(SystemExit):
        main(config)
    assert "finished trainings: 1, in" in capsys.readouterr().out
    results = main(dataclasses.replace(config, resume=True))
    assert trained == [1e-2, 1e-3, 1e-3]
    assert [run["learning_rate"] for run in results["runs"]] == [1e-2, 1e-3]
    assert len(json.loads((config.out / "results.json").read_text())["runs"]) == 2
    for changes, message in [({"seed": 1}, "has seed=0, expected 1"), ({"out": tmp_path / "none"}, "can't be read")]:
        with pytest.raises(SystemExit):
            main(dataclasses.replace(config, resume=True, **changes))
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_an_existing_folder_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "results.json").write_text("precious")
    with pytest.raises(SystemExit) as exit_:
        main(dataclasses.replace(TINY, out=tmp_path))
    assert exit_.value.code == 2
    assert "is not empty and is left as it is" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "precious"
